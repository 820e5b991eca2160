"""Encoded sets on disk: nothing is encoded twice, nothing damaged is used, nothing missing goes unnoticed."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile

from speechtune.cache import encode as encoding
from speechtune.cache import store as feature_store
from speechtune.cache.encode import ClipHasher, encode_samples
from speechtune.cache.encoded_set import EncodedSet
from speechtune.cache.store import FeatureStore
from speechtune.errors import AudioError, ConfigError, ManifestError
from speechtune.family import Family
from speechtune.types import Audio, AudioRef, Clip, Encoded, Pronunciation, Sample

SAMPLING_RATE = 16_000


@dataclass
class FakeFamily:
    """Features are the clip's samples times 1000, as (num_samples, 1); one token per reference and per feature."""

    name: str = "fake"
    sampling_rate: int = SAMPLING_RATE
    encode_key: str = "fake-1"
    reference_encoder: Any = None
    groups: list[int] = field(default_factory=list)

    def clips(self, sample: Sample) -> tuple[AudioRef, ...]:
        assert sample.audio is not None
        return (*(clip.audio for clip in sample.references), sample.audio)

    def encode_audio(self, audios: list[Audio]) -> list[np.ndarray]:
        self.groups.append(len(audios))
        if any(np.all(audio.samples == 0) for audio in audios):
            raise ValueError("silence")
        return [np.round(audio.samples * 1000).astype(np.int16)[:, None] for audio in audios]

    def encode(self, sample: Sample, features: list[np.ndarray]) -> Encoded:
        return Encoded(sample.id, {"codes": features[-1]}, len(features[-1]) + len(features) - 1, 0.5)

    @property
    def num_encoded(self) -> int:
        return sum(self.groups)


def make_family(**values: object) -> tuple[FakeFamily, Family]:
    family = FakeFamily(**values)  # type: ignore[arg-type]
    return family, cast(Family, family)


