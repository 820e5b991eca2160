"""Recordings -> a folder of training data: the steps in their order, each taken up where the last run left it."""

from collections import Counter
from collections.abc import Mapping, Sequence

from speechtune.audio import flac_bytes, read_audio
from speechtune.errors import ConfigError
from speechtune.preparation import decide, quality, speakers, transcribe
from speechtune.preparation.activity import Activity, find_speech
from speechtune.preparation.cut import Piece, cut_speech
from speechtune.preparation.decide import Findings, Reason
from speechtune.preparation.loudness import Loudness, normalise
from speechtune.preparation.prepared import CLIPS, STEPS, Prepared, Request
from speechtune.preparation.recordings import Recording, cut_out, find_recordings
from speechtune.preparation.results import Progress, Results, compute
from speechtune.preparation.script import align_script
from speechtune.preparation.selection import KeptClip, hold_out
from speechtune.preparation.settings import PrepareConfig
from speechtune.preparation.write import write_data
from speechtune.storage.files import write_atomically
from speechtune.storage.lock import locked
from speechtune.types import Audio, AudioRef


def prepare(request: Request, progress: Progress) -> Prepared:
    """Take all steps and write the folder; what an earlier run has found with the same settings is not found again.

    Raises AudioError: a recording cannot be read; ConfigError: nothing to read, or another process writes there.
    """
    out = request.out
    if (out / CLIPS).exists() and not (out / STEPS).is_dir():
        raise ConfigError(f"--out {out}: its folder {CLIPS} was not made by `speechtune prepare`: name another")
    if request.recordings.is_dir() and out.resolve().is_relative_to(request.recordings.resolve()):
        raise ConfigError(f"--out {out} lies among the recordings, which its clips would join: name another")
    recordings = find_recordings(request.recordings, progress)
    with locked(out):
        activities = _find_speech(request, recordings, progress)
        findings = Findings(_cut(request.config, recordings, activities))
        languages = _measure(request, recordings, findings, progress)
        reasons = decide.decide(findings, request.config)
        clips = _kept_clips(findings, reasons)
        prepared = Prepared(
            request,
            recordings,
            activities,
            findings,
            languages,
            reasons,
            clips,
            hold_out(clips, request.config.select),
        )
        write_data(prepared, progress)
    return prepared


def _find_speech(request: Request, recordings: Sequence[Recording], progress: Progress) -> dict[str, Activity]:
    """Speech of each recording by its digest."""
    settings = request.config.activity
    total = sum(recording.info.duration_seconds for recording in recordings)
    done = 0.0
    found: dict[str, Activity] = {}
    with Results(
        request.out / STEPS,
        "activity",
        Activity,
        {"detector": request.detector.name, "settings": settings.model_dump()},
    ) as results:
        for recording in recordings:
            if recording.digest not in results:
                activity = find_speech(recording, request.detector, settings, progress, done, total)
                results.put(recording.digest, activity)
            found[recording.digest] = results[recording.digest]
            done += recording.info.duration_seconds
            progress("activity", done, total)
    return found


def _cut(
    config: PrepareConfig, recordings: Sequence[Recording], activities: Mapping[str, Activity]
) -> dict[str, Piece]:
    """The pieces of all recordings in order; their keys say what they hold, so that the same audio has the same key."""
    pieces: dict[str, Piece] = {}
    seen: Counter[str] = Counter()
    for recording in recordings:
        again = f"-{seen[recording.digest]}" if recording.digest in seen else ""  # a copy of another recording
        seen[recording.digest] += 1
        for start, end, spoken in cut_speech(
            activities[recording.digest].speech, recording.info.duration_seconds, config.cut
        ):
            key = f"{recording.digest}-{round(1e4 * start)}-{round(1e4 * end)}{again}"
            name = f"{recording.stem}-{round(1e3 * start):08d}"
            pieces[key] = Piece(name, key, recording.name, start, end, spoken)
    return pieces


