"""Audio in and out: the only place where files are decoded and where a sampling rate changes."""

import hashlib
import io
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib import request

import numpy as np
import soundfile
import soxr

from speechtune import __version__
from speechtune.errors import AudioError
from speechtune.types import Audio, AudioRef

MAX_FILE_BYTES = 4 * 2**30  # largest audio file opened
MAX_INLINE_BYTES = 128 * 2**20  # largest clip held in memory as bytes (inline base64 or a download)
MAX_DECODED_VALUES = 2**28  # samples x channels decoded at once: 1 GiB of float32, 93 minutes of mono at 48 kHz
BLOCK_SECONDS = 30  # of audio decoded at once where a file is streamed
DOWNLOAD_TIMEOUT_SECONDS = 30.0  # longest wait for a server to connect or to send the next bytes
DURATION_TOLERANCE_SECONDS = 0.5  # by how much a declared duration or the end of a segment may miss the file's end
SILENCE_PEAK = 1e-3  # -60 dBFS: audio whose deviation from its mean never exceeds this is silent
CLIPPING_LEVEL = 0.999  # absolute value from which a sample counts as full scale
MAX_NAME_BYTES = 200  # of a file name made of an id; file systems take 255
CANCELLING = 0.03  # range of the mix of channels, relative to theirs, below which they cancel each other out
CLIPPING_SHARE = 1e-3  # of samples equal to their neighbour at full scale: from there on audio counts as clipped
_CONTENTS = {
    rb"version https://git-lfs": "it is a Git LFS pointer in place of the audio: run `git lfs pull`",
    rb"(?i)\s*<(!doctype|html|\?xml)": "it is a web page or an error message in place of the audio: download it again",
    rb"....ftyp|\xff[\xf0\xf1\xf8\xf9]|\x1aE\xdf\xa3|0&\xb2u|#!AMR": "convert it: ffmpeg -i FILE FILE.wav",
}


class InvalidAudioError(AudioError):
    """An `AudioError` with a short `code` for tables, such as `missing_file` or `not_audio`."""

    def __init__(self, code: str, ref: AudioRef | Path, reason: str) -> None:
        super().__init__(f"{ref}: {reason}")
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """The header of a file: duration of the complete file in seconds, sampling rate in Hz."""

    duration_seconds: float
    sampling_rate: int
    num_frames: int
    num_channels: int


def audio_info(ref: AudioRef, *, allow_urls: bool = False) -> AudioInfo:
    """Read the header of the file behind `ref`, whatever segment `ref` means; `AudioError` if it is not audio."""
    with _open(ref, allow_urls) as file:
        return _info(ref, file)


def segment_frames(ref: AudioRef, info: AudioInfo) -> tuple[int, int]:
    """First frame and number of frames of the segment `ref` means in a file with this header.

    A segment that ends up to `DURATION_TOLERANCE_SECONDS` past the file's end is cut there, any other is an error.
    """
    if ref.offset_seconds < 0:
        raise InvalidAudioError("bad_offset", ref, f"the offset {ref.offset_seconds:g} s is negative")
    # in seconds first: frames of 1e308 s are infinite, and cannot be rounded
    start = round(min(ref.offset_seconds, info.duration_seconds) * info.sampling_rate)
    if start >= info.num_frames:
        reason = f"the offset {ref.offset_seconds:g} s lies past the end of the file ({info.duration_seconds:.2f} s)"
        raise InvalidAudioError("bad_offset", ref, reason)
    available = info.num_frames - start
    if ref.duration_seconds is None:
        return start, available
    most = info.duration_seconds + 2 * DURATION_TOLERANCE_SECONDS
    count = round(min(ref.duration_seconds, most) * info.sampling_rate)
    if count <= 0:
        raise InvalidAudioError("bad_duration", ref, f"the segment is empty ({ref.duration_seconds:g} s)")
    if count - available > DURATION_TOLERANCE_SECONDS * info.sampling_rate:
        end = ref.offset_seconds + ref.duration_seconds
        reason = f"the segment ends at {end:.2f} s, but the file is {info.duration_seconds:.2f} s long"
        raise InvalidAudioError("duration_mismatch", ref, reason)
    return start, min(count, available)


