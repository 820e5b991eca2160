"""The mixed load of bench/serve.py, short: all that it asks is answered as it should be."""

import pytest
from serve import KINDS, soak


@pytest.mark.slow
def test_a_short_soak() -> None:
    found = soak(minutes=1 / 3)
    assert not found["unexpected"], found
    assert sum(found["asked"].values()) >= len(KINDS) and found["files"] == [".lock", "heart.json"]
    assert found["mib_warm"] > 100 and found["growth"] < 0.2, "a third of a minute is too short for less"
