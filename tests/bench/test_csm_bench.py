"""The bench of CSM compares the same work: both sides see the same clips, and the same number of positions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module", autouse=True)
def _bench_on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def test_both_sides_see_the_same_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over eight clips on either side; the peer's codec is in its loop, ours ran before it."""
    import csm
    from meter import quiet

    from speechtune.families.csm import tiny

    monkeypatch.setattr(csm, "SAMPLES", 8)
    monkeypatch.setattr(csm, "STEPS", 2)
    csm.write_data(tmp_path)
    tiny.make_model(tmp_path / "base", (), hidden_size=32)
    with quiet():
        ours = csm.train_ours(tmp_path, {})
        theirs, codec_share = csm.train_peer(tmp_path, 1.0)
    assert [tokens for *_, tokens in ours.marks] == [tokens for *_, tokens in theirs.marks]
    assert ours.rate().wall > 0 and 0 < codec_share < 1
