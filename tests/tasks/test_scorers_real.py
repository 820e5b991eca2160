"""Real scorers on the shipped speech of four people: they tell voices, words and noise apart, and say what their
packages say.

What is not installed is skipped with its install line. Whisper needs weights that no package of ours carries: name a
CTranslate2 folder in SPEECHTUNE_TEST_WHISPER.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import DemoClip
from speechtune.audio import read_audio, resample
from speechtune.family import MosPredictor, SpeakerEncoder, Transcriber
from speechtune.tasks.voice_cloning import asr, mos, speaker
from speechtune.tasks.voice_cloning import word_errors as spoken_text
from speechtune.tasks.voice_cloning.measures import cosine
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.tasks.voice_cloning.support import RATE
from speechtune.types import Audio, AudioRef

MODULES = {
    "resemblyzer": (("resemblyzer", "webrtcvad"), speaker.INSTALL),
    "distillmos": (("distillmos", "xls_r_sqa"), mos.INSTALL_DISTILLMOS),
    "dnsmos": (("speechmos", "onnxruntime"), mos.INSTALL_DNSMOS),
    "pocketsphinx": (("pocketsphinx", "jiwer", "whisper_normalizer"), asr.INSTALL),
    "faster-whisper": (("faster_whisper", "jiwer", "whisper_normalizer"), asr.INSTALL_FASTER_WHISPER),
}


def wanted(kind: str) -> None:
    """Skip where a package of this scorer is not installed."""
    modules, install = MODULES[kind]
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} missing: {install}")


@dataclass(frozen=True)
class Spoken:
    audio: Audio
    speaker: str
    text: str
    language: str


@pytest.fixture(scope="session")
def speech(demo_clips: list[DemoClip]) -> list[Spoken]:
    """All 48 shipped human clips."""
    return [Spoken(read_audio(AudioRef(str(c.path))), c.speaker, c.text, c.language) for c in demo_clips]


@pytest.fixture(scope="session")
def pieces(speech: list[Spoken]) -> list[Spoken]:
    """At least 50 pieces of real speech: the clips, those of over four seconds cut into halves."""
    found = []
    for spoken in speech:
        audio, middle = spoken.audio, len(spoken.audio.samples) // 2
        if audio.duration_seconds < 4:
            found.append(spoken)
            continue
        for samples in (audio.samples[:middle], audio.samples[middle:]):
            found.append(Spoken(Audio(samples, audio.sampling_rate), spoken.speaker, "", spoken.language))
    assert len(found) >= 50
    return found


def equal_error_rate(same: np.ndarray, different: np.ndarray) -> float:
    """Where as many pairs of one voice fall below a threshold as pairs of two lie above it."""
    thresholds = np.sort(np.concatenate([same, different]))
    missed = np.searchsorted(np.sort(same), thresholds) / len(same)
    taken = 1 - np.searchsorted(np.sort(different), thresholds) / len(different)
    at = int(np.abs(missed - taken).argmin())
    return float((missed[at] + taken[at]) / 2)


def with_noise(audio: Audio, snr_db: float, seed: int) -> Audio:
    """White noise added at a ratio of powers."""
    samples = audio.samples.astype(np.float64)
    noise = np.random.default_rng(seed).standard_normal(len(samples))
    noise *= np.sqrt(np.mean(samples**2) / np.mean(noise**2) / 10 ** (snr_db / 10))
    return Audio((samples + noise).astype(np.float32), audio.sampling_rate)


@pytest.mark.parametrize(("kind", "place"), [("resemblyzer", 1), ("distillmos", 2), ("dnsmos", 2)])
def test_scorers_draw_no_random_numbers(kind: str, place: int, speech: list[Spoken]) -> None:
    wanted(kind)
    before = torch.get_rng_state()
    scorers = load_scorers(*(kind if i == place else None for i in range(3)))
    if scorers.speaker is not None:
        scorers.speaker.embed([speech[0].audio])
    if scorers.mos is not None:
        scorers.mos.predict([speech[0].audio])
    assert torch.equal(torch.get_rng_state(), before)


# -- speakers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def encoder() -> SpeakerEncoder:
    wanted("resemblyzer")
    speaker = load_scorers(None, "resemblyzer", None).speaker
    assert speaker is not None and speaker.name.startswith("Resemblyzer 0.1.4 (sha256 39373b86598f")
    return speaker


def test_one_voice_is_nearer_than_two(encoder: SpeakerEncoder, pieces: list[Spoken], record_property) -> None:
    embedded = encoder.embed([piece.audio for piece in pieces])
    first, second = np.triu_indices(len(pieces), 1)
    sims = cosine(embedded[first], embedded[second])
    same = np.array([pieces[i].speaker == pieces[j].speaker for i, j in zip(first, second, strict=True)])
    error = equal_error_rate(sims[same], sims[~same])
    record_property("eer", error)
    print(f"{len(pieces)} pieces: same {sims[same].mean():.3f} different {sims[~same].mean():.3f} EER {error:.2%}")
    assert sims[same].mean() > sims[~same].mean() + 0.2
    assert error < 0.05


def test_an_embedding_does_not_depend_on_company(encoder: SpeakerEncoder, speech: list[Spoken]) -> None:
    clips = [spoken.audio for spoken in speech[::8]]
    together = encoder.embed(clips)
    assert np.array_equal(together[::-1], encoder.embed(clips[::-1]))
    assert np.array_equal(together[:1], encoder.embed(clips[:1]))
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    higher = [resample(clip, 24_000) for clip in clips]
    assert cosine(together, encoder.embed(higher)).min() > 0.99
    for odd in (np.zeros(RATE, np.float32), np.ones(7, np.float32), np.zeros(0, np.float32)):
        assert encoder.embed([Audio(odd, RATE)]).shape == (1, 256)


@pytest.mark.parametrize("seconds", [0.02, 0.06, 0.12, 0.2, 0.3])
def test_a_clip_shorter_than_the_silence_that_is_cut_out(
    encoder: SpeakerEncoder, speech: list[Spoken], seconds: float
) -> None:
    """Guards against an IndexError in the evaluation of a model that stops at once."""
    audio = speech[0].audio
    middle = len(audio.samples) // 2
    short = Audio(audio.samples[middle : middle + int(seconds * audio.sampling_rate)], audio.sampling_rate)
    (embedded,) = encoder.embed([short])
    assert np.isfinite(embedded).all() and abs(np.linalg.norm(embedded) - 1) < 1e-5


def test_similarities_are_the_packages_own(encoder: SpeakerEncoder, pieces: list[Spoken]) -> None:
    pytest.importorskip("librosa", reason="Resemblyzer's own code needs it: pip install librosa")
    import resemblyzer

    theirs = resemblyzer.VoiceEncoder("cpu", verbose=False)
    expected = [theirs.embed_utterance(resemblyzer.preprocess_wav(piece.audio.samples)) for piece in pieces]
    np.testing.assert_allclose(encoder.embed([piece.audio for piece in pieces]), expected, atol=1e-5)


# -- quality -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=["distillmos", "dnsmos"])
def predictor(request: pytest.FixtureRequest) -> MosPredictor:
    wanted(request.param)
    mos = load_scorers(None, None, request.param).mos
    assert mos is not None and "sha256" in mos.name
    return mos


def test_noise_lowers_the_score(predictor: MosPredictor, speech: list[Spoken]) -> None:
    clips = [spoken.audio for spoken in speech[::12]]
    clean = predictor.predict(clips)
    light, heavy = (predictor.predict([with_noise(c, snr, i) for i, c in enumerate(clips)]) for snr in (20, 5))
    print(f"{predictor.name}: clean {clean.mean():.2f}, 20 dB {light.mean():.2f}, 5 dB {heavy.mean():.2f}")
    assert clean.mean() > light.mean() + 0.3 > heavy.mean() + 0.6
    assert (clean > heavy).all()
    assert clean.dtype == np.float64 and ((clean > 1) & (clean < 5)).all()


def test_a_score_does_not_depend_on_company(predictor: MosPredictor, speech: list[Spoken]) -> None:
    clips = [spoken.audio for spoken in speech[::24]]
    together = predictor.predict(clips)
    assert np.array_equal(together[::-1], predictor.predict(clips[::-1]))
    assert predictor.predict(clips[:1])[0] == together[0]
    odd = [Audio(np.full(5, 0.1, np.float32), RATE), Audio(np.zeros(0, np.float32), RATE)]
    assert np.isfinite(predictor.predict(odd)).all()


def test_distillmos_scores_are_the_packages_own(speech: list[Spoken]) -> None:
    wanted("distillmos")
    mos = load_scorers(None, None, "distillmos").mos
    from distillmos import ConvTransformerSQAModel

    theirs = ConvTransformerSQAModel().eval()
    clips = [spoken.audio for spoken in speech[::4]]
    with torch.no_grad():
        expected = [theirs(torch.from_numpy(clip.samples)[None]).item() for clip in clips]
    assert mos is not None
    np.testing.assert_allclose(mos.predict(clips), expected, atol=1e-6)


def test_dnsmos_scores_are_the_packages_own(speech: list[Spoken]) -> None:
    wanted("dnsmos")
    pytest.importorskip("librosa", reason="speechmos's own code needs it: pip install librosa requests")
    from speechmos import dnsmos

    mos = load_scorers(None, None, "dnsmos").mos
    clips = [spoken.audio for spoken in speech[::2]]
    expected = [dnsmos.run(clip.samples, RATE)["ovrl_mos"] for clip in clips]
    assert mos is not None
    np.testing.assert_allclose(mos.predict(clips), expected, atol=1e-6)


# -- words ---------------------------------------------------------------------------------------------------------


def corpus_wer(texts: list[str], transcripts: list[str], languages: list[str]) -> float:
    counts = [spoken_text.word_errors(*row) for row in zip(texts, transcripts, languages, strict=True)]
    return sum(errors for errors, _ in counts) / sum(words for _, words in counts)


@pytest.fixture(scope="session", params=["pocketsphinx", "faster-whisper"])
def recogniser(request: pytest.FixtureRequest) -> Transcriber:
    wanted(request.param)
    spec = request.param
    if spec == "faster-whisper":
        folder = os.environ.get("SPEECHTUNE_TEST_WHISPER")
        if not folder or not Path(folder).is_dir():
            pytest.skip("no weights: name a CTranslate2 Whisper folder in SPEECHTUNE_TEST_WHISPER")
        spec = f"faster-whisper:{folder}"
    asr = load_scorers(spec, None, None).asr
    assert asr is not None
    return asr


def test_right_texts_have_fewer_errors_than_shuffled_ones(recogniser: Transcriber, speech: list[Spoken]) -> None:
    known = [s for s in speech if recogniser.languages is None or s.language in recogniser.languages]
    texts, languages = [s.text for s in known], [s.language for s in known]
    transcripts = recogniser.transcribe([s.audio for s in known], languages)
    right = corpus_wer(texts, transcripts, languages)
    shuffled = corpus_wer(texts[1:] + texts[:1], transcripts, languages[1:] + languages[:1])
    print(f"{recogniser.name}: {len(known)} clips, WER {right:.1%}, with texts shuffled {shuffled:.1%}")
    assert right < 0.3 and shuffled > 0.7
    some = range(0, len(known), 5)
    again = recogniser.transcribe([known[i].audio for i in reversed(some)], [languages[i] for i in reversed(some)])
    assert again[::-1] == [transcripts[i] for i in some]  # in another company and order


def test_pocketsphinx_hears_what_the_package_hears(speech: list[Spoken]) -> None:
    wanted("pocketsphinx")
    from pocketsphinx import Decoder

    clips = [s.audio for s in speech if s.language == "en"][:6]
    expected = []
    for clip in clips:
        decoder = Decoder(samprate=RATE, loglevel="FATAL")
        decoder.start_utt()
        decoder.process_raw(np.round(clip.samples * 32767).astype(np.int16).tobytes(), False, True)
        decoder.end_utt()
        expected.append(decoder.hyp().hypstr)
    asr = load_scorers("pocketsphinx", None, None).asr
    assert asr is not None and asr.transcribe(clips, ["en"] * 6) == expected


def test_faster_whisper_hears_what_the_package_hears(speech: list[Spoken]) -> None:
    wanted("faster-whisper")
    folder = os.environ.get("SPEECHTUNE_TEST_WHISPER")
    if not folder:
        pytest.skip("no weights: name a CTranslate2 Whisper folder in SPEECHTUNE_TEST_WHISPER")
    from faster_whisper import WhisperModel

    clips = speech[::8]
    model = WhisperModel(folder, device="cpu", compute_type="float32")
    expected = []
    for s in clips:
        options = {"beam_size": 1, "temperature": 0.0, "condition_on_previous_text": False}
        segments, _ = model.transcribe(s.audio.samples, language=s.language, **options)
        expected.append("".join(segment.text for segment in segments).strip())
    asr = load_scorers(f"faster-whisper:{folder}", None, None).asr
    assert asr is not None
    assert asr.transcribe([s.audio for s in clips], [s.language for s in clips]) == expected
