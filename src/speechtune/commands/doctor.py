"""Checks before a run: the machine, the files, the data, and one real training step; each with its cure."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn

from speechtune.cache.encode import encode_samples
from speechtune.cache.encoded_set import EncodedSet
from speechtune.config import RunConfig
from speechtune.errors import SpeechtuneError
from speechtune.families import create_family, load_config
from speechtune.family import Family
from speechtune.lora.apply import apply_lora, count_by_component, load_adapter, model_tensors, trainable
from speechtune.lora.files import read_adapter
from speechtune.precision import PrecisionPlan, plan_precision
from speechtune.storage.model_folder import inspect_folder
from speechtune.storage.verified_folder import check_writable, write_verified
from speechtune.tensors import checksums
from speechtune.training import guards
from speechtune.training.checkpoint import ADAM_MOMENTS, save_weights
from speechtune.training.job import Objective
from speechtune.training.prepare import load_sets

FLOORS = {"torch": (2, 8), "transformers": (5, 17), "peft": (0, 17), "accelerate": (1, 10)}
MERGE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
TRIED_SAMPLES = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    verdict: Literal["pass", "warn", "fail"]
    detail: str
    cure: str = ""


def print_findings(config: RunConfig | None, *, as_json: bool = False) -> int:
    """Run all checks, print them, and return 2 when one failed."""
    findings = list(examine(config))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False))
    else:
        table = Table("check", "", "found", "cure")
        colours = {"pass": "green", "warn": "yellow", "fail": "red"}
        for finding in findings:
            verdict = f"[{colours[finding.verdict]}]{finding.verdict}[/]"
            table.add_row(finding.check, verdict, finding.detail, finding.cure)
        Console().print(table)
    return 2 if any(finding.verdict == "fail" for finding in findings) else 0


def examine(config: RunConfig | None) -> Iterator[Finding]:
    """All findings in order; a check that others need ends the list when it fails."""
    yield from environment()
    if config is None:
        return
    for check in (partial(output_folder, config), partial(model_folders, config)):
        yield from check()
    family = create_family(config)
    patient = Patient(config, family)
    for name, step in (
        ("LoRA targets", patient.targets),
        ("data", patient.data),
        ("training step", patient.training_step),
        ("save and reload", patient.reload),
        ("merge", patient.merge),
    ):
        finding = attempt(name, step)
        yield finding
        if finding.verdict == "fail":
            return


def attempt(check: str, step: Callable[[], str]) -> Finding:
    """Run one step; an error of ours or of the memory becomes a failing line."""
    try:
        return Finding(check, "pass", step())
    except SpeechtuneError as error:
        return Finding(check, "fail", str(error), "as the message says")
    except torch.cuda.OutOfMemoryError as error:
        cure = "train.gradient_checkpointing=true, a smaller rank, or a larger GPU"
        return Finding(check, "fail", f"out of memory: {error}", cure)


def environment() -> Iterator[Finding]:
    """Versions, device and the precision that follows from it."""
    yield Finding("python", "pass", f"{platform.python_version()} on {platform.platform()}")
    for package, floor in FLOORS.items():
        version = importlib.metadata.version(package)
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        wanted = ".".join(map(str, floor))
        ok = numbers >= floor
        cure = "" if ok else f"pip install '{package}>={wanted}'"
        yield Finding(package, "pass" if ok else "fail", f"{version}, at least {wanted}", cure)
    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 1e9
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        detail = f"{name}, {memory:.0f} GB, compute capability {capability}, CUDA {torch.version.cuda}"
        yield Finding("device", "pass", detail)
    else:
        yield Finding(
            "device", "warn", "no CUDA device: a CPU trains small models only", "a CUDA build of torch, a GPU"
        )
    yield Finding("precision", "pass", plan_precision().describe())


def output_folder(config: RunConfig) -> Iterator[Finding]:
    """Permission by writing, and space for what the run will keep."""
    family = create_family(config)

    def check() -> str:
        model = family.skeleton()
        if config.lora.enabled:
            model = apply_lora(model, family, config.lora, config.train.seed)
        trained = 4 * sum(parameter.numel() for parameter in trainable(model).values())
        kept = config.checkpoint.keep_last + 2  # the best one, and the one being written
        needed = trained * ((1 + ADAM_MOMENTS) * kept + 1)
        check_writable(config.output_dir, needed)
        free = shutil.disk_usage(config.output_dir).free
        return f"written and removed a file; the run keeps {needed / 1e9:.2f} GB, {free / 1e9:.0f} GB are free"

    yield attempt("output folder", check)


def model_folders(config: RunConfig) -> Iterator[Finding]:
    """Local folders of the base and its parts file by file; hub ids are checked by the hub's client on download."""
    parts = {"model": (config.model.path, None), **create_family(config).parts}
    for part, (place, _) in parts.items():
        name = f"{part} files"
        folder = Path(place)
        if not folder.is_dir():
            yield Finding(name, "warn", f"{place} is a hub id: its files are checked when they are downloaded")
            continue
        problems = inspect_folder(folder)
        detail = "; ".join(map(str, problems)) or f"{place}: every file opens"
        cure = "download these files again" if problems else ""
        yield Finding(name, "fail" if problems else "pass", detail, cure)


class Patient:
    """The recipe's model and a little of its data, examined step by step; each method returns what it found."""

    def __init__(self, config: RunConfig, family: Family) -> None:
        self.config, self.family = config, family
        self.plan: PrecisionPlan = plan_precision(config.train.precision, full_finetune=not config.lora.enabled)
        self._encoded: EncodedSet | None = None
        self._model: nn.Module | None = None

    @property
    def encoded(self) -> EncodedSet:
        """The few samples tried."""
        return cast(EncodedSet, self._encoded)

    @property
    def model(self) -> Any:
        """The model, after the training step."""
        return self._model

    def targets(self) -> str:
        """LoRA targets by part of the model."""
        if not self.config.lora.enabled:
            return "full fine-tuning: no adapter"
        model = apply_lora(self.family.skeleton(), self.family, self.config.lora, self.config.train.seed)
        rows = [row for row in count_by_component(model, self.family) if row.trainable]
        return "; ".join(f"{row.component}: {row.trainable:,} trainable" for row in rows)

    def data(self) -> str:
        """The manifest reads, and its first samples encode."""
        training, evaluation = load_sets(self.config, self.family)
        chosen = training[:TRIED_SAMPLES]
        urls = self.config.data.allow_urls
        self._encoded = encode_samples(self.family, chosen, self.config.cache_dir, allow_urls=urls, quiet=True)
        lengths = ", ".join(str(length) for length in self.encoded.lengths)
        return f"{len(training)} training and {len(evaluation)} evaluation samples; the first take {lengths} positions"

    def training_step(self) -> str:
        """One real forward pass, backward pass and optimizer step."""
        config = self.config
        model = self.family.load(self.plan)
        if config.lora.enabled:
            model = apply_lora(model, self.family, config.lora, config.train.seed)
        self._model = model
        parameters = trainable(model)
        guards.check_trainable(parameters, lora=config.lora.enabled)
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


def run_doctor(recipe: Path | None, overrides: Sequence[str], *, as_json: bool = False) -> int:
    """Examine the machine, and a recipe if one is given; print the findings."""
    return print_findings(load_config(recipe, overrides) if recipe else None, as_json=as_json)
