"""Checks before a run: the machine, the files, the data, and one real training step; each with its cure."""

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import torch
from packaging.requirements import Requirement
from peft import PeftModel
from rich.table import Table
from torch import nn

from speechtune.cache.encode import encode_samples
from speechtune.cache.encoded_set import EncodedSet
from speechtune.commands import print_json, wide_console
from speechtune.config import RunConfig
from speechtune.errors import SpeechtuneError
from speechtune.families import create_family, load_config
from speechtune.lora.additions import addition_state
from speechtune.lora.apply import (
    apply_lora,
    count_by_component,
    load_adapter,
    load_base,
    model_tensors,
    open_initial,
    trainable,
)
from speechtune.lora.files import StoredAdapter, read_adapter
from speechtune.precision import plan_precision
from speechtune.storage.model_folder import inspect_folder, is_missing_folder
from speechtune.storage.verified_folder import check_writable, write_verified
from speechtune.tensors import checksums
from speechtune.training import guards
from speechtune.training.checkpoint import ADAM_MOMENTS, save_weights
from speechtune.training.job import Objective
from speechtune.training.prepare import load_sets

# How far merging may move the logits: what adding the adapter rounds off in the base's own type.
MERGE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
TRIED_SAMPLES = 2


@dataclass(frozen=True, slots=True)
class Result:
    """Outcome of one check, a line of the table."""

    check: str
    verdict: Literal["pass", "warn", "fail"]
    detail: str
    cure: str = ""


def run_doctor(recipe: Path | None, overrides: Sequence[str], *, as_json: bool) -> int:
    """Check the machine, and a recipe if one is given; print the results; 2 when a check failed, else 0."""
    results = list(examine(load_config(recipe, overrides) if recipe else None))
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        table = Table("check", "", "result", "cure")
        colours = {"pass": "green", "warn": "yellow", "fail": "red"}
        for result in results:
            table.add_row(result.check, f"[{colours[result.verdict]}]{result.verdict}[/]", result.detail, result.cure)
        wide_console().print(table)
    return 2 if any(result.verdict == "fail" for result in results) else 0


def examine(config: RunConfig | None) -> Iterator[Result]:
    """All results in order; a step of the trial that fails ends it, as each needs those before it."""
    yield from environment()
    if config is None:
        return
    trial = Trial(config)
    yield attempt("output folder", trial.output_folder)
    yield from model_folders(trial)
    steps = {
        "LoRA targets": trial.targets,
        "data": trial.data,
        "training step": trial.training_step,
        "save and reload": trial.reload,
        "merge": trial.merge,
    }
    for name, step in steps.items():
        result = attempt(name, step)
        yield result
        if result.verdict == "fail":
            return


def attempt(check: str, step: Callable[[], str]) -> Result:
    """Run one step; an error of ours or of the memory becomes a failing line."""
    try:
        return Result(check, "pass", step())
    except SpeechtuneError as error:
        return Result(check, "fail", str(error), "as the message says")
    except torch.cuda.OutOfMemoryError as error:
        cure = "train.gradient_checkpointing=true, a smaller rank, or a larger GPU"
        return Result(check, "fail", f"out of memory: {error}", cure)


def environment() -> Iterator[Result]:
    """Versions, device and the precision that follows from it."""
    yield Result("python", "pass", f"{platform.python_version()} on {platform.platform()}")
    try:
        yield from packages(metadata.requires("speechtune") or ())
    except metadata.PackageNotFoundError:
        yield Result("packages", "warn", "speechtune is not installed: required versions unknown", "pip install -e .")
    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 1e9
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        detail = f"{name}, {memory:.0f} GB, compute capability {capability}, CUDA {torch.version.cuda}"
        yield Result("device", "pass", detail)
    else:
        yield Result("device", "warn", "no CUDA device: a CPU trains small models only", "a CUDA build of torch, a GPU")
    yield Result("precision", "pass", plan_precision().describe())


def packages(requirements: Sequence[str]) -> Iterator[Result]:
    """Installed versions of what is required, the requirements of extras left out."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and "extra" in str(requirement.marker):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = ""
        met = bool(version) and requirement.specifier.contains(version, prereleases=True)
        detail, cure = f"{version or 'missing'}, required is {requirement.specifier}", f"pip install '{requirement}'"
        yield Result(requirement.name, "pass" if met else "fail", detail, "" if met else cure)


def model_folders(trial: "Trial") -> Iterator[Result]:
    """Local folders of the base and its parts file by file; hub ids are checked by the hub's client on download."""
    parts = {"model": (trial.config.model.path, None), **trial.family.parts}
    for part, (place, _) in parts.items():
        name = f"{part} files"
        if is_missing_folder(place):
            yield Result(name, "fail", f"{place}: no such folder", f"correct the path of the {part}")
            continue
        if not Path(place).is_dir():
            yield Result(name, "warn", f"{place} is a hub id: its files are checked when they are downloaded")
            continue
        issues = inspect_folder(Path(place))
        detail = "; ".join(map(str, issues)) or f"{place}: every file opens"
        yield Result(name, "fail" if issues else "pass", detail, "download these files again" if issues else "")


