"""How `lint --fix` changes a script: what to insert or replace on the syntax tree, and how the file is written."""

import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import libcst as cst

from speechtune.errors import ConfigError
from speechtune.lint.script import Binding, Fix, Script, Training
from speechtune.lint.syntax import argument, callee, inside, is_name, keywords, receiver

_LINES = cst.SimpleStatementLine | cst.BaseCompoundStatement


class NotFixable(Exception):
    """Why an issue has to be fixed by hand."""


class _Use(NamedTuple):
    """Where a model is trained, or handed out by the function that makes it."""

    node: cst.CSTNode
    model: cst.BaseExpression
    training: cst.Call | None = None


def plan_wrap(script: Script, config: cst.Call) -> Fix:
    """Apply a LoraConfig to the model that is trained or returned: `model = get_peft_model(model, config)` before."""
    holder = script.parent(config)
    targets = [target.target for target in holder.targets] if isinstance(holder, cst.Assign) else []
    targets += [holder.target] if isinstance(holder, cst.AnnAssign) else []
    name = targets[0] if targets else None
    if not isinstance(name, cst.Name) or len(targets) > 1:
        raise NotFixable("the configuration is not kept in a variable of its own")
    here = script.function(config)
    trained = [t for t in script.trainings if here in (None, script.function(t.call)) and script.variable(t.model)]
    uses = [_Use(training.call, training.model, training.call) for training in trained]
    uses = uses or _returned_models(script, config)
    if not uses:
        raise NotFixable("no Trainer or optimizer in reach takes a model from a variable, and none is returned")
    if len({script.variable(use.model) for use in uses}) > 1:
        raise NotFixable("several models are trained here, or returned, and which one is meant is not certain")
    first = uses[0]
    _check_model(script, first)
    anchor = _wrap_anchor(script, _settled(script, config, name, first), first)
    function, imports = _wrap_function(script, config)
    if not all(isinstance(node, _LINES) for node in (anchor, *(node for node, _ in imports))):
        raise NotFixable("a statement beside which a line is needed shares its line with another")
    model = script.code(first.model)
    return Fix(insert=((anchor, f"{model} = {function}({model}, {name.value})"), *imports))


def _returned_models(script: Script, config: cst.Call) -> list[_Use]:
    """Models that the function which makes the configuration loads, or is given, and returns after it."""
    function, uses = script.function(config), []
    for returned in inside(function.body, cst.Return) if function else ():
        if script.function(returned) is not function or script.start(returned) < script.end(config):
            continue
        for node in inside(returned, cst.BaseExpression):
            holder = script.parent(node)
            handed = isinstance(holder, cst.Return | cst.Element | cst.DictElement | cst.Arg)
            places = script.bindings.get(script.variable(node) or (0, ""), ()) if handed else ()
            if any(_is_model(script, place) for place in places):
                uses.append(_Use(returned, node))
    if function and uses:
        _check_applied_nowhere(script, function.name.value)
    return uses


def _is_model(script: Script, place: Binding) -> bool:
    if isinstance(script.parent(place.node), cst.Param):
        return script.code(place.node).endswith("model")
    made = script.code(place.value.func) if isinstance(place.value, cst.Call) else ""
    return bool(re.search(r"[Mm]odel|For[A-Z]", made)) and not re.search("Config|Tokenizer|Processor", made)


def _check_applied_nowhere(script: Script, function: str) -> None:
    """Refuse where this file, or one beside it that imports it, may apply an adapter to what the function returns."""
    for call in script.all(cst.Call):
        made = script.call_at(argument(call, "model", 0)) if script.is_wrap(call) else None
        if (script.is_wrap(call) and (made is None or callee(made) == function)) or "peft_config" in keywords(call):
            raise NotFixable("this file may apply an adapter to it in another place")
    imports = re.compile(rf"\b(from|import)\b.*\b{re.escape(script.path.stem)}\b")
    for folder in (script.path.absolute().parent, script.path.absolute().parents[1]):
        for other in folder.glob("*.py"):
            text = other.read_text(encoding="utf-8", errors="replace") if other.is_file() else ""
            if imports.search(text) and any(word in text for word in ("get_peft_model", "peft_config", "add_adapter")):
                raise NotFixable(f"{other.name} imports it and applies an adapter by itself")


def _settled(script: Script, config: cst.Call, name: cst.Name, use: _Use) -> cst.CSTNode:
    """The configuration's name, or of several under one name the `if` whose every branch makes one."""
    configs = [call for call in script.all(cst.Call) if script.is_lora_config(call)]
    if not use.training:  # each function returns a model of its own
        configs = [call for call in configs if script.function(call) is script.function(config)]
    if len(configs) == 1:
        return name
    places = [place for place in script.bindings[script.variable(name) or (0, "")] if place.value in configs]
    choices = {_statement_beside(script, place, use.node) for place in places}
    choice = choices.pop()
    branches = list(_branches(choice)) if isinstance(choice, cst.If) else [None]
    chosen = {script.parent(script.statement(place.node)) for place in places}
    if choices or len(places) < len(configs) or not chosen.issuperset(branches):
        raise NotFixable("the script makes several LoraConfigs, and which one is meant is not certain")
    return choice


