"""Rules on the training step: no backward (L4), labels (L5, L8), NaN shown as 0.0 (L6), hidden errors (L7)."""

import re
from collections.abc import Iterable, Iterator

import libcst as cst

from speechtune.lint.script import Match, Script
from speechtune.lint.syntax import argument, callee, calls_in, inside, is_name, keywords, literal, receiver

_LABELS = {"labels", "label_ids", "lm_labels"}
_COPIES = {"clone", "copy", "deepcopy", "detach", "to", "long", "cuda", "contiguous", "tolist", "list"}
_MASKING = {"DataCollatorForLanguageModeling", "DataCollatorForCompletionOnlyLM", "DataCollatorWithFlattening"}
_PADDING = {"DataCollatorForSeq2Seq", "DataCollatorForTokenClassification"}
_NOT_TRAINING = ("eval", "test", "valid", "perplex", "ppl", "infer", "generat", "score", "dummy")
_UNPADDED = ("pack", "group", "chunk", "block", "stream")
_IGNORE_NAMES = ("ignore_index", "ignore_id", "ignore_token", "label_pad", "loss_mask", "labels_mask")
_TRAINER_METHODS = {"compute_loss", "log", "store_flos", "compute_loss_context_manager", "_prepare_inputs"}
_TRAINER_METHODS |= {"_prepare_input", "autocast_smart_context_manager", "get_batch_samples", "is_world_process_zero"}
_NOT_MODELS = ("token", "processor", "extractor", "config")
_SAVES = {"save_pretrained", "save_model", "save_state", "_save_checkpoint"}
_NOISE = {"print", "debug", "info", "warning", "warn", "error", "exception", "log", "print_exc", "write", "empty_cache"}


def steps_without_backward(script: Script) -> Iterator[Match]:
    """L4: training_step of a Trainer subclass that never reaches a backward()."""
    for class_ in script.all(cst.ClassDef):
        step = _method(class_, "training_step")
        if step is None or not script.extends_hf_trainer(class_) or not inside(step.body, cst.Return):
            continue
        if not _reaches_backward(script, class_, step, {step}):
            yield Match(
                "L4",
                step.name,
                "this training_step never calls backward: no gradient exists, so the optimizer moves nothing while the "
                "loss is logged as usual. Call self.accelerator.backward(loss), or return super().training_step(...)",
            )


def _method(class_: cst.ClassDef, name: str) -> cst.FunctionDef | None:
    methods = [node for node in class_.body.body if isinstance(node, cst.FunctionDef) and node.name.value == name]
    return methods[-1] if methods else None


def _reaches_backward(
    script: Script, class_: cst.ClassDef, function: cst.FunctionDef, seen: set[cst.FunctionDef]
) -> bool:
    for call in inside(function.body, cst.Call):
        name, called = callee(call), None
        if "backward" in name or name == "training_step":
            return True
        if is_name(receiver(call), "self"):
            called = _method(class_, name)
            if called is None and name not in _TRAINER_METHODS:
                return True  # a method from a base that is not seen may do it
        elif isinstance(call.func, cst.Name):
            own = [function for function in script.all(cst.FunctionDef) if function.name.value == name]
            called = own[0] if own else None
            takes_loss = any(is_name(arg.value, "loss") for arg in call.args)
            if called is None and takes_loss and not any("builtins" in known for known in script.names(call.func)):
                return True
        if called is not None and called not in seen:
            seen.add(called)
            if _reaches_backward(script, class_, called, seen):
                return True
    return False


def unmasked_labels(script: Script) -> Iterator[Match]:
    """L5: labels that are a plain copy of input_ids, so that padding and prompt are trained."""
    names = {callee(call) for call in script.all(cst.Call)}
    if names & _MASKING or any(name.startswith("SFT") for name in names) or _masks_somewhere(script):
        return
    padded = any(_pads(call) for call in script.all(cst.Call))
    if names & _PADDING and not padded:
        return  # the collator pads labels with -100
    for node, value in _label_values(script):
        source = _copied_input_ids(value)
        if source is None or not _is_model_input(script, node, value, source) or _is_exempt(script, node):
            continue
        region = script.function(node) or script.module
        words = {name.value for name in inside(region, cst.Name)}
        words |= {literal(string) for string in inside(region, cst.SimpleString)}
        certain = padded or bool(words & {"attention_mask", "pad_token_id"})
        message = (
            "labels are a copy of input_ids and are masked nowhere: padding"
            f"{'' if certain else ' (if rows are padded)'} is trained as if it were text, and so is the prompt. "
            "Set both to -100 in the labels; a collator can do it"
        )
        yield Match("L5", node, message, note=not certain)


