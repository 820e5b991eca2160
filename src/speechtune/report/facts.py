"""The facts of a report as rows of text, said once for the page, for Markdown and for machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from speechtune.report.read_run import STOPPED, RunReport, number, section
from speechtune.training.tracking import duration, flatten

Rows = list[tuple[str, str]]

CODEBOOK = "codebook_accuracy_"
SHORT_HASH = 16  # characters of a hash where runs stand side by side
SAME_MEANING = ("family", "hash of the base's weights", "hash of the data")  # or losses cannot be compared

PARTS_OF_TIME = (
    ("data_seconds", "waiting for data"),
    ("forward_backward_seconds", "forward and backward"),
    ("optimizer_seconds", "optimizer"),
    ("evaluation_seconds", "evaluation"),
    ("checkpoint_seconds", "checkpoints"),
)

# measure -> (what it is, which way is better)
MEASURES = {
    "wer": ("word error rate", "lower is better"),
    "per": ("phone error rate", "lower is better"),
    "sim": ("speaker similarity", "higher is better"),
    "mos": ("predicted MOS", "higher is better"),
    "stop_rate": ("share of answers that stop by themselves", "higher is better"),
    "duration_ratio": ("duration, generated / recorded", "1 is best"),
    "pcc_accuracy": ("PCC of accuracy", "higher is better"),
    "pcc_fluency": ("PCC of fluency", "higher is better"),
    "pcc_prosodic": ("PCC of prosody", "higher is better"),
    "pcc_total": ("PCC of the total", "higher is better"),
    "mdd_f1": ("F1 of mispronunciation detection", "higher is better"),
    "parse_rate": ("share of answers that parse", "higher is better"),
    "eval_loss": ("evaluation loss", "lower is better"),
}


def figure(value: object, digits: int = 4) -> str:
    """A number for a table; NaN and infinity by name, `-` for what is not there."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) and abs(value) < 10**15:
        return f"{value:,}"
    finite = number(value)
    return str(value) if finite is None else f"{finite:.{digits}g}"


def megabytes(num_bytes: object) -> str:
    """Bytes as kB, MB or GB."""
    value = number(num_bytes)
    if value is None:
        return "-"
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if value >= size), ("kB", 1e3))
    return f"{value / size:.3g} {unit}"


def time_of(seconds: object) -> str:
    """Seconds as h:mm:ss, short ones with a decimal."""
    value = number(seconds)
    if value is None:
        return "-"
    return f"{value:.1f} s" if value < 60 else duration(value)


def measure_label(name: str) -> str:
    """A measure's name in words; unknown ones and codebooks as they are called."""
    return MEASURES.get(name, (name.replace("_", " "), ""))[0]


def better(name: str) -> str:
    """Which way of a measure is better, or nothing."""
    return MEASURES.get(name, ("", "higher is better" if "accuracy" in name else ""))[1]


def state_line(report: RunReport) -> str:
    """Where the run stands, in words."""
    total = report.total_steps
    at = f"at step {report.last_step:,}" + (f" of {total:,}" if total else "")
    if report.state == STOPPED:
        return f"{STOPPED} {at}: {report.stop_reasons[-1]}"
    return f"{report.state} {at}"


def headline(report: RunReport) -> Rows:
    """The few figures that stand on top."""
    total = report.total_steps
    rows = [("steps", f"{report.last_step:,}" + (f" of {total:,}" if total else ""))]
    losses = [value for _, value in report.training_curve("loss")]
    if losses:
        rows.append(("training loss, first → last", f"{figure(losses[0])} → {figure(losses[-1])}"))
    if report.evaluations:
        first, last = report.evaluations[0], report.evaluations[-1]
        for name, now in [("eval_loss", last.get("eval_loss")), *section(last, "scores").items()][:4]:
            base = first.get("eval_loss") if name == "eval_loss" else section(first, "scores").get(name)
            if now is not None:
                shown = f"{figure(base)} → {figure(now)}" if first["step"] == 0 and base is not None else figure(now)
                rows.append((measure_label(name), shown))
    proof = section(report.summary, "proof")
    if proof:
        moved = f"{figure(proof.get('lora_b_moved'))} of {figure(proof.get('lora_b_total'))}"
        rows.append(("lora_B moved", moved if proof.get("lora_b_total") else "full fine-tuning"))
    if report.summary.get("seconds") is not None:
        rows.append(("time", time_of(report.summary["seconds"])))
    return rows


