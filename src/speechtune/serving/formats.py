"""Generated audio as a stream of bytes in the formats of OpenAI's speech endpoint, by libsndfile."""

import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import soundfile

from speechtune import __version__
from speechtune.audio import resample
from speechtune.types import Audio

Format = Literal["mp3", "opus", "flac", "wav", "pcm"]


@dataclass(frozen=True, slots=True)
class _Kind:
    media_type: str
    container: str
    subtype: str
    rates: tuple[int, ...] = ()
    """Sampling rates that it knows; empty for any."""


MPEG_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
KINDS: dict[Format, _Kind] = {
    "wav": _Kind("audio/wav", "WAV", "PCM_16"),
    "flac": _Kind("audio/flac", "FLAC", "PCM_16"),
    "mp3": _Kind("audio/mpeg", "MP3", "MPEG_LAYER_III", MPEG_RATES),
    "opus": _Kind("audio/ogg", "OGG", "OPUS", (8000, 12000, 16000, 24000, 48000)),
    "pcm": _Kind("audio/pcm", "RAW", "PCM_16"),
}
LONGEST_FRAME_HEAD = 40  # bytes of header, checksum and side information of a mono mp3 frame, and of the tag behind
UNKNOWN = struct.pack("<I", 0xFFFFFFFF)  # a size that is not known yet: players read on to the end


class _Sink(io.RawIOBase):
    """What libsndfile writes to; what was taken is gone, and changes to it, as of a header's sizes, are dropped."""

    def __init__(self) -> None:
        self._fresh, self._taken, self._place = bytearray(), 0, 0

    def write(self, data: Any) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # as RawIOBase's
        data = bytes(data)
        start = self._place - self._taken
        if start >= 0:
            self._fresh[start : start + len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._taken + len(self._fresh)}
        self._place = origin[whence] + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def take(self) -> bytes:
        """All that was written since the last call."""
        data = bytes(self._fresh)
        self._taken += len(data)
        self._fresh.clear()
        return data


class AudioStream:
    """Encodes audio piece by piece; the file says of itself what `write_wav` says: that it was generated, and by what.

    Streamed piece by piece, a wav or mp3 has no length in its header, as OpenAI's wav; a flac cannot be streamed,
    for its readers need one. pcm is 16 bit, little-endian, without a header.
    """

    def __init__(self, kind: Format, sampling_rate: int, provenance: Mapping[str, Any]) -> None:
        self._kind = KINDS[kind]
        rates = self._kind.rates
        self.sampling_rate = sampling_rate if not rates or sampling_rate in rates else 48_000
        rate = f";rate={self.sampling_rate}" if kind == "pcm" else ""
        self.media_type = self._kind.media_type + rate
        self._sink, self._name, self._begun = _Sink(), kind, False
        options: dict[str, Any] = {"format": self._kind.container, "subtype": self._kind.subtype}
        if kind == "pcm":
            options["endian"] = "LITTLE"
        if kind == "mp3":  # so that readers who are told no length find it by the size
            options |= {"bitrate_mode": "CONSTANT", "compression_level": 0.5}
        self._file = soundfile.SoundFile(cast(BinaryIO, self._sink), "w", self.sampling_rate, 1, **options)
        if kind != "pcm":
            self._file.comment = json.dumps(provenance)
            self._file.software = f"speechtune {__version__}"

    def add(self, audio: Audio) -> bytes:
        """The bytes that are ready after another piece of audio; values beyond full scale are clipped."""
        self.write(audio)
        data = self._sink.take()
        if data and not self._begun:
            self._begun = True
            data = {"wav": _without_sizes, "mp3": _without_length}.get(self._name, bytes)(data)
        return data

    def write(self, audio: Audio) -> None:
        """Take another piece; with `end` alone after it, the header says the length, in every format."""
        self._file.write(np.clip(resample(audio, self.sampling_rate).samples, -1, 1))

    def end(self) -> bytes:
        """The last bytes."""
        self._file.close()
        return self._sink.take()


def _without_sizes(wav: bytes) -> bytes:
    """The beginning of a wav, sizes of the file and of its samples unknown."""
    place = 12
    while wav[place : place + 4] != b"data":
        place += 8 + struct.unpack("<I", wav[place + 4 : place + 8])[0]
    return wav[:4] + UNKNOWN + wav[8 : place + 4] + UNKNOWN + wav[place + 8 :]


def _without_length(mp3: bytes) -> bytes:
    """The beginning of an mp3, the frame with its length made one of silence: mpg123 stops where that length says."""
    sizes = mp3[6:10] if mp3.startswith(b"ID3") else b""  # 7 bits a byte
    frame = sum(size << shift for size, shift in zip(sizes, (21, 14, 7, 0), strict=False)) + (10 if sizes else 0)
    for tag in (b"Xing", b"Info"):
        place = mp3.find(tag, frame, frame + LONGEST_FRAME_HEAD)
        if place >= 0:
            return mp3[:place] + bytes(4) + mp3[place + 4 :]
    return mp3