def _masks_somewhere(script: Script) -> bool:
    """Whether the file writes -100, or names an index that the loss ignores."""
    for minus in script.all(cst.UnaryOperation):
        hundred = isinstance(minus.expression, cst.Integer) and minus.expression.value == "100"
        if hundred and isinstance(minus.operator, cst.Minus) and script.enclosing(minus, cst.Comparison) is None:
            return True
    return any(part in name.value.lower() for name in script.all(cst.Name) for part in _IGNORE_NAMES)


def _pads(call: cst.Call) -> bool:
    padding = argument(call, "padding")
    asked = padding is not None and not is_name(padding, "False", "None") and literal(padding) != "do_not_pad"
    return asked or callee(call) in {"pad", "pad_sequence"}


def _label_values(script: Script) -> Iterator[tuple[cst.CSTNode, cst.BaseExpression]]:
    for assign in script.all(cst.Assign):
        if any(is_name(target.target, *_LABELS) or _key(target.target) in _LABELS for target in assign.targets):
            yield assign, assign.value
    for element in script.all(cst.DictElement):
        if literal(element.key) in _LABELS:
            yield element, element.value
    for arg in script.all(cst.Arg):
        if arg.keyword is not None and arg.keyword.value in _LABELS:
            yield arg, arg.value


def _key(node: cst.CSTNode) -> str | None:
    """`k` of `x["k"]`."""
    if not isinstance(node, cst.Subscript) or len(node.slice) != 1:
        return None
    index = node.slice[0].slice
    return literal(index.value) if isinstance(index, cst.Index) else None


def _copied_input_ids(value: cst.BaseExpression) -> cst.BaseExpression | None:
    """The `input_ids` expression of which `value` is a plain copy."""
    while True:
        if is_name(value, "input_ids") or _key(value) == "input_ids":
            return value
        if isinstance(value, cst.Attribute) and value.attr.value == "input_ids":
            return value
        if isinstance(value, cst.Subscript) and _key(value) is None:
            value = value.value
        elif isinstance(value, cst.Call) and callee(value) in _COPIES:
            owner = receiver(value)
            of_module = is_name(owner, "torch", "copy", "np")
            inner = value.args[0].value if (of_module or owner is None) and value.args else owner
            if inner is None:
                return None
            value = inner
        else:
            return None


def _is_model_input(script: Script, node: cst.CSTNode, value: cst.BaseExpression, source: cst.BaseExpression) -> bool:
    """Whether the copied ids are the model's input; `labels = tokenizer(target)["input_ids"]` is not."""
    if isinstance(source, cst.Name):
        return True
    base = script.code(source.value) if isinstance(source, cst.Subscript | cst.Attribute) else ""
    if isinstance(node, cst.Assign):
        targets = [target.target for target in node.targets]
        same = [t for t in targets if isinstance(t, cst.Subscript) and script.code(t.value) == base]
        return bool(same) or (value is not source and any(is_name(target, *_LABELS) for target in targets))
    holder = script.parent(node)
    if isinstance(holder, cst.Call):
        given = argument(holder, "input_ids")
        spread = any(arg.star == "**" and script.code(arg.value) == base for arg in holder.args)
        return spread or (given is not None and script.code(given) == script.code(source))
    for element in holder.elements if isinstance(holder, cst.Dict) else ():
        ids = _copied_input_ids(element.value) if isinstance(element, cst.DictElement) else None
        key = literal(element.key) if isinstance(element, cst.DictElement) else None
        if key == "input_ids" and ids is not None and script.code(ids) == script.code(source):
            return True
        if isinstance(element, cst.StarredDictElement) and script.code(element.value) == base:
            return True
    return False