def read_audio(ref: AudioRef, sampling_rate: int | None = None, *, allow_urls: bool = False) -> Audio:
    """Decode the segment `ref` means, mixed down to mono float32 and resampled to `sampling_rate`.

    `sampling_rate` in Hz; None keeps the file's. `AudioError` if the segment cannot be read in full, exceeds a limit,
    or holds NaN or infinite samples.
    """
    with _open(ref, allow_urls) as file:
        info = _info(ref, file)
        start, count = segment_frames(ref, info)
        skipped = 0 if file.seekable() else start  # GSM 6.10 and others can only be read in sequence
        if (skipped + count) * info.num_channels > MAX_DECODED_VALUES:
            reason = (
                f"too large to decode: {count / info.sampling_rate:.0f} s in {info.num_channels} channel(s) exceed "
                f"{MAX_DECODED_VALUES} values; cut it into shorter clips"
            )
            raise InvalidAudioError("too_large", ref, reason)
        try:
            if not skipped and start:
                file.seek(start)
            frames = file.read(skipped + count, dtype="float32", always_2d=True)[skipped:]
        except soundfile.SoundFileError as error:
            raise InvalidAudioError("not_audio", ref, f"cannot be decoded: {_reason(error)}") from None
    if len(frames) < count:
        raise _truncated(ref, start, count, len(frames))
    return resample(Audio(_mix_down(ref, frames), info.sampling_rate), sampling_rate or info.sampling_rate)


def stream_audio(ref: AudioRef, sampling_rate: int | None = None) -> Iterator[np.ndarray]:
    """Decode a complete file of any length block by block, mixed down to mono float32 and resampled.

    Errors are those of `read_audio`, but no length is too large: one block of `BLOCK_SECONDS` is held at a time.
    """
    with _open(ref, allow_urls=False) as file:
        info = _info(ref, file)
        rate = sampling_rate or info.sampling_rate
        resampler = soxr.ResampleStream(info.sampling_rate, rate, 1, dtype="float32")
        num_read = 0
        while num_read < info.num_frames:
            try:
                frames = file.read(BLOCK_SECONDS * info.sampling_rate, dtype="float32", always_2d=True)
            except soundfile.SoundFileError as error:
                raise InvalidAudioError("not_audio", ref, f"cannot be decoded: {_reason(error)}") from None
            if not len(frames):
                raise _truncated(ref, 0, info.num_frames, num_read)
            num_read += len(frames)
            samples = _mix_down(ref, frames)
            yield (
                samples
                if rate == info.sampling_rate
                else resampler.resample_chunk(samples, last=num_read >= info.num_frames)
            )


def _truncated(ref: AudioRef, start: int, count: int, decoded: int) -> InvalidAudioError:
    reason = f"truncated: the header promises {count} frames from {start} on, only {decoded} can be decoded"
    return InvalidAudioError("truncated", ref, reason)


def _mix_down(ref: AudioRef, frames: np.ndarray) -> np.ndarray:
    """Mono samples of decoded frames of shape (frames, channels)."""
    num_channels = frames.shape[1]
    samples = frames[:, 0] if num_channels == 1 else frames.mean(axis=1, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise InvalidAudioError("not_finite", ref, "holds NaN or infinite samples")
    loudest = float(np.ptp(frames, axis=0).max()) if num_channels > 1 else 0.0
    if loudest > 2 * SILENCE_PEAK and float(np.ptp(samples)) < CANCELLING * loudest:
        reason = "its channels cancel each other out (opposite phase): keep one, ffmpeg -i IN -af 'pan=mono|c0=c0' OUT"
        raise InvalidAudioError("opposite_phase", ref, reason)
    return samples


def resample(audio: Audio, sampling_rate: int) -> Audio:
    """Audio at another rate in Hz, by soxr; samples float32 and contiguous."""
    samples = audio.samples
    if sampling_rate != audio.sampling_rate:
        samples = soxr.resample(samples, audio.sampling_rate, sampling_rate)
    return Audio(np.ascontiguousarray(samples, dtype=np.float32), sampling_rate)


def file_name(sample_id: str) -> str:
    """A sample id as a file name that stays inside its folder; other ids have other names.

    Where the id does not fit as it is, a part of its hash follows what fits.
    """
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in sample_id).lstrip(".")
    name = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore") or "_"
    digest = hashlib.sha256(sample_id.encode(errors="surrogatepass")).hexdigest()
    return name if name == sample_id else f"{name}-{digest[:8]}"