def _measure(
    request: Request, recordings: Sequence[Recording], findings: Findings, progress: Progress
) -> dict[str, transcribe.Language]:
    """Write the pieces, and let each step look at them; the language of each recording by its name."""
    config, steps, names = request.config, request.out / STEPS, request.scorer_names
    fitting = {k: p for k, p in findings.pieces.items() if decide.reject_by_length(p, config) is None}
    findings.loudness = _write_pieces(request, recordings, list(fitting.values()), progress)

    def rate(piece: Piece) -> quality.Quality:
        return quality.measure(_audio(request, piece), findings.loudness[piece.key].gain_db, request.mos)

    scorer = {"mos": names.get("mos"), **request.made_with}
    findings.quality = compute(steps, "quality", quality.Quality, scorer, fitting, rate, progress)
    spoken = {key: piece for key, piece in fitting.items() if findings.quality[key].sound is None}
    if (encoder := request.speaker_encoder) is not None:

        def embed(piece: Piece) -> speakers.Embedding:
            return speakers.embed(encoder, _audio(request, piece))

        scorer = {"speaker": encoder.name, **request.made_with}
        embeddings = compute(steps, "speakers", speakers.Embedding, scorer, spoken, embed, progress)
        seconds = {key: piece.speech_seconds for key, piece in spoken.items()}
        findings.voices = speakers.find_voices(embeddings, seconds, config.speakers)
    own = {key: piece for key, piece in spoken.items() if decide.is_voice(findings, key, config)}
    languages = _find_languages(request, recordings, own, progress)
    findings.languages = {key: languages[piece.source].code for key, piece in spoken.items()}
    _transcribe(request, findings, own, progress)
    return languages


def _audio(request: Request, piece: Piece) -> Audio:
    return read_audio(AudioRef(str(request.piece_file(piece))))


def _find_languages(
    request: Request,
    recordings: Sequence[Recording],
    pieces: Mapping[str, Piece],
    progress: Progress,
) -> dict[str, transcribe.Language]:
    """The language of each recording by its name, told by its longest pieces where it is not given."""
    if request.language:
        return {recording.name: transcribe.Language(code=request.language) for recording in recordings}
    longest = sorted(pieces.values(), key=lambda piece: -piece.seconds)
    chosen = {
        one.name: [piece for piece in longest if piece.source == one.name][: transcribe.LANGUAGE_PIECES]
        for one in recordings
    }
    found = compute(
        request.out / STEPS,
        "language",
        transcribe.Language,
        {"asr": request.asr.name, **request.made_with},
        {" ".join(piece.key for piece in pieces): pieces for pieces in chosen.values()},
        lambda pieces: transcribe.find_language(request.asr, [_audio(request, piece) for piece in pieces]),
        progress,
    )
    return {name: found[" ".join(piece.key for piece in pieces)] for name, pieces in chosen.items()}


def _transcribe(
    request: Request,
    findings: Findings,
    pieces: Mapping[str, Piece],
    progress: Progress,
) -> None:
    """Texts of the pieces, and their places in the script where there is one."""
    keys = {f"{key} {findings.languages[key]}": key for key in pieces}
    found = compute(
        request.out / STEPS,
        "transcripts",
        transcribe.Transcript,
        {"asr": request.asr.name, **request.made_with},
        keys,
        lambda key: transcribe.transcribe(request.asr, _audio(request, pieces[key]), findings.languages[key]),
        progress,
    )
    findings.transcripts = {key: found[name] for name, key in keys.items()}
    if request.script:
        said = {key: transcript.text for key, transcript in findings.transcripts.items()}
        code = next(filter(None, findings.languages.values()), None)
        findings.script = align_script(request.script, said, code, request.config.transcribe.max_errors)


def _write_pieces(
    request: Request,
    recordings: Sequence[Recording],
    pieces: Sequence[Piece],
    progress: Progress,
) -> dict[str, Loudness]:
    """Write pieces of the right length as FLAC, loudness made equal; each recording is decoded once, as a stream."""
    rate = request.config.output.sampling_rate
    with Results(request.out / STEPS, "loudness", Loudness, request.made_with) as results:
        done = 0
        for recording in recordings:
            own = [piece for piece in pieces if piece.source == recording.name]
            missing = [p for p in own if p.key not in results or not request.piece_file(p).is_file()]
            done += len(own) - len(missing)
            cuts = cut_out(recording, [(piece.start, piece.end) for piece in missing]) if missing else ()
            for piece, audio in zip(missing, cuts, strict=True):
                louder, loudness = normalise(audio, rate, request.config.loudness)
                write_atomically(request.piece_file(piece), flac_bytes(louder))
                results.put(piece.key, loudness)
                done += 1
                progress("loudness", done, len(pieces))
        progress("loudness", len(pieces), len(pieces))
        return {piece.key: results[piece.key] for piece in pieces}


def _kept_clips(findings: Findings, reasons: Mapping[str, list[Reason]]) -> list[KeptClip]:
    kept = [piece for key, piece in findings.pieces.items() if not reasons[key]]
    return [
        KeptClip(
            piece.id,
            f"{CLIPS}/{piece.id}.flac",
            findings.text(piece.key),
            piece.seconds,
            findings.languages[piece.key],
            decide.sounds(findings.quality[piece.key]),
        )
        for piece in kept
    ]