def _is_exempt(script: Script, node: cst.CSTNode) -> bool:
    """Places that do not train, that see no padding, or that change the labels afterwards."""
    above = list(script.ancestors(node))
    homes = [home for home in above if isinstance(home, cst.FunctionDef | cst.ClassDef)]
    names = " ".join(home.name.value.lower() for home in homes)
    heads = [item.item for with_ in above if isinstance(with_, cst.With) for item in with_.items]
    heads += [decorator.decorator for home in homes for decorator in home.decorators]
    if any(part in names for part in _NOT_TRAINING + _UNPADDED):
        return True
    if any(word in script.code(head) for head in heads for word in ("no_grad", "inference_mode")):
        return True
    region = script.function(node) or script.module
    for call in inside(region, cst.Call):
        name, blocks = callee(call), callee(call) == "range" and len(call.args) == 3
        if "mask" in name.lower() or name in {"randint", "randn"} or blocks:
            return True
    return _changed_later(script, node, region)


def _changed_later(script: Script, node: cst.CSTNode, region: cst.CSTNode) -> bool:
    later = [target for target in inside(region, cst.AssignTarget) if script.start(target) >= script.end(node)]
    if any(isinstance(target.target, cst.Subscript) and "label" in script.code(target) for target in later):
        return True
    target = node.targets[0].target if isinstance(node, cst.Assign) else None
    if not isinstance(target, cst.Name):
        return False
    variable = script.variable(target)
    reads = [r for r in script.reads.get(variable or (0, ""), []) if script.start(r) >= script.end(node)]
    statements = [script.parent(script.parent(script.parent(read))) for read in reads]  # Name, Arg, Call, statement
    assigns = [s for s in statements if isinstance(s, cst.Assign) and is_name(s.targets[0].target, target.value)]
    changed = any(isinstance(a.value, cst.Call) and callee(a.value) not in _COPIES | {"stack"} for a in assigns)
    return not reads or changed or any(isinstance(statement, cst.Expr) for statement in statements)


def masked_end(script: Script) -> Iterator[Match]:
    """L8: padding is the end token, and something masks every padding token in the labels."""
    pads = list(_pad_tokens(script))
    ends = [node for node, value in pads if _named(value, "eos_token", "eos_token_id")]
    masking = next(_masks_of_padding(script), None)
    if masking is None or len(ends) < len(pads):
        return  # where it gets another token, too, it is not certain which one it has
    for node in ends:
        yield Match(
            "L8",
            node,
            f"padding is the end token here, and line {script.start(masking)[0]} masks every padding token in the "
            "labels: the end is never trained, so the model never stops. Give padding a token of its own, such as one "
            "that the vocabulary reserves, or mask where attention_mask is 0",
        )


def _pad_tokens(script: Script) -> Iterator[tuple[cst.CSTNode, cst.BaseExpression]]:
    """Places that choose the padding token of a tokenizer, and what they choose."""
    for assign in script.all(cst.Assign):
        for target in assign.targets:
            own = _named(target.target, "pad_token", "pad_token_id") and "config" not in script.code(target.target)
            if own and isinstance(target.target, cst.Attribute):
                yield assign, assign.value
    for call in calls_in([script.module], "add_special_tokens"):
        for element in inside(call, cst.DictElement):
            if literal(element.key) == "pad_token":
                yield call, element.value
    for call in calls_in([script.module], "from_pretrained"):
        if (chosen := argument(call, "pad_token")) is not None:
            yield call, chosen


def _named(node: cst.BaseExpression | None, *names: str) -> bool:
    return isinstance(node, cst.Attribute) and node.attr.value in names


def _masks_of_padding(script: Script) -> Iterator[cst.CSTNode]:
    """Places that take every padding token, by its id, out of the loss."""
    for call in script.all(cst.Call):
        causal = callee(call) == "DataCollatorForLanguageModeling" and is_name(argument(call, "mlm", 1), "False")
        if (causal and script.comes_from(call.func, "transformers", callee(call))) or (
            callee(call) == "DataCollatorForCompletionOnlyLM" or _is_padding(script, argument(call, "ignore_index"))
        ):
            yield call
    for comparison in script.all(cst.Comparison):
        sides = (comparison.left, *(target.comparator for target in comparison.comparisons))
        statement = script.statement(comparison)
        if any(_is_padding(script, side) for side in sides) and isinstance(statement, cst.SimpleStatementLine):
            code = script.code(statement)
            if re.search(r"-\s*100\b|ignore_index", code, re.IGNORECASE) and "attention_mask" not in code:
                yield comparison