def read_provenance(path: Path) -> dict[str, Any] | None:
    """The `provenance` that `write_wav` put into a file; None for a file without it."""
    try:
        with soundfile.SoundFile(path) as file:
            comment = json.loads(file.comment or "null")
    except soundfile.SoundFileError as error:
        raise InvalidAudioError("unreadable", path, _reason(error)) from None
    except ValueError:
        return None
    return comment if isinstance(comment, dict) and "generated" in comment else None


def write_wav(path: Path, audio: Audio, provenance: Mapping[str, Any] | None = None) -> None:
    """Write mono 16-bit PCM; values beyond full scale are clipped, NaN or infinite ones are an error.

    `provenance` goes as JSON into the file's comment (the INFO chunk), where any audio tool shows it.
    """
    if not np.isfinite(audio.samples).all():
        raise InvalidAudioError("not_finite", path, "not written: the samples hold NaN or infinite values")
    try:
        rate = audio.sampling_rate
        with path.open("wb") as raw, soundfile.SoundFile(raw, "w", rate, 1, "PCM_16", format="WAV") as file:
            if provenance is not None:
                file.comment = json.dumps(provenance)
                file.software = f"speechtune {__version__}"
            file.write(audio.samples)
    except (OSError, soundfile.SoundFileError) as error:
        raise InvalidAudioError("unwritable", path, f"cannot be written: {_reason(error)}") from None


def flac_bytes(audio: Audio) -> bytes:
    """A clip as 24-bit FLAC; values beyond full scale are clipped."""
    file = io.BytesIO()
    soundfile.write(file, audio.samples, audio.sampling_rate, format="FLAC", subtype="PCM_24")
    return file.getvalue()


