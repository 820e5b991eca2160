"""A form for a run: its fields are the options of a family's configuration, its answers a configuration or issues."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from speechtune.commands import demo_pronunciation, demo_voice
from speechtune.commands.demo import DEFAULTS
from speechtune.config import RunConfig, apply_override, shipped_recipes
from speechtune.errors import ConfigError
from speechtune.families import build_config, family_packages, family_part, load_config
from speechtune.studio.workspace import Workspace

SHIPPED = "the small English model that ships with speechtune"
DEMO = "the demonstration of "
BASIC = (
    "data.train", "data.validation_split", "lora.rank", "lora.alpha", "train.epochs", "train.max_steps",
    "train.batch_size", "train.learning_rate", "evaluate.every_steps", "evaluate.prompts", "checkpoint.every_steps",
)  # fmt: skip
"""Options that stand open in the form; all others are folded, by section."""
YES_OR_NO = (True, False)
GIVEN = ("family", "output_dir")
"""Options that the form asks for in another way."""


@dataclass(frozen=True)
class Option:
    """One field: the option's dotted name, its description, and the values to choose from; () for free text."""

    name: str
    help: str
    choices: tuple[object, ...] = ()

    @property
    def section(self) -> str:
        """Part of the recipe that it belongs to."""
        return self.name.partition(".")[0]


def options_of(section: type[BaseModel], prefix: str = "") -> list[Option]:
    """The fields for a family's class of configurations, in order of definition."""
    found: list[Option] = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += options_of(kind, f"{prefix}{name}.")
        elif prefix + name not in GIVEN:
            found.append(Option(prefix + name, " ".join((info.description or "").split()), choices_of(kind)))
    return found


def choices_of(kind: object) -> tuple[object, ...]:
    """All values that an annotation allows, where they can be listed: yes or no, names, or none."""
    if kind is bool:
        return YES_OR_NO
    if kind is type(None):
        return (None,)
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        parts = [choices_of(part) for part in get_args(kind)]
        return tuple(value for part in parts for value in part) if all(parts) else ()
    return ()


def starting_points() -> list[str]:
    """Names of what a form can start from: the small model that speaks, the demonstrations, and the recipes."""
    return [SHIPPED, *(f"{DEMO}{family}" for family in family_packages()), *shipped_recipes()]


def start_from(name: str, workspace: Workspace) -> RunConfig:
    """The configuration that a form shows first; a demonstration makes its small base in the studio's folder.

    Raises ConfigError: nothing of that name.
    """
    if name == SHIPPED:
        family = DEFAULTS["voice"]
        model = family_part(family, "tiny").speaking_base()
        train = {"max_steps": 60, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 6}
        every = {"every_steps": 20}
        values = {"family": family, "model": model, "train": train, "checkpoint": every}
        return build_config(values | {"evaluate": every | {"prompts": 2}}, name)
    if name in shipped_recipes():
        return load_config(Path(name))
    family = name.removeprefix(DEMO)
    demo = demo_voice if "speak" in family_part(family, "family").FAMILY.abilities else demo_pronunciation
    folder = workspace.directory / "demo" / family
    return demo.demo_config(family, demo.write_data(folder), folder)


def shown(value: object) -> str:
    """A value as it is typed on the command line; nothing for none."""
    if value is None:
        return ""
    if isinstance(value, str) and yaml.safe_load(value) == value:
        return value
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n").strip()
    )


def values_of(config: RunConfig, options: Sequence[Option]) -> list[str | bool]:
    """What the fields hold for a configuration: yes or no where there is only that, else text."""
    values: list[str | bool] = []
    plain = config.model_dump(mode="json")
    for option in options:
        value: Any = plain
        for part in option.name.split("."):
            value = value[part]
        values.append(value if option.choices == YES_OR_NO else shown(value))
    return values


def read_form(
    family: str, options: Sequence[Option], answers: Sequence[object], run: Path, workspace: Workspace
) -> RunConfig:
    """The configuration that the answers describe, for a run into the folder `run`.

    Raises ConfigError: lists every issue, those of paths that must not be read among them.
    """
    values: dict[str, Any] = {"family": family, "output_dir": str(run)}
    issues = []
    for option, answer in zip(options, answers, strict=True):
        text = answer.strip() if isinstance(answer, str) else shown(answer)
        if apply_override(values, f"{option.name}={text or 'null'}") is not None:
            issues.append(f"{option.name}: {text!r} cannot be read (a list is written [a, b], a mapping {{a: 1}})")
    if issues:
        raise ConfigError("\n  ".join(["the form cannot be read", *issues]), tuple(issues))
    config = build_config(values, "the form")
    workspace.check_paths(config)
    if config.data.audio_root is None:  # rows name clips too
        config = config.model_copy(update={"data": config.data.model_copy(update={"audio_root": workspace.roots})})
    if config.data.train is None:
        raise ConfigError("data.train: choose what to train on", ("data.train: choose what to train on",))
    return config


def issues_by_option(error: ConfigError, options: Sequence[Option]) -> tuple[dict[str, str], list[str]]:
    """The messages for each field, and those that belong to none."""
    names = {option.name for option in options}
    at: dict[str, str] = {}
    others: list[str] = [] if error.issues else [str(error)]
    for line in error.issues:
        name, _, message = line.partition(": ")
        name = next((known for known in names if name == known or name.startswith(f"{known}.")), "")
        if name:
            at[name] = f"{at[name]}; {message}" if name in at else message
        else:
            others.append(line)
    return at, others


def number(name: str, text: str) -> float | None:
    """A number of at least 0 that was typed; None where nothing was. Raises ConfigError: it is none."""
    try:
        value = float(text) if text.strip() else None
    except ValueError:
        value = math.nan
    if value is not None and not 0 <= value < math.inf:
        raise ConfigError(f"{name}: {text!r} is no number of at least 0")
    return value
