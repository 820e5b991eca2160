"""Reading audio: segments, mixing, resampling, and every reason to refuse."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechtune import audio
from speechtune.audio import (
    audio_info,
    content_hash,
    file_name,
    find_defects,
    flac_bytes,
    read_audio,
    stream_audio,
    write_wav,
)
from speechtune.errors import AudioError
from speechtune.types import Audio, AudioRef

RATE = 16000


def tone(seconds: float, rate: int = RATE, frequency: float = 220.0, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> AudioRef:
    soundfile.write(path, samples, rate, subtype=subtype)
    return AudioRef(path=str(path))


@pytest.fixture
def ramp(tmp_path: Path) -> AudioRef:
    return write(tmp_path / "ramp.wav", np.linspace(-0.9, 0.9, 2 * RATE, dtype=np.float32), subtype="FLOAT")


def test_whole_file_keeps_its_rate(ramp: AudioRef) -> None:
    decoded = read_audio(ramp)
    assert (
        decoded.samples.dtype == np.float32 and decoded.samples.shape == (2 * RATE,) and decoded.sampling_rate == RATE
    )
    assert decoded.duration_seconds == 2.0


def test_segment_is_exactly_the_wanted_samples(ramp: AudioRef) -> None:
    part = AudioRef(path=ramp.path, offset_seconds=0.5, duration_seconds=0.25)
    np.testing.assert_array_equal(read_audio(part).samples, read_audio(ramp).samples[8000:12000])
    rest = AudioRef(path=ramp.path, offset_seconds=1.75)
    np.testing.assert_array_equal(read_audio(rest).samples, read_audio(ramp).samples[28000:])


@pytest.mark.parametrize(("form", "subtype"), [("WAV", "GSM610"), ("WAV", "G721_32"), ("AU", "G721_32")])
def test_files_that_cannot_seek_are_read_in_sequence(tmp_path: Path, form: str, subtype: str) -> None:
    """Guards against "Seek attempted on unseekable file type" for telephone recordings."""
    path = tmp_path / "call"
    soundfile.write(path, tone(1.0, 8000), 8000, format=form, subtype=subtype)
    whole, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_array_equal(read_audio(AudioRef(str(path))).samples, whole)
    part = read_audio(AudioRef(str(path), offset_seconds=0.25, duration_seconds=0.5)).samples
    np.testing.assert_array_equal(part, whole[2000:6000])


@pytest.mark.parametrize(
    ("name", "there", "hint"),
    [
        ("wavs\\a.wav", "wavs/a.wav", "write / between folders"),
        ("caf\u00e9/a.wav", "cafe\u0301/a.wav", "differs in case or Unicode form"),
        ("cafe\u0301.wav", "caf\u00e9.wav", "differs in case or Unicode form"),
        ("A.WAV", "a.wav", "'a.wav' differs in case"),
        ("b.wav", "a.wav", ""),
        ("none/b.wav", "a.wav", ""),
    ],
)
def test_a_missing_file_says_why(tmp_path: Path, name: str, there: str, hint: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).touch()
    with pytest.raises(AudioError) as caught:
        read_audio(AudioRef(str(tmp_path / name)))
    assert hint in str(caught.value) and str(caught.value).endswith("no such file") == (not hint)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run `git lfs pull`"),
        (b"<!DOCTYPE html><html>404</html>", "download it again"),
        (b"\0\0\0\x20ftypM4A \0\0\0\0", "convert it: ffmpeg -i FILE FILE.wav"),
        (b"\xff\xf1\x50\x80" + b"\0" * 60, "convert it: ffmpeg"),
        (b"\x1aE\xdf\xa3" + b"\0" * 60, "convert it: ffmpeg"),
    ],
)
def test_what_is_no_audio_is_named(tmp_path: Path, content: bytes, hint: str) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    for ref in (AudioRef(str(tmp_path / "a.wav")), AudioRef(data=content)):
        with pytest.raises(AudioError, match="not audio libsndfile can read") as caught:
            audio_info(ref)
        assert hint in str(caught.value)


def test_only_the_segment_is_decoded(ramp: AudioRef, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = soundfile.SoundFile.read

    def read(self: soundfile.SoundFile, frames: int = -1, *args: object, **kwargs: object) -> object:
        asked.append(frames)
        return real(self, frames, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    read_audio(AudioRef(path=ramp.path, offset_seconds=0.5, duration_seconds=0.25))
    assert asked == [4000]


def test_mixes_down_by_mean(tmp_path: Path) -> None:
    left, right = tone(0.2, frequency=300), tone(0.2, frequency=500)
    ref = write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    np.testing.assert_allclose(read_audio(ref).samples, (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("target", [24000, 8000])
def test_resampling_keeps_length_and_pitch(tmp_path: Path, target: int) -> None:
    """Guards against a clip taken at another rate in silence (2 s at 16 kHz read as 34 codec frames, not 50)."""
    decoded = read_audio(write(tmp_path / "a.wav", tone(2.0), subtype="FLOAT"), target)
    assert decoded.sampling_rate == target and len(decoded.samples) == pytest.approx(2 * target, abs=3)
    middle = decoded.samples[target // 2 : target // 2 + target]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert np.argmax(spectrum) == 220  # one-second window: bins of 1 Hz
    assert decoded.samples.dtype == np.float32


def test_reads_bytes_and_flac(tmp_path: Path) -> None:
    ref = write(tmp_path / "a.flac", tone(0.5))
    content = (tmp_path / "a.flac").read_bytes()
    np.testing.assert_array_equal(read_audio(AudioRef(data=content)).samples, read_audio(ref).samples)


def test_header_tells_the_whole_file(ramp: AudioRef) -> None:
    info = audio_info(AudioRef(path=ramp.path, offset_seconds=1.0))
    assert (info.duration_seconds, info.sampling_rate, info.num_frames, info.num_channels) == (2.0, RATE, 2 * RATE, 1)


def unreadable(tmp_path: Path, kind: str) -> AudioRef:
    path = tmp_path / f"{kind}.wav"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is not audio at all, whatever its name says")
    elif kind == "folder":
        path.mkdir()
    elif kind == "no_frames":
        write(path, np.zeros(0, np.float32))
    elif kind == "nan":
        write(path, np.array([0.1, np.nan, 0.2], np.float32), subtype="FLOAT")
    elif kind == "raw":
        path = tmp_path / "a.raw"
        path.write_bytes(b"\1\2" * 100)
    return AudioRef(path=str(path))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("empty", "the file is empty (0 bytes)"),
        ("text", "not audio libsndfile can read"),
        ("folder", "not a regular file"),
        ("no_frames", "holds no audio frames"),
        ("nan", "holds NaN or infinite samples"),
        ("raw", "headerless raw samples"),
    ],
)
def test_unreadable_audio_is_an_error_naming_file_and_reason(tmp_path: Path, kind: str, reason: str) -> None:
    """Guards against unreadable audio replaced by zeros."""
    ref = unreadable(tmp_path, kind)
    with pytest.raises(AudioError) as caught:
        read_audio(ref)
    assert str(ref.path) in str(caught.value) and reason in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_forbidden_file(ramp: AudioRef) -> None:
    assert ramp.path is not None
    Path(ramp.path).chmod(0)
    with pytest.raises(AudioError, match="Permission denied"):
        read_audio(ramp)


@pytest.mark.parametrize(
    ("offset", "duration", "reason"),
    [
        (2.0, None, "lies past the end of the file"),
        (-0.1, None, "is negative"),
        (0.0, 0.0, "the segment is empty"),
        (1.0, 1.6, "the segment ends at 2.60 s, but the file is 2.00 s long"),
    ],
)
def test_segments_outside_the_file(ramp: AudioRef, offset: float, duration: float | None, reason: str) -> None:
    with pytest.raises(AudioError, match=reason):
        read_audio(AudioRef(path=ramp.path, offset_seconds=offset, duration_seconds=duration))


def test_segment_slightly_past_the_end_is_cut(ramp: AudioRef) -> None:
    decoded = read_audio(AudioRef(path=ramp.path, offset_seconds=1.0, duration_seconds=1.4))
    assert decoded.duration_seconds == 1.0


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    """Guards against a cut file passing as a shorter one: FLAC fails to decode, MP3 just ends early."""
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * RATE).astype(np.float32)
    path = tmp_path / f"a.{suffix}"
    ref = AudioRef(path=str(path))
    soundfile.write(path, noise, RATE)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert audio_info(ref).duration_seconds == 4.0  # the header still promises all of it
    with pytest.raises(AudioError, match=r"truncated|cannot be decoded"):
        read_audio(ref)


def test_limits(ramp: AudioRef, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ramp.path is not None
    monkeypatch.setattr(audio, "MAX_DECODED_VALUES", 1000)
    with pytest.raises(AudioError, match="too large to decode: 2 s"):
        read_audio(ramp)
    monkeypatch.setattr(audio, "MAX_FILE_BYTES", 1000)
    with pytest.raises(AudioError, match="exceed the limit of 1000 bytes"):
        read_audio(ramp)
    monkeypatch.setattr(audio, "MAX_INLINE_BYTES", 1000)
    with pytest.raises(AudioError, match="exceeds the limit of 1000 bytes for inline audio"):
        read_audio(AudioRef(data=Path(ramp.path).read_bytes()))


class _Server(http.server.BaseHTTPRequestHandler):
    content = b""

    def do_GET(self) -> None:
        if self.path == "/to-file":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/etc/passwd")
            self.end_headers()
        elif self.path == "/a.wav":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.content)
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server(ramp: AudioRef, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    assert ramp.path is not None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(_Server, "content", Path(ramp.path).read_bytes())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_urls_are_refused_unless_allowed(server: str, ramp: AudioRef) -> None:
    ref = AudioRef(url=f"{server}/a.wav")
    with pytest.raises(AudioError, match="refused"):
        read_audio(ref)
    np.testing.assert_array_equal(read_audio(ref, allow_urls=True).samples, read_audio(ramp).samples)
    assert audio_info(ref, allow_urls=True).duration_seconds == 2.0


def test_downloads_fail_with_a_reason(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AudioError, match="download failed: Not Found"):
        read_audio(AudioRef(url=f"{server}/none.wav"), allow_urls=True)
    with pytest.raises(AudioError, match=r"download failed: .*ftp"):
        read_audio(AudioRef(url=f"{server}/to-file"), allow_urls=True)
    monkeypatch.setattr(audio, "MAX_INLINE_BYTES", 1000)
    with pytest.raises(AudioError, match="the download exceeds the limit"):
        read_audio(AudioRef(url=f"{server}/a.wav"), allow_urls=True)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a.wav", "data:audio/wav;base64,AAAA", "a.wav"])
def test_other_schemes_are_refused_even_when_urls_are_allowed(url: str) -> None:
    with pytest.raises(AudioError, match="only http and https"):
        read_audio(AudioRef(url=url), allow_urls=True)


def test_write_and_read_back(tmp_path: Path) -> None:
    samples = np.concatenate([tone(0.1), np.array([1.7, -1.7], np.float32)])
    write_wav(tmp_path / "out.wav", Audio(samples, 24000))
    decoded = read_audio(AudioRef(path=str(tmp_path / "out.wav")))
    assert decoded.sampling_rate == 24000
    np.testing.assert_allclose(decoded.samples, np.clip(samples, -1, 1), atol=1 / 32768)


def test_write_refuses(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="NaN"):
        write_wav(tmp_path / "nan.wav", Audio(np.array([np.nan], np.float32), RATE))
    assert not (tmp_path / "nan.wav").exists()
    with pytest.raises(AudioError, match=r"none/a\.wav: cannot be written: No such file"):
        write_wav(tmp_path / "none" / "a.wav", Audio(tone(0.1), RATE))


@pytest.mark.parametrize(("right", "cancels"), [(-1, True), (-0.97, True), (-0.5, False), (0, False)])
def test_channels_that_cancel_each_other_out_are_an_error(tmp_path: Path, right: float, cancels: bool) -> None:
    """Guards against speech that is silence once it is mixed down."""
    both = np.stack([tone(0.2), right * tone(0.2)], axis=1)
    ref = write(tmp_path / "stereo.wav", both)
    if cancels:
        with pytest.raises(AudioError, match="channels cancel each other out"):
            read_audio(ref)
    else:
        assert np.abs(read_audio(ref).samples).max() > 0.01
    assert not np.any(read_audio(write(tmp_path / "zero.wav", np.zeros_like(both))).samples)


def test_ids_that_read_alike_name_different_files(tmp_path: Path) -> None:
    """Guards against two samples that share one wav: `Yes!` and `Yes?`, `s/1` and `s 1`, long ids."""
    ids = ["Yes!", "Yes?", "Yes_", "s/1", "s 1", "s_1", "", ".", "..", ".a", "a", "/a", "é?", "é!", "\ud800", "a\0b"]
    ids += ["x" * 5000, "x" * 5001, "字" * 300, "字" * 301]
    names = {file_name(sample_id) for sample_id in ids}
    assert len(names) == len(ids)
    for name in names:
        (tmp_path / f"{name}.wav").touch(exist_ok=False)
    assert len(list(tmp_path.iterdir())) == len(ids) and not [name for name in names if name.startswith(".")]
    assert [file_name(plain) for plain in ("LJ001-0001", "a_b.c", "日本")] == ["LJ001-0001", "a_b.c", "日本"]


def test_content_hash_follows_bytes_and_segment_not_the_path(ramp: AudioRef, tmp_path: Path) -> None:
    """Guards against cache keys made of the path alone."""
    assert ramp.path is not None
    content = Path(ramp.path).read_bytes()
    (tmp_path / "copy.wav").write_bytes(content)
    whole = content_hash(ramp)
    assert len(whole) == 64
    assert whole == content_hash(AudioRef(path=str(tmp_path / "copy.wav"))) == content_hash(AudioRef(data=content))
    others = [
        content_hash(AudioRef(path=ramp.path, offset_seconds=0.5)),
        content_hash(AudioRef(path=ramp.path, duration_seconds=0.5)),
        content_hash(AudioRef(path=ramp.path, offset_seconds=0.5, duration_seconds=0.5)),
    ]
    Path(ramp.path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert len({whole, *others, content_hash(ramp)}) == 5
    with pytest.raises(AudioError, match="no such file"):
        content_hash(AudioRef(path=str(tmp_path / "none.wav")))


@pytest.mark.parametrize(
    ("samples", "codes"),
    [
        (tone(1.0), []),
        (tone(1.0, level=0.003), []),  # quiet speech is speech
        (np.zeros(RATE, np.float32), ["silent"]),
        (np.full(RATE, 0.5, np.float32), ["silent"]),  # a constant offset is silence too
        (np.zeros(0, np.float32), ["silent"]),
        (np.clip(tone(1.0, level=2.0), -1, 1), ["clipped"]),
        (tone(1.0, level=1.0), []),  # normalised to full scale is not clipped
        (np.array([0.1, np.inf, 0.2], np.float32), ["not_finite"]),
        (np.array([0.1, np.nan, 0.2], np.float32), ["not_finite"]),
    ],
)
def test_defects(samples: np.ndarray, codes: list[str]) -> None:
    assert [code for code, _ in find_defects(Audio(samples, RATE))] == codes


@pytest.mark.parametrize("rate", [None, 16000, 24000])
def test_a_stream_is_the_file_block_by_block(tmp_path: Path, rate: int | None) -> None:
    left, right = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 70 * 8000))
    ref = write(tmp_path / "long.flac", np.stack([left, right], axis=1), 8000)
    blocks = list(stream_audio(ref, rate))
    whole = read_audio(ref, rate)
    assert len(blocks) == 3 and max(map(len, blocks)) <= 31 * whole.sampling_rate
    assert np.allclose(np.concatenate(blocks), whole.samples, atol=1e-5)


def test_a_stream_refuses_what_reading_refuses(tmp_path: Path) -> None:
    ref = write(tmp_path / "a.wav", np.stack([tone(1), -tone(1)], axis=1))
    with pytest.raises(AudioError, match="opposite phase"):
        list(stream_audio(ref))
    ref = write(tmp_path / "b.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 40 * RATE))
    content = (tmp_path / "b.flac").read_bytes()
    (tmp_path / "b.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match=r"truncated|decoded"):
        list(stream_audio(ref))


def test_flac_of_24_bits_keeps_samples(tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_bytes(flac_bytes(Audio(tone(1), RATE)))
    samples, rate = soundfile.read(tmp_path / "a.flac", dtype="float32")
    assert rate == RATE and np.abs(samples - tone(1)).max() < 2**-22