def _is_padding(script: Script, node: cst.BaseExpression | None) -> bool:
    return any(_named(value, "pad_token_id") for value in (node, script.value_at(node)))


def hidden_nan(script: Script) -> Iterator[Match]:
    """L6, a note: fp16 training in which the Trainer prints a NaN loss as 0.0."""
    for call in script.all(cst.Call):
        if not script.is_hf(call.func, "TrainingArguments"):
            continue
        if is_name(argument(call, "fp16"), "True") and not keywords(call) & {"logging_nan_inf_filter", "**"}:
            message = (
                "with fp16=True a loss that became NaN is printed as 0.0, as logging_nan_inf_filter is on by default. "
                "Set logging_nan_inf_filter=False to see it"
            )
            yield Match("L6", call, message, note=True)


def swallowed_errors(script: Script) -> Iterator[Match]:
    """L7: a handler for everything around a training step or a save that goes on as if nothing had happened."""
    for try_ in script.all(cst.Try):
        step, stored = _guarded(script, try_)
        for handler in try_.handlers:
            named = inside(handler.type, cst.Name) if handler.type is not None else []
            everything = handler.type is None or any(is_name(name, "Exception", "BaseException") for name in named)
            if not everything or inside(handler.body, cst.Raise) or any(calls_in([handler.body], "exit", "_exit")):
                continue
            if step and _zero_loss(script, handler):
                what = "puts a loss of zero in the place of"
            elif (step and _goes_on(handler, _NOISE)) or (stored and _goes_on(handler, ())):
                what = "passes over"
            else:
                continue
            message = (
                f"this handler catches everything and {what} any error of the {step or stored} above: a run that "
                "learns, or stores, nothing looks successful. Catch the error you expect, or raise"
            )
            yield Match("L7", handler, message)


def _guarded(script: Script, try_: cst.Try) -> tuple[str, str]:
    """What of a training step, and of training or saving outside of it, a try block holds; "" for nothing."""
    trainers = [training.call for training in script.trainings if training.trainer]
    step = stored = ""
    for call in calls_in([try_.body]):
        owner = receiver(call)
        if callee(call) in {"backward", "training_step"}:
            step = "training step"
        elif callee(call) == "train" and script.call_at(owner) in trainers:
            stored = "training"
        elif callee(call) in _SAVES and not any(part in script.code(owner or call.func) for part in _NOT_MODELS):
            stored = stored or "save"
    function = script.function(try_)
    if function is not None and function.name.value in {"training_step", "compute_loss"}:
        step = "training step"
    return step, stored


def _zero_loss(script: Script, handler: cst.ExceptHandler) -> bool:
    values = [a.value for a in inside(handler.body, cst.Assign) if "loss" in script.code(a.targets[0].target)]
    values += [returned.value for returned in inside(handler.body, cst.Return) if returned.value is not None]
    for value in values:
        made = callee(value) if isinstance(value, cst.Call) else ""
        first = value.args[0].value if isinstance(value, cst.Call) and made == "tensor" and value.args else value
        zero = isinstance(first, cst.Integer | cst.Float) and float(first.evaluated_value) == 0
        if zero or made in {"zeros", "zeros_like", "new_zeros"}:
            return True
    return False


def _goes_on(handler: cst.ExceptHandler, noise: Iterable[str]) -> bool:
    """Whether a handler holds nothing but pass, continue, and calls that only report."""
    for statement in [small for line in handler.body.body for small in getattr(line, "body", [line])]:
        value = statement.value if isinstance(statement, cst.Expr) else None
        silent = isinstance(statement, cst.Pass | cst.Continue | cst.Expr)
        if not silent or (isinstance(value, cst.Call) and callee(value) not in noise):
            return False
    return True


RULES = (steps_without_backward, unmasked_labels, masked_end, hidden_nan, swallowed_errors)
