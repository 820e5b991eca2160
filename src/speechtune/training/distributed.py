"""Training on several ranks: joining them, DDP (the model on each) or FSDP2 (its weights sharded), and sums over ranks.

Sharding is torch's own `fully_shard`: accelerate, given an FSDP plugin on a CPU, ran DDP without saying so.
"""

import hashlib
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from speechtune.config import RunConfig, is_first_rank, num_prompts, world_size
from speechtune.errors import CheckpointError, ConfigError, SpeechtuneError, TrainingError
from speechtune.training.tracking import configure_logging

log = logging.getLogger("speechtune")

SETUP_TIMEOUT = timedelta(hours=12)  # ranks wait while one encodes clips, generates samples or saves a model


def start_accelerator(config: RunConfig) -> Accelerator:
    """Join the other ranks, if any, and check that accelerate did.

    Raises ConfigError: an option, or the launch, cannot work on these ranks; TrainingError: accelerate runs another
    kind of job than was launched.
    """
    tracking, ranks = config.tracking, world_size()
    for name in tracking.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.trackers: {name} is not installed: pip install {name}, or name another tracker"
            )
    if config.speed.parallel == "fsdp":
        _check_sharding(config)
    if ranks > 1:
        if "MASTER_ADDR" not in os.environ:
            raise ConfigError(f"WORLD_SIZE={ranks} without MASTER_ADDR: start several processes with torchrun")
        _check_restarts()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # without this accelerate starts single processes under torchrun on a CPU
        log_with=list(tracking.trackers) or None,
        project_dir=tracker_folder(config),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=SETUP_TIMEOUT)],
    )
    expected = {DistributedType.NO} if ranks == 1 else {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if accelerator.distributed_type not in expected or accelerator.num_processes != ranks:
        raise TrainingError(
            f"{ranks} processes were launched, accelerate runs {accelerator.distributed_type.value} with "
            f"{accelerator.num_processes}; check ACCELERATE_* in the environment"
        )
    configure_logging(accelerator.is_main_process)
    return accelerator


def tracker_folder(config: RunConfig) -> Path:
    """Where trackers write: a folder of the run's own, also in a `tracking.logging_dir` that several runs share."""
    if (shared := config.tracking.logging_dir) is None:
        return config.output_dir / "logs"
    run = config.output_dir.resolve()
    return shared / f"{run.name}-{hashlib.sha256(os.fsencode(run)).hexdigest()[:8]}"


def _check_sharding(config: RunConfig) -> None:
    if world_size() == 1:
        raise ConfigError(
            "speed.parallel=fsdp: there is one process, so nothing can be sharded: start several with torchrun, or set "
            "speed.parallel=ddp"
        )
    if num_prompts(config):
        raise ConfigError(
            "speed.parallel=fsdp: samples are generated on one rank, which has only its share of the weights: set "
            "evaluate.prompts=0 and run speechtune evaluate afterwards, or set speed.parallel=ddp"
        )
    for option, value in (
        ("batch.tokens", config.batch.tokens),
        ("train.gradient_checkpointing", config.train.gradient_checkpointing),
    ):
        if value == "auto":
            raise ConfigError(f"speed.parallel=fsdp: {option}=auto measures a model that is not sharded: name a value")


def _check_restarts() -> None:
    """Refuse restarts that would connect new processes to the addresses of the old ones (pytorch issue 135712)."""
    shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise ConfigError(
            "torchrun --max-restarts: a restart would connect to the processes of the attempt before it; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun, and start several nodes with "
            "--rdzv-backend=c10d"
        )


def on_first_rank(work: Callable[[], object]) -> None:
    """Do something on rank 0 alone, the others wait; where it fails, all of them raise its error."""
    error: SpeechtuneError | None = None
    if is_first_rank():
        try:
            work()
        except SpeechtuneError as raised:
            error = raised
    (error,) = broadcast_object_list([error])
    if error is not None:
        raise error


def check_same_checkpoint(accelerator: Accelerator, chosen: Path | None) -> None:
    """All ranks resume from the same checkpoint; a node that sees another disk would start from the beginning."""
    names = cast(list[str], gather_object([chosen.name if chosen else "none"]))
    if len(set(names)) > 1:
        raise CheckpointError(
            f"the ranks see different checkpoints to resume from ({', '.join(names)}, in order of rank): output_dir "
            "must lie on a disk that all nodes share"
        )


class Engine:
    """Model and loss as one module: `objective` for the passes of training on this rank, `plain` for evaluation.

    With `fsdp` it is sharded in place; `defer` then adds up unsharded gradients until a step's last micro-batch: right
    for an adapter, whose gradients are small; those of a full model would fill the memory that sharding frees.
    """

    def __init__(
        self, objective: nn.Module, accelerator: Accelerator, parallel: Literal["ddp", "fsdp"], *, defer: bool
    ) -> None:
        self.accelerator, self.defer = accelerator, defer
        if parallel == "fsdp":
            self.objective = self.plain = shard(objective, accelerator)
        else:
            self.objective = accelerator.prepare(objective)
            self.plain = accelerator.unwrap_model(self.objective)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward pass; ranks add up gradients in the `last` one of a step."""
        if isinstance(self.objective, FSDPModule):
            self.objective.set_requires_gradient_sync(last or not self.defer)
            yield
        elif last:
            yield
        else:
            with self.accelerator.no_sync(self.objective):
                yield


def shard(objective: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard every repeated block of a model, then what is left, over all ranks, and check that it happened."""
    ranks = accelerator.num_processes
    mesh = init_device_mesh(accelerator.device.type, (ranks,), mesh_dim_names=("shard",))
    layers = blocks(objective)
    if not layers:
        raise TrainingError(
            "speed.parallel=fsdp: the model names no repeated blocks (_no_split_modules), so every pass would gather "
            "all of it on each rank: use speed.parallel=ddp"
        )
    # The root reshards after its forward pass too, so that outside a pass every parameter is a shard.
    for module in (*layers.values(), objective):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    held, total = check_sharded(dict(objective.named_parameters()), ranks)
    shares = cast(list[int], gather_object([held]))
    if sum(shares) != total:
        raise TrainingError(f"speed.parallel=fsdp: ranks hold {shares} bytes, together not the model's {total}")
    per_rank = ", ".join(f"{share / 1e6:,.3f}" for share in shares)
    message = "FSDP2: %d blocks and the rest sharded over %d ranks; MB per rank: %s of %.3f"
    log.info(message, len(layers), ranks, per_rank, total / 1e6)
    return objective


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers of a model: what its classes name in `_no_split_modules`, subclasses of these included."""
    names = {str(name) for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return {
        path: module
        for path, module in model.named_modules()
        if any(kind.__name__ in names for kind in type(module).__mro__) and any(True for _ in module.parameters())
    }


def check_sharded(parameters: Mapping[str, nn.Parameter], ranks: int) -> tuple[int, int]:
    """Check that every parameter is a shard over `ranks` ranks; returns the bytes held here, and those of the model."""
    unsharded = [name for name, p in parameters.items() if not isinstance(p, DTensor) or p.device_mesh.size() != ranks]
    if unsharded:
        raise TrainingError(
            f"speed.parallel=fsdp: {len(unsharded)} of {len(parameters)} parameters are not sharded over {ranks} ranks "
            f"(first {unsharded[0]})"
        )
    shards = cast(list[DTensor], list(parameters.values()))
    held = sum(p.to_local().numel() * p.element_size() for p in shards)
    return held, sum(p.numel() * p.element_size() for p in shards)


def sum_heads(
    accelerator: Accelerator, per_batch: Sequence[Mapping[str, float]], heads: Sequence[str]
) -> dict[str, float]:
    """Add up per-head numbers over batches and ranks; a head that no batch of any rank had is left out."""
    seen = [{head: value, f"{head} seen": 1.0} for values in per_batch for head, value in values.items()]
    totals = sum_over_ranks(accelerator, seen, [name for head in heads for name in (head, f"{head} seen")])
    return {head: totals[head] for head in heads if totals[f"{head} seen"]}


def sum_over_ranks(
    accelerator: Accelerator, values: Sequence[Mapping[str, float]], names: Sequence[str] | None = None
) -> dict[str, float]:
    """Add up named numbers over a list and over all ranks, in float64; a missing name counts as zero.

    `names` must be the same on every rank; None takes those of the first entry.
    """
    names = list(values[0]) if names is None else names
    local = [math.fsum(value.get(name, 0.0) for value in values) for name in names]
    if accelerator.num_processes > 1:
        total = torch.tensor(local, dtype=torch.float64, device=accelerator.device)
        local = cast(torch.Tensor, accelerator.reduce(total, "sum")).tolist()
    return dict(zip(names, local, strict=True))
