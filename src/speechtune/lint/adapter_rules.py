"""Rules on adapters: configurations never applied (L1), the wrong model saved (L2), trainable fp16 weights (L3)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import libcst as cst

from speechtune.lint.fixes import NotFixable, plan_inner_save, plan_keep, plan_save, plan_wrap
from speechtune.lint.script import Fix, Match, Script, Training, Variable
from speechtune.lint.syntax import argument, callee, calls_in, inside, is_name, keywords, literal, receiver

_SHOWS = {"print", "pprint", "repr", "str", "type", "isinstance", "len", "debug", "info", "warning", "error", "log"}
_EXPECTS_ERROR = {"raises", "assertRaises", "assertRaisesRegex", "warns"}


def _planned(code: str, node: cst.CSTNode, message: str, plan: Callable[[], Fix]) -> Match:
    try:
        return Match(code, node, message, plan())
    except NotFixable as reason:
        return Match(code, node, f"{message} (--fix leaves this to you: {reason})")


def unapplied_configs(script: Script) -> Iterator[Match]:
    """L1: a LoraConfig that reaches no model."""
    if any(is_name(call.func, "locals", "globals", "vars") and not call.args for call in script.all(cst.Call)):
        return
    trains = bool(script.trainings) or any(callee(call) == "backward" for call in script.all(cst.Call))
    for call in script.all(cst.Call):
        if not script.is_lora_config(call) or _escapes(script, call, set()):
            continue
        function = script.function(call)
        probes = isinstance(script.parent(call), cst.Expr) and script.enclosing(call, cst.Try) is not None
        if not trains and (function is None or function.name.value.startswith("test")):
            continue  # another file may import it; a test may only look at it
        with_ = script.enclosing(call, cst.With)
        expected = with_ is not None and any(calls_in((item.item for item in with_.items), *_EXPECTS_ERROR))
        if probes or expected:
            continue  # it is made to see whether it can be made
        message = (
            "this LoraConfig is never applied: no call gets it, so all weights are trained, or none, and no adapter is "
            "saved. Apply it before the trainer or optimizer is made: model = get_peft_model(model, config)"
        )
        yield _planned("L1", call, message, lambda call=call: plan_wrap(script, call))


def dropped_models(script: Script) -> Iterator[Match]:
    """L1 and L2: what makes a PEFT model of a base, or a base of a PEFT model, with its result dropped."""
    for line in script.all(cst.Expr):
        call = line.value
        if not isinstance(call, cst.Call):
            continue
        if callee(call) == "get_peft_model" and (model := argument(call, "model", 0)) is not None:
            message = (
                f"the PEFT model that this makes is dropped: {script.code(model)} stays the base, and saving it writes "
                f"no adapter. Keep it: {script.code(model)} = {script.code(call)}"
            )
            yield _planned("L1", call, message, lambda line=line, model=model: plan_keep(script, line, model))
        elif callee(call) == "merge_and_unload" and (model := receiver(call)) is not None:
            saves = [c for c in script.all(cst.Call) if callee(c) == "save_pretrained" and script.dominates(call, c)]
            variable = script.variable(model)
            saves = [save for save in saves if variable and script.variable(receiver(save)) == variable]
            kept = variable and any(not script.rebound(variable, call, save) for save in saves)
            if kept and script.is_wrap(script.call_at(model)):
                message = (
                    f"the merged model that this returns is dropped: {script.code(model)} is left an adapter without "
                    f"layers, and that is saved. Keep it: {script.code(model)} = {script.code(call)}"
                )
                yield _planned("L2", call, message, lambda line=line, model=model: plan_keep(script, line, model))


def _escapes(script: Script, expression: cst.BaseExpression, seen: set[Variable]) -> bool:
    """Whether the value of an expression gets anywhere but into tests, its own attributes and print-like calls."""
    match holder := script.parent(expression):
        case cst.Expr() | cst.ComparisonTarget() | cst.Comparison() | cst.FormattedStringExpression() | cst.Assert():
            return False
        case cst.UnaryOperation() | cst.If() | cst.While():
            return False
        case cst.Attribute():
            return holder.attr.value in {"to_dict", "__dict__"}
        case cst.Arg():
            call = script.parent(holder)
            return not (isinstance(call, cst.Call) and callee(call) in _SHOWS)
        case cst.IfExp() if holder.test is expression:
            return False
        case cst.IfExp() | cst.BooleanOperation():
            return _escapes(script, holder, seen)
        case cst.Assign():
            return any(_target_escapes(script, target.target, seen) for target in holder.targets)
        case cst.AnnAssign():
            return _target_escapes(script, holder.target, seen)
    return True


def _target_escapes(script: Script, target: cst.BaseExpression, seen: set[Variable]) -> bool:
    variable = script.variable(target) if isinstance(target, cst.Name) else None
    scope = next((a for a in script.ancestors(target) if isinstance(a, cst.FunctionDef | cst.ClassDef)), None)
    if variable is None or isinstance(scope, cst.ClassDef):
        return True
    if variable in seen:
        return False
    seen.add(variable)
    return any(_escapes(script, read, seen) for read in script.reads.get(variable, []))


def wrong_saves(script: Script) -> Iterator[Match]:
    """L2: save_pretrained of a model that is not the trained one, or that has no such method."""
    targets = [target.target for target in script.all(cst.AssignTarget)]
    delegated = any(isinstance(node, cst.Attribute) and node.attr.value == "save_pretrained" for node in targets)
    for call in script.all(cst.Call):
        owner = receiver(call)
        if callee(call) != "save_pretrained" or owner is None or "state_dict" in keywords(call):
            continue
        match = None if delegated else _wrapper_save(script, call, owner)
        match = match or _base_save(script, call, owner) or _reloaded_save(script, call, owner)
        if match is not None:
            yield match


def _wrapper_save(script: Script, save: cst.Call, owner: cst.BaseExpression) -> Match | None:
    model = owner
    if isinstance(owner, cst.Attribute) and owner.attr.value == "model":
        made = script.call_at(owner.value)
        model = next((t.model for t in script.trainings if t.call is made and t.trainer), owner)
    call, class_ = script.call_at(model), script.class_of(model)
    if call is None or class_ is None or not _is_bare_module(script, class_):
        return None
    guards = [above.test for above in script.ancestors(save) if isinstance(above, cst.If)]
    if any(calls_in(guards, "hasattr", "isinstance", "getattr")) or script.enclosing(save, cst.Try) is not None:
        return None
    message = (
        f"{script.code(owner)} is a {class_.name.value}, an nn.Module without save_pretrained: this line raises "
        "AttributeError after the training, and nothing is saved. Save the PEFT model inside it"
    )
    return _planned("L2", save, message, lambda: plan_inner_save(script, owner, call, class_))


def _is_bare_module(script: Script, class_: cst.ClassDef) -> bool:
    """A class of this file with nothing but torch's nn.Module, and no save_pretrained or __getattr__, above it."""
    if any(function.name.value in {"save_pretrained", "__getattr__"} for function in inside(class_, cst.FunctionDef)):
        return False
    for base in class_.bases:
        above = script.find_class(base.value)
        known = script.comes_from(base.value, "torch", "Module")
        if not known and (above is None or above is class_ or not _is_bare_module(script, above)):
            return False
    return bool(class_.bases)


