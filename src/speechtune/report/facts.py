"""The facts of a report as text: names with values, and tables whose first row names the columns."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from speechtune.report.read_run import STOPPED, RunReport, curve, number, section
from speechtune.tasks.results import strict_json
from speechtune.training.tracking import duration, flatten

Rows = list[tuple[str, str]]  # name and value

CURVE_ROWS = 12  # steps of the training table, evenly spread
CODEBOOK = "codebook_accuracy_"

PARTS_OF_TIME = {
    "data_seconds": "waiting for data",
    "forward_backward_seconds": "forward and backward",
    "optimizer_seconds": "optimizer",
    "evaluation_seconds": "evaluation",
    "checkpoint_seconds": "checkpoints",
}
# measurement -> (what it is, which way is better or another note)
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
    "loss": ("loss", "all heads weighted"),
    "grad_norm": ("gradient norm", "before clipping"),
    "audio_seconds_per_second": ("seconds of audio per second", ""),
    "tokens_per_second": ("positions per second", ""),
    "data_wait_share": ("share of the step spent waiting for data", ""),
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
    """A measurement's name in words; unknown ones and codebooks as they are called."""
    group, _, key = name.rpartition("/")
    if group in ("losses", "eval_losses"):
        return f"{'evaluation ' if group == 'eval_losses' else ''}loss of the {key} head"
    return MEASURES.get(key, (key.replace("_", " "), ""))[0]


def better(name: str) -> str:
    """Which values of a measure are better; empty if not known."""
    return MEASURES.get(name, ("", "higher is better" if "accuracy" in name else ""))[1]


def state_line(report: RunReport) -> str:
    """State and step of a run, and why a guard stopped it."""
    reason = f": {report.stop_reasons[-1]}" if report.state == STOPPED else ""
    return f"{report.state} at step {steps_taken(report)}{reason}"


def steps_taken(report: RunReport) -> str:
    """The last step, and the number of steps planned."""
    return f"{report.last_step:,}" + (f" of {report.total_steps:,}" if report.total_steps else "")


def progress(report: RunReport) -> list[tuple[str, object, object]]:
    """Each measure with the zero-shot base's value (None where it is not known) and the last one."""
    if not report.evaluations:
        return []
    has_base = len(report.evaluations) > 1 and report.evaluations[0]["step"] == 0
    base = _measures(report.evaluations[0]) if has_base else {}
    return [(name, base.get(name), value) for name, value in _measures(report.evaluations[-1]).items()]


def change(base: object, value: object) -> str:
    """A value after the base's and an arrow, if that is known."""
    return figure(value) if base is None else f"{figure(base)} → {figure(value)}"


def _measures(record: Mapping[str, Any]) -> dict[str, object]:
    """Evaluation loss and scores of an evaluation; those of the codebooks as their mean."""
    scores = section(record, "scores")
    codebooks = [value for name in scores if name.startswith(CODEBOOK) and (value := number(scores[name])) is not None]
    values = {"eval_loss": record.get("eval_loss"), **{k: v for k, v in scores.items() if not k.startswith(CODEBOOK)}}
    mean = {"accuracy, mean over codebooks": fmean(codebooks)} if codebooks else {}
    return {name: value for name, value in {**values, **mean}.items() if value is not None}


def headline(report: RunReport) -> Rows:
    """The key figures at the top of a page."""
    rows = [("steps", steps_taken(report))]
    losses = [value for _, value in curve(report.steps, "loss")]
    if losses:
        rows.append(("training loss, first → last", f"{figure(losses[0])} → {figure(losses[-1])}"))
    rows += [(measure_label(name), change(base, value)) for name, base, value in progress(report)[:4]]
    if proof := section(report.summary, "proof"):
        what, kind = ("lora_B", "lora_b") if proof.get("lora_b_total") else ("trained tensors", "tensors")
        rows.append((f"{what} moved", f"{figure(proof.get(f'{kind}_moved'))} of {figure(proof.get(f'{kind}_total'))}"))
    if report.summary.get("seconds") is not None:
        rows.append(("time", time_of(report.summary["seconds"])))
    return rows


