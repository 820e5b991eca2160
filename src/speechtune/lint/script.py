"""A parsed script: its calls, what each variable is bound to, and what trains which model."""

import ast
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import libcst as cst
from libcst import metadata

from speechtune.errors import ConfigError
from speechtune.lint.syntax import Node, argument, callee, calls_in, inside, is_name, receiver

Variable = tuple[int, str]
"""Identity of the owning scope (or of the class, for `self.x`) and the dotted name."""

OPTIMIZERS = ("Adam", "SGD", "Adafactor", "Lion", "Lamb", "RMSprop", "Muon", "Prodigy", "Optimizer")


@dataclass(frozen=True, slots=True)
class Binding:
    """One place where a variable gets a value; `value` is None where it is not a plain assignment."""

    node: cst.CSTNode
    value: cst.BaseExpression | None
    end: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Training:
    """A Trainer (`trainer` true) or an optimizer, and the expression of the model it trains."""

    call: cst.Call
    model: cst.BaseExpression
    trainer: bool


@dataclass(frozen=True, slots=True)
class Fix:
    """Statements to insert after others, and expressions to replace, by node of the script's tree."""

    insert: tuple[tuple[cst.CSTNode, str], ...] = ()
    replace: tuple[tuple[cst.CSTNode, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Match:
    """A node to which a rule applies; `note` marks a hint that is nothing wrong by itself."""

    code: str
    node: cst.CSTNode
    message: str
    fix: Fix | None = None
    note: bool = False


class Script:
    """A parsed file with positions, parents, scopes and qualified names; ConfigError if it cannot be parsed."""

    def __init__(self, path: Path, source: bytes, places: Sequence[tuple[int, int]] = ()) -> None:
        """`places`, for a notebook: cell and line of each line of `source`."""
        self.path, self.places = path, places
        try:
            # Not run. Python's own parser comes first: it says what is wrong and where, and it refuses nesting at which
            # libcst's would end the process.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT if places else 0
                compile(source, str(path), "exec", flags, dont_inherit=True)
            self._wrapper = metadata.MetadataWrapper(cst.parse_module(source))
        except (SyntaxError, ValueError, cst.ParserSyntaxError) as error:
            line = getattr(error, "lineno", None) or getattr(error, "raw_line", None) or 1
            reason = getattr(error, "msg", None) or str(error).splitlines()[0]
            message = f"{self.place(line)}: not readable as Python: {reason}; nothing was checked or changed"
            raise ConfigError(message) from error
        self.module = self._wrapper.module

    @cached_property
    def _facts(self) -> dict[Any, dict[cst.CSTNode, Any]]:
        providers = (metadata.PositionProvider, metadata.ScopeProvider, metadata.ExpressionContextProvider)
        return cast(Any, self._wrapper.resolve_many(providers))

    @cached_property
    def _parents(self) -> dict[cst.CSTNode, cst.CSTNode]:
        return {child: node for nodes in self._nodes.values() for node in nodes for child in node.children}

    @cached_property
    def _nodes(self) -> dict[type[cst.CSTNode], list[Any]]:
        nodes: dict[type[cst.CSTNode], list[Any]] = defaultdict(list)
        for node in inside(self.module, cst.CSTNode):
            nodes[type(node)].append(node)
        return nodes

    def all(self, kind: type[Node]) -> list[Node]:
        """All nodes of one kind, in source order."""
        return self._nodes[kind]

    def place(self, line: int) -> str:
        """file:line, of a notebook file:cell N:line."""
        cell, line = self.places[min(line, len(self.places)) - 1] if self.places else (0, line)
        return f"{self.path}:cell {cell}:{line}" if cell else f"{self.path}:{line}"

    def code(self, node: cst.CSTNode) -> str:
        return self.module.code_for_node(node)

    def start(self, node: cst.CSTNode) -> tuple[int, int]:
        """Line from 1, column from 0."""
        position = self._facts[metadata.PositionProvider][node].start
        return position.line, position.column

    def end(self, node: cst.CSTNode) -> tuple[int, int]:
        """Line from 1 and column from 0 of the end."""
        position = self._facts[metadata.PositionProvider][node].end
        return position.line, position.column

    def parent(self, node: cst.CSTNode) -> cst.CSTNode:
        return self._parents[node]

    def ancestors(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        """Parent, its parent, and so on to the module."""
        while (above := self._parents.get(node)) is not None:
            yield above
            node = above

    def enclosing(self, node: cst.CSTNode, kind: type[Node]) -> Node | None:
        """Nearest ancestor of a kind."""
        return next((above for above in self.ancestors(node) if isinstance(above, kind)), None)

    def function(self, node: cst.CSTNode) -> cst.FunctionDef | None:
        """The function whose body holds the node; None at module level."""
        return self.enclosing(node, cst.FunctionDef)

    def statement(self, node: cst.CSTNode) -> cst.CSTNode:
        """The statement, simple or compound, whose parent is a block."""
        while not isinstance(self.parent(node), cst.Module | cst.IndentedBlock | cst.SimpleStatementSuite):
            node = self.parent(node)
        return node

    def dominates(self, first: cst.CSTNode, second: cst.CSTNode) -> bool:
        """Whether reaching `second` means that `first` ran before it, as far as blocks show it."""
        block = self.parent(self.statement(first))
        while isinstance(outer := self._parents.get(block), cst.With):
            block = self.parent(outer)
        return self.end(first) <= self.start(second) and any(above is block for above in self.ancestors(second))

    def names(self, node: cst.CSTNode) -> set[str]:
        """Qualified names a name or attribute may stand for."""
        scope = self._facts[metadata.ScopeProvider].get(node)
        return {name.name for name in scope.get_qualified_names_for(node)} if scope else set()

    def comes_from(self, node: cst.CSTNode, package: str, *names: str) -> bool:
        """Whether a name was imported from a package and is called one of `names` there."""
        known = self.names(node)
        if not known and isinstance(node, cst.Name):
            stars = [found.module for found in self.all(cst.ImportFrom) if isinstance(found.names, cst.ImportStar)]
            known = {f"{self.code(module)}.{node.value}" for module in stars if module is not None}
        return any(name.partition(".")[0] == package and name.rpartition(".")[2] in names for name in known)

    def is_hf(self, node: cst.CSTNode, suffix: str) -> bool:
        """Whether a name comes from transformers or trl and ends with `suffix` there."""
        names = [name for name in self.names(node) if name.endswith(suffix)]
        return any(name.partition(".")[0] in {"transformers", "trl"} for name in names)

    def variable(self, expression: cst.CSTNode | None) -> Variable | None:
        """Identity of the variable that a name, or an attribute of a name, stands for."""
        if isinstance(expression, cst.Name):
            if (scope := self._facts[metadata.ScopeProvider].get(expression)) is None:
                return None
            owner = next((assignment.scope for assignment in scope[expression.value]), scope.globals)
            return id(owner), expression.value
        if isinstance(expression, cst.Attribute) and isinstance(expression.value, cst.Name):
            class_ = self.enclosing(expression, cst.ClassDef) if is_name(expression.value, "self") else None
            if class_ is not None:
                return id(class_), f"self.{expression.attr.value}"
            base = self.variable(expression.value)
            return base and (base[0], f"{base[1]}.{expression.attr.value}")
        return None

    @cached_property
    def bindings(self) -> dict[Variable, list[Binding]]:
        """All places that bind a variable, in source order."""
        bindings: dict[Variable, list[Binding]] = defaultdict(list)
        for node, variable in self._used(metadata.ExpressionContext.STORE):
            holder = self.parent(node)
            holder = self.parent(holder) if isinstance(holder, cst.AssignTarget) else holder
            if isinstance(holder, cst.Assign | cst.AnnAssign | cst.NamedExpr):
                bindings[variable].append(Binding(node, holder.value, self.end(holder)))
            else:
                bindings[variable].append(Binding(node, None, self.end(self.enclosing(node, cst.Assign) or node)))
        for places in bindings.values():
            places.sort(key=lambda binding: binding.end)
        return bindings

    @cached_property
    def reads(self) -> dict[Variable, list[cst.BaseExpression]]:
        """All places that read a variable, in source order."""
        reads: dict[Variable, list[cst.BaseExpression]] = defaultdict(list)
        for node, variable in self._used(metadata.ExpressionContext.LOAD):
            reads[variable].append(node)
        return reads

    def _used(self, context: metadata.ExpressionContext) -> Iterator[tuple[cst.BaseExpression, Variable]]:
        contexts = self._facts[metadata.ExpressionContextProvider]
        for node in [*self.all(cst.Name), *self.all(cst.Attribute)]:
            variable = self.variable(node) if contexts.get(node) is context else None
            if variable is not None:
                yield node, variable

    def binding_at(self, expression: cst.CSTNode, variable: Variable | None = None) -> Binding | None:
        """The binding a variable certainly has at a place; None if that cannot be told."""
        variable = variable or self.variable(expression)
        places = self.bindings.get(variable, []) if variable else []
        here = self.function(expression)
        local = [place for place in places if self.function(place.node) is here]
        if len(places) == 1 and not local:
            return places[0]
        earlier = [place for place in local if place.end <= self.start(expression)]
        if not earlier or len(local) < len(places) or not self.dominates(earlier[-1].node, expression):
            return None
        return earlier[-1]

    def value_at(self, expression: cst.BaseExpression | None) -> cst.BaseExpression | None:
        """What an expression certainly is: itself, or the value its variable was given."""
        if expression is None or self.variable(expression) is None:
            return expression
        binding = self.binding_at(expression)
        return binding and binding.value

    def call_at(self, expression: cst.BaseExpression | None) -> cst.Call | None:
        """The call that made the value of an expression, where it is certain."""
        value = self.value_at(expression)
        return value if isinstance(value, cst.Call) else None

    def rebound(self, variable: Variable, after: cst.CSTNode, before: cst.CSTNode | None = None) -> bool:
        """Whether a variable gets another value after one place (and before another)."""
        later = [place.end for place in self.bindings.get(variable, []) if place.end > self.end(after)]
        return any(before is None or end <= self.start(before) for end in later)

    def class_of(self, expression: cst.BaseExpression | None) -> cst.ClassDef | None:
        """The class of this file whose instance an expression certainly is."""
        call = self.call_at(expression)
        return self.find_class(call.func) if call else None

    def find_class(self, node: cst.CSTNode) -> cst.ClassDef | None:
        """The class of this file that a name stands for."""
        classes = [class_ for class_ in self.all(cst.ClassDef) if is_name(node, class_.name.value)]
        return classes[0] if len(classes) == 1 else None

    def extends_hf_trainer(self, class_: cst.ClassDef) -> bool:
        """Whether a class of this file has a Trainer class of transformers or trl above it."""
        for base in class_.bases:
            above = self.find_class(base.value)
            if self.is_hf(base.value, "Trainer"):
                return True
            if above is not None and above is not class_ and self.extends_hf_trainer(above):
                return True
        return False

    def is_hf_trainer(self, node: cst.CSTNode) -> bool:
        """A Trainer class of transformers or trl, or one of this file that derives from it."""
        class_ = self.find_class(node)
        return self.extends_hf_trainer(class_) if class_ else self.is_hf(node, "Trainer")

    def is_lora_config(self, call: cst.Call) -> bool:
        """A call that makes peft's LoraConfig."""
        return self.comes_from(call.func, "peft", "LoraConfig")

    def is_wrap(self, call: cst.Call | None) -> bool:
        """A call that makes a PEFT model of its first argument."""
        if call is None:
            return False
        owner = receiver(call)
        class_ = owner.value if isinstance(owner, cst.Name) and callee(call) == "from_pretrained" else callee(call)
        return callee(call) == "get_peft_model" or class_.startswith(("PeftModel", "PeftMixed", "AutoPeftModel"))

    @cached_property
    def trainings(self) -> list[Training]:
        """All trainers and optimizers whose model can be seen, in source order."""
        trainings = []
        for call in self.all(cst.Call):
            name = callee(call)
            if name.endswith("Trainer"):
                roots = {name.partition(".")[0] for name in self.names(call.func)}
                model = argument(call, "model", 0 if self.is_hf_trainer(call.func) else None)
                if model is not None and not roots & {"pytorch_lightning", "lightning", "pl"}:
                    trainings.append(Training(call, model, True))
            elif any(part in name for part in OPTIMIZERS):
                sources = [arg.value for arg in call.args]
                sources += [value for source in sources if (value := self.value_at(source)) not in (None, source)]
                for getter in calls_in(sources, "parameters", "named_parameters"):
                    if (model := receiver(getter)) is not None:
                        trainings.append(Training(call, model, False))
        return trainings
