"""`speechtune adapters`, `merge` and `push`: what can be done with a finished adapter."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from speechtune.commands import print_result, wide_console
from speechtune.errors import ConfigError
from speechtune.export.convert import convert
from speechtune.export.extract import extract, settings_nearby
from speechtune.export.find import find_adapters
from speechtune.export.merge import merge
from speechtune.export.push import plan_upload, upload
from speechtune.export.verify import Verification, verify_adapter
from speechtune.family import NATIVE
from speechtune.inference.load import model_config, open_adapter
from speechtune.lora.files import read_tensors, weights_file

TEST_INPUT = "The quick brown fox jumps over the lazy dog."
COLORS = {"ok": "green", "issue": "red", "warning": "yellow", "unchecked": "dim"}


def run_verify(
    path: Path,
    base: str | None = None,
    *,
    model_options: Mapping[str, str] | None = None,
    find_all: bool = False,
    verbose: bool = False,
    as_json: bool = False,
) -> int:
    """Verify one adapter, or all under `path`, and print the result; 0 when all are valid, else 1."""
    if model_options and base is None:
        names = [name.replace("_", "-") for name in model_options if name != "reference_conditioning"]
        flags = ", ".join(f"--{name}" for name in names)
        raise ConfigError(f"{flags}: says how a base is prepared; name that base with --base")
    folders = find_adapters(path)[0] if find_all else [path]
    reports = [verify_adapter(folder, base, model_options=model_options) for folder in folders]
    valid = bool(reports) and all(report.valid for report in reports)
    for report in [] if as_json else reports:
        _print_verification(wide_console(), report, verbose)
    rows = [asdict(report) for report in reports]
    values = {"valid": valid, "adapters": rows} if find_all else rows[0]
    lines = [] if reports else [f"no adapter under {path}"]
    return print_result(values, lines, as_json, 0 if valid else 1)


def _print_verification(console: Console, report: Verification, verbose: bool) -> None:
    table = Table("check", "", "result", title=report.path)
    for check in report.checks:
        table.add_row(check.name, f"[{COLORS[check.status]}]{check.status}[/]", escape(check.detail))
    console.print(table)
    if verbose and report.valid:
        tensors = Table("tensor", "shape", "dtype", "norm")
        for name, tensor in sorted(read_tensors(weights_file(Path(report.path))).items()):
            kind = str(tensor.dtype).removeprefix("torch.")
            tensors.add_row(name, str(tuple(tensor.shape)), kind, f"{float(tensor.float().norm()):.4g}")
        console.print(tensors)
    console.print("[green]valid[/]: " if report.valid else "[red]NOT valid[/]: ", end="")
    line = f"base {report.base}, step {report.step}, {report.format}, {report.bytes:,} bytes"
    console.print(line, markup=False, soft_wrap=True)


def run_find(root: Path, *, verbose: bool = False, as_json: bool = False) -> int:
    """List every adapter under `root`; 0 when one is there, else 1."""
    folders, checkpoints = find_adapters(root)
    adapters = [verify_adapter(folder, look_up_base=False) for folder in folders]
    paths = [Column(name, overflow="fold") for name in ("adapter", "base")]
    table = Table(*paths, "rank", "step", "valid", "bytes", "date", title=f"adapters under {root}")
    lines = [] if adapters or checkpoints else [f"no adapter under {root}"]
    for one in adapters:
        valid = "[green]yes[/]" if one.valid else "[red]no[/]"
        cells = (escape(one.path), escape(one.base or "?"), str(one.rank or "?"), str(one.step or "?"), valid)
        table.add_row(*cells, f"{one.bytes:,}", (one.modified or "?").replace("T", " ").removesuffix("+00:00"))
        shown = one.checks if verbose else [check for check in one.checks if check.status == "issue"]
        lines += [f"{one.path}: {check.name}: {check.status}: {check.detail}" for check in shown]
    if adapters and not as_json:
        wide_console().print(table)
    extract_it = "a full checkpoint with LoRA weights inside: `speechtune adapters extract`"
    lines += [f"{path}: {extract_it}" for path in checkpoints]
    values = {"adapters": [asdict(one) for one in adapters], "full_checkpoints": checkpoints}
    return print_result(values, lines, as_json, 0 if adapters or checkpoints else 1)


def run_convert(adapter: Path, output: Path, to: str, *, base: str | None = None, as_json: bool = False) -> int:
    """Convert an adapter and print what was done; 0."""
    report = convert(adapter, output, to, base=base)
    lines = [
        f"{adapter} ({report.source_layout}) -> {output} ({to})",
        f"{report.tensors} tensors, {report.renamed} renamed, values unchanged",
    ]
    if report.target_modules_listed:
        lines.append("target_modules named modules by their old place: it is now the list of the modules themselves")
    if report.not_compared:
        lines.append(f"logits were not compared: {report.not_compared}")
    else:
        lines.append(f"logits of both layouts differ by {report.logit_difference:.1e}")
        lines.append(f"the adapter moves them by {report.adapter_effect:.3g}")
    return print_result(asdict(report), lines, as_json)


def run_extract(checkpoint: Path, output: Path, *, as_json: bool = False, **known: Any) -> int:
    """Extract an adapter, with what is `known` of its training; print what it holds and what could not be known; 0."""
    report = extract(checkpoint, output, **known)
    lines = [
        f"{report.tensors} tensors of {report.modules} modules -> {output}",
        f"rank {report.rank} (from the shapes{'; other ranks in rank_pattern' if report.rank_pattern else ''})",
        f"alpha {report.alpha:g} (from {report.alpha_from})",
        f"base {report.base} (from {report.base_from})",
        *(f"{check.name}: {check.status}: {check.detail}" for check in report.verification.checks),
        *(f"not known: {reason}" for reason in report.unknown),
    ]
    if report.layout not in (None, NATIVE):
        command = f"speechtune adapters convert {output} OUTPUT --to {NATIVE}"
        lines.append(f"keys are in the {report.layout} layout: next, `{command}`")
    return print_result(asdict(report), lines, as_json)


def run_merge(
    adapter: Path,
    output: Path,
    *,
    base: str | None = None,
    model_options: Mapping[str, str] | None = None,
    strength: float = 1.0,
    compare_models: bool = False,
    test_input: str = TEST_INPUT,
    as_json: bool = False,
    **storage: Any,
) -> int:
    """Merge an adapter into the base it names, or into `base`, and print what was measured; 0.

    `storage` says how the merged model is stored: dtype, save_tokenizer and max_shard_size of `export.merge`.
    """
    stored = open_adapter(adapter, strength)
    named = (nearby.codec for level in settings_nearby(stored.directory) for nearby in level if nearby.codec)
    options = {"codec_path": codec} if (codec := next(named, None)) else {}
    config = model_config(base, {**options, **(model_options or {})}, stored)
    report = merge(config, stored, output, compare_on=test_input if compare_models else None, **storage)
    lines = [
        f"{adapter}{'' if strength == 1 else f' at strength {strength:g}'} + {config.model.path} -> {output}",
        f"the adapter moves the base's logits by up to {report.adapter_effect:.3g}",
        f"merged and adapter-on logits differ by up to {report.merged_difference:.1e}; greedy codes are equal",
    ]
    if text := report.comparison:
        lines += [
            f"on {text.test_input!r}: adapter on and off differ by up to {text.adapter_effect:.3g},",
            f"  another first choice at {text.changed_positions} of {text.positions} positions;",
            f"  merged and adapter on differ by up to {text.merged_difference:.1e}",
        ]
    return print_result(asdict(report) | {"output": output}, lines, as_json)


def run_push(path: Path, repository: str, *, private: bool, no_samples: bool, dry_run: bool, as_json: bool) -> int:
    """Upload, or with `dry_run` only show what would be; 0."""
    plan = plan_upload(path, repository, private=private, samples=not no_samples)
    address = None if dry_run else upload(plan)
    kind = "private" if plan.private else "public"
    lines = [
        f"{plan.repository} ({kind}, if new): {len(plan.files)} files, {plan.bytes / 1e6:.1f} MB",
        *(f"  {name}" for name in plan.files),
        f"uploaded: {address}" if address else "dry run: nothing was sent",
    ]
    return print_result(asdict(plan) | {"url": address, "dry_run": dry_run}, lines, as_json)
