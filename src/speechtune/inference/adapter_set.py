"""A base with several adapters on it, of which one, or none, answers: added, chosen and removed while it is in use."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn

from speechtune.config import RunConfig
from speechtune.errors import AdapterError
from speechtune.family import Ability, Family
from speechtune.inference.load import load_model, model_config
from speechtune.lora.apply import load_adapter, plain_model, require_usable
from speechtune.lora.base_identity import check_base
from speechtune.lora.files import StoredAdapter, addition_files
from speechtune.lora.prompts import as_trained
from speechtune.precision import plan_precision
from speechtune.types import Sample


@dataclass(frozen=True, eq=False, slots=True)
class LoadedAdapter:
    """An adapter on the base; `key` is its name there, `effect` by how much it moves the logits at the most.

    `system` and `scene` are those of its training, for prompts without their own.
    """

    key: str
    stored: StoredAdapter
    effect: float
    system: str | None
    scene: str | None


class AdapterSet:
    """A base and its adapters, for one thread at a time.

    Attributes:
        config, family: of the base.
        model: what generates; with the adapter that `use` chose.
        prompt: system message and scene of the base's own training, where it is one that was trained in full or merged.
    """

    def __init__(
        self,
        model: str | None,
        options: Mapping[str, str] | None = None,
        first: StoredAdapter | None = None,
        ability: Ability | None = None,
    ) -> None:
        """Load the base that is named, or else the one that an adapter was trained on; no adapter is loaded yet.

        Raises ConfigError, AdapterError: as `model_config` and `load_model`.
        """
        self.config: RunConfig = model_config(model, options, first)
        self._plan = plan_precision()
        self.family: Family
        self.model: nn.Module
        self.family, self.model = load_model(self.config, None, self._plan, ability)
        self._carried = list(self.model.peft_config) if isinstance(self.model, PeftModel) else []
        self._logits = self.family.probe(self.model)[0]
        self._added = 0
        self.prompt = _prompt_of(Path(self.config.model.path))

    def add(self, stored: StoredAdapter) -> LoadedAdapter:
        """Load an adapter at its strength beside those that are there, and prove that it changes what the base answers.

        Whatever was in use, the base alone is afterwards. At strength 0 nothing is proven.

        Raises AdapterError: it belongs to another base, or to this one prepared otherwise, does not fit, or changes
        nothing; ConfigError: nothing says how its base was prepared.
        """
        if beside := addition_files(stored.directory):
            raise AdapterError(
                f"{stored.directory}: {beside[0].name} was trained beside it and changes the base itself, which other "
                "adapters could not share: use `speechtune generate`, or serve its merged model"
            )
        require_usable(self.family, stored)
        self.use(None)
        if stored.identity:
            if stored.identity.trainable_tokens != self.config.lora.trainable_tokens:
                tokens = ", ".join(stored.identity.trainable_tokens) or "none"
                raise AdapterError(f"{stored.directory}: trained with other control tokens than this base ({tokens})")
            check_base(stored.identity, stored.directory, self.family, self.model, self._plan)
        self._added += 1
        key = f"added-{self._added}"
        system, scene = _prompt_of(stored.directory)
        self.model = load_adapter(self.model, stored, key)
        self._use(key)
        effect = float((self.family.probe(self.model)[0] - self._logits).abs().max())
        loaded = LoadedAdapter(key, stored, effect, system, scene)
        if stored.strength and not effect > 0:  # also NaN
            self.remove(loaded)
            raise AdapterError(f"{stored.directory}: the adapter changes no logit of this base")
        self.use(None)
        return loaded

    def remove(self, adapter: LoadedAdapter) -> None:
        """Take an adapter off; the base alone is in use afterwards."""
        model = cast(PeftModel, self.model)
        if others := [name for name in model.peft_config if name != adapter.key]:
            model.set_adapter(others[0])  # PEFT is lost where the one it takes for active is gone
        else:
            self.model = plain_model(model)
        model.delete_adapter(adapter.key)
        self.use(None)

    def use(self, adapter: LoadedAdapter | None) -> None:
        """Let an adapter answer from now on; None is the base alone."""
        self._use(adapter.key if adapter else None)

    def _use(self, key: str | None) -> None:
        if not isinstance(self.model, PeftModel):
            return
        tuner, names = cast(Any, self.model.base_model), [*self._carried, *([key] if key else [])]
        if names:
            tuner.enable_adapter_layers()
            tuner.set_adapter(names)
        else:
            tuner.disable_adapter_layers()


def _prompt_of(folder: Path) -> tuple[str | None, str | None]:
    """System message and scene of the training whose result lies in a folder; None where it had none."""
    (sample,) = as_trained([Sample("", "", None)], folder)
    return sample.system, sample.scene
