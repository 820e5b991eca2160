"""Scorers: specs, missing packages, how texts are normalised; networks by tiny models made here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    GenerationConfig,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMForXVector,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

from helpers import DemoClip
from speechtune.audio import read_audio, resample
from speechtune.errors import ConfigError
from speechtune.family import Scorers
from speechtune.tasks.voice_cloning import asr, support
from speechtune.tasks.voice_cloning import word_errors as spoken_text
from speechtune.tasks.voice_cloning.measures import cosine
from speechtune.tasks.voice_cloning.scorers import load_scorers, what_is_missing
from speechtune.types import Audio, AudioRef

RATE = support.RATE


@pytest.fixture(scope="session")
def clips(demo_clips: list[DemoClip]) -> list[Audio]:
    """Six clips of real speech, at 16 and at 24 kHz."""
    return [read_audio(AudioRef(str(clip.path)), (16_000, 24_000)[i % 2]) for i, clip in enumerate(demo_clips[::8])]


# -- specs and packages --------------------------------------------------------------------------------------------


def test_nothing_wanted_is_nothing_loaded_and_said() -> None:
    scorers = load_scorers(None, None, None)
    assert scorers == Scorers() and scorers.names == {}
    lines = what_is_missing(scorers)
    assert [line.partition(":")[0] for line in lines] == ["no WER", "no speaker similarity", "no MOS"]
    assert all("pip install" in line for line in lines)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (("wisper", None, None), "no such scorer; known are faster-whisper:FOLDER_OR_ID, whisper:FOLDER_OR_ID, pocket"),
        ((None, "ecapa:x", None), "known are resemblyzer, wavlm:FOLDER_OR_ID"),
        ((None, None, "utmos"), "known are distillmos, dnsmos"),
        ((None, None, "dnsmos:/tmp"), "lie in its package; write 'dnsmos'"),
        (("whisper", None, None), "name its weights: whisper:FOLDER or whisper:HUB_ID"),
        (("whisper:/gone", None, None), "no such folder: /gone"),
        ((None, "wavlm:nobody/nothing@main", None), "does not load as WavLM"),
    ],
)
def test_a_spec_that_cannot_be_used_says_why(specs: tuple[str | None, ...], message: str) -> None:
    if specs[0]:
        pytest.importorskip("whisper_normalizer")
    with pytest.raises(ConfigError) as error:
        load_scorers(*specs)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("specs", "hidden", "install"),
    [
        (("pocketsphinx", None, None), "pocketsphinx", "pip install 'speechtune[asr]'"),
        (("pocketsphinx", None, None), "jiwer", "pip install 'speechtune[asr]'"),
        (("pocketsphinx", None, None), "whisper_normalizer.english", "pip install 'speechtune[asr]'"),
        (("faster-whisper:x/y", None, None), "faster_whisper", "pip install 'speechtune[asr,faster-whisper]'"),
        ((None, "resemblyzer", None), "webrtcvad", "pip install --no-deps Resemblyzer==0.1.4"),
        ((None, None, "distillmos"), "distillmos.sqa", "pip install --no-deps distillmos==0.9.1 xls-r-sqa==0.1.0"),
        ((None, None, "dnsmos"), "onnxruntime", "pip install 'speechtune[mos]'"),
    ],
)
def test_a_missing_package_is_named_with_its_install_line(
    specs: tuple[str | None, ...], hidden: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(ConfigError, match="is missing") as error:
        load_scorers(*specs)
    assert install in str(error.value)


def test_a_missing_file_of_a_package_is_named() -> None:
    with pytest.raises(ConfigError, match=r"w: the package nowhere \(its file a.pt\) is missing: pip install x"):
        support.package_file("nowhere", "a.pt", "w", "pip install x")


def test_a_hub_id_may_name_a_revision(tmp_path: Path) -> None:
    assert support.place_of("whisper:a/b@c1") == ("a/b", "c1")
    assert support.place_of("whisper:a/b") == ("a/b", None)
    (tmp_path / "x@y").mkdir()
    assert support.place_of(f"whisper:{tmp_path}/x@y") == (f"{tmp_path}/x@y", None)


def test_a_waveform_is_resampled_and_clipped() -> None:
    loud = Audio(np.full(2400, 3.0, np.float32), 24_000)
    samples = support.waveform(loud)
    assert len(samples) == 1600 and samples.dtype == np.float32 and samples.max() == 1.0


# -- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("language", "text", "transcript", "expected"),
    [
        ("en", "It's five o'clock, Mr. Smith!", "it is 5 o'clock mister smith", (0, 6)),
        ("en-US", "a b c d", "a x c", (2, 4)),
        ("English", "colour", "color", (0, 1)),
        ("fr", "L'été, déjà ?", "l'été déjà", (0, 3)),
        ("fr", "été", "ete", (1, 1)),  # an accent is a difference
        ("hi", "नमस्ते दुनिया", "नमस्ते दुनिया", (0, 2)),
        ("zh", "今天天气很好。", "今天天汽很好", (1, 6)),
        ("ja", "こんにちは", "", (5, 5)),
        (None, "Hello, World", "hello world", (0, 2)),
        ("en", "...", "anything", (0, 0)),  # nothing was to be said: nothing to measure
    ],
)
def test_word_errors_per_language(language: str | None, text: str, transcript: str, expected: tuple[int, int]) -> None:
    pytest.importorskip("whisper_normalizer")
    pytest.importorskip("jiwer")
    assert spoken_text.word_errors(text, transcript, language) == expected


def test_word_errors_are_jiwers() -> None:
    """Independent: seed-tts-eval's own steps (`process_one` of run_wer.py) where normalisation does not matter."""
    pytest.importorskip("whisper_normalizer")
    jiwer = pytest.importorskip("jiwer")
    generator = np.random.default_rng(0)
    words = ["red", "green", "blue", "dark", "house", "river"]
    for _ in range(50):
        text, transcript = (" ".join(generator.choice(words, size=generator.integers(1, 9))) for _ in range(2))
        errors, count = spoken_text.word_errors(text, transcript, "en")
        assert errors / count == pytest.approx(jiwer.process_words(text, transcript).wer, abs=1e-12)