def content_hash(ref: AudioRef, *, allow_urls: bool = False) -> str:
    """SHA-256 in hex over the file's bytes and the segment; the path does not enter."""
    if ref.path is None:
        digest = hashlib.sha256(_bytes(ref, allow_urls))
    else:
        _check_file(ref, ref.path)
        try:
            with open(ref.path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
        except OSError as error:
            raise InvalidAudioError("unreadable_file", ref, f"cannot be read: {_reason(error)}") from None
    duration = "end" if ref.duration_seconds is None else f"{ref.duration_seconds:.6f}"
    digest.update(f"|{ref.offset_seconds:.6f}|{duration}".encode())
    return digest.hexdigest()


def find_defects(audio: Audio) -> list[tuple[str, str]]:
    """(code, message) for each defect of decoded audio: `not_finite`, `silent`, `clipped`."""
    samples = audio.samples
    if len(samples) == 0:
        return [("silent", "holds no samples")]
    finite = np.isfinite(samples)
    if not finite.all():
        return [("not_finite", f"holds {int((~finite).sum())} NaN or infinite sample(s)")]
    deviation = float(np.abs(samples - samples.mean()).max())
    if deviation <= SILENCE_PEAK:
        return [("silent", f"silent: no sample deviates by more than {deviation:.1e} from the mean")]
    # a loud peak touches full scale, only a clipped one stays there
    flat = (np.abs(samples[1:]) >= CLIPPING_LEVEL) & (samples[1:] == samples[:-1])
    share = float(flat.sum()) / len(samples)
    if share >= CLIPPING_SHARE:
        return [("clipped", f"clipped: the signal stands still at full scale for {share:.1%} of the time")]
    return []


def _open(ref: AudioRef, allow_urls: bool) -> soundfile.SoundFile:
    if ref.path is not None:
        _check_file(ref, ref.path)
        source: str | io.BytesIO = ref.path
    else:
        source = io.BytesIO(_bytes(ref, allow_urls))
    try:
        return soundfile.SoundFile(source)
    except soundfile.SoundFileError as error:
        reason = f"not audio libsndfile can read: {_reason(error)}{_known_contents(source)}"
        raise InvalidAudioError("not_audio", ref, reason) from None
    except TypeError:  # how soundfile refuses headerless *.raw
        raise InvalidAudioError("not_audio", ref, "not audio libsndfile can read: headerless raw samples") from None


def _info(ref: AudioRef, file: soundfile.SoundFile) -> AudioInfo:
    if file.frames <= 0:
        raise InvalidAudioError("empty_audio", ref, "holds no audio frames")
    return AudioInfo(file.frames / file.samplerate, file.samplerate, file.frames, file.channels)


def _check_file(ref: AudioRef, path: str) -> None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise InvalidAudioError("missing_file", ref, f"no such file{_other_name(path)}") from None
    except (OSError, ValueError) as error:
        raise InvalidAudioError("unreadable_file", ref, f"cannot be opened: {_reason(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidAudioError("unreadable_file", ref, "not a regular file")
    if status.st_size == 0:
        raise InvalidAudioError("empty_file", ref, "the file is empty (0 bytes)")
    if status.st_size > MAX_FILE_BYTES:
        raise InvalidAudioError("too_large", ref, f"{status.st_size} bytes exceed the limit of {MAX_FILE_BYTES} bytes")
    if not os.access(path, os.R_OK):
        raise InvalidAudioError("unreadable_file", ref, "cannot be opened: Permission denied")


def _other_name(path: str) -> str:
    """Under which name a missing file may be there."""
    if "\\" in path:
        return "; a backslash is part of a name here: write / between folders"
    place = Path(path)
    while not os.path.isdir(place.parent) and place != place.parent:
        place = place.parent
    other = _names(str(place.parent)).get(_plain(place.name))
    return f"; {other!r} differs in case or Unicode form: write the name as the folder has it" if other else ""


@lru_cache(maxsize=8)
def _names(folder: str) -> dict[str, str]:
    """The files of a folder by name, regardless of case and Unicode form."""
    try:
        return {_plain(name): name for name in os.listdir(folder)}
    except OSError:
        return {}


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _known_contents(source: str | io.BytesIO) -> str:
    """What a file is that libsndfile cannot read, where its first bytes tell, and what to do about it."""
    try:
        with open(source, "rb") if isinstance(source, str) else io.BytesIO(source.getvalue()) as file:
            head = file.read(64)
    except OSError:
        return ""
    return next((f"; {hint}" for pattern, hint in _CONTENTS.items() if re.match(pattern, head, re.DOTALL)), "")


def _bytes(ref: AudioRef, allow_urls: bool) -> bytes:
    if ref.data is not None:
        if not ref.data:
            raise InvalidAudioError("empty_file", ref, "no bytes")
        if len(ref.data) > MAX_INLINE_BYTES:
            raise InvalidAudioError("too_large", ref, f"exceeds the limit of {MAX_INLINE_BYTES} bytes for inline audio")
        return ref.data
    if ref.url is None:
        raise InvalidAudioError("missing_file", ref, "names neither a path nor bytes nor a URL")
    if not allow_urls:
        reason = "audio from URLs is refused; set data.allow_urls=true, or download it"
        raise InvalidAudioError("url_refused", ref, reason)
    return _download(ref, ref.url)


def _download(ref: AudioRef, url: str) -> bytes:
    scheme = url.partition(":")[0].lower()
    if scheme not in ("http", "https"):
        raise InvalidAudioError("url_refused", ref, f"scheme {scheme!r} is refused; only http and https are fetched")
    try:
        with _opener().open(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
            data = response.read(MAX_INLINE_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise InvalidAudioError("download_failed", ref, f"download failed: {_reason(error)}") from None
    if len(data) > MAX_INLINE_BYTES:
        raise InvalidAudioError("too_large", ref, f"the download exceeds the limit of {MAX_INLINE_BYTES} bytes")
    if not data:
        raise InvalidAudioError("empty_file", ref, "the download is empty (0 bytes)")
    return data


def _opener() -> request.OpenerDirector:
    # build_opener would add file:, ftp: and data: handlers, and a redirect may lead to ftp:
    opener = request.OpenerDirector()
    handlers: list[type[request.BaseHandler]] = [request.HTTPHandler, request.HTTPSHandler, request.HTTPRedirectHandler]
    handlers += [request.ProxyHandler, request.UnknownHandler]
    for handler in (*handlers, request.HTTPDefaultErrorHandler, request.HTTPErrorProcessor):
        opener.add_handler(handler())
    return opener


def _reason(error: Exception) -> str:
    """What the system, a server or libsndfile says was wrong, without the path."""
    texts = (getattr(error, name, None) for name in ("reason", "strerror", "error_string"))
    return str(next(filter(None, texts), error))