def _base_save(script: Script, save: cst.Call, owner: cst.BaseExpression) -> Match | None:
    """The model that went into get_peft_model or into a trainer that wraps it itself, or whose copy is trained."""
    saved = script.variable(owner)
    merged = [call for call in script.all(cst.Call) if callee(call) in {"merge_and_unload", "unload", "merge_adapter"}]
    if saved is None or any(
        script.function(c) is not script.function(save) or script.end(c) <= script.start(save) for c in merged
    ):
        return None
    for training in script.trainings:
        if not _trained_before(script, training, save, saved):
            continue
        made = script.call_at(training.model)
        config = script.call_at(argument(training.call, "peft_config"))
        if config is not None and script.is_lora_config(config) and not script.is_wrap(made):
            source, how = training.model, "it is the base inside the PEFT model that the trainer made of it"
        elif made is not None and script.is_wrap(made):
            source, how = argument(made, "model", 0), "it is the base inside the PEFT model that was trained"
        elif made is not None and script.comes_from(made.func, "copy", "deepcopy"):
            source, how = argument(made, "x", 0), "a copy of it was trained"
            if _is_saved(script, training, script.module):
                continue  # both are, on purpose
        else:
            continue
        if source is None or not _same_object(script, owner, saved, source, save):
            continue
        if source is not training.model and any(script.variable(t.model) == saved for t in script.trainings):
            continue
        message = (
            f"{script.code(owner)} is not what was trained: {how}, so no loadable adapter is saved. "
            "Save the trained model: trainer.save_model(folder), or save_pretrained of the PEFT model"
        )
        return _planned("L2", save, message, lambda training=training: plan_save(script, save, owner, training))
    return None