def test_the_normalisation_is_stated() -> None:
    pytest.importorskip("whisper_normalizer")
    assert "EnglishTextNormalizer" in spoken_text.description() and "zh" in spoken_text.description()


# -- networks by folder --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wavlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WavLM with an x-vector head, random and tiny, as a folder."""
    folder = tmp_path_factory.mktemp("wavlm")
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8, 8, 8, 8, 8, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        tdnn_dim=(8, 8, 8, 8, 16),
        xvector_output_dim=12,
        num_buckets=16,
    )
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder


def test_wavlm_gives_what_transformers_gives(wavlm: Path, clips: list[Audio]) -> None:
    encoder = load_scorers(None, f"wavlm:{wavlm}", None).speaker
    assert encoder is not None and "WavLM-SV" in encoder.name and "sha256" in encoder.name
    together = encoder.embed(clips)
    model = WavLMForXVector.from_pretrained(wavlm).eval()
    extract = Wav2Vec2FeatureExtractor.from_pretrained(wavlm)
    for clip, row in zip(clips, together, strict=True):
        assert np.array_equal(encoder.embed([clip])[0], row)  # alone as among others
        with torch.no_grad():
            inputs = extract(resample(clip, RATE).samples, sampling_rate=RATE, return_tensors="pt")
            expected = torch.nn.functional.normalize(model(**inputs).embeddings, dim=-1)[0]
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(cosine(together, together), 1.0, atol=1e-6)
    assert encoder.embed([]).shape == (0, 12)
    assert np.isfinite(encoder.embed([Audio(np.ones(10, np.float32), RATE)])).all()  # shorter than a convolution


