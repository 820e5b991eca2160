"""Model families, found by folder: here, and in packages behind the entry-point group `speechtune.families`.

A family is a package with these parts, and nothing outside it knows its name:

- `__init__.py`: `MODEL_TYPES`, the `model_type`s of config.json that belong to it; imports nothing heavy.
- `options.py`: `Config`, a `RunConfig` with the family's own options in `model:` and `data:`.
- `family.py`: `FAMILY`, its implementation of `speechtune.family.Family`.
- `tiny.py`: `make_base` and `load_plain`, its embedded default: a small base for demonstrations; where one of a voice
  needs options that the family has in `data:`, `DEMO_DATA`.
"""

import json
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import field_validator

from speechtune import config
from speechtune.config import RunConfig
from speechtune.errors import ConfigError
from speechtune.family import AdapterLayout, Family

ENTRY_POINTS = "speechtune.families"


@cache
def family_packages() -> dict[str, str]:
    """Name of each family -> its package, in the order of names; a folder here goes before an entry point."""
    here = Path(__file__).parent
    packages = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    packages |= {file.parent.name: f"{__name__}.{file.parent.name}" for file in here.glob("*/family.py")}
    return dict(sorted(packages.items()))


def family_part(name: str, part: str) -> ModuleType:
    """A module of a family's package: "family", "options" or "tiny"; "" for the package itself.

    Raises ConfigError: no such family.
    """
    packages = family_packages()
    if name not in packages:
        raise ConfigError(f"family: {_no_family(name)}")
    return import_module(f"{packages[name]}.{part}".rstrip("."))


class _NoFamily(RunConfig, frozen=True):
    """Stands in where the family is unknown, so that all other issues are reported with that one."""

    @field_validator("family")
    @classmethod
    def _is_unknown(cls, name: str) -> str:
        raise ValueError(_no_family(name))


def config_class(name: object) -> type[RunConfig]:
    """The class of a family's configurations; of an unknown family one that no recipe satisfies."""
    return family_part(name, "options").Config if isinstance(name, str) and name in family_packages() else _NoFamily


def _no_family(name: str) -> str:
    return f"no family {name!r}; there are: {', '.join(family_packages())}"


def build_config(values: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Validate nested `values`, overrides applied, with the options of the family they name.

    Raises ConfigError: starts with `where` and lists every issue.
    """
    issues = [issue for override in overrides if (issue := config.apply_override(values, override)) is not None]
    return config.build_config(values, where, config_class(values.get("family")), issues)


def load_config(recipe: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML recipe and apply `section.key=value` overrides; see `speechtune.config.load_config`."""
    return config.load_config(recipe, overrides, config_class)


def create_family(run: RunConfig) -> Family:
    """Make the family a configuration names; nothing heavy is loaded yet.

    Raises ConfigError: no such family.
    """
    return family_part(run.family, "family").FAMILY(run)


def adapter_layouts() -> dict[str, AdapterLayout]:
    """Layouts other than the native one that adapters of any family may have, by name."""
    families = [family_part(name, "family").FAMILY for name in family_packages()]
    return {name: layout for family in families for name, layout in family.adapter_layouts.items()}


def family_of(model_path: str, trained_on: str | None = None) -> str:
    """Name of the family a base model belongs to, from its config.json; `trained_on` names that of an adapter for it.

    Raises ConfigError: no configuration there, a model type of no family, or of another one than the adapter's.
    """
    from transformers.utils.hub import cached_file

    folder = Path(model_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        models = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; a model lies in {models[-1]}" if models else ""
        raise ConfigError(
            f"{model_path}: no model folder: config.json is missing{hint} (an adapter is named with --adapter)"
        )
    try:
        file = cached_file(model_path, "config.json")
        model_type = json.loads(Path(str(file)).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model_path}: no model configuration there: {error}") from None
    names = {kind: name for name in family_packages() for kind in family_part(name, "").MODEL_TYPES}
    if model_type not in names:
        raise ConfigError(f"{model_path}: model_type {model_type!r} belongs to no family; known: {', '.join(names)}")
    if trained_on not in (None, names[model_type]):
        raise ConfigError(
            f"{model_path} is a base of {names[model_type]}, the adapter was trained on one of {trained_on}"
        )
    return names[model_type]
