"""Generated speech -> one row of measures per output, their summary, and warnings about what looks wrong.

WER and similarity as in seed-tts-eval (see `word_errors`): a recogniser's transcript against the text, and the cosine
of speaker embeddings of the output and of the reference voice. An output without sound counts as the worst value of
each measure, and its row says so.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from speechtune.audio import find_defects, read_audio
from speechtune.family import Scorers, SpeakerEncoder, Transcriber
from speechtune.tasks.statistics import ratio
from speechtune.tasks.voice_cloning.word_errors import language_code, word_errors
from speechtune.types import Audio, Output, Sample, Scored

WORST_SIM, WORST_MOS = 0.0, 1.0
"""What an output without sound counts for; its WER is 1, every word deleted."""
LEAST_STOP_RATE, STOP_RATE_FALL = 0.5, 0.25
WER_FACTOR, WER_RISE = 2.0, 0.05
SIM_FALL, MOS_FALL = 0.05, 0.5
DURATION_FACTOR = 3.0
END_ACCURACY = "end_accuracy"
"""Name of the score of the ends of speech among a family's targets."""
NO_END = "no end of speech stands among the targets: a model that learns from them never stops speaking"


@dataclass(frozen=True, slots=True)
class VoiceRow:
    """Measures of one output; None is what was not measured.

    Attributes:
        transcript: the recogniser's, as it wrote it.
        wer: word errors over words, after normalisation; None also where the text holds no word.
        word_errors: substitutions, deletions and insertions together.
        words: of the normalised text; characters where the language divides no words.
        sim: cosine to the reference voice; None also where there is no reference.
        mos: predicted, from 1 to 5.
        stopped: the model ended by itself, not by the length cap.
        seconds: duration of the output.
        duration_ratio: `seconds` over those of the target recording; None where there is none.
        defect: why the output has no sound: "no audio", "empty", "not finite", "silent"; the row then holds the worst
            values. None for sound.
        note: what was not measured, and why.
        audio: path of the wav, where one was written.
        system: name of the model that spoke, in comparisons.
    """

    id: str
    speaker: str | None
    language: str | None
    text: str
    transcript: str | None
    wer: float | None
    word_errors: int | None
    words: int | None
    sim: float | None
    mos: float | None
    stopped: bool
    seconds: float
    duration_ratio: float | None
    defect: str | None = None
    note: str | None = None
    audio: str | None = None
    system: str = ""


def measure(
    samples: Sequence[Sample],
    outputs: Sequence[Output],
    references: Sequence[Audio | None],
    targets: Sequence[Audio | None],
    scorers: Scorers,
) -> list[VoiceRow]:
    """Measure every output; none is dropped. A scorer that is None leaves its measures None.

    `outputs` are in the order of `samples`; so are `references`, the voice each is compared with, and `targets`, the
    recording of the same text, for durations.

    Raises ValueError: different lengths, or outputs in another order.
    """
    ids = [sample.id for sample in samples]
    if ids != [output.sample_id for output in outputs] or not len(ids) == len(references) == len(targets):
        raise ValueError("samples, outputs, references and targets do not belong together")
    defects = [defect_of(output.audio) for output in outputs]
    # only outputs with sound are given to scorers
    audios = [output.audio if defect is None else None for output, defect in zip(outputs, defects, strict=True)]
    transcripts = _transcripts(samples, audios, scorers.asr)
    sims = _similarities(audios, references, scorers.speaker)
    rated = iter(() if scorers.mos is None else scorers.mos.predict([audio for audio in audios if audio is not None]))
    rows = []
    for i, (sample, output, target) in enumerate(zip(samples, outputs, targets, strict=True)):
        transcript = transcripts[i]
        errors, words = (None, None) if transcript is None else word_errors(sample.text, transcript, sample.language)
        seconds = output.audio.duration_seconds if output.audio is not None else 0.0
        row = VoiceRow(
            id=sample.id,
            speaker=sample.speaker,
            language=sample.language,
            text=sample.text,
            transcript=transcript,
            wer=errors / words if errors is not None and words else None,
            word_errors=errors,
            words=words,
            sim=sims[i],
            mos=None if scorers.mos is None else WORST_MOS if audios[i] is None else float(next(rated)),
            stopped=output.stopped,
            seconds=seconds,
            duration_ratio=seconds / target.duration_seconds if target is not None and len(target.samples) else None,
            defect=defects[i],
            note=_note(transcript, words, sample, scorers.asr),
        )
        rows.append(row)
    return rows


