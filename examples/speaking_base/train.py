"""Train the speaking base on chains of clips; stop it at any time, start it again, and it goes on exactly.

    torchrun --nproc-per-node 2 examples/speaking_base/train.py --features features --codes codes --codec codec \\
        --tokenizer tokenizer --output run --base base

Each process makes its share of a step's chains; on two cores that is 1.3 times as fast as one process of two threads.
New shards of codes are taken in when the run is started anew.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from chains import Chains, Clips, Guided
from model import SpeakingBase, entry_features, make_config, nearest_entries, total_loss
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from write_base import write_base

from speechtune.families.higgs_audio_v2.codec_world import WorldCodec
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.families.higgs_audio_v2.options import Config, HiggsModelConfig
from speechtune.types import Batch

BETAS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.95), 0.1, 1.0
WARMUP_STEPS, AVERAGED_STEPS = 100, 500
DECAY_SHARE, LAST_RATE = 0.4, 0.03
GUIDANCE_FADES, GUIDANCE_LATE = 0.6, 0.3  # share of the steps after which guidance is weaker, and how strong it is then


class TrainingFamily(HiggsAudioV2Family):
    """The family with configuration, tokenizer and codec that lie in memory."""

    def __init__(self, config: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(Config.model_construct(model=HiggsModelConfig.model_construct(path=""), batch=_Packed()))
        vars(self).update(model_config=config, tokenizer=tokenizer)


class _Packed:
    packing = True


class Run:
    """Everything that a run saves and loads."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.output, self.arguments = cast(Path, arguments.output), arguments
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(arguments.seed)
        self.codec = WorldCodec(str(arguments.codec))
        self.tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(arguments.tokenizer))
        config = make_config(self.tokenizer, self.codec, arguments.hidden, arguments.layers)
        self.device = torch.device(arguments.device)
        self.base = SpeakingBase(config, entry_features(self.codec)).to(self.device)
        if arguments.compile:
            self.base.compile_parts()
        matrices = [p for n, p in self.base.named_parameters() if "_proj" in n]
        others = [p for n, p in self.base.named_parameters() if "_proj" not in n]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=BETAS, fused=True)
        self.average = {name: value.detach().clone() for name, value in self.base.state_dict().items()}
        self.step, self.positions, self.seconds = 0, 0, 0.0
        if (self.output / "state.json").is_file():
            self.load()
        self.clips = Clips(arguments.codes, arguments.features, self.tokenizer)
        family = TrainingFamily(config, self.tokenizer)
        neighbours = nearest_entries(self.codec)
        self.chains = Chains(family, self.clips, self.codec, neighbours, arguments.seed, arguments.chain_positions)

    def save(self) -> None:
        """Write the state; the file that names it comes last."""
        self.output.mkdir(parents=True, exist_ok=True)
        tensors = {f"base.{name}": value for name, value in self.base.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        name = f"state-{self.step}.safetensors"
        save_file({key: value.detach().cpu().clone() for key, value in tensors.items()}, self.output / name)
        state = {"step": self.step, "positions": self.positions, "seconds": self.seconds, "tensors": name}
        state["arguments"] = {key: str(value) for key, value in vars(self.arguments).items()}
        temporary = self.output / f"state.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(state, indent=1), encoding="utf-8")
        temporary.replace(self.output / "state.json")
        for old in self.output.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self) -> None:
        """Take up the saved state."""
        state = json.loads((self.output / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(self.output / state["tensors"])
        parts: dict[str, dict[str, torch.Tensor]] = {"base": {}, "average": {}, "optimizer": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self.base.load_state_dict(parts["base"])
        self.average = {name: value.to(self.device) for name, value in parts["average"].items()}
        saved: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in parts["optimizer"].items():
            index, _, name = key.partition(".")
            saved.setdefault(int(index), {})[name] = value
        whole = self.optimizer.state_dict()
        whole["state"] = saved
        self.optimizer.load_state_dict(whole)
        self.step, self.positions, self.seconds = state["step"], state["positions"], state["seconds"]

    def learning_rate(self) -> float:
        """Warm-up, a plateau, and a linear decay at the end of the steps there are."""
        left = (self.arguments.steps - self.step) / (DECAY_SHARE * self.arguments.steps)
        scale = min(1.0, (self.step + 1) / WARMUP_STEPS, max(LAST_RATE, left))
        return self.arguments.learning_rate * scale

    def own_chains(self) -> range:
        """Which of a step's chains this process makes."""
        return range(self.rank, self.arguments.chains, self.world)

    def share_gradients(self, num_tokens: int) -> int:
        """Give each process the mean of all gradients; returns the sum of their tokens."""
        if self.world == 1:
            return num_tokens
        gradients = [p.grad for p in self.base.parameters() if p.grad is not None]
        tokens = gradients[0].new_tensor([num_tokens])
        sums = torch.cat([*(gradient.flatten() for gradient in gradients), tokens])
        dist.all_reduce(sums)
        parts = (sums[:-1] / self.world).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return int(sums[-1])

    def train_step(self, made: tuple[Batch, Guided] | None = None) -> dict[str, float]:
        """One step, on the batch that was made for it; returns its losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        batch, guided = (part.to(self.device) for part in made or self.chains.batch(self.step, self.own_chains()))
        guidance = 1.0 if self.step < GUIDANCE_FADES * self.arguments.steps else GUIDANCE_LATE
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.bf16), parametrize.cached():
            losses = self.base.losses(batch, guided)
            loss = total_loss(losses, guidance)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.positions += self.share_gradients(batch.num_tokens)
        nn.utils.clip_grad_norm_(self.base.parameters(), CLIP_NORM)
        self.optimizer.step()
        share = 1 / min(self.step + 1, AVERAGED_STEPS)
        with torch.no_grad():
            state = self.base.state_dict()
            torch._foreach_lerp_([self.average[name] for name in state], list(state.values()), share)
        self.step += 1
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"step {self.step}: the loss is {loss.item()}")
        return {name: value.item() for name, value in losses.items()}

    @torch.no_grad()
    def development(self) -> dict[str, float]:
        """Losses of the averaged weights on clips that no batch holds."""
        current = {name: value.detach().clone() for name, value in self.base.state_dict().items()}
        self.base.load_state_dict(self.average)
        made = (part.to(self.device) for part in self.chains.development_batch(48))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.bf16), parametrize.cached():
            losses = self.base.losses(*made)
        self.base.load_state_dict(current)
        return {name: value.item() for name, value in losses.items()}


class Steps(torch.utils.data.Dataset[tuple[Batch, Guided]]):
    """The batches that a run has still to take, one after the other."""

    def __init__(self, run: Run) -> None:
        self.chains, self.own = run.chains, run.own_chains()
        self.first, self.count = run.step, run.arguments.steps - run.step

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Batch, Guided]:
        return self.chains.batch(self.first + index, self.own)


def show(losses: dict[str, float]) -> str:
    """Losses on one line."""
    books = " ".join(f"{value:.2f}" for name, value in losses.items() if name.startswith("codebook"))
    return books + " " + " ".join(f"{name} {value:.2f}" for name, value in losses.items() if "codebook" not in name)


def main() -> None:
    """Train until the last step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("--features", "--codes", "--codec", "--tokenizer", "--output"):
        parser.add_argument(name, type=Path, required=True)
    for name, default in (("--steps", 4_800), ("--chains", 12), ("--chain-positions", 320), ("--hidden", 256),
                          ("--layers", 6), ("--seed", 0), ("--threads", 1), ("--save-every", 200),
                          ("--workers", 0)):  # fmt: skip
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--base", type=Path, help="where to write the finished base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--compile", action="store_true", help="a minute to begin with, a third faster after it")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    run = Run(arguments)
    first = run.rank == 0
    size = sum(p.numel() for p in run.base.native().parameters()) / 1e6
    voices = len(run.clips.by_voice)
    if first:
        print(f"{run.clips.count} clips, {voices} voices, {size:.2f} M parameters, step {run.step}", flush=True)
    last, sums = time.monotonic(), dict[str, float]()
    for made in torch.utils.data.DataLoader(Steps(run), batch_size=None, num_workers=arguments.workers):
        losses = run.train_step(made)
        sums = {name: sums.get(name, 0.0) + value / 50 for name, value in losses.items()}
        if first and run.step % 50 == 0:
            now = time.monotonic()
            run.seconds += now - last
            last = now
            print(f"step {run.step} {run.positions / run.seconds:.0f} positions/s {show(sums)}", flush=True)
            sums = {}
        if first and run.step % arguments.save_every == 0:
            run.save()
            print(f"   development {show(run.development())}", flush=True)
    if not first:
        return
    run.save()
    if arguments.base and run.step == arguments.steps:
        write_base(arguments.output, arguments.codec, arguments.tokenizer, arguments.base)


if __name__ == "__main__":
    main()