class Trial:
    """One training step of a recipe on a little of its data; each method is a check and returns what it measured."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.family = config, create_family(config)
        self.plan = plan_precision(config.train.precision, full_finetune=not config.lora.enabled)

    def _with_lora(self, model: nn.Module) -> nn.Module:
        settings, seed = self.config.lora, self.config.train.seed
        if settings.enabled:
            model = apply_lora(model, self.family, settings, seed, self.initial)
        self.family.add_to_base(model, self.initial.directory if self.initial else None, training=True)
        return model

    @cached_property
    def initial(self) -> StoredAdapter | None:
        """The adapter that the run starts from."""
        return open_initial(self.family, self.config.lora)

    @cached_property
    def skeleton(self) -> nn.Module:
        """Without memory for weights."""
        return self._with_lora(self.family.skeleton())

    @cached_property
    def model(self) -> nn.Module:
        return self._with_lora(load_base(self.family, self.plan, self.initial))

    @cached_property
    def samples(self) -> tuple[list[Any], list[Any]]:
        return load_sets(self.config, self.family)

    @cached_property
    def encoded(self) -> EncodedSet:
        """The few samples tried."""
        chosen, cache = self.samples[0][:TRIED_SAMPLES], self.config.cache_dir
        return encode_samples(self.family, chosen, cache, allow_urls=self.config.data.allow_urls, quiet=True)

    def output_folder(self) -> str:
        """Permission by writing, and space for what the run will keep."""
        config = self.config
        trained = 4 * sum(parameter.numel() for parameter in trainable(self.skeleton).values())
        kept = config.checkpoint.keep_last + 2  # the best one, and the one being written
        needed = trained * ((1 + ADAM_MOMENTS) * kept + 1)
        check_writable(config.output_dir, needed)
        free = shutil.disk_usage(config.output_dir).free
        return f"written and removed a file; the run keeps {needed / 1e9:.2f} GB, {free / 1e9:.0f} GB are free"

    def targets(self) -> str:
        """LoRA targets by part of the model."""
        if not self.config.lora.enabled:
            return "full fine-tuning: no adapter"
        rows = [row for row in count_by_component(self.skeleton, self.family) if row.trainable]
        return "; ".join(f"{row.component}: {row.trainable:,} trainable" for row in rows)

    def data(self) -> str:
        """The manifest reads, and its first samples encode."""
        training, evaluation = self.samples
        lengths = ", ".join(map(str, self.encoded.lengths))
        return f"{len(training)} training and {len(evaluation)} evaluation samples; the first take {lengths} positions"

    def training_step(self) -> str:
        """One real forward pass, backward pass and optimizer step."""
        config, model = self.config, self.model
        parameters = trainable(model)
        guards.check_trainable(parameters, lora=config.lora.enabled, additions=[n for n, _, _ in addition_state(model)])
        batch = self.family.collate([self.encoded[i] for i in range(len(self.encoded))])
        guards.check_targets(batch, "doctor")
        counts = {head: float(count) for head, count in batch.target_counts.items()}
        objective = Objective(model.train(), self.family, self.plan, config.train.head_weights)
        loss, sums = objective(batch.to(self.plan.device), counts)
        guards.check_losses({h: float(v) / counts[h] for h, v in sums.items()}, "doctor", batch.sample_ids)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), config.train.max_grad_norm))
        guards.check_gradients(parameters, norm, "doctor", batch.sample_ids)
        if config.lora.enabled:
            guards.check_reached(parameters, "doctor")
        before = checksums(parameters)
        torch.optim.AdamW(list(parameters.values()), lr=config.train.learning_rate, weight_decay=0.0).step()
        after = checksums(parameters)
        guards.check_moved(before, after, "doctor")
        watched = [name for name in after if "lora_B" in name] or list(after)
        moved = sum(before[name] != after[name] for name in watched)
        kind = "lora_B" if config.lora.enabled else "tensors"
        return f"loss {float(loss.detach()):.4f}, gradient norm {norm:.3g}, {moved} of {len(watched)} {kind} moved"

    def reload(self) -> str:
        """Save the weights verified, load the adapter onto a fresh base, compare logits."""
        with tempfile.TemporaryDirectory(prefix="speechtune-doctor-") as folder:
            saved = Path(folder) / "saved"
            write_verified(saved, lambda aside: save_weights(self.model, aside, {}), model_tensors(self.model))
            if not self.config.lora.enabled:
                return "the full model reads back bit for bit"
            trained, _ = self.family.probe(self.model.eval())
            fresh = load_adapter(self.family.load(self.plan), read_adapter(saved))
            self.family.add_to_base(fresh, saved)
            difference = float((self.family.probe(fresh)[0] - trained).abs().max())
        guards.check_equal(difference, 0.0, "the reloaded adapter")
        return f"reads back bit for bit; logits differ by {difference:.1e}"

    def merge(self) -> str:
        """Merge in memory and compare logits, as far as the base's dtype allows."""
        if not isinstance(self.model, PeftModel):
            return "full fine-tuning: nothing to merge"
        trained, _ = self.family.probe(self.model.eval())
        merged = cast(Any, self.model).merge_and_unload().eval()
        difference = float((self.family.probe(merged)[0] - trained).abs().max())
        scale = max(1.0, float(trained.abs().max()))
        guards.check_equal(difference / scale, MERGE_TOLERANCE[self.plan.base_dtype], "the merged model")
        return f"logits differ by {difference:.1e} at a scale of {scale:.2g}, in {self.plan.base_dtype}"