def write_clip(path: Path, value: float, num_samples: int = 800) -> AudioRef:
    soundfile.write(path, np.full(num_samples, value, np.float32), SAMPLING_RATE)
    return AudioRef(path=str(path))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Five targets and one shared reference: six distinct clips of different length."""
    reference = Clip(write_clip(tmp_path / "reference.wav", 0.9), "the reference")
    return [
        Sample(
            f"s{i}",
            f"text {i}",
            write_clip(tmp_path / f"{i}.wav", 0.1 * (i + 1), 800 + 160 * i),
            (reference,),
            source=f"train.jsonl:{i + 1}",
        )
        for i in range(5)
    ]


def encode(family: Family, samples: list[Sample], root: Path, **options: object) -> EncodedSet:
    return encode_samples(family, samples, root, quiet=True, **options)  # type: ignore[arg-type]


def test_features_belong_to_their_samples(samples: list[Sample], tmp_path: Path) -> None:
    fake, family = make_family()
    encoded = encode(family, samples, tmp_path / "cache", group_size=2)
    assert fake.groups == [2, 2, 2]
    assert len(encoded) == 5
    for i, item in enumerate(encoded):
        codes = item.arrays["codes"]
        assert item.sample_id == f"s{i}"
        assert codes.shape == (800 + 160 * i, 1) and codes.dtype == np.int16
        assert np.all(codes == round(100 * (i + 1)))
        assert encoded.lengths[i] == 800 + 160 * i + 1
    assert encoded.lengths.tolist() == [801, 961, 1121, 1281, 1441]
    assert encoded.audio_seconds == pytest.approx(2.5)
    report = encoded.report
    assert (report.num_clips, report.num_encoded, report.num_reused) == (6, 6, 0)
    assert report.audio_seconds_encoded == pytest.approx((800 * 6 + 160 * 10) / SAMPLING_RATE)


def test_arrays_are_views_that_cannot_be_written(samples: list[Sample], tmp_path: Path) -> None:
    _, family = make_family()
    codes = encode(family, samples, tmp_path / "cache")[0].arrays["codes"]
    assert not codes.flags.owndata and not codes.flags.writeable
    assert codes.__array_interface__["data"][0] % 64 == 0
    with pytest.raises(ValueError):
        codes[0] = 1


def test_a_second_run_encodes_nothing(samples: list[Sample], tmp_path: Path) -> None:
    encode(make_family()[1], samples, tmp_path / "cache")
    fake, family = make_family()
    report = encode(family, samples, tmp_path / "cache").report
    assert fake.groups == []
    assert (report.num_clips, report.num_encoded, report.num_reused) == (6, 0, 6)


def test_the_same_audio_under_two_names_is_encoded_once(samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "copy.wav").write_bytes((tmp_path / "0.wav").read_bytes())
    inline = AudioRef(data=(tmp_path / "1.wav").read_bytes())
    more = [
        Sample("copy", "copy", AudioRef(path=str(tmp_path / "copy.wav"))),
        Sample("inline", "inline", inline),
    ]
    fake, family = make_family()
    encoded = encode(family, samples + more, tmp_path / "cache")
    assert fake.num_encoded == 6
    assert np.array_equal(encoded[5].arrays["codes"], encoded[0].arrays["codes"])
    assert np.array_equal(encoded[6].arrays["codes"], encoded[1].arrays["codes"])


def test_text_may_change_audio_and_key_may_not(samples: list[Sample], tmp_path: Path) -> None:
    before = encode(make_family()[1], samples, tmp_path / "cache")
    renamed = [replace(sample, text=sample.text + "!") for sample in samples]
    fake, family = make_family()
    after = encode(family, renamed, tmp_path / "cache")
    assert fake.groups == []
    assert before.fingerprint != after.fingerprint

    write_clip(tmp_path / "0.wav", 0.77)
    changed = encode(family, renamed, tmp_path / "cache")
    assert fake.num_encoded == 1
    assert changed.fingerprint != after.fingerprint

    other, family = make_family(encode_key="fake-2")
    rekeyed = encode(family, renamed, tmp_path / "cache")
    assert other.num_encoded == 6
    assert rekeyed.fingerprint != changed.fingerprint


def test_fingerprint_is_stable_and_sees_everything_a_prompt_is_made_of(samples: list[Sample], tmp_path: Path) -> None:
    _, family = make_family()
    reference = encode(family, samples, tmp_path / "cache").fingerprint
    assert encode(make_family()[1], samples, tmp_path / "elsewhere").fingerprint == reference
    first = samples[0]
    changes = [
        replace(first, id="other"),
        replace(first, scene="a hall"),
        replace(first, pronunciation=Pronunciation(scores={"total": 9})),
        replace(first, references=(replace(first.references[0], text="other words"),)),
        replace(first, references=()),
    ]
    found = {encode(family, [change, *samples[1:]], tmp_path / "cache").fingerprint for change in changes}
    found.add(encode(family, samples[::-1], tmp_path / "cache").fingerprint)
    assert reference not in found and len(found) == 6


def test_every_bad_clip_is_named_and_the_good_ones_are_kept(samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "1.wav").write_bytes(b"RIFF no audio at all")
    (tmp_path / "2.wav").unlink()
    write_clip(tmp_path / "3.wav", 0.0)
    fake, family = make_family()
    with pytest.raises(ManifestError) as caught:
        encode(family, samples, tmp_path / "cache")
    message = str(caught.value)
    for number in (1, 2, 3):
        assert f"{number}.wav" in message and f"s{number} (train.jsonl:{number + 1})" in message
    assert "silence" in message and "0.wav" not in message
    issues = caught.value.issues
    assert sorted(Path(issue.source).name for issue in issues) == ["1.wav", "2.wav", "3.wav"]
    assert {issue.code for issue in issues} == {"clip_not_encoded"}

    fake, family = make_family()
    assert len(encode(family, [samples[0], samples[4]], tmp_path / "cache")) == 2
    assert fake.groups == []


def test_shards_divide_the_clips_and_a_missing_share_is_an_error(samples: list[Sample], tmp_path: Path) -> None:
    families = [make_family() for _ in range(3)]
    encoded = [
        encode(family, samples, tmp_path / "cache", shard=(rank, 3)) for rank, (_, family) in enumerate(families[:2])
    ]
    done = [fake.num_encoded for fake, _ in families]
    assert done[2] == 0 and sum(done) < 6, "the third share of these clips is empty; choose other clips"
    with pytest.raises(ManifestError, match="encode the set again"):
        list(encoded[0])
    encode(families[2][1], samples, tmp_path / "cache", shard=(2, 3))
    assert sum(fake.num_encoded for fake, _ in families) == 6
    assert encoded[0].lengths.tolist() == [801, 961, 1121, 1281, 1441]  # finds what the others wrote since


def test_pickled_set_reads_on_its_own(samples: list[Sample], tmp_path: Path) -> None:
    encoded = encode(make_family()[1], samples, tmp_path / "cache")
    lengths = encoded.lengths
    data = pickle.dumps(encoded)
    assert len(data) < 10_000, "the arrays must not travel"
    copy = pickle.loads(data)
    assert np.array_equal(copy[3].arrays["codes"], encoded[3].arrays["codes"])
    assert np.array_equal(copy.lengths, lengths) and copy.fingerprint == encoded.fingerprint


# The store itself


def part(store: FeatureStore, suffix: str, number: int = 0) -> Path:
    return store.folder / f"part-{number:04d}{suffix}"


def filled(root: Path, count: int = 4) -> FeatureStore:
    with FeatureStore(root, "key") as store:
        for i in range(count):
            store.put(f"k{i}", np.full((i + 3, 2), i, np.float32))
    return store


def test_put_and_get_keep_shape_and_dtype(tmp_path: Path) -> None:
    arrays = {
        "vector": np.arange(5, dtype=np.int16),
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "strided": np.arange(20, dtype=np.uint8)[::3],
        "scalar": np.array(3.5, np.float32),
    }
    with FeatureStore(tmp_path, "key") as store:
        for key, array in arrays.items():
            store.put(key, array)
            assert np.array_equal(store.get(key), array)
    for reader in (store, FeatureStore(tmp_path, "key")):
        for key, array in arrays.items():
            found = reader.get(key)
            assert found.dtype == array.dtype and found.shape == array.shape and np.array_equal(found, array)
            assert found.__array_interface__["data"][0] % 64 == 0
    with pytest.raises(KeyError):
        store.get("absent")
    for useless in (np.empty(0), np.array(["text"]), np.array([None])):
        with pytest.raises(ValueError):
            store.put("useless", useless)


def test_torn_index_line_costs_only_that_entry(tmp_path: Path) -> None:
    index = part(filled(tmp_path), ".jsonl")
    whole = index.read_bytes()
    index.write_bytes(whole[:-9])
    with FeatureStore(tmp_path, "key") as store:
        assert [f"k{i}" in store for i in range(4)] == [True, True, True, False]
        store.put("k3", np.full((6, 2), 3, np.float32))
    assert index.read_bytes() == whole
    assert FeatureStore(tmp_path, "key").verify() == []


def test_data_without_index_are_overwritten(tmp_path: Path) -> None:
    data = part(filled(tmp_path), ".bin")
    size = data.stat().st_size
    with data.open("ab") as file:
        file.write(b"left by a killed writer" * 100)
    with FeatureStore(tmp_path, "key") as store:
        store.put("next", np.ones(1, np.uint8))
    assert data.stat().st_size <= size + 64
    assert store.verify() == []


def test_entries_whose_data_are_gone_never_come_back(tmp_path: Path) -> None:
    data = part(filled(tmp_path), ".bin")
    os.truncate(data, data.stat().st_size - 1)
    with FeatureStore(tmp_path, "key") as store:
        assert [f"k{i}" in store for i in range(4)] == [True, True, True, False]
        for i in range(50):  # grows past the lost entry
            store.put(f"new{i}", np.full(7, i, np.int64))
    again = FeatureStore(tmp_path, "key")
    assert "k3" not in again and len(again) == 53 and again.verify() == []


def test_zeros_left_by_a_power_cut_are_dropped_by_the_next_writer(tmp_path: Path) -> None:
    data = part(filled(tmp_path), ".bin")
    content = data.read_bytes()
    data.write_bytes(content[:-16] + bytes(16))
    with FeatureStore(tmp_path, "key") as store:
        assert store.verify() == ["k3"]
        store.put("next", np.ones(3))
    again = FeatureStore(tmp_path, "key")
    assert "k3" not in again and "next" in again and again.verify() == []


def test_a_writer_keeps_all_that_is_whole_however_long_ago_it_was_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "SYNC_ARRAYS", 3)
    data = part(filled(tmp_path, 10), ".bin")
    content = data.read_bytes()
    data.write_bytes(content[:-160] + bytes(160))  # all of k9, and the end of k8
    with FeatureStore(tmp_path, "key") as store:
        assert store.verify() == ["k8", "k9"]
        store.put("next", np.ones(3))
        store.discard(["k1"])
        assert len(store) == 8 and "k1" not in store and "next" in store
    again = FeatureStore(tmp_path, "key")
    assert [f"k{i}" in again for i in range(10)] == [True, False, *[True] * 6, False, False]
    assert len(again) == 8 and again.verify() == []
    assert all(np.array_equal(again.get(f"k{i}"), np.full((i + 3, 2), i, np.float32)) for i in (0, *range(2, 8)))


def test_corrupted_bytes_are_found_named_and_encoded_anew(samples: list[Sample], tmp_path: Path) -> None:
    encoded = encode(make_family()[1], samples, tmp_path / "cache")
    key = encoded.keys[0][0]
    index = part(encoded.store, ".jsonl")
    row = next(row for row in map(json.loads, index.read_text().splitlines()) if row["key"] == key)
    with part(encoded.store, ".bin").open("r+b") as file:
        file.seek(row["offset"] + 2)
        file.write(b"\x55")
    store = FeatureStore(tmp_path / "cache", "fake-1")
    assert store.verify() == [key]
    with pytest.raises(AudioError, match=key):
        store.get(key)

    fake, family = make_family()
    repaired = encode(family, samples, tmp_path / "cache", verify=True)
    assert fake.num_encoded == 1
    assert repaired.store.verify() == []
    straight = encode(make_family()[1], samples, tmp_path / "elsewhere")
    for i in range(5):
        assert all(np.array_equal(*pair) for pair in zip(repaired.features(i), straight.features(i), strict=True))


def test_folder_of_another_key_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path)
    (store.folder / "encode_key.txt").write_text("another codec")
    with pytest.raises(ConfigError, match="another codec"):
        FeatureStore(tmp_path, "key")


@pytest.mark.parametrize("budget", [100, 8010], ids=["in the data", "in the index line"])
def test_full_disk_is_reported_and_leaves_a_sound_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    store = filled(tmp_path)
    store.put("small", np.ones(1))  # opens the part
    sizes = [part(store, suffix).stat().st_size for suffix in (".bin", ".jsonl")]
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal budget
        if budget <= 0:
            raise OSError(28, "No space left on device")
        written = real(descriptor, data[:budget], offset)
        budget -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ConfigError, match="No space left"):
        store.put("big", np.ones(1000))
    monkeypatch.undo()
    left = [part(store, suffix).stat().st_size for suffix in (".bin", ".jsonl")]
    assert left[1] == sizes[1] and left[0] - sizes[0] <= 8000 + 64
    store.put("big", np.ones(500))
    store.close()
    again = FeatureStore(tmp_path, "key")
    assert len(again) == 6 and again.verify() == [] and np.array_equal(again.get("big"), np.ones(500))


def test_a_line_is_never_seen_before_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, reader = os.pwrite, FeatureStore(tmp_path, "key")

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        written = real(descriptor, data[:20], offset)  # a reader looks after every 20 bytes
        reader.refresh()
        assert reader.verify() == []
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    with FeatureStore(tmp_path, "key") as store:
        for i in range(5):
            store.put(f"k{i}", np.full(10 + i, i, np.float32))
            assert f"k{i}" in reader


def test_two_writers_take_two_parts_and_a_free_one_is_reused(tmp_path: Path) -> None:
    with FeatureStore(tmp_path, "key") as first, FeatureStore(tmp_path, "key") as second:
        first.put("a", np.ones(3))
        second.put("b", np.zeros(3))
        assert "b" not in first
        assert np.array_equal(first.get("b"), np.zeros(3))
    with FeatureStore(tmp_path, "key") as third:
        third.put("c", np.ones(2))
    assert sorted(path.name for path in third.folder.glob("*.bin")) == ["part-0000.bin", "part-0001.bin"]


def _write_many(root: Path, start: int, stop: int, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    with FeatureStore(root, "key") as store:
        for i in range(start, stop):
            store.put(f"k{i}", np.full(50 + i, i, np.int32))


def test_concurrent_processes_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [
        context.Process(target=_write_many, args=(tmp_path, *share, barrier)) for share in ((0, 200), (150, 350))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    store = FeatureStore(tmp_path, "key")
    assert len(store) == 350 and store.verify() == []
    assert all(np.array_equal(store.get(f"k{i}"), np.full(50 + i, i, np.int32)) for i in range(350))


# Remembered hashes


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[AudioRef]:
    """Every clip whose bytes were really hashed."""
    calls: list[AudioRef] = []
    real = encoding.content_hash

    def counted(ref: AudioRef, *, allow_urls: bool = False) -> str:
        calls.append(ref)
        return real(ref, allow_urls=allow_urls)

    monkeypatch.setattr(encoding, "content_hash", counted)
    return calls


def settle(path: Path) -> None:
    os.utime(path, (1e9, 1e9))


def test_hash_of_an_unchanged_file_is_remembered(tmp_path: Path, hashed: list[AudioRef]) -> None:
    ref = write_clip(tmp_path / "a.wav", 0.5)
    settle(tmp_path / "a.wav")
    first = ClipHasher(tmp_path)(ref)
    with (tmp_path / "hashes.jsonl").open("ab") as file:
        file.write(b'{"file": ["torn')
    again = ClipHasher(tmp_path)
    assert again(ref) == first and len(hashed) == 1
    segment = again(replace(ref, offset_seconds=0.01))
    assert segment != first and len(hashed) == 2
    assert ClipHasher(tmp_path)(replace(ref, offset_seconds=0.01)) == segment and len(hashed) == 2


def test_changed_file_of_the_same_size_and_time_is_hashed_again(tmp_path: Path, hashed: list[AudioRef]) -> None:
    ref = write_clip(tmp_path / "a.wav", 0.5)
    settle(tmp_path / "a.wav")
    first = ClipHasher(tmp_path)(ref)
    write_clip(tmp_path / "a.wav", 0.6)
    settle(tmp_path / "a.wav")
    assert ClipHasher(tmp_path)(ref) != first and len(hashed) == 2


def test_young_files_and_inline_bytes_are_always_hashed(tmp_path: Path, hashed: list[AudioRef]) -> None:
    ref = write_clip(tmp_path / "a.wav", 0.5)
    inline = AudioRef(data=(tmp_path / "a.wav").read_bytes())
    hasher = ClipHasher(tmp_path)
    assert hasher(ref) == hasher(ref) == hasher(inline) == hasher(inline)
    assert len(hashed) == 4
