"""What an adapter was trained on: how its base was prepared, and what that base answered to a fixed input.

An adapter is a difference: on another base, or on the right one prepared another way, it loads without an error and is
wrong. So the identity of the base is saved beside the adapter, and loading compares it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from speechtune.config import RunConfig
from speechtune.errors import AdapterError, ConfigError, TrainingError, some
from speechtune.family import Family
from speechtune.precision import PrecisionPlan
from speechtune.tensors import non_finite

RECIPE_NAME = "base_recipe.json"
NUM_LOGITS = 256
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}
"""Greatest distance of two fingerprints, relative to their length, per precision of the coarser of the two bases."""


@dataclass(frozen=True, slots=True)
class BaseRecipe:
    """The base of an adapter.

    Attributes:
        family: name of the family.
        model: the options that say how the base is prepared, as `model` of a configuration.
        trainable_tokens: control tokens of the prompts that are tokens of their own.
        prepared: what the family did with the base (`Family.recipe`).
        precision: of the base when the fingerprint was taken.
        logits: its answer to the family's probe, thinned out evenly to `NUM_LOGITS` values.
    """

    family: str
    model: dict[str, Any]
    trainable_tokens: tuple[str, ...]
    prepared: dict[str, Any]
    precision: str
    logits: tuple[float, ...]

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps(asdict(self), indent=1) + "\n"


def describe_base(config: RunConfig, family: Family, model: nn.Module, plan: PrecisionPlan) -> BaseRecipe:
    """Take the fingerprint of a prepared base that has no adapter of ours yet.

    Raises ConfigError: it holds NaN or infinity; TrainingError: its answer is not finite though its weights are: in
    float16, activations of some bases overflow.
    """
    settings = config.model.model_dump(mode="json", exclude={"attention"})  # another attention, the same base
    return BaseRecipe(
        family.name,
        settings,
        config.lora.trainable_tokens,
        family.recipe(),
        plan.name,
        tuple(_fingerprint(family, model, plan, f"model.path={config.model.path}")),
    )


def read_recipe(adapter: Path) -> BaseRecipe | None:
    """The recipe beside an adapter; None for adapters of other tools.

    Raises AdapterError: the file is damaged.
    """
    file = adapter / RECIPE_NAME
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values["trainable_tokens"], values["logits"] = tuple(values["trainable_tokens"]), tuple(values["logits"])
        return BaseRecipe(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{file}: not readable as the recipe of a base: {error}") from None


def check_base(recipe: BaseRecipe, adapter: Path, family: Family, model: nn.Module, plan: PrecisionPlan) -> None:
    """Compare a freshly prepared base with the one an adapter was trained on.

    Raises AdapterError: it was prepared another way, or answers otherwise.
    """
    prepared = json.loads(json.dumps(family.recipe()))
    if prepared != recipe.prepared:
        raise AdapterError(f"{adapter}: trained on a base prepared as {recipe.prepared}, here it is {prepared}")
    now, then = torch.tensor(_fingerprint(family, model, plan, "the base")), torch.tensor(recipe.logits)
    distance = float((now - then).norm() / then.norm()) if len(now) == len(then) else float("inf")
    allowed = max(TOLERANCE[plan.name], TOLERANCE[recipe.precision])
    if not distance <= allowed:
        raise AdapterError(
            f"{adapter}: this base answers a fixed input otherwise than the base the adapter was trained on (relative "
            f"distance {distance:.2g}, allowed {allowed:g}): it is another model, another revision, or damaged; the "
            f"adapter names {recipe.model['path']}"
        )


def check_weights(model: nn.Module, where: str) -> None:
    """All weights of a base are finite.

    Raises ConfigError: names those that are not.
    """
    broken = [name.removeprefix("base_model.model.") for name in non_finite(model.named_parameters())]
    if broken:
        half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        cure = "download it again" + (", or, as float16 ends at 65504, set train.precision=fp32" if half else "")
        raise ConfigError(f"{where}: {len(broken)} weights of the base are not finite ({some(broken)}); {cure}")


def _fingerprint(family: Family, model: nn.Module, plan: PrecisionPlan, where: str) -> list[float]:
    was_training = model.training
    logits = family.probe(model.eval())[0].flatten()
    model.train(was_training)
    if not bool(logits.isfinite().all()):
        check_weights(model, where)
        cure = "its activations overflow float16; set train.precision=fp32" if plan.name == "fp16" else "is it damaged?"
        raise TrainingError(f"the base answers NaN or infinity in {plan.name}: {cure}")
    places = torch.linspace(0, len(logits) - 1, NUM_LOGITS).long()
    return [round(value, 6) for value in logits[places].tolist()]