def _branches(choice: cst.If | cst.Else | None) -> Iterator[cst.BaseSuite | None]:
    """Bodies of an `if` and what follows it; None at the end where there is no `else`."""
    yield choice and choice.body
    if isinstance(choice, cst.If):
        yield from _branches(choice.orelse)


def _check_model(script: Script, use: _Use) -> None:
    made = script.call_at(use.model)
    value = script.value_at(use.model)
    class_ = script.class_of(use.model)
    if script.is_wrap(made):
        raise NotFixable("the model is a PEFT model already, made with another configuration")
    if class_ is not None:
        raise NotFixable(f"the model is a {class_.name.value} of this script; wrap the model inside it")
    if made is not None and any(name.startswith("torch.nn") for name in script.names(made.func)):
        raise NotFixable(f"{script.code(use.model)}, which is trained, is a bare layer")
    if isinstance(value, cst.BaseString) or any(part in script.code(use.model) for part in ("name", "path")):
        raise NotFixable("the trainer gets the model by name; give it as peft_config=")
    if use.training and {"peft_config", "**"} & keywords(use.training):
        raise NotFixable("the trainer may apply a configuration by itself")
    for call in script.all(cst.Call):
        added = callee(call) in {"add_adapter", "load_adapter"}
        if added and script.variable(receiver(call)) == script.variable(use.model):
            raise NotFixable("the model has an adapter already, made with another configuration")


def _wrap_anchor(script: Script, config: cst.CSTNode, use: _Use) -> cst.CSTNode:
    """The statement after which both the model and the configuration are ready, and training has not begun."""
    variable, function = script.variable(use.model), script.function(use.node)
    places = script.bindings.get(variable, []) if variable else []
    before = [b for b in places if script.function(b.node) is function and b.end <= script.start(use.node)]
    if not before:
        raise NotFixable("the model is made in another function")
    if script.start(use.node) < script.end(config):
        raise NotFixable("the configuration is made after the optimizer or trainer; move it before")
    last = before[-1]
    if script.function(config) is function and last.end < script.start(config):
        anchor = script.statement(config)
    else:
        anchor = _statement_beside(script, last, use.node)
        if not script.dominates(config, anchor) and script.function(config) is function:
            raise NotFixable("the configuration is made in a branch that may not be taken before the model is made")
    loops = [above for above in script.ancestors(anchor) if isinstance(above, cst.For | cst.While)]
    above = list(script.ancestors(last.node))
    if any(all(loop is not outer for outer in above) for loop in loops):
        raise NotFixable("in the loop, the model would be wrapped again at each turn")
    if any(outer is anchor for outer in script.ancestors(use.node)):
        raise NotFixable("the model is made in the statement that holds the training, or is an argument")
    return anchor


def _statement_beside(script: Script, binding: Binding, use: cst.CSTNode) -> cst.CSTNode:
    """The statement that holds the binding, in the innermost block that also holds the use."""
    above = {id(node) for node in script.ancestors(use)}
    statement = script.statement(binding.node)
    while id(script.parent(statement)) not in above:
        statement = script.statement(script.parent(statement))
    return statement


def _wrap_function(script: Script, config: cst.Call) -> tuple[str, list[tuple[cst.CSTNode, str]]]:
    """How the script can call get_peft_model, and the import to add if it cannot yet."""
    if isinstance(config.func, cst.Attribute):
        return f"{script.code(config.func.value)}.get_peft_model", []
    if any(variable[1] == "get_peft_model" for variable in script.bindings):
        raise NotFixable("the script uses the name get_peft_model for something else")
    home = None
    for node in script.all(cst.ImportFrom):
        for alias in () if isinstance(node.names, cst.ImportStar) else node.names:
            local = alias.asname.name if alias.asname else alias.name
            reachable = script.function(node) in (None, script.function(config))
            if is_name(alias.name, "get_peft_model") and isinstance(local, cst.Name) and reachable:
                return local.value, []
            if isinstance(local, cst.Name) and local.value == callee(config) and reachable:
                home = node
    if home is None:
        return "get_peft_model", []  # both names came by `from peft import *`
    return "get_peft_model", [(script.statement(home), "from peft import get_peft_model")]


def plan_keep(script: Script, line: cst.Expr, model: cst.BaseExpression) -> Fix:
    """Keep in the model's variable what a call on it returns."""
    if script.variable(model) is None:
        raise NotFixable("the model is in no variable")
    return Fix(replace=((line, f"{script.code(model)} = {script.code(line.value)}"),))


