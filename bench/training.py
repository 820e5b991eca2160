"""Training throughput against `peers/higgs_trainer.py`: model, data, LoRA, optimizer, threads, samples per step alike.

Both sides are timed by one hook that torch calls behind every optimizer step, so what a loop does between its steps
counts in full; tokens are real positions, without padding. The first step is left out, and the steps timed see each
sample once. Ours is `speechtune.loop.Run` with its guards on. The peer runs at the best of its settings, found first
with the same data; that table is part of the result. Rates by CPU time stand beside those by the clock: other programs
on the machine bend them less.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from meter import Meter, Rate, metered, quiet
from ours import prepare, train_ours
from peers import higgs_trainer as peer
from voices import LORA_ALPHA, LORA_RANK, RATE, SAMPLES_PER_STEP, SEED, SYSTEM

SAMPLES = 32
TIMED_STEPS = SAMPLES // SAMPLES_PER_STEP
TRIES, LOADERS = 2, 2
COMPARED = ("mixed", "equal")
CANDIDATES = (
    peer.Settings(1, 8),
    peer.Settings(4, 2),
    peer.Settings(8, 1),
    peer.Settings(1, 8, "random"),
    peer.Settings(4, 2, "random"),
    peer.Settings(8, 1, "random"),
    peer.Settings(4, 2, "batch_rebalance"),
)


def train_peer(base: Path, data: Path, folder: Path, steps: int, settings: peer.Settings) -> tuple[Meter, list[float]]:
    """Train with the peer's script; the meter, and the loss of every micro-batch."""
    model = peer.load_model(str(base / "model"), LORA_RANK, LORA_ALPHA, SEED)
    voices = peer.Voices(str(base / "model"), data, SYSTEM)
    losses: list[torch.Tensor] = []
    with metered() as meter:

        def count(_: object, __: object, inputs: dict[str, torch.Tensor], output: Any) -> None:
            meter.tokens += int(inputs["attention_mask"].sum())
            losses.append(output.loss.detach())

        model.get_base_model().register_forward_hook(count, with_kwargs=True)
        peer.make_trainer(model, voices, settings, steps, folder / "peer", RATE).train()
    return meter, [float(loss) for loss in losses]


@dataclass(frozen=True)
class Setting:
    """Where the runs of one distribution of lengths find their base and data, and may write."""

    base: Path
    data: Path
    folder: Path

    def ours(self, steps: int = TIMED_STEPS + 1) -> Rate:
        """Real tokens a second of ours."""
        return train_ours(self.base, self.data, self.folder, steps)[0].rate()

    def peer(self, settings: peer.Settings, steps: int = TIMED_STEPS + 1) -> Rate:
        """Real tokens a second of the peer."""
        return train_peer(self.base, self.data, self.folder, steps, settings)[0].rate()


def measure(pairs: int = 5) -> dict[str, list[float]]:
    """Ratios and rates on mixed and equal lengths, and the rates of all the peer's settings."""
    result: dict[str, list[float]] = {}
    with quiet(), tempfile.TemporaryDirectory(prefix="speechtune-bench-") as name:
        for lengths in COMPARED:
            data = prepare(Path(name), lengths, SAMPLES)
            setting = Setting(Path(name) / "base", data, Path(name) / f"{lengths}-runs")
            result |= compare(setting, lengths, pairs)
    return result


def compare(setting: Setting, lengths: str, pairs: int) -> dict[str, list[float]]:
    """Find the peer's best settings, then alternate; which side begins changes from pair to pair."""
    tried: dict[peer.Settings, list[float]] = {settings: [] for settings in CANDIDATES}
    for _ in range(min(pairs, TRIES)):  # round by round: what slows the machine for a while slows all of them
        for settings in tried:
            tried[settings].append(setting.peer(settings).wall)
    fastest = max(tried, key=lambda settings: median(tried[settings]))
    loading = replace(fastest, workers=LOADERS)
    tried[loading] = [setting.peer(loading).wall for _ in range(min(pairs, TRIES))]
    best = max(tried, key=lambda settings: median(tried[settings]))
    rates: dict[str, list[Rate]] = {"ours": [], "peer": []}
    for pair in range(pairs):
        for side in ("ours", "peer") if pair % 2 else ("peer", "ours"):
            rates[side].append(setting.ours() if side == "ours" else setting.peer(best))
    both = list(zip(rates["ours"], rates["peer"], strict=True))
    result = {
        f"{lengths} lengths: ours / peer": [ours.wall / peers.wall for ours, peers in both],
        f"{lengths} lengths: ours / peer, by CPU time": [ours.cpu / peers.cpu for ours, peers in both],
        f"{lengths} lengths: ours, tokens/s": [ours.wall for ours, _ in both],
        f"{lengths} lengths: peer, tokens/s ({best})": [peers.wall for _, peers in both],
    }
    return result | {f"{lengths} lengths: peer tried, {name}": values for name, values in tried.items()}