def _trained_before(script: Script, training: Training, save: cst.Call, saved: Variable) -> bool:
    if script.function(training.call) is script.function(save):
        return script.dominates(training.call, save)
    places = script.bindings.get(saved, [])  # self.model, saved in another method than it is made in
    elsewhere = len(places) == 1 and script.function(places[0].node) is not script.function(save)
    class_ = script.enclosing(save, cst.ClassDef)
    return saved[1].startswith("self.") and elsewhere and class_ is script.enclosing(training.call, cst.ClassDef)


def _same_object(
    script: Script, owner: cst.BaseExpression, saved: Variable, source: cst.BaseExpression, save: cst.Call
) -> bool:
    """Whether the saved variable still holds at `save` what `source` held when it was wrapped."""
    limit = save if script.function(source) is script.function(save) else None
    if saved == script.variable(source):
        return not script.rebound(saved, source, limit)
    given = script.value_at(source)  # model = base; peft_model = get_peft_model(model, ...)
    if given is not None and script.variable(given) == saved:
        return not script.rebound(saved, given, limit)
    alias, target = script.binding_at(owner), script.variable(source)
    # base = model; model = get_peft_model(model, ...)
    if alias is None or alias.value is None or target is None or script.variable(alias.value) != target:
        return False
    return script.end(alias.value) <= script.start(source) and not script.rebound(target, alias.value, source)


def _is_saved(script: Script, training: Training, until: cst.CSTNode) -> bool:
    """Whether the trained model is saved somewhere between its training and a place."""
    saves = [call for call in script.all(cst.Call) if callee(call) in {"save_model", "save_pretrained"}]
    saves = [c for c in saves if script.start(c) >= script.end(training.call) and script.end(c) <= script.end(until)]
    models = [receiver(call) for call in saves if callee(call) == "save_pretrained"]
    trained = script.variable(training.model)
    return len(models) < len(saves) or any(
        script.variable(model) == trained or (isinstance(model, cst.Attribute) and model.attr.value == "model")
        for model in models
    )


def _reloaded_save(script: Script, save: cst.Call, owner: cst.BaseExpression) -> Match | None:
    """The untrained checkpoint, loaded into the variable again after the training and saved as it is."""
    variable, again = script.variable(owner), script.call_at(owner)
    if variable is None or again is None or callee(again) != "from_pretrained" or script.is_wrap(again):
        return None
    between = [r for r in script.reads[variable] if script.end(again) <= script.start(r) < script.start(owner)]
    for training in script.trainings:
        first = script.call_at(training.model)
        wrapped = argument(first, "model", 0) if first and script.is_wrap(first) else None
        first = script.call_at(wrapped) if wrapped is not None else first
        if between or first is None or first is again or callee(first) != "from_pretrained" or not again.args:
            continue
        same = first.args and script.code(first.args[0].value) == script.code(again.args[0].value)
        if same and script.dominates(training.call, again) and not _is_saved(script, training, again):
            message = (
                f"{script.code(owner)} was loaded anew from {script.code(again.args[0].value)} after the training: "
                "these are the untrained weights. Save the trained model: trainer.save_model(folder)"
            )
            return _planned("L2", save, message, lambda training=training: plan_save(script, save, owner, training))
    return None


@dataclass(frozen=True, slots=True)
class _Precision:
    half: bool = False
    wrapped: bool = False
    adapters: cst.Call | None = None  # the call that made trainable fp16 weights


def half_adapters(script: Script) -> Iterator[Match]:
    """L3: trainable fp16 weights under an optimizer without a loss scaler."""
    seen = set()
    for training in script.trainings:
        cause = None if _may_be_scaled(script, training) else _precision(script, training.model).adapters
        if cause is None or cause in seen:
            continue
        seen.add(cause)
        yield Match(
            "L3",
            cause,
            "this makes the trainable adapter fp16 without a loss scaler: AdamW's eps (1e-8) is 0 in fp16, so its "
            "weights are NaN after a step, which the Trainer prints as loss 0.0. Keep the adapter in fp32 (as "
            "get_peft_model makes it: no .half() after it, no autocast_adapter_dtype=False) and train with fp16=True",
        )