def plan_save(script: Script, save: cst.Call, owner: cst.BaseExpression, training: Training) -> Fix:
    """Save what was trained instead of `owner`: the PEFT variable, or else by the trainer."""
    trained = script.variable(training.model)
    binding = script.binding_at(save, trained) if trained else None
    if binding and script.is_wrap(script.call_at(binding.value)):
        return Fix(replace=((owner, script.code(training.model)),))
    rebound = script.enclosing(binding.node, cst.Assign) if binding else None
    if rebound and isinstance(rebound.value, cst.Call) and callee(rebound.value) == "prepare":
        accelerator = receiver(rebound.value)
        if accelerator is not None:
            code = f"{script.code(accelerator)}.unwrap_model({script.code(training.model)})"
            return Fix(replace=((owner, code),))
    return _by_trainer(script, save, owner, training)


def _by_trainer(script: Script, save: cst.Call, owner: cst.BaseExpression, training: Training) -> Fix:
    holder = script.parent(training.call)
    target = holder.targets[0].target if isinstance(holder, cst.Assign) else None
    variable = script.variable(target)
    binding = script.binding_at(save, variable) if variable else None
    if not training.trainer or target is None or not binding or binding.value is not training.call:
        raise NotFixable("the trained model is not in reach of this line; save it where it was trained")
    if len(save.args) != 1 or save.args[0].star or not keywords(save) <= {"save_directory"}:
        return Fix(replace=((owner, f"{script.code(target)}.model"),))
    renamed = ((save.args[0].keyword, "output_dir"),) if save.args[0].keyword else ()
    return Fix(replace=((save.func, f"{script.code(target)}.save_model"), *renamed))


def plan_inner_save(script: Script, owner: cst.BaseExpression, made: cst.Call, class_: cst.ClassDef) -> Fix:
    """Save the PEFT model inside a wrapper class of the script, by its variable or by the wrapper's attribute."""
    for attribute, value in _inner_models(script, made, class_):
        if not script.is_wrap(script.call_at(value)):
            continue
        variable = script.variable(value)
        binding = script.binding_at(owner, variable) if variable else None
        if binding and script.is_wrap(script.call_at(binding.value)):
            return Fix(replace=((owner, script.code(value)),))
        if attribute:
            return Fix(replace=((owner, f"{script.code(owner)}.{attribute}"),))
    raise NotFixable("what the wrapper holds is not certain; save the model inside it, or call trainer.save_model")


def _inner_models(script: Script, made: cst.Call, class_: cst.ClassDef) -> Iterator[tuple[str, cst.BaseExpression]]:
    """Attributes that `__init__` sets, each with the expression it gets, arguments of the call put in; "" if none."""
    inits = [node for node in class_.body.body if isinstance(node, cst.FunctionDef) and node.name.value == "__init__"]
    for init in inits:
        names = [parameter.name.value for parameter in init.params.params[1:]]
        for node in [assign for assign in script.all(cst.Assign) if script.function(assign) is init]:
            target = node.targets[0].target
            if not isinstance(target, cst.Attribute) or not is_name(target.value, "self"):
                continue
            given = node.value
            if isinstance(given, cst.Name) and given.value in names:
                given = argument(made, given.value, names.index(given.value))
            if given is not None:
                yield target.attr.value, given
    yield from (("", arg.value) for arg in made.args)


class Edit(cst.CSTTransformer):
    """Applies one fix and leaves everything else as it was; the caller checks that the result still parses."""

    def __init__(self, fix: Fix) -> None:
        super().__init__()
        self.fix = fix

    def on_leave(self, original_node: cst.CSTNode, updated_node: Any) -> Any:
        updated: Any = super().on_leave(original_node, updated_node)
        for node, code in self.fix.replace:
            if node is original_node:
                line = isinstance(node, cst.Expr)
                updated = (
                    cst.ensure_type(cst.parse_statement(code), cst.SimpleStatementLine).body[0]
                    if line
                    else (cst.parse_expression(code))
                )
        added = [cst.parse_statement(code) for node, code in self.fix.insert if node is original_node]
        return cst.FlattenSentinel([updated, *added]) if added else updated


def write_with_backup(path: Path, original: bytes, source: bytes) -> Path:
    """Put `source` in a file's place in one step, after a copy of the original under a name not used before."""
    path = path.resolve()  # a link stays a link
    try:
        if path.read_bytes() != original:
            raise ConfigError(f"{path}: changed while it was being fixed; nothing was written, try again")
        if not os.access(path, os.W_OK):
            raise ConfigError(f"{path}: is read-only; make it writable to have it fixed")
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(source)
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(path, aside)
            backup = _backup(path, original)
            os.replace(aside, path)
        finally:
            Path(aside).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be fixed: {error}; the script is as it was") from error
    return backup


def _backup(path: Path, original: bytes) -> Path:
    names = (path.with_name(f"{path.name}.bak{number or ''}") for number in itertools.count())
    backup = next(name for name in names if not name.exists())
    with backup.open("xb") as file:  # not over one that another process made meanwhile
        file.write(original)
        os.fsync(file.fileno())
    shutil.copymode(path, backup)
    return backup