@pytest.fixture(scope="session")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper, random and tiny, with a tokenizer of single letters, as a folder."""
    folder = tmp_path_factory.mktemp("whisper")
    letters = [chr(code) for code in range(97, 123)]
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fr|>", "<|translate|>", "<|transcribe|>"]
    special += ["<|notimestamps|>"]
    vocab = {token: number for number, token in enumerate([*letters, *special])}
    tokenizer = WhisperTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [])), unk_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    torch.manual_seed(0)
    end = vocab["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=len(vocab) + 1501,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_target_positions=16,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=vocab["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=1.0,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    GenerationConfig(
        is_multilingual=True,
        lang_to_id={"<|en|>": vocab["<|en|>"], "<|fr|>": vocab["<|fr|>"]},
        task_to_id={"translate": vocab["<|translate|>"], "transcribe": vocab["<|transcribe|>"]},
        no_timestamps_token_id=vocab["<|notimestamps|>"],
        suppress_tokens=list(range(len(vocab), len(vocab) + 1501)),
        max_length=12,
        decoder_start_token_id=vocab["<|startoftranscript|>"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    ).save_pretrained(folder)
    return folder


def test_whisper_gives_what_transformers_gives(whisper: Path, clips: list[Audio]) -> None:
    pytest.importorskip("whisper_normalizer")
    asr = load_scorers(f"whisper:{whisper}", None, None).asr
    assert asr is not None and "Whisper" in asr.name and "sha256" in asr.name and asr.languages is None
    languages = ["en", "fr", "en", "en-US", "fr", "en"]
    transcripts = asr.transcribe(clips, languages)
    assert any(transcripts)
    assert asr.transcribe(clips[::-1], languages[::-1])[::-1] == transcripts
    alone = [asr.transcribe([clip], [language])[0] for clip, language in zip(clips, languages, strict=True)]
    assert alone == transcripts
    model = WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    extract = WhisperFeatureExtractor.from_pretrained(whisper)
    tokenizer = WhisperTokenizerFast.from_pretrained(whisper)
    inputs = extract(
        resample(clips[0], RATE).samples, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True
    )
    ids = model.generate(**inputs, language="en", task="transcribe")
    assert tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip() == transcripts[0]


def test_whisper_transcribes_more_than_its_window(whisper: Path, clips: list[Audio]) -> None:
    pytest.importorskip("whisper_normalizer")
    asr = load_scorers(f"whisper:{whisper}", None, None).asr
    assert asr is not None
    long = Audio(np.tile(clips[0].samples, 40)[: 33 * clips[0].sampling_rate], clips[0].sampling_rate)
    transcripts = asr.transcribe([long, clips[1]], ["en", "en"])
    assert transcripts[1] == asr.transcribe([clips[1]], ["en"])[0]
    assert transcripts[0] == asr.transcribe([long], ["en"])[0]


def test_a_transcript_too_long_for_its_clip_is_made_again(
    whisper: Path, clips: list[Audio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word heard 222 times in one clip made a WER of 29 % out of 18 %: then the library's repetition penalty."""
    pytest.importorskip("whisper_normalizer")
    scorer = load_scorers(f"whisper:{whisper}", None, None).asr
    assert scorer is not None and "repetition penalty 1.3" in scorer.name
    model = WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    extract = WhisperFeatureExtractor.from_pretrained(whisper)
    tokenizer = WhisperTokenizerFast.from_pretrained(whisper)
    samples = resample(clips[0], RATE).samples
    inputs = extract(samples, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    once, again = (
        tokenizer.batch_decode(
            model.generate(**inputs, language="en", task="transcribe", repetition_penalty=penalty),
            skip_special_tokens=True,
        )[0].strip()
        for penalty in (1.0, 1.3)
    )
    assert once != again
    seconds = clips[0].duration_seconds
    for fastest, expected in ((len(once) / seconds + 1, once), (len(once) / seconds - 1, again)):
        monkeypatch.setattr(asr, "FASTEST", fastest)
        assert scorer.transcribe([clips[0]], ["en"]) == [expected]


def test_faster_whisper_makes_it_again_as_well() -> None:
    """The package's model in its place: it repeats itself unless it is told not to."""
    pytest.importorskip("faster_whisper")

    class Repeats:
        def transcribe(self, samples: object, *, repetition_penalty: float, **options: object) -> tuple[object, None]:
            assert not options["word_timestamps"] and options["beam_size"] == 1
            text = " Extension two." if repetition_penalty > 1 else " Extension two" + " two" * 300
            return [SimpleNamespace(text=text, words=None)], None

    scorer = asr.FasterWhisper.__new__(asr.FasterWhisper)
    scorer._model, scorer._known = Repeats(), {"en"}
    seconds = (2, 29, 31)
    heard = scorer.transcribe([Audio(np.zeros(16_000 * n, np.float32), 16_000) for n in seconds], ["en"] * 3)
    assert [len(text) < 100 for text in heard] == [True, True, False]  # over 30 s it is read in pieces


def test_weights_that_are_no_model_are_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wavlm"}))
    with pytest.raises(ConfigError, match="does not load as WavLM"):
        load_scorers(None, f"wavlm:{tmp_path}", None)


def test_faster_whisper_fetches_no_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper")
    pytest.importorskip("whisper_normalizer")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        load_scorers(f"faster-whisper:{tmp_path}", None, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not load as a CTranslate2 Whisper"):
        load_scorers(f"faster-whisper:{tmp_path}", None, None)


def test_a_pickle_in_the_weights_is_not_run(wavlm: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((wavlm / name).read_bytes())
    torch.save({"a": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError):
        load_scorers(None, f"wavlm:{folder}", None)
    assert not (tmp_path / "ran").exists()


def test_cosine() -> None:
    a, b = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), np.array([[0.0, 2.0], [6.0, 8.0], [1.0, 0.0]])
    np.testing.assert_allclose(cosine(a, b), [0.0, 1.0, 0.0])