def defect_of(audio: Audio | None) -> str | None:
    """Why audio has no sound; None where it has."""
    if audio is None:
        return "no audio"
    if not len(audio.samples):
        return "empty"
    codes = {code for code, _ in find_defects(audio)}
    return "not finite" if "not_finite" in codes else "silent" if "silent" in codes else None


def _transcripts(
    samples: Sequence[Sample], audios: Sequence[Audio | None], asr: Transcriber | None
) -> list[str | None]:
    """Transcripts; "" for an output without sound, None where the recogniser does not know the language."""
    if asr is None:
        return [None] * len(samples)
    known = [
        asr.languages is None or sample.language is None or language_code(sample.language) in asr.languages
        for sample in samples
    ]
    asked = [(i, audio) for i, audio in enumerate(audios) if audio is not None and known[i]]
    texts = asr.transcribe([audio for _, audio in asked], [samples[i].language for i, _ in asked])
    transcripts: list[str | None] = ["" if is_known else None for is_known in known]
    for (i, _), text in zip(asked, texts, strict=True):
        transcripts[i] = text
    return transcripts


def _note(transcript: str | None, words: int | None, sample: Sample, asr: Transcriber | None) -> str | None:
    if asr is not None and transcript is None:
        return f"no WER: {asr.name} does not know {sample.language!r}"
    return "no WER: the normalised text holds no word" if words == 0 else None


def _similarities(
    audios: Sequence[Audio | None], references: Sequence[Audio | None], encoder: SpeakerEncoder | None
) -> list[float | None]:
    sims: list[float | None] = [None] * len(audios)
    if encoder is None:
        return sims
    spoken: list[tuple[int, Audio, tuple[int, bytes]]] = []
    voices: dict[tuple[int, bytes], Audio] = {}  # many prompts share a voice; each recording is embedded once
    for i, (audio, reference) in enumerate(zip(audios, references, strict=True)):
        if reference is None or defect_of(reference) is not None:
            continue
        sims[i] = WORST_SIM
        if audio is not None:
            key = reference.sampling_rate, reference.samples.tobytes()
            spoken.append((i, audio, key))
            voices.setdefault(key, reference)
    if not spoken:
        return sims
    embedded = dict(zip(voices, encoder.embed(list(voices.values())), strict=True))
    wanted = np.stack([embedded[key] for *_, key in spoken])
    similarities = cosine(encoder.embed([audio for _, audio, _ in spoken]), wanted)
    for (i, *_), similarity in zip(spoken, similarities, strict=True):
        sims[i] = float(similarity)
    return sims