def identity_rows(report: RunReport) -> Rows:
    """What was trained on what: base, adapter, hashes, versions, hardware, precision."""
    info, config = report.info, report.config
    model, lora, train = section(config, "model"), section(config, "lora"), section(config, "train")
    identity, base = section(report.trainer_state, "identity"), section(info, "base")
    hardware, proof = section(info, "hardware"), section(report.summary, "proof")
    rows: Rows = [
        ("family", str(config.get("family") or identity.get("family") or "-")),
        ("base", str(base.get("path") or model.get("path") or "-")),
        ("base revision", str(base.get("revision") or model.get("revision") or "not pinned")),
        ("hash of the base's weights", str(base.get("fingerprint") or identity.get("base") or "-")),
        ("hash of the data", str(section(info, "data").get("fingerprint") or identity.get("dataset") or "-")),
        ("trained", _adapter(lora, identity)),
        ("learning rate", _rate(train)),
        ("samples per optimizer step", figure(identity.get("global_batch"))),
        ("seed", figure(train.get("seed"))),
        ("precision", str(info.get("precision") or f"{train.get('precision', '-')} (as configured)")),
        ("processes", figure(info.get("world_size"))),
        ("started", str(info.get("started") or "-")),
    ]
    if hardware:
        rows.append(("hardware", _hardware(hardware)))
    versions = {"speechtune": info.get("speechtune") or report.summary.get("speechtune"), **section(info, "versions")}
    rows.append(("versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value) or "-"))
    if proof:
        rows.append(("frozen base unchanged", "yes, bit for bit" if proof.get("base_unchanged") is True else "NO"))
        rows.append(("trainable parameters", figure(proof.get("trainable_parameters"))))
    return rows


def _adapter(lora: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    if not lora:
        return "-"
    if lora.get("enabled") is False:
        return "the full model"
    parts = [f"LoRA, rank {figure(lora.get('rank'))}, alpha {figure(lora.get('alpha'))}"]
    parts.append(f"dropout {figure(lora.get('dropout'))}")
    parts += [name for name in ("rslora", "dora") if lora.get(name)]
    targets = section(identity, "lora").get("targets") or lora.get("targets")
    return ", ".join(parts) + f", on {targets}"


def _rate(train: Mapping[str, Any]) -> str:
    if not train:
        return "-"
    return f"{figure(train.get('learning_rate'))}, {train.get('schedule')}, {figure(train.get('warmup_steps'))} warm-up"


def _hardware(hardware: Mapping[str, Any]) -> str:
    name, count = hardware.get("name") or hardware.get("device") or "-", hardware.get("count")
    parts = [f"{count} x {name}" if isinstance(count, int) and count > 1 else str(name)]
    if hardware.get("cpu"):
        parts.append(f"CPU {hardware['cpu']}")
    if hardware.get("memory_bytes"):
        parts.append(f"{megabytes(hardware['memory_bytes'])} memory")
    return ", ".join(parts)


def data_rows(report: RunReport) -> Rows:
    """Statistics of the data, as the run recorded them; without them at least where it came from."""
    data, configured = section(report.info, "data"), section(report.config, "data")
    rows: Rows = [("training data", str(configured.get("train") or "-"))]
    held_out = number(configured.get("validation_split"))
    if configured.get("eval"):
        rows.append(("evaluation data", str(configured["eval"])))
    elif held_out:
        rows.append(("evaluation data", f"{held_out:.0%} of the training data, held out"))
    for key, label in (("samples", "samples"), ("hours", "hours"), ("speakers", "speakers")):
        if key in data:
            rows.append((label, figure(data[key])))
    if section(data, "languages"):
        rows.append(("languages", ", ".join(f"{name}: {figure(n)}" for name, n in section(data, "languages").items())))
    if "eval_samples" in data:
        rows.append(("evaluation samples", figure(data["eval_samples"])))
    return rows


def parameter_rows(report: RunReport) -> list[tuple[str, str, str]]:
    """(part, base parameters, trainable ones) by part of the model, with a sum; empty if not recorded."""
    entries = report.info.get("parameters")
    components = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    if not components:
        return []
    rows = [(str(t.get("component")), figure(t.get("total")), figure(t.get("trainable"))) for t in components]
    total, trained = (sum(number(t.get(key)) or 0 for t in components) for key in ("total", "trainable"))
    share = f" ({trained / total:.2%})" if total else ""
    return [*rows, ("all", f"{total:,.0f}", f"{trained:,.0f}{share}")]


def time_parts(report: RunReport) -> list[tuple[str, float]]:
    """Seconds by what they went into, the rest as `other`; empty if the run did not record it."""
    times = section(report.summary, "time")
    parts = [(label, seconds) for key, label in PARTS_OF_TIME if (seconds := number(times.get(key))) is not None]
    total = number(times.get("total_seconds"))
    if parts and total is not None:
        rest = total - sum(seconds for _, seconds in parts)
        return [*parts, ("other", rest)] if rest > 0 else parts
    return parts


def time_rows(report: RunReport) -> Rows:
    """Throughput, and where the time went."""
    rates = report.throughput()
    rows: Rows = []
    if "audio_seconds_per_second" in rates:
        rows.append(("audio, median", f"{figure(rates['audio_seconds_per_second'], 3)} s per second"))
    if "tokens_per_second" in rates:
        rows.append(("positions, median", f"{rates['tokens_per_second']:,.0f} per second"))
    if "data_wait_share" in rates:
        rows.append(("share of a step spent waiting for data, mean", f"{rates['data_wait_share']:.1%}"))
    cost = [number(record.get("seconds", record.get("eval_seconds"))) for record in report.evaluations]
    seconds = [value for value in cost if value is not None]
    if seconds:
        rows.append(("evaluations", f"{len(seconds)} in {time_of(sum(seconds))}"))
    if report.summary.get("seconds") is not None:
        rows.append(("training, from first step to last", time_of(report.summary["seconds"])))
    parts = time_parts(report)
    total = sum(value for _, value in parts)
    rows += [(label, f"{time_of(value)} ({value / total:.0%})") for label, value in parts if total]
    return rows


def evaluation_table(report: RunReport) -> list[list[str]]:
    """All evaluations, one row each after a row of names; step 0 is the zero-shot base. Empty without any."""
    if not report.evaluations:
        return []
    flat = [flatten(record) for record in report.evaluations]
    names = list(dict.fromkeys(name for record in flat for name in record if "seconds" not in name))
    rows = [["step", *(measure_label(name.removeprefix("scores/")) for name in names)]]
    for record, values in zip(report.evaluations, flat, strict=True):
        step = "0 (zero-shot base)" if record["step"] == 0 else f"{record['step']:,}"
        rows.append([step, *(figure(values.get(name)) for name in names)])
    return rows


def checkpoint_table(report: RunReport) -> list[list[str]]:
    """Checkpoints after a row of names; empty without any."""
    if not report.checkpoints:
        return []
    rows = [["checkpoint", "size", "evaluation loss", "checked", ""]]
    for c in report.checkpoints:
        checked = f"DAMAGED: {c.problem}" if c.problem else f"whole: {c.checked}"
        rows.append([c.name, megabytes(c.num_bytes), figure(c.eval_loss), checked, "best" if c.best else ""])
    return rows


def best_line(report: RunReport) -> str:
    """Which checkpoint is the best one, and whether it is still there."""
    best = report.best_step
    if best is None:
        return "Without an evaluation after step 0 no checkpoint can be called the best; the last one is the newest."
    there = any(c.step == best for c in report.checkpoints)
    value, metric = (
        report.trainer_state.get("best_value"),
        section(report.config, "evaluate").get("best_metric", "loss"),
    )
    name = "evaluation loss" if metric == "loss" else measure_label(str(metric))
    by = "the lowest evaluation loss recorded" if value is None else f"{name} {figure(value)}"
    return f"Best: checkpoint-{best}, {by}" + ("." if there else "; it is not in the folder.")


def flat_config(report: RunReport) -> dict[str, str]:
    """The resolved configuration as dotted names and text."""

    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in values.items():
            if isinstance(value, Mapping) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", "-" if value is None else str(value)

    return dict(walk(report.config, ""))


def differences(reports: Sequence[RunReport]) -> list[list[str]]:
    """Options and facts in which runs differ, one row each: name, then a value per run."""
    columns = [{**flat_config(r), **{f"({name})": value for name, value in _compared(r)}} for r in reports]
    return [row for row in _side_by_side(columns) if len(set(row[1:])) > 1]


def _compared(report: RunReport) -> Rows:
    wanted = {*SAME_MEANING[1:], "precision", "hardware", "versions", "samples per optimizer step"}
    rows = [(name, value) for name, value in identity_rows(report) if name in wanted]
    return [(name, value[:SHORT_HASH] if name.startswith("hash") else value) for name, value in rows]


def final_figures(reports: Sequence[RunReport]) -> list[list[str]]:
    """Final figures side by side: name, then a value per run."""
    results: list[dict[str, str]] = []
    for report in reports:
        column = {"state": report.state, "steps": f"{report.last_step:,}"}
        if report.steps:
            last = flatten(report.steps[-1])
            wanted = [name for name in last if name == "loss" or name.startswith("losses/")]
            column |= {f"last training {name.replace('losses/', 'loss, ')}": figure(last[name]) for name in wanted}
        results.append({**column, **_evaluated(report), "best step": figure(report.best_step)})
    return _side_by_side(results) + _side_by_side([dict(time_rows(report)) for report in reports])


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "-") for column in columns)] for name in names]