def _may_be_scaled(script: Script, training: Training) -> bool:
    """Whether a scaler, another optimizer, another eps, or something unseen may keep fp16 weights finite."""
    call = training.call
    if training.trainer:
        args = argument(call, "args", 1)
        made = script.call_at(args)
        if not script.is_hf_trainer(call.func) or keywords(call) & {"optimizers", "optimizer_cls_and_kwargs", "**"}:
            return True
        if made is None:
            return args is not None
        fp16, optim = argument(made, "fp16"), argument(made, "optim")
        adamw = optim is None or (literal(optim) or "").startswith("adamw_torch")
        usual = adamw and (fp16 is None or is_name(fp16, "False"))
        return not usual or bool(keywords(made) & {"**", "adam_epsilon", "deepspeed", "fsdp"})
    if callee(call) not in {"Adam", "AdamW"} or keywords(call) & {"eps", "**"}:
        return True
    accelerators = [made for made in script.all(cst.Call) if callee(made) == "Accelerator"]
    scaled = any(literal(argument(made, "mixed_precision")) not in {"no", "bf16"} for made in accelerators)
    names = {callee(other) for other in script.all(cst.Call)}
    return scaled or "backward" not in names or bool(names & {"GradScaler", "initialize"})


def _precision(script: Script, expression: cst.BaseExpression | None) -> _Precision:
    """Precision of a model where an expression stands; fp32 where that is not certain."""
    if isinstance(expression, cst.Call):
        return _precision_of_call(script, expression)
    binding = script.binding_at(expression) if expression is not None else None
    if expression is None or binding is None or script.function(binding.node) is not script.function(expression):
        return _Precision()
    state = _precision(script, binding.value)
    for read in script.reads.get(script.variable(expression) or (0, ""), []):
        if not (binding.end <= script.start(read) and script.end(read) <= script.start(expression)):
            continue
        holder = script.parent(read)
        call = script.parent(holder)
        if isinstance(holder, cst.Attribute) and isinstance(call, cst.Call) and call.func is holder:
            after = _after_method(script, state, call)
            if after.adapters is None or script.dominates(call, expression):
                state = after
        elif isinstance(call, cst.Call) and any(part in callee(call) for part in ("prepare_", "cast", "float", "fp32")):
            state = _Precision(wrapped=state.wrapped)
    return state


def _precision_of_call(script: Script, call: cst.Call) -> _Precision:
    if script.is_wrap(call):
        half = _precision(script, argument(call, "model", 0)).half
        kept = is_name(argument(call, "autocast_adapter_dtype"), "False")
        return _Precision(half, True, call if half and kept else None)
    if callee(call) in {"from_pretrained", "from_config"}:
        packed = keywords(call) & {"quantization_config", "load_in_4bit", "load_in_8bit", "**"}
        half = any(_is_half(script, argument(call, keyword)) for keyword in ("dtype", "torch_dtype"))
        return _Precision(half and not packed)
    return _after_method(script, _precision(script, receiver(call)), call)


def _after_method(script: Script, state: _Precision, call: cst.Call) -> _Precision:
    """A model's precision after `model.method(...)`."""
    name, values = callee(call), [arg.value for arg in call.args]
    if name == "half" or (name == "to" and any(_is_half(script, value) for value in values)):
        return _Precision(True, state.wrapped, call if state.wrapped or state.adapters else None)
    if name == "to" and not any("dtype" in script.code(arg) or "torch.float" in script.code(arg) for arg in call.args):
        return state  # a device
    if name in {"to", "float", "double", "bfloat16"}:
        return _Precision(wrapped=state.wrapped)
    for_ = script.enclosing(call, cst.For)
    if name in {"parameters", "named_parameters"} and for_ and any(calls_in([for_.body], "float", "to")):
        return _Precision(wrapped=state.wrapped)  # the usual loop that casts what is trainable
    adds = name == "add_adapter" or (name == "load_adapter" and is_name(argument(call, "is_trainable"), "True"))
    return replace(state, adapters=call) if adds and state.half and not state.wrapped else state


def _is_half(script: Script, node: cst.BaseExpression | None) -> bool:
    values = [value for value in (node, script.value_at(node)) if value is not None]
    return any(script.comes_from(value, "torch", "float16", "half") or literal(value) == "float16" for value in values)


RULES = (unapplied_configs, dropped_models, wrong_saves, half_adapters)