def cosine(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows, shape (clips,): seed-tts-eval's SIM."""
    norms = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
    return (a_ND * b_ND).sum(axis=1) / np.maximum(norms, np.finfo(np.float32).tiny)


def summarise(rows: Sequence[VoiceRow]) -> dict[str, float]:
    """Measures over rows; one that no row has is left out.

    Returns:
        wer: errors over words of all rows together.
        wer_mean: mean of the rows' own WERs, which is what seed-tts-eval reports.
        sim, mos: means.
        stop_rate: share that ended by itself.
        duration_ratio: median.
        silence_rate: share without sound.
    """
    measured = [row for row in rows if row.wer is not None]
    ratios = [row.duration_ratio for row in rows if row.duration_ratio is not None]
    summary = {
        "wer": ratio(sum(row.word_errors or 0 for row in measured), sum(row.words or 0 for row in measured)),
        "wer_mean": _mean(row.wer for row in rows),
        "sim": _mean(row.sim for row in rows),
        "mos": _mean(row.mos for row in rows),
        "stop_rate": _mean(float(row.stopped) for row in rows),
        "duration_ratio": float(np.median(ratios)) if ratios else math.nan,
        "silence_rate": _mean(float(row.defect is not None) for row in rows),
    }
    return {name: value for name, value in summary.items() if not math.isnan(value)}


def _mean(values: Iterable[float | None]) -> float:
    measured = [value for value in values if value is not None]
    return ratio(math.fsum(measured), len(measured))


def warnings_of(summary: Mapping[str, float], baseline: Mapping[str, float] | None) -> list[str]:
    """Sentences for a report: what looks wrong in a summary, by itself and beside the base's."""
    base = baseline or {}
    both = summary.keys() & base.keys()
    lines = []
    if (silent := summary.get("silence_rate", 0.0)) > 0:
        lines.append(f"{silent:.0%} of the outputs have no sound; they count as WER 1, similarity 0, MOS 1")
    stop, base_stop = summary.get("stop_rate"), base.get("stop_rate")
    fallen = stop is not None and base_stop is not None and base_stop - stop >= STOP_RATE_FALL
    if stop is not None and (stop < LEAST_STOP_RATE or fallen):
        beside = "" if base_stop is None else f" (base: {base_stop:.0%})"
        lines.append(
            f"only {stop:.0%} of the outputs end by themselves{beside}, the others run into the length cap: does the "
            "end of speech stand in the targets? is the cap long enough?"
        )
    if "wer" in both and summary["wer"] > max(WER_FACTOR * base["wer"], base["wer"] + WER_RISE):
        lines.append(
            f"WER rose from {base['wer']:.1%} to {summary['wer']:.1%}: the words are lost; is the learning rate too "
            "high, do texts and recordings belong together?"
        )
    if "sim" in both and base["sim"] - summary["sim"] > SIM_FALL:
        lines.append(
            f"speaker similarity fell from {base['sim']:.3f} to {summary['sim']:.3f}: the voice is lost; do reference "
            "and target come from one speaker, is the reference kept out of the loss?"
        )
    if "mos" in both and base["mos"] - summary["mos"] > MOS_FALL:
        lines.append(f"predicted MOS fell from {base['mos']:.2f} to {summary['mos']:.2f}: play the outputs")
    length = summary.get("duration_ratio")
    if length is not None and not 1 / DURATION_FACTOR <= length <= DURATION_FACTOR:
        than = "longer" if length > 1 else "shorter"
        lines.append(f"outputs last {length:.2f} times as long as the recordings: much {than} than their texts need")
    return lines


def score_names(num_codebooks: int) -> dict[str, str]:
    """Names of the scores of a family that speaks in codes, each with what is better, "min" or "max"."""
    names = {"wer": "min", "sim": "max", "mos": "max", "stop_rate": "max", END_ACCURACY: "max"}
    return names | {f"codebook_accuracy_{k}": "max" for k in range(num_codebooks)}


def score_speech(samples: Sequence[Sample], outputs: Sequence[Output], scorers: Scorers, sampling_rate: int) -> Scored:
    """How intelligible, how like the reference's voice, how natural, and whether it ends; `Family.score` of speech.

    A sample without reference is compared with its own recording.
    """
    voices = [sample.references[0].audio if sample.references else sample.audio for sample in samples]
    references, targets = (
        [None if ref is None else read_audio(ref, sampling_rate) for ref in refs]
        for refs in (voices, [sample.audio for sample in samples])
    )
    rows = measure(samples, outputs, references, targets, scorers)
    return Scored(summarise(rows), [asdict(row) for row in rows])


def speech_warnings(scores: Mapping[str, float], base: Mapping[str, float]) -> list[str]:
    """See `warnings_of`; and targets without an end, which no loss shows."""
    return [*([] if END_ACCURACY in scores else [NO_END]), *warnings_of(scores, base)]