def _evaluated(report: RunReport) -> dict[str, str]:
    """Each measure's last value, after the base's and an arrow where that is known; codebooks as their mean."""
    if not report.evaluations:
        return {}
    first, last = (_measures(report.evaluations[i]) for i in (0, -1))
    base = first if report.evaluations[0]["step"] == 0 else {}
    column = {}
    alone = len(report.evaluations) == 1
    for name, value in last.items():
        if base and alone:
            column[f"{measure_label(name)} (zero-shot)"] = figure(value)
            continue
        before = f"{figure(base[name])} → " if base.get(name) is not None else ""
        column[measure_label(name) + (" (zero-shot → last)" if before else "")] = before + figure(value)
    return column


def _measures(record: Mapping[str, Any]) -> dict[str, Any]:
    scores = section(record, "scores")
    codebooks = [value for name in scores if name.startswith(CODEBOOK) and (value := number(scores[name])) is not None]
    values = {"eval_loss": record.get("eval_loss"), **{k: v for k, v in scores.items() if not k.startswith(CODEBOOK)}}
    mean = {"accuracy, mean over codebooks": fmean(codebooks)} if codebooks else {}
    return {name: value for name, value in {**values, **mean}.items() if value is not None}


def not_comparable(reports: Sequence[RunReport]) -> str | None:
    """A sentence of warning, where losses of these runs do not mean the same."""
    differing = [
        name for name in SAME_MEANING if len({dict(identity_rows(report))[name] for report in reports} - {"-"}) > 1
    ]
    return f"The runs differ in {', '.join(differing)}: compare their losses with care." if differing else None


def to_json(report: RunReport) -> dict[str, Any]:
    """The report's facts for a machine; NaN and infinity become null, curves are left in metrics.jsonl."""
    command, recorded = report.command
    facts = {
        "run": str(report.directory),
        "state": report.state,
        "last_step": report.last_step,
        "total_steps": report.total_steps,
        "best_step": report.best_step,
        "non_finite_steps": len(report.non_finite),
        "last": flatten(report.steps[-1]) if report.steps else {},
        "last_evaluation": flatten(report.evaluations[-1]) if report.evaluations else {},
        "base_evaluation": next((flatten(record) for record in report.evaluations if record["step"] == 0), {}),
        "throughput": report.throughput(),
        "time": report.summary.get("time"),
        "checkpoints": [
            {"name": c.name, "bytes": c.num_bytes, "problem": c.problem, "eval_loss": c.eval_loss, "best": c.best}
            for c in report.checkpoints
        ],
        "warnings": report.warnings,
        "missing": report.missing,
        "command": command,
        "command_recorded": recorded,
        "info": report.info,
        "summary": report.summary,
    }
    return {name: _strict(value) for name, value in facts.items()}


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return number(value) if isinstance(value, float) else value
