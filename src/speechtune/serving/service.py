"""What a server does with a model: speak texts of any length in registered voices, and assess recordings."""

import asyncio
import io
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch import nn

from speechtune.cache.encode import encode_samples
from speechtune.errors import ConfigError
from speechtune.inference.adapter_set import AdapterSet, LoadedAdapter
from speechtune.inference.generate import provenance
from speechtune.inference.score import Score, check_recordings, score_samples
from speechtune.lora.apply import plain_model
from speechtune.serving.adapters import Adapters
from speechtune.serving.batches import Batches
from speechtune.serving.metrics import Metrics
from speechtune.serving.voices import NO_REFERENCE, Voice, VoiceStore, check_recording
from speechtune.types import Audio, AudioRef, Clip, GenerationOptions, Output, Sample

BASE = "base"
"""Name of the model without an adapter."""
AHEAD = 8
"""Pieces of one text that are asked for before the first of them is sent."""


class Abandoned(Exception):
    """Nobody waits for a batch any more."""


class NotFound(ConfigError):
    """A name that is not registered; `param` is the field that held it."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes.

    Attributes:
        batch_size: pieces of text, or recordings, at a time.
        max_new_tokens: cap of a piece, as for `generate`.
        max_characters: longest text.
        max_requests: requests that are answered or wait at one time.
        max_voices: registered voices.
        deadline_seconds: longest that an answer may take.
    """

    batch_size: int = 32
    max_new_tokens: int | None = None
    max_characters: int = 20_000
    max_requests: int = 256
    max_voices: int = 1000
    deadline_seconds: float = 300.0


_Reference = tuple[Clip, Sequence[np.ndarray]]
"""A clip of a voice, and its features."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a request speaks with: the voice's reference, the adapter's name, its strength."""

    reference: _Reference | None
    adapter: str | None
    strength: float


@dataclass(frozen=True, slots=True)
class _Speech:
    """A piece of text to be spoken: the prompt, its reference's features, the seed of its draws."""

    prompt: Sample
    features: Sequence[np.ndarray]
    seed: int


_Key = tuple[LoadedAdapter | None, GenerationOptions | None]
"""What a batch has in common: the adapter, and how it is drawn; no options where recordings are assessed."""