def identity_rows(report: RunReport) -> Rows:
    """What was trained on what: base, adapter, hashes, versions, hardware, precision."""
    info, config = report.info, report.config
    model, lora, train = section(config, "model"), section(config, "lora"), section(config, "train")
    identity, base = section(report.trainer_state, "identity"), section(info, "base")
    hardware, proof = section(info, "hardware"), section(report.summary, "proof")
    rate, warmup = figure(train.get("learning_rate")), figure(info.get("warmup_steps", train.get("warmup_steps")))
    rows: Rows = [
        ("family", str(config.get("family") or identity.get("family") or "-")),
        ("base", str(base.get("path") or model.get("path") or "-")),
        ("base revision", str(base.get("revision") or model.get("revision") or "not pinned")),
        ("hash of the base's weights", str(base.get("fingerprint") or identity.get("base") or "-")),
        ("hash of the data", str(section(info, "data").get("fingerprint") or identity.get("dataset") or "-")),
        ("trained", _adapter(lora, identity) if lora else "-"),
        ("learning rate", f"{rate}, {train.get('schedule')}, {warmup} warm-up" if train else "-"),
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
        unchanged = "yes, bit for bit" if proof.get("base_unchanged") is True else "NO"
        total = proof.get("lora_b_total")
        full = total is None or (total == 0 and "tensors_total" not in proof)  # as earlier versions wrote it
        rows.append(("frozen base unchanged", "no base was kept: full fine-tuning" if full else unchanged))
        rows.append(("trainable parameters", figure(proof.get("trainable_parameters"))))
    return rows


def _adapter(lora: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    if lora.get("enabled") is False:
        return "the full model"
    numbers = [f"{name} {figure(lora.get(name))}" for name in ("rank", "alpha", "dropout")]
    variants = [name for name in ("rslora", "dora") if lora.get(name)]
    targets = section(identity, "lora").get("targets") or lora.get("targets")
    return ", ".join(["LoRA", *numbers, *variants, f"on {targets}"])


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
    rows += [(key, figure(data[key])) for key in ("samples", "hours", "speakers") if key in data]
    if languages := section(data, "languages"):
        rows.append(("languages", ", ".join(f"{name}: {figure(n)}" for name, n in languages.items())))
    if "eval_samples" in data:
        rows.append(("evaluation samples", figure(data["eval_samples"])))
    return rows


def parameter_rows(report: RunReport) -> list[tuple[str, str, str]]:
    """Components with their base and trainable parameters, after a row of names, and a sum; empty if not recorded."""
    entries = report.info.get("parameters")
    components = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    if not components:
        return []
    rows = [(str(c.get("component")), figure(c.get("total")), figure(c.get("trainable"))) for c in components]
    total, trained = (sum(number(c.get(key)) or 0 for c in components) for key in ("total", "trainable"))
    share = f" ({trained / total:.2%})" if total else ""
    return [("part", "base parameters", "trainable"), *rows, ("all", f"{total:,.0f}", f"{trained:,.0f}{share}")]


def time_parts(report: RunReport) -> list[tuple[str, float]]:
    """Seconds by activity, the rest as `other`; empty if the run did not record them."""
    times = section(report.summary, "time")
    parts = [
        (label, seconds) for key, label in PARTS_OF_TIME.items() if (seconds := number(times.get(key))) is not None
    ]
    total = number(times.get("total_seconds"))
    rest = (total or 0.0) - sum(seconds for _, seconds in parts)
    return [*parts, ("other", rest)] if parts and rest > 0 else parts


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
    durations = [number(record.get("seconds", record.get("eval_seconds"))) for record in report.evaluations]
    if seconds := [value for value in durations if value is not None]:
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
    rows = [["step", *map(measure_label, names)]]
    for record, values in zip(report.evaluations, flat, strict=True):
        step = figure(record["step"]) + (" (zero-shot base)" if record["step"] == 0 else "")
        rows.append([step, *(figure(values.get(name)) for name in names)])
    return rows


def training_table(report: RunReport) -> list[list[str]]:
    """Losses, rate and norm at some steps, after a row of names; empty without any."""
    steps = report.steps
    if not steps:
        return []
    heads = [f"losses/{head}" for head in section(steps[-1], "losses")]
    names = ["loss", *heads, "learning_rate", "grad_norm"]
    count = min(CURVE_ROWS, len(steps))
    chosen = sorted({round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)})
    rows = [["step", *map(measure_label, names)]]
    for i in chosen:
        values = flatten(steps[i])
        rows.append([figure(steps[i]["step"]), *(figure(values.get(name)) for name in names)])
    return rows


def to_json(report: RunReport) -> dict[str, Any]:
    """The facts of a report for JSON, without the curves; NaN and infinity become null."""
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
            {"name": c.name, "bytes": c.num_bytes, "damage": c.damage or None, "eval_loss": c.eval_loss, "best": c.best}
            for c in report.checkpoints
        ],
        "warnings": report.warnings,
        "missing": report.missing,
        "command": command,
        "command_recorded": recorded,
        "info": report.info,
        "summary": report.summary,
    }
    return strict_json(facts)
