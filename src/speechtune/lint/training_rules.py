"""Rules on what is trained: frozen adapters (L9, L10), optimizers of the base (L11), gradients thrown away (L12)."""

from collections.abc import Iterator, Sequence

import libcst as cst

from speechtune.lint.script import Match, Script, Training, Variable
from speechtune.lint.syntax import argument, callee, calls_in, inside, is_name, keywords, receiver

_PLACES = {"to", "cuda", "cpu", "float", "half", "bfloat16", "train", "eval"}  # methods that return the model itself
_INNER = {"base_model", "model", "module", "get_base_model"}  # of a PEFT model: LoRA lies in the base, too
_UNFREEZES = {"set_adapter", "set_requires_grad", "mark_only_lora_as_trainable"}
_KBIT = {"prepare_model_for_kbit_training", "prepare_model_for_int8_training"}


def adapters_for_inference(script: Script) -> Iterator[Match]:
    """L9: an adapter that PEFT was told, or left, to load for inference, and that is then trained."""
    if _unfreezes(script):
        return
    for training in script.trainings:
        for call in _origins(script, training) if _is_run(script, training) else ():
            loaded = callee(call) in {"from_pretrained", "load_adapter"}
            if loaded and not keywords(call) & {"is_trainable", "**"} and len(call.args) < 4:
                yield Match(
                    "L9",
                    call,
                    "the adapter is loaded for inference, so all its weights are frozen, and then trained: nothing is "
                    "learnt. Load it with is_trainable=True",
                )
            config = script.call_at(argument(call, "peft_config", 1)) if callee(call) == "get_peft_model" else None
            if config and script.is_lora_config(config) and is_name(argument(config, "inference_mode"), "True"):
                yield Match(
                    "L9",
                    config,
                    "inference_mode=True freezes the adapter that this configuration makes, and it is then trained: "
                    "nothing is learnt. Leave inference_mode out",
                )


def _origins(script: Script, training: Training) -> Iterator[cst.Call]:
    """Calls that made the trained model, the last one first, and load_adapter calls on it before the training."""
    made = script.call_at(training.model)
    while made is not None and callee(made) in _PLACES:
        made = script.call_at(receiver(made))
    if made is None:
        return
    if script.is_wrap(made):
        yield made
    elif callee(made) == "from_pretrained":
        variable = script.variable(training.model)
        for call in script.all(cst.Call):
            same = callee(call) == "load_adapter" and variable and script.variable(receiver(call)) == variable
            if same and script.dominates(call, training.call):
                yield call


def _is_run(script: Script, training: Training) -> bool:
    """Whether this file lets the trainer train, or the optimizer step; one made for an evaluation is not run."""
    wanted = "train" if training.trainer else "step"
    return any(
        callee(call) == wanted and (script.call_at(receiver(call)) is training.call or not training.trainer)
        for call in script.all(cst.Call)
    )


def _unfreezes(script: Script, after: cst.CSTNode | None = None) -> bool:
    """Whether anything in the file (after a place) may make parameters trainable again."""
    nodes = [node for node, value in _switches(script.module) if not is_name(value, "False")]
    nodes += calls_in([script.module], *_UNFREEZES)
    return any(after is None or script.start(node) >= script.end(after) for node in nodes)


def _switches(region: cst.CSTNode) -> Iterator[tuple[cst.CSTNode, cst.BaseExpression | None]]:
    """Places that set requires_grad, and the value it gets."""
    for call in calls_in([region], "requires_grad_"):
        yield call, argument(call, "requires_grad", 0)
    for assign in inside(region, cst.Assign):
        target = assign.targets[0].target
        if isinstance(target, cst.Attribute) and target.attr.value == "requires_grad":
            yield assign, assign.value


def frozen_adapters(script: Script) -> Iterator[Match]:
    """L10: every parameter frozen after LoRA was applied, its own among them."""
    for node, frozen in _freezings(script):
        wrapped = next((wrap for wrap in _wraps(script) if _holds(script, wrap, frozen, node)), None)
        if wrapped is not None and not _unfreezes(script, node):
            yield Match(
                "L10",
                node,
                "this freezes every parameter after LoRA was applied, the adapter's among them: nothing is learnt. "
                "Freeze the base before get_peft_model, which also does it by itself, or leave this out",
            )


def _freezings(script: Script) -> Iterator[tuple[cst.CSTNode, cst.BaseExpression]]:
    """Places that freeze all parameters of a model, and the model."""
    for call in script.all(cst.Call):
        off = callee(call) == "requires_grad_" and is_name(argument(call, "requires_grad", 0), "False")
        model = receiver(call) if off else argument(call, "model", 0) if callee(call) in _KBIT else None
        if model is not None:
            yield call, model
    for loop in script.all(cst.For):
        parameters = next(calls_in([loop.iter], "parameters", "named_parameters"), None)
        owner = receiver(parameters) if parameters else None
        if owner is None or any(inside(loop, kind) for kind in (cst.If, cst.IfExp, cst.CompIf)):
            continue  # a condition on the name keeps the adapter
        yield from ((node, owner) for node, value in _switches(loop.body) if is_name(value, "False"))


