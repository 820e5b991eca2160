"""README.md of an adapter in the hub's form: what it was trained from and on, how it scored, what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from speechtune import __version__
from speechtune.cache import EncodedSet
from speechtune.config import RunConfig
from speechtune.families.base import Family
from speechtune.run_info import describe_data


def model_card(
    config: RunConfig, family: Family, train_set: EncodedSet, scores: Mapping[str, float] | None = None
) -> str:
    """The card; `scores` are those of the run's last (or best) evaluation by name."""
    base = config.model.path
    title = Path(base).name if Path(base).exists() else base
    parts = [
        "---",
        card_data(config, family, scores or {}).to_yaml(),
        "---",
        f"# LoRA adapter for {title}",
        "",
        _training(config, train_set),
        "",
        f"Load it with `PeftModel.from_pretrained(base, folder)`. {family.card_note}",
        "",
        "## Evaluation",
        "",
        *(_table(scores) if scores else ["No evaluation was made in this run."]),
        "",
        "## Use",
        "",
        f"{family.card_use} The licence of the base model holds for this adapter too.",
    ]
    return "\n".join(parts) + "\n"


def card_data(config: RunConfig, family: Family, scores: Mapping[str, float]) -> ModelCardData:
    """The metadata block; a base in a local folder is not named, for nobody else could find it."""
    base, data = config.model.path, config.data
    name = data.eval.name if data.eval else "held out from the training data"
    results = [
        EvalResult(
            task_type=family.pipeline_tag,
            dataset_type="custom",
            dataset_name=name,
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for metric, value in scores.items()
    ]
    return ModelCardData(
        base_model=None if Path(base).exists() else base,
        library_name="peft",
        license=family.base_license,
        pipeline_tag=family.pipeline_tag,
        tags=["lora", "speechtune"],
        model_name=config.output_dir.name,
        eval_results=results or None,
        ignore_metadata_errors=False,
    )


def _training(config: RunConfig, train_set: EncodedSet) -> str:
    lora, facts = config.lora, describe_data(train_set, None)
    return (
        f"Trained with speechtune {__version__} on {facts['samples']} samples ({facts['hours']:.2f} h, "
        f"{facts['speakers']} speakers): rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, targets "
        f"`{lora.targets}`, learning rate {config.train.learning_rate:g}, seed {config.train.seed}."
    )


def _table(scores: Mapping[str, Any]) -> list[str]:
    return ["| figure | value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in scores.items())]
