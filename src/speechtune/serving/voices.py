"""Voices by name: a recording, what is said in it, and the adapter that speaks with it; one file each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Base64Bytes, BaseModel, Field, StringConstraints, ValidationError

from speechtune.audio import audio_info
from speechtune.config import DataConfig
from speechtune.errors import AudioError, ConfigError
from speechtune.inference.generate import check_references
from speechtune.storage.files import write_atomically
from speechtune.types import AudioRef, Clip, Sample

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME)]
"""Of voices and adapters: what is also a safe file name."""
NO_REFERENCE = "default"
"""The voice that the model chooses by itself."""
MAX_STRENGTH = 4.0


class Voice(BaseModel, frozen=True, extra="forbid"):
    """A registered voice."""

    name: Name
    text: str = Field(min_length=1, max_length=2000)
    """What is said in the recording, word for word."""
    adapter: Name | None = None
    """Name of the adapter that speaks; None leaves that to the request."""
    strength: float = Field(default=1.0, ge=0.0, le=MAX_STRENGTH, allow_inf_nan=False)
    """How much of the adapter counts."""
    audio: Base64Bytes = Field(repr=False)
    """The recording as it was uploaded."""

    @property
    def clip(self) -> Clip:
        """The recording as a reference in a prompt."""
        return Clip(AudioRef(data=self.audio), self.text)


def check_recording(clip: Clip, max_seconds: float = DataConfig().max_seconds) -> None:
    """Refuse a reference that `speechtune generate` would refuse, and one longer than a file of training data may be.

    Raises AudioError, ManifestError: what is wrong with it.
    """
    seconds = audio_info(clip.audio).duration_seconds  # first: decoding takes memory
    if seconds > max_seconds:
        raise AudioError(f"the recording lasts {seconds:.1f} s, at most {max_seconds:g} s are taken: cut it")
    check_references([Sample("the voice", clip.text, None, (clip,), source="the upload")])


class VoiceStore:
    """The voices of a server in a folder that is its own."""

    def __init__(self, folder: Path) -> None:
        """Read all voices.

        Raises ConfigError: a file that holds none.
        """
        self._folder = folder
        self._voices: dict[str, Voice] = {}
        for file in sorted(folder.glob("*.json")):
            if file.name.startswith("."):  # what a write that was killed left behind
                continue
            try:
                voice = Voice.model_validate_json(file.read_bytes())
            except (OSError, ValidationError) as error:
                raise ConfigError(f"{file}: not readable as a voice; repair or remove it: {error}") from None
            self._voices[voice.name] = voice

    def __iter__(self) -> Iterator[Voice]:
        return iter(list(self._voices.values()))

    def __len__(self) -> int:
        return len(self._voices)

    def get(self, name: str) -> Voice | None:
        """The voice of a name."""
        return self._voices.get(name)

    def add(self, voice: Voice) -> None:
        """Keep a voice, in the place of one of that name.

        Raises OSError: it cannot be written.
        """
        write_atomically(self._folder / f"{voice.name}.json", voice.model_dump_json().encode())
        self._voices[voice.name] = voice

    def remove(self, voice: Voice) -> None:
        """Forget a voice."""
        (self._folder / f"{voice.name}.json").unlink(missing_ok=True)
        self._voices.pop(voice.name, None)