class Service:
    """One base with its adapters and voices; made inside a running event loop."""

    def __init__(
        self,
        models: AdapterSet,
        folder: Path,
        limits: Limits,
        adapters: Mapping[str, Path] | None = None,
        adapter_root: Path | None = None,
    ) -> None:
        """`folder` is the server's own; `adapters` and `adapter_root` as in `serving.adapters`.

        Raises ConfigError: a stored voice that cannot be read.
        """
        self.models, self.limits, self.folder = models, limits, folder
        self.voices = VoiceStore(folder / "voices")
        self.batches: Batches[_Key, Any, Any] = Batches(
            self._work, limits.batch_size, lambda size: self.metrics.batch_size.observe(size)
        )
        self.metrics = Metrics(lambda: len(self.batches))
        self.adapters = Adapters(models, self.batches, dict(adapters or {}), adapter_root)
        self._references: dict[str, _Reference] = {}

    async def start(self) -> None:
        """Verify and load every adapter that is named at the start or by a stored voice, and encode all voices.

        Raises AdapterError, ConfigError, AudioError: what cannot be served, with its name.
        """
        for name in list(self.adapters.folders):
            await self.adapters.register(name)
        for voice in self.voices:
            if voice.adapter is not None and self.adapters.find(voice.adapter) is None:
                raise ConfigError(
                    f"voice {voice.name} speaks with the adapter {voice.adapter}, which is not there: name it with "
                    f"--adapter {voice.adapter}=FOLDER, or remove {self.folder / 'voices' / voice.name}.json"
                )
            async with self.adapters.in_use(voice.adapter, voice.strength):
                self._references[voice.name] = await self._encode(voice.clip)

    async def close(self) -> None:
        """Answer what is queued, then end."""
        await self.batches.close()

    async def add_voice(self, voice: Voice) -> None:
        """Check and keep a voice; its adapter is loaded at its strength and proven active first.

        Raises AudioError, ManifestError: the recording; AdapterError, ConfigError: the adapter.
        """
        if len(self.voices) >= self.limits.max_voices:
            raise ConfigError(f"there are {self.limits.max_voices} voices already: remove one")
        await asyncio.to_thread(check_recording, voice.clip)
        async with self.adapters.in_use(voice.adapter, voice.strength):
            reference = await self._encode(voice.clip)
        await asyncio.to_thread(self.voices.add, voice)
        self._references[voice.name] = reference

    def remove_voice(self, name: str) -> bool:
        """Forget a voice; False where there is none of that name."""
        voice = self.voices.get(name)
        if voice is not None:
            self.voices.remove(voice)
            self._references.pop(name, None)
        return voice is not None

    async def _encode(self, clip: Clip) -> _Reference:
        """A clip with its features, which are encoded as `generate` encodes them; nothing of them stays on the disk."""

        def encode() -> Sequence[np.ndarray]:
            sample = Sample("reference", clip.text, None, (clip,), source="the upload")
            with tempfile.TemporaryDirectory(dir=self.folder) as cache:
                features = encode_samples(self.models.family, [sample], Path(cache), quiet=True).features(0)
                return [np.array(values) for values in features]

        return clip, await self.batches.call(encode)

    def choose(self, model: str, voice_name: str) -> Chosen:
        """The voice, and the adapter with its strength, that a request means.

        Raises NotFound: a model or a voice of that name; ConfigError: they want different adapters.
        """
        named = self.choose_adapter(model)
        if voice_name == NO_REFERENCE:
            return Chosen(None, named, 1.0)
        voice, reference = self.voices.get(voice_name), self._references.get(voice_name)
        if voice is None or reference is None:
            raise NotFound(f"no voice {voice_name!r}; register it at /v1/audio/voices", "voice")
        if voice.adapter is not None and named not in (None, voice.adapter):
            raise ConfigError(f"the voice {voice.name} speaks with the adapter {voice.adapter}, the model is {named}")
        return Chosen(reference, voice.adapter or named, voice.strength if voice.adapter else 1.0)

    def choose_adapter(self, model: str) -> str | None:
        """The adapter that a request's model names; None is the base.

        Raises NotFound: there is none of that name.
        """
        if model != BASE and model not in self.adapters.folders:
            known = ", ".join([BASE, *sorted(self.adapters.folders)])
            raise NotFound(f"no model {model!r}: there are {known}", "model")
        return None if model == BASE else model

    async def origin(self, chosen: Chosen) -> dict[str, Any]:
        """Where a recording comes from, to be written into it."""
        async with self.adapters.in_use(chosen.adapter, chosen.strength) as loaded:
            return provenance(self.models.config, loaded.stored if loaded else None)

    async def speak(
        self, pieces: Sequence[str], chosen: Chosen, options: GenerationOptions
    ) -> AsyncGenerator[Output, None]:
        """Speak a text piece by piece, several in a batch; each is what `generate` says with the same seed.

        Without a reference the first piece decides on the voice: it is the reference of the others.
        """
        deadline = time.monotonic() + self.limits.deadline_seconds
        left, waiting, reference = deque(pieces), deque[asyncio.Future[Output]](), chosen.reference
        options, seed = replace(options, seed=0, max_new_tokens=self.limits.max_new_tokens), options.seed
        async with AsyncExitStack() as stack:
            loaded = await stack.enter_async_context(self.adapters.in_use(chosen.adapter, chosen.strength))
            stack.callback(lambda: [answer.cancel() for answer in waiting])
            while left or waiting:
                while left and len(waiting) < (AHEAD if reference else 1):
                    speech = self._prompt(left.popleft(), reference, loaded, seed)
                    waiting.append(self.batches.submit((loaded, options), speech, len(speech.prompt.text)))
                output = await asyncio.wait_for(waiting[0], deadline - time.monotonic())
                waiting.popleft()
                if reference is None and left and output.audio is not None and len(output.audio.samples):
                    reference = await self._encode(Clip(AudioRef(data=_wav(output.audio)), pieces[0]))
                self.metrics.audio_seconds.inc(output.audio.duration_seconds if output.audio else 0.0)
                yield output

    def _prompt(self, text: str, reference: _Reference | None, loaded: LoadedAdapter | None, seed: int) -> _Speech:
        system, scene = (loaded.system, loaded.scene) if loaded else self.models.prompt
        clip, features = reference or (None, ())
        sample = Sample("input", text, None, (clip,) if clip else (), system, scene, source="the request")
        return _Speech(sample, features, seed)

    async def score(self, audio: AudioRef, text: str, adapter: str | None) -> Score:
        """Assess a recording, as `speechtune score` does.

        Raises ManifestError: it cannot be assessed.
        """
        sample = Sample("audio", text, audio, source="the upload")
        await asyncio.to_thread(check_recordings, "the upload", [sample])
        async with self.adapters.in_use(adapter) as loaded:
            answer = self.batches.submit((loaded, None), sample)
            return await asyncio.wait_for(answer, self.limits.deadline_seconds)

    def _work(self, key: _Key, items: Sequence[Any], abandoned: Callable[[], bool]) -> Sequence[Any]:
        """Answer a batch, in the model's thread."""
        adapter, options = key
        self.models.use(adapter)
        family, model = self.models.family, self.models.model

        def leave(module: nn.Module, args: object) -> None:
            if abandoned():
                raise Abandoned

        hook = plain_model(model).register_forward_pre_hook(leave)  # called for every step of generation
        try:
            if options is not None:
                prompts = [(family.prompt(item.prompt), item.features) for item in items]
                return family.generate(model, prompts, replace(options, seeds=tuple(item.seed for item in items)))
            with tempfile.TemporaryDirectory(dir=self.folder) as cache:
                asked = [replace(item, id=str(number)) for number, item in enumerate(items)]
                cap = self.limits.max_new_tokens
                return score_samples(
                    family, model, asked, Path(cache), batch_size=self.limits.batch_size, max_tokens=cap
                )
        finally:
            hook.remove()


def _wav(audio: Audio) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio.samples, audio.sampling_rate, subtype="FLOAT", format="WAV")
    return file.getvalue()
