"""Guards on their own: what each refuses, what it lets pass, and that its message names step, parameter and samples.

`tests/faults/test_guards_in_run.py` provokes the same issues in real runs.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from speechtune.errors import TrainingError
from speechtune.training import guards
from speechtune.types import Batch

LORA_A, LORA_B = "base_model.model.q_proj.lora_A.default.weight", "base_model.model.q_proj.lora_B.default.weight"
IDS = ("sample-7", "sample-9")


def parameter(*values: float, dtype: torch.dtype = torch.float32, grad: object = None) -> nn.Parameter:
    result = nn.Parameter(torch.tensor(values, dtype=dtype))
    if grad is not None:
        result.grad = torch.tensor(grad, dtype=dtype)
    return result


def batch(**counts: int) -> Batch:
    return Batch(IDS, {}, counts, 10, 1.0)


# -- what is trainable ---------------------------------------------------------------------------------------------


def test_nothing_trainable_is_refused() -> None:
    for lora in (True, False):
        with pytest.raises(TrainingError, match="nothing is trainable"):
            guards.check_trainable({}, lora=lora)


def test_an_adapter_alone_is_trainable() -> None:
    names = [LORA_A, LORA_B, "x.lora_magnitude_vector.default.weight", "x.modules_to_save.default.weight"]
    guards.check_trainable({name: parameter(0.0) for name in names}, lora=True)


def test_parameters_of_the_base_beside_the_adapter_are_named() -> None:
    """A resume that forgets to freeze the base trains all of it, and saves an adapter that does not fit the base."""
    base = {f"base_model.model.layers.{i}.weight": parameter(0.0) for i in range(7)}
    with pytest.raises(TrainingError) as caught:
        guards.check_trainable({LORA_A: parameter(0.0), **base}, lora=True)
    message = str(caught.value)
    assert "7 parameters of the base" in message and "layers.0.weight" in message and "and 2 more" in message
    assert "lora.modules_to_save" in message and caught.value.exit_code == 4
    guards.check_trainable(base, lora=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lora", [True, False])
def test_half_precision_parameters_are_named_with_their_dtype(dtype: torch.dtype, lora: bool) -> None:
    with pytest.raises(TrainingError, match=re.escape(f"{LORA_B} is {dtype}")):
        guards.check_trainable({LORA_A: parameter(0.0), LORA_B: parameter(0.0, dtype=dtype)}, lora=lora)


# -- targets and losses --------------------------------------------------------------------------------------------


def test_a_head_without_targets_is_named_with_the_samples() -> None:
    guards.check_targets(batch(audio=1, text=3), "step 4")
    with pytest.raises(TrainingError) as caught:
        guards.check_targets(batch(audio=0, text=3), "step 4")
    assert "step 4" in str(caught.value) and "audio" in str(caught.value) and "sample-7, sample-9" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_stops(value: float) -> None:
    """transformers prints NaN as 0.0 (`logging_nan_inf_filter`), which looks like a run that has learnt everything."""
    with pytest.raises(TrainingError) as caught:
        guards.check_losses({"text": 2.0, "audio": value}, "step 12", IDS)
    message = str(caught.value)
    assert "step 12" in message and f"audio loss is {value}" in message and "sample-7, sample-9" in message


def test_a_loss_of_exactly_zero_stops() -> None:
    """The original pipeline turned every exception into a loss of zero; one head sure of its three targets is none."""
    guards.check_losses({"audio": 1e-30, "text": 5.0}, "step 1", IDS)
    guards.check_losses({"audio": 1.0, "text": 0.0}, "step 900", IDS)
    with pytest.raises(TrainingError, match=r"step 3: the audio and text loss is exactly 0\.0.*sample-7, sample-9"):
        guards.check_losses({"audio": 0.0, "text": 0.0}, "step 3", IDS)


# -- gradients and the step ----------------------------------------------------------------------------------------


def test_a_loss_without_gradient_stops() -> None:
    guards.check_attached(parameter(1.0).sum(), "step 1", IDS)
    with pytest.raises(TrainingError, match=r"step 1: the loss carries no gradient.*sample-7, sample-9"):
        guards.check_attached(parameter(1.0).sum().detach(), "step 1", IDS)


def test_sound_gradients_pass() -> None:
    guards.check_gradients({LORA_B: parameter(0.0, grad=[1e-20])}, 1e-20, "step 1", IDS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_named(value: float) -> None:
    parameters = {LORA_A: parameter(1.0, grad=[0.0]), LORA_B: parameter(1.0, 1.0, grad=[1.0, value])}
    with pytest.raises(TrainingError) as caught:
        guards.check_gradients(parameters, value, "step 2", IDS)
    message = str(caught.value)
    assert f"step 2: the gradient norm is {value}" in message and "in 1 parameters" in message
    assert LORA_B in message and LORA_A not in message and "sample-7, sample-9" in message


def test_gradients_of_zero_stop() -> None:
    with pytest.raises(TrainingError, match=r"step 5: all gradients are zero.*sample-7"):
        guards.check_gradients({LORA_B: parameter(0.0, grad=[0.0])}, 0.0, "step 5", IDS)


@pytest.mark.parametrize("grad", [None, [0.0]])
def test_a_lora_b_that_the_loss_does_not_reach_is_named(grad: object) -> None:
    """lora_A gets no gradient at the first step, lora_B being zero: only lora_B tells where the loss passes."""
    reached = {LORA_A: parameter(0.0), LORA_B: parameter(0.0, grad=[1e-30])}
    guards.check_reached(reached, "step 1")
    unreached = "base_model.model.mlp.lora_B.default.weight"
    with pytest.raises(TrainingError) as caught:
        guards.check_reached({**reached, unreached: parameter(0.0, grad=grad)}, "step 1")
    message = str(caught.value)
    assert "reached 1 lora_B" in message and unreached in message and LORA_B not in message
    assert "lora.targets" in message


def test_a_step_that_changes_nothing_stops() -> None:
    guards.check_moved({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, "step 1")
    with pytest.raises(TrainingError, match="step 1: the optimizer step changed none of the 2 trainable parameters"):
        guards.check_moved({"a": "1", "b": "2"}, {"a": "1", "b": "2"}, "step 1")


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_step_that_leaves_nan_stops(value: float, name: str) -> None:
    """Else the checkpoint after it would hold NaN, verify, and be resumed from."""
    sound, broken = parameter(1.0, 2.0), parameter(1.0, value)
    guards.check_finite({LORA_A: sound}, "step 3", IDS)
    with pytest.raises(TrainingError) as caught:
        guards.check_finite({LORA_A: sound, LORA_B: broken}, "step 3", IDS)
    message = str(caught.value)
    assert message.startswith(
        f"step 3: the optimizer step left 1 parameters that are not finite ({LORA_B} holds {name})"
    )
    assert "sample-7, sample-9" in message


def raised_messages() -> list[re.Pattern[str]]:
    """Every message that `training/` can raise, as a regex that takes anything where a value is filled in."""
    patterns = []
    for path in Path(guards.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "TrainingError" and node.args:
                message = node.args[0]
                parts = message.values if isinstance(message, ast.JoinedStr) else [message]
                texts = [re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in parts]  # type: ignore[type-var]
                patterns.append(re.compile("".join(texts)))
    return patterns


def test_every_message_quoted_in_the_docs_exists() -> None:
    """Guards against a page that quotes a message which was reworded: nobody would find it by searching."""
    page = (Path(__file__).parents[2] / "docs/guards.md").read_text(encoding="utf-8")
    quotes = [" ".join(quote.split()) for quote in re.findall(r"```\n(.*?)```", page, re.DOTALL)]
    patterns = raised_messages()
    unknown = [quote for quote in quotes if not any(pattern.fullmatch(quote) for pattern in patterns)]
    assert len(quotes) > 10 and not unknown, unknown
