"""A callback that gives `transformers.Trainer` verified LoRA adapters and the guards of speechtune's own loop."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import distributed, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from speechtune.errors import AdapterError, ConfigError, TrainingError, some
from speechtune.lora.apply import trainable
from speechtune.lora.files import FOLDER_NAME
from speechtune.lora.save import STARTS_AT_ZERO, find_peft_model, named_state, save_lora_adapters, trained_adapter
from speechtune.tensors import checksums, tensors_fingerprint
from speechtune.training import guards

log = logging.getLogger("speechtune")

SAMPLES = ("not known to a Trainer callback",)
WARNINGS_SHOWN = 3  # of each kind; then one in WARNINGS_BETWEEN
WARNINGS_BETWEEN = 100


class LoRACheckpointCallback(TrainerCallback):
    """Saves verified adapters to `checkpoint-N/lora_adapters` and `output_dir/lora_adapters`, and guards the training.

    Keep it in the Trainer when you resume: from a checkpoint with an adapter in a subfolder, transformers 5.17 does not
    load the trained one; the callback does.

    Args:
        on_issue: "stop" raises TrainingError at an issue of the training, "warn" logs it and continues. A failed save
            always raises.
        model_card: text of each README.md (default: PEFT's card).
        save_embedding_layers: as PEFT's option; "auto" adds the embeddings of a resized vocabulary.

    Raises:
        AdapterError: out of `trainer.train()`: the model holds no LoRA adapter, or its adapter was never trained or
            holds NaN.
        CheckpointError: out of `trainer.train()`: an adapter could not be written, or reads back different.
        TrainingError: out of `trainer.train()`: a guard stopped the training.
    """

    def __init__(
        self,
        on_issue: Literal["stop", "warn"] = "stop",
        *,
        model_card: str | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
    ) -> None:
        if on_issue not in ("stop", "warn"):
            raise ConfigError(f"on_issue={on_issue!r}: expected 'stop' or 'warn'")
        self.on_issue = on_issue
        self.model_card = model_card
        self.save_embedding_layers: bool | Literal["auto"] = save_embedding_layers
        self._parameters: dict[str, nn.Parameter] = {}
        self._before: dict[str, str] | None = None
        self._has_moved = False
        self._first_step = 0
        self._warned: Counter[str] = Counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the model, the optimizer and the arguments before the first step."""
        _show_log_lines(args.should_save)
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        peft_model = find_peft_model(model)
        name = trained_adapter(peft_model)
        named_state(peft_model, name)
        if state.global_step > 0:
            _load_resumed(peft_model, name)
        self._parameters = trainable(model)
        self._has_moved, self._before, self._first_step = False, None, state.global_step
        if args.logging_nan_inf_filter:
            args.logging_nan_inf_filter = False
            log.warning("logging_nan_inf_filter was on and would have shown a NaN loss as 0.0: switched off")
        where = f"before step {state.global_step + 1}"
        self._guard(guards.check_trainable, self._parameters, where=where, lora=True)
        adapter_only = {key: p for key, p in self._parameters.items() if any(m in key for m in guards.ADAPTER_MARKS)}
        if self._parameters and len(adapter_only) < len(self._parameters):  # only reached when issues are warnings
            self._guard(guards.check_trainable, adapter_only, where=where, lora=True)
        if optimizer is not None:
            self._guard(_check_optimizer, self._parameters, optimizer.param_groups, where=where)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients, after clipping."""
        optimizer = kwargs["optimizer"]
        if not self._has_moved and any(group["lr"] > 0 for group in optimizer.param_groups):  # a warm-up begins at 0
            self._before = checksums(self._starts_at_zero())
        if getattr(optimizer, "scaler", None) is not None:
            return  # with float16 autocast an overflow is normal: the scaler skips the step
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        # In half precision the norm may overflow although every gradient is finite.
        if math.isfinite(norm) or not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            where = f"step {state.global_step + 1}"
            self._guard(guards.check_gradients, self._parameters, norm, where, SAMPLES, where=where)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check what the optimizer made of the parameters."""
        where = f"step {state.global_step}"
        self._guard(guards.check_finite, self._parameters, where, SAMPLES, where=where)
        if self._before is None or getattr(kwargs["optimizer"], "step_was_skipped", False):
            return
        before, self._before = self._before, None
        after = checksums(self._starts_at_zero())
        self._guard(guards.check_moved, before, after, where, where=where)
        still = [name for name in after if before[name] == after[name]]
        self._has_moved = len(still) < len(after)
        log.info("%s: %d of %d lora_B moved", where, len(after) - len(still), len(after))
        if still and self._has_moved:
            log.warning("%s: no training signal reached %s", where, some(still))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the losses and the gradient norm that the Trainer reports."""
        logs: Mapping[str, float] = kwargs.get("logs") or {}
        where = f"step {state.global_step}"
        losses = {key: logs[key] for key in logs if key == "loss" or (key.startswith("eval") and key.endswith("_loss"))}
        for name, value in losses.items():
            self._guard(guards.check_losses, {f"logged {name!r}:": value}, where, SAMPLES, where=where)
        if logs.get("grad_norm") == 0.0:
            self._guard(guards.check_gradients, self._parameters, 0.0, where, SAMPLES, where=where)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put verified adapters into the checkpoint the Trainer has just written."""
        directory = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FOLDER_NAME
        self._save(args, state, kwargs["model"], directory, allow_untrained=not self._has_moved)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the final adapters, or the best ones with `load_best_model_at_end`."""
        for kind, count in self._warned.items():
            log.warning("the training had %d issues of the kind %s", count, kind)
        started = any(bool(parameter.any()) for parameter in self._starts_at_zero().values())
        if started and not self._has_moved and state.global_step > self._first_step:
            raise AdapterError("the adapter has the weights it began with: this training changed none of its lora_B")
        self._save(args, state, kwargs["model"], Path(str(args.output_dir)) / FOLDER_NAME, allow_untrained=False)

    def _save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        directory: Path,
        allow_untrained: bool,
    ) -> None:
        where = f"step {state.global_step}"
        self._guard(_check_ranks_agree, self._parameters, where=where)
        save_lora_adapters(
            model,
            directory,
            model_card=self.model_card,
            allow_untrained=allow_untrained,
            save_embedding_layers=self.save_embedding_layers,
            is_main_process=args.should_save,
        )

    def _starts_at_zero(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._parameters.items() if any(mark in name for mark in STARTS_AT_ZERO)}

    def _guard(self, check: Callable[..., None], *arguments: Any, where: str, **options: Any) -> None:
        try:
            check(*arguments, **options)
        except TrainingError as error:
            message = str(error) if str(error).startswith(where) else f"{where}: {error}"
            if self.on_issue == "stop":
                raise TrainingError(message) from None
            self._warned[check.__name__] += 1
            count = self._warned[check.__name__]
            if count <= WARNINGS_SHOWN or count % WARNINGS_BETWEEN == 0:
                log.warning("%s (on_issue='warn': continuing)", message)


def _check_optimizer(parameters: Mapping[str, nn.Parameter], groups: Iterable[Mapping[str, Any]]) -> None:
    """The optimizer must hold exactly the trainable parameters of the model."""
    held = {id(parameter) for group in groups for parameter in group["params"] if parameter.requires_grad}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in held]
    num_foreign = len(held - {id(parameter) for parameter in parameters.values()})
    if missing or num_foreign:
        raise TrainingError(
            f"the optimizer holds {num_foreign} parameters that are not the model's, and misses {len(missing)} of the "
            f"model's {len(parameters)} trainable ones ({some(missing)}): was it built from another object, or before "
            "get_peft_model?"
        )


def _check_ranks_agree(parameters: Mapping[str, nn.Parameter]) -> None:
    """All processes must hold the same trainable parameters; each of them must call this."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    fingerprints: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(fingerprints, tensors_fingerprint(parameters.items()))
    if len(set(fingerprints)) > 1:
        raise TrainingError(
            f"the {len(fingerprints)} processes hold {len(set(fingerprints))} different adapters: gradients were not "
            "averaged; is model.module called behind DDP, in compute_loss or a wrapper?"
        )


def _load_resumed(model: PeftModel, name: str) -> None:
    """Copy into the trained adapter what a resume loaded as a second adapter named after our folder; drop that one.

    The Trainer loads every subfolder that holds an adapter; transformers 5.17 then does not load the one beside it.
    """
    if FOLDER_NAME not in model.peft_config or name == FOLDER_NAME:
        return
    stored, live = named_state(model, FOLDER_NAME), named_state(model, name)
    shapes = {key: tensor.shape for key, tensor in stored.items()}
    if shapes != {key: tensor.shape for key, tensor in live.items()}:
        raise TrainingError(f"the checkpoint's {FOLDER_NAME} does not have the tensors of the adapter {name!r}")
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(stored[key])
    model.delete_adapter(FOLDER_NAME)
    log.info("resumed: adapter %r goes on from the checkpoint's %s", name, FOLDER_NAME)


def _show_log_lines(main_process: bool) -> None:
    """Print our log lines in a script that set up no logging."""
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO if main_process else logging.WARNING)