def _wraps(script: Script) -> list[cst.Call]:
    """Calls that put a trainable adapter into a model."""
    return [c for c in script.all(cst.Call) if callee(c) in {"get_peft_model", "add_adapter"}] + [
        c for c in script.all(cst.Call) if script.is_wrap(c) and is_name(argument(c, "is_trainable", 3), "True")
    ]


def _wrapped(script: Script, wrap: cst.Call) -> list[Variable]:
    """Variables that hold the LoRA layers once `wrap` was called: what it returns, and the base itself."""
    base = receiver(wrap) if callee(wrap) == "add_adapter" else argument(wrap, "model", 0)
    holder = script.parent(wrap)
    targets = [target.target for target in holder.targets] if isinstance(holder, cst.Assign) else []
    return [variable for node in (*targets, base) if (variable := script.variable(node)) is not None]


def _holds(script: Script, wrap: cst.Call, model: cst.BaseExpression, place: cst.CSTNode) -> bool:
    """Whether a model, or what it was taken out of, holds at a place the LoRA layers that `wrap` put there before."""
    if not script.dominates(wrap, place) or script.function(wrap) is not script.function(place):
        return False
    variables = _wrapped(script, wrap)
    while True:
        variable = script.variable(model)
        if variable is not None and variable in variables:
            return not script.rebound(variable, script.statement(wrap), place)
        inner = model.func if isinstance(model, cst.Call) else model
        if not isinstance(inner, cst.Attribute) or inner.attr.value not in _INNER:
            return False
        model = inner.value


def early_optimizers(script: Script) -> Iterator[Match]:
    """L11: an optimizer, or a trainer, that was made of the base before LoRA was applied to it."""
    for training in script.trainings:
        model = script.variable(training.model)
        for wrap in _wraps(script):
            base = receiver(wrap) if callee(wrap) == "add_adapter" else argument(wrap, "model", 0)
            later = model is not None and script.variable(base) == model and script.dominates(training.call, wrap)
            if not later or model is None or script.function(wrap) is not script.function(training.call):
                continue
            if script.rebound(model, training.call, wrap) or not _is_used_after(script, training, wrap):
                continue
            what = (
                "this trainer is made before LoRA is applied: it saves the base with LoRA layers in it, and no adapter"
                if training.trainer
                else "this optimizer is made before LoRA is applied: it holds the base's parameters, which LoRA "
                "freezes, and none of the adapter's, so nothing is learnt"
            )
            yield Match("L11", training.call, f"{what}. Make it after get_peft_model")
            break


def _is_used_after(script: Script, training: Training, wrap: cst.Call) -> bool:
    """Whether what was made before the wrapping is used after it, and only then, and gets nothing of the adapter."""
    others = [other for other in script.trainings if script.start(other.call) >= script.end(wrap)]
    if any(other.trainer is training.trainer for other in others) or any(
        callee(call) == "add_param_group" for call in script.all(cst.Call)
    ):
        return False
    holder = script.parent(training.call)
    variable = script.variable(holder.targets[0].target) if isinstance(holder, cst.Assign) else None
    if variable is None or any(name == f"{variable[1]}.model" for _, name in script.bindings):
        return False  # trainer.model = model sets it right
    runs = [c for c in script.all(cst.Call) if callee(c) in {"train", "step"}]
    early = [c for c in runs if script.variable(receiver(c)) == variable and script.end(c) <= script.start(wrap)]
    return not early and any(script.start(read) >= script.end(wrap) for read in script.reads.get(variable, ()))


def discarded_gradients(script: Script) -> Iterator[Match]:
    """L12: gradients cleared after the backward pass and before the step that needs them."""
    for block in (*script.all(cst.IndentedBlock), script.module):
        calls = [_only_call(statement) for statement in block.body]
        names = [_kind(call) for call in calls]
        for number, call in enumerate(calls):
            before = next((name for name in reversed(names[:number]) if name), "")
            after = next((name for name in names[number + 1 :] if name), "")
            if call is not None and (before, names[number], after) == ("backward", "zero_grad", "step"):
                yield Match(
                    "L12",
                    call,
                    "the gradients are cleared between backward and step: the optimizer moves nothing. Call zero_grad "
                    "before backward, or after step",
                )


def _only_call(statement: cst.CSTNode) -> cst.Call | None:
    lines: Sequence[cst.BaseSmallStatement] = statement.body if isinstance(statement, cst.SimpleStatementLine) else ()
    value = lines[0].value if len(lines) == 1 and isinstance(lines[0], cst.Expr) else None
    return value if isinstance(value, cst.Call) else None


def _kind(call: cst.Call | None) -> str:
    name = callee(call) if call is not None else ""
    if name == "step" and call is not None and not any(part in _text(receiver(call)) for part in ("opt", "scaler")):
        return ""  # of a scheduler, a progress bar
    return name if name in {"backward", "zero_grad", "step"} else ""


def _text(node: cst.BaseExpression | None) -> str:
    return cst.Module([]).code_for_node(node).lower() if node is not None else ""


RULES = (adapters_for_inference, frozen_adapters, early_optimizers, discarded_gradients)
