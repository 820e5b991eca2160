"""Speech recognisers: Whisper by faster-whisper or transformers, from a path or hub id; pocketsphinx."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from speechtune.errors import ConfigError
from speechtune.tasks.voice_cloning.support import (
    LOAD_ERRORS,
    RATE,
    identity,
    load_pretrained,
    need,
    pcm16,
    place_of,
    waveform,
)
from speechtune.tasks.voice_cloning.word_errors import INSTALL, language_code
from speechtune.types import Audio

INSTALL_FASTER_WHISPER = "pip install 'speechtune[asr,faster-whisper]'"
BATCH_SIZE = 8
WINDOW_SECONDS = 30
"""What Whisper takes at once; longer clips go through it in pieces."""
FASTEST = 30
"""Characters a second: nobody speaks as fast (read English has about 15)."""
REPETITION_PENALTY = 1.3
GREEDY = f"greedy; texts too long for their clips once more at repetition penalty {REPETITION_PENALTY}"


@dataclass(frozen=True, slots=True)
class TimedWord:
    """A word with its place in a clip in seconds, and how probable the recogniser took it to be."""

    text: str
    start: float
    end: float
    probability: float


def _too_long(audio: Audio, text: str) -> bool:
    """Whether a clip cannot hold its transcript: at times Whisper hears no end and repeats a word some hundred times.

    One such clip, 222 errors in 7 words, made a WER of 29 % out of 18 % over 284 sentences.
    """
    seconds = max(1.0, audio.duration_seconds)
    return seconds <= WINDOW_SECONDS and len(text) > FASTEST * seconds


class FasterWhisper:
    """Whisper by CTranslate2: greedy as in seed-tts-eval, without the random retries at higher temperatures."""

    languages: frozenset[str] | None = None

    def __init__(self, spec: str, device: str) -> None:
        package = need("faster_whisper", spec, INSTALL_FASTER_WHISPER)
        place, revision = place_of(spec)
        try:
            folder = Path(place if Path(place).is_dir() else package.download_model(place, revision=revision))
            if not (folder / "tokenizer.json").is_file():  # the library would fetch one of another model
                raise FileNotFoundError(f"{folder} holds no tokenizer.json")
            kind = "float32" if device == "cpu" else "default"  # no CPU computes in the float16 that most are stored in
            self._model = package.WhisperModel(str(folder), device=device, compute_type=kind, local_files_only=True)
        except LOAD_ERRORS as error:
            raise ConfigError(f"{spec}: does not load as a CTranslate2 Whisper: {error}") from None
        self._known = set(self._model.supported_languages)
        self.name = identity("faster-whisper", folder / "model.bin", f"Whisper {place}, {GREEDY}")

    def transcribe(self, audios: Sequence[Audio], languages: Sequence[str | None]) -> list[str]:
        """Texts of clips, one at a time, for the library batches only pieces of one recording."""
        return [self._transcribe(audio, code)[0] for audio, code in zip(audios, languages, strict=True)]

    def transcribe_words(self, audio: Audio, language: str | None) -> tuple[str, list[TimedWord]]:
        """The text of a clip, and its words with times and probabilities."""
        return self._transcribe(audio, language, word_timestamps=True)

    def detect_language(self, audio: Audio) -> tuple[str, float]:
        """Code of the language of a clip, and its probability; of a model of English alone that."""
        if not self._model.model.is_multilingual:
            return "en", 1.0
        code, probability, _ = self._model.detect_language(waveform(audio))
        return str(code), float(probability)

    def _transcribe(
        self, audio: Audio, language: str | None, word_timestamps: bool = False, penalty: float = 1.0
    ) -> tuple[str, list[TimedWord]]:
        options = {"beam_size": 1, "temperature": 0.0, "condition_on_previous_text": False}
        options |= {"repetition_penalty": penalty}
        code = language_code(language)
        known = code if code in self._known else None
        found, _ = self._model.transcribe(waveform(audio), language=known, word_timestamps=word_timestamps, **options)
        segments = list(found)
        words = [
            TimedWord(word.word, float(word.start), float(word.end), float(word.probability))
            for segment in segments
            for word in segment.words or ()
        ]
        text = "".join(segment.text for segment in segments).strip()
        if penalty == 1.0 and _too_long(audio, text):
            return self._transcribe(audio, language, word_timestamps, REPETITION_PENALTY)
        return text, words


class Whisper:
    """Whisper through transformers, greedy; seed-tts-eval names openai/whisper-large-v3."""

    languages: frozenset[str] | None = None

    def __init__(self, spec: str, device: str) -> None:
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        types = WhisperProcessor, WhisperForConditionalGeneration
        loaded = load_pretrained(*types, spec, device, kind="Whisper", label=f"Whisper {{}}, {GREEDY}")
        self._processor, self._model, self.name = loaded
        tokens = getattr(self._model.generation_config, "lang_to_id", None) or {}
        self._known = {token.strip("<|>") for token in tokens}

    @torch.inference_mode()
    def transcribe(self, audios: Sequence[Audio], languages: Sequence[str | None]) -> list[str]:
        """Texts of clips, in batches of one language; clips over 30 s alone, in pieces."""
        texts = [""] * len(audios)
        groups: dict[tuple[str | None, int], list[int]] = {}
        for index, (audio, language) in enumerate(zip(audios, languages, strict=True)):
            code = language_code(language)
            group = (code if code in self._known else None, index if audio.duration_seconds > WINDOW_SECONDS else -1)
            groups.setdefault(group, []).append(index)
        for (code, _), indices in groups.items():
            for first in range(0, len(indices), BATCH_SIZE):
                chosen = indices[first : first + BATCH_SIZE]
                for index, text in zip(chosen, self._generate([audios[i] for i in chosen], code), strict=True):
                    texts[index] = text
        return texts

    def _generate(self, audios: Sequence[Audio], code: str | None, penalty: float = 1.0) -> list[str]:
        long = audios[0].duration_seconds > WINDOW_SECONDS
        inputs = self._processor(
            [waveform(audio) for audio in audios],
            sampling_rate=RATE,
            return_tensors="pt",
            truncation=not long,
            padding="longest" if long else "max_length",
            return_attention_mask=True,
        )
        features = inputs["input_features"].to(self._model.device, self._model.dtype)
        mask = inputs["attention_mask"].to(self._model.device)
        options = {"do_sample": False, "num_beams": 1, "return_timestamps": long, "repetition_penalty": penalty}
        options |= {"language": code, "task": "transcribe"} if code else {}
        ids = self._model.generate(features, attention_mask=mask, **options)
        texts = [text.strip() for text in self._processor.batch_decode(ids, skip_special_tokens=True)]
        if penalty == 1.0:
            for index, (audio, text) in enumerate(zip(audios, texts, strict=True)):
                if _too_long(audio, text):
                    texts[index] = self._generate([audio], code, REPETITION_PENALTY)[0]
        return texts


class PocketSphinx:
    """CMU PocketSphinx with the English model of its package: small, offline, wrong in every fourth word.

    Enough to see speech turn into noise; not to compare good systems.
    """

    languages: frozenset[str] | None = frozenset({"en"})

    def __init__(self, spec: str, device: str) -> None:
        package = need("pocketsphinx", spec, INSTALL)
        self._decoder = package.Decoder(samprate=RATE, loglevel="FATAL")
        self._cmn = self._decoder.get_cmn(False)
        self.name = identity("pocketsphinx", None, "English, model of the package")

    def transcribe(self, audios: Sequence[Audio], languages: Sequence[str | None]) -> list[str]:
        """Texts of clips; `languages` are taken to be English."""
        texts = []
        for audio in audios:
            # it carries the mean of the cepstrum over from clip to clip, which would make texts depend on their order
            self._decoder.set_cmn(self._cmn)
            self._decoder.start_utt()
            self._decoder.process_raw(pcm16(waveform(audio)), full_utt=True)
            self._decoder.end_utt()
            hypothesis = self._decoder.hyp()
            texts.append(hypothesis.hypstr if hypothesis is not None else "")
        return texts
