"""Training throughput against `peers/higgs_trainer.py`: model, data, LoRA, optimizer, threads, samples per step alike.

Both sides are timed by one hook that torch calls behind every optimizer step, so what a loop does between its steps
counts in full; tokens are real positions, without padding. The first step is left out, and the steps timed see each
sample once. Ours is `training.loop.Run` with its guards on. The peer trains in padded batches at the best of its
settings, found first with the same data; that table is part of the result. One sample at a time pads nothing, and on
two cores is faster than any padded batch; on a GPU nobody would train so. The ratio to it stands beside the other, held
to no threshold. Rates by CPU time stand beside those by the clock: other programs on the machine bend them less.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
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
        return said(f"{self.data.name}, ours", train_ours(self.base, self.data, self.folder, steps)[0].rate())

    def peer(self, settings: peer.Settings, steps: int = TIMED_STEPS + 1) -> Rate:
        """Real tokens a second of the peer."""
        rate = train_peer(self.base, self.data, self.folder, steps, settings)[0].rate()
        return said(f"{self.data.name}, peer, {settings}", rate)


def said(what: str, rate: Rate) -> Rate:
    """Show a rate as soon as it is known: all of them take minutes."""
    print(f"{what}: {rate.wall:,.0f} tokens/s ({rate.cpu:,.0f} per CPU second)", flush=True)
    return rate


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
    """Find the peer's best settings, then take all sides in turn, in another order each time."""
    tried = try_settings(setting, min(pairs, TRIES))
    padded, single = (
        max((one for one in tried if (one.batch_size > 1) == several), key=lambda settings: max(tried[settings]))
        for several in (True, False)
    )
    sides: dict[str, peer.Settings | None] = {"ours": None, "padded": padded, "single": single}
    rates: dict[str, list[Rate]] = {side: [] for side in sides}
    for pair in range(pairs):
        for side, settings in list(sides.items())[:: 1 if pair % 2 else -1]:
            rates[side].append(setting.ours() if settings is None else setting.peer(settings))
    result: dict[str, list[float]] = {}
    for side, what in (("padded", "peer"), ("single", "peer, one sample a batch")):
        both = list(zip(rates["ours"], rates[side], strict=True))
        result[f"{lengths} lengths: ours / {what}"] = [ours.wall / theirs.wall for ours, theirs in both]
        result[f"{lengths} lengths: ours / {what}, CPU time"] = [ours.cpu / theirs.cpu for ours, theirs in both]
    for side, settings in sides.items():
        name = side if settings is None else f"peer, {settings}"
        result[f"{lengths} lengths: tokens/s, {name}"] = [rate.wall for rate in rates[side]]
    return result | {f"{lengths} lengths: tokens/s, tried: {name}": values for name, values in tried.items()}


def try_settings(setting: Setting, rounds: int) -> dict[peer.Settings, list[float]]:
    """Tokens a second of the peer at each of its settings, and at the best of them with processes that load data."""
    tried: dict[peer.Settings, list[float]] = {settings: [] for settings in CANDIDATES}
    for _ in range(rounds):  # round by round: what slows the machine for a while slows all of them
        for settings in CANDIDATES:
            tried[settings].append(setting.peer(settings).wall)
    fastest = max(tried, key=lambda settings: max(tried[settings]))
    loading = replace(fastest, workers=LOADERS)
    tried[loading] = [setting.peer(loading).wall for _ in range(rounds)]
    return tried
