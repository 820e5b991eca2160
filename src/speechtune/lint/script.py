"""A parsed script: its calls, what each variable is bound to, and what trains which model."""

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import libcst as cst
from libcst.metadata import (
    ExpressionContext,
    ExpressionContextProvider,
    MetadataWrapper,
    PositionProvider,
    ScopeProvider,
)

from speechtune.errors import ConfigError

Variable = tuple[int, str]
"""Identity of the owning scope (or of the class, for `self.x`) and the dotted name."""

Node = TypeVar("Node", bound=cst.CSTNode)

HF_ROOTS = {"transformers", "trl"}
OPTIMIZERS = ("Adam", "SGD", "Adafactor", "Lion", "Lamb", "RMSprop", "Muon", "Prodigy", "Optimizer")
_LIGHTNING = {"pytorch_lightning", "lightning", "pl"}


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


def callee(call: cst.Call) -> str:
    """Last part of the name that is called, "" for anything else."""
    if isinstance(call.func, cst.Attribute):
        return call.func.attr.value
    return call.func.value if isinstance(call.func, cst.Name) else ""


def receiver(call: cst.Call) -> cst.BaseExpression | None:
    """`x` of `x.method(...)`."""
    return call.func.value if isinstance(call.func, cst.Attribute) else None


def argument(call: cst.Call, keyword: str, index: int | None = None) -> cst.BaseExpression | None:
    """Value of an argument, by its keyword or else its position."""
    for arg in call.args:
        if arg.keyword is not None and arg.keyword.value == keyword:
            return arg.value
    plain = [arg for arg in call.args if arg.keyword is None]
    if index is None or index >= len(plain) or any(arg.star for arg in plain[: index + 1]):
        return None
    return plain[index].value


def keywords(call: cst.Call) -> set[str]:
    """Names of the keyword arguments; "**" stands for keywords that cannot be known."""
    return {arg.keyword.value if arg.keyword else arg.star for arg in call.args} - {""}


def is_name(node: cst.CSTNode | None, *names: str) -> bool:
    """A plain name (`None`, `True` and `False` are names, too) among `names`."""
    return isinstance(node, cst.Name) and node.value in names


def literal(node: cst.CSTNode | None) -> str | None:
    """Text of a plain string."""
    value = node.evaluated_value if isinstance(node, cst.SimpleString) else None
    return value if isinstance(value, str) else None


def inside(node: cst.CSTNode, kind: type[Node]) -> list[Node]:
    """Nodes of one kind in a subtree, in source order, the root included."""
    nodes, waiting = [], [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, kind):
            nodes.append(node)
        waiting.extend(reversed(node.children))
    return nodes


def calls_in(nodes: Iterable[cst.CSTNode], *names: str) -> Iterator[cst.Call]:
    """Calls in some subtrees; with `names` only those whose last name is among them."""
    for node in nodes:
        yield from (call for call in inside(node, cst.Call) if not names or callee(call) in names)


class Script:
    """A parsed file with positions, parents, scopes and qualified names.

    Raises:
        ConfigError: this Python cannot parse the file.
    """

    def __init__(self, path: Path, source: bytes) -> None:
        self.path = path
        try:
            # Not run. Python's own parser comes first: it says what is wrong and where, and it refuses nesting at which
            # libcst's would end the process.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(source, str(path), "exec", dont_inherit=True)
            self._wrapper = MetadataWrapper(cst.parse_module(source))
        except (SyntaxError, ValueError, cst.ParserSyntaxError) as error:
            line = getattr(error, "lineno", None) or getattr(error, "raw_line", None) or 1
            reason = getattr(error, "msg", None) or str(error).splitlines()[0]
            message = f"{path}:{line}: not readable as Python: {reason}; nothing was checked or changed"
            raise ConfigError(message) from error
        self.module = self._wrapper.module

    @cached_property
    def _facts(self) -> dict[Any, dict[cst.CSTNode, Any]]:
        facts = self._wrapper.resolve_many((PositionProvider, ScopeProvider, ExpressionContextProvider))
        return cast(dict[Any, dict[cst.CSTNode, Any]], facts)

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

    @property
    def calls(self) -> list[cst.Call]:
        """All calls, in source order."""
        return self.all(cst.Call)

    def code(self, node: cst.CSTNode) -> str:
        """Source text of a node."""
        return self.module.code_for_node(node)

    def start(self, node: cst.CSTNode) -> tuple[int, int]:
        """Line from 1, column from 0."""
        position = self._facts[PositionProvider][node].start
        return position.line, position.column

    def end(self, node: cst.CSTNode) -> tuple[int, int]:
        """Line from 1 and column from 0 of the end."""
        position = self._facts[PositionProvider][node].end
        return position.line, position.column

    def parent(self, node: cst.CSTNode) -> cst.CSTNode:
        """The node that holds this one."""
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
        blocks = cst.Module | cst.IndentedBlock | cst.SimpleStatementSuite
        while not isinstance(self.parent(node), blocks):
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
        scope = self._facts[ScopeProvider].get(node)
        return {name.name for name in scope.get_qualified_names_for(node)} if scope else set()

    def comes_from(self, node: cst.CSTNode, roots: Collection[str], names: Collection[str]) -> bool:
        """Whether a name was imported from one of the packages `roots` and is called one of `names` there."""
        known = self.names(node)
        if not known and isinstance(node, cst.Name):
            known = {f"{root}.{node.value}" for root in self._star_imports}
        return any(name.partition(".")[0] in roots and name.rpartition(".")[2] in names for name in known)

    @cached_property
    def _star_imports(self) -> set[str]:
        imports = [node for node in self.all(cst.ImportFrom) if isinstance(node.names, cst.ImportStar)]
        return {self.code(node.module) for node in imports if node.module is not None}

    def variable(self, expression: cst.CSTNode | None) -> Variable | None:
        """Identity of the variable that a name, or an attribute of a name, stands for."""
        if isinstance(expression, cst.Name):
            scope = self._facts[ScopeProvider].get(expression)
            if scope is None:
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
        for node, variable in self._used(ExpressionContext.STORE):
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
        for node, variable in self._used(ExpressionContext.LOAD):
            reads[variable].append(node)
        return reads

    def _used(self, context: ExpressionContext) -> Iterator[tuple[cst.BaseExpression, Variable]]:
        contexts = self._facts[ExpressionContextProvider]
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
        return binding.value if binding else None

    def call_at(self, expression: cst.BaseExpression | None) -> cst.Call | None:
        """The call that made the value of an expression, where it is certain."""
        value = self.value_at(expression)
        return value if isinstance(value, cst.Call) else None

    def rebound(self, variable: Variable, after: cst.CSTNode, before: cst.CSTNode | None = None) -> bool:
        """Whether a variable gets another value after one place (and before another)."""
        places = self.bindings.get(variable, [])
        return any(
            self.end(after) < place.end and (before is None or place.end <= self.start(before)) for place in places
        )

    def class_of(self, expression: cst.BaseExpression | None) -> cst.ClassDef | None:
        """The class of this file whose instance an expression certainly is."""
        call = self.call_at(expression)
        return self.find_class(call.func) if call else None

    def find_class(self, node: cst.CSTNode) -> cst.ClassDef | None:
        """The class of this file that a name stands for."""
        classes = [class_ for class_ in self.all(cst.ClassDef) if is_name(node, class_.name.value)]
        return classes[0] if len(classes) == 1 else None

    def derives(self, class_: cst.ClassDef, roots: Collection[str], suffix: str) -> bool:
        """Whether a class has a base from one of some packages whose name ends with `suffix`, directly or not."""
        for base in class_.bases:
            if any(n.partition(".")[0] in roots and n.endswith(suffix) for n in self.names(base.value)):
                return True
            above = self.find_class(base.value)
            if above is not None and above is not class_ and self.derives(above, roots, suffix):
                return True
        return False

    def is_hf_trainer(self, node: cst.CSTNode) -> bool:
        """A Trainer class of transformers or trl, or one of this file that derives from it."""
        class_ = self.find_class(node)
        if class_ is not None:
            return self.derives(class_, HF_ROOTS, "Trainer")
        return any(n.partition(".")[0] in HF_ROOTS and n.endswith("Trainer") for n in self.names(node))

    def is_lora_config(self, call: cst.Call) -> bool:
        """A call that makes peft's LoraConfig."""
        return self.comes_from(call.func, {"peft"}, {"LoraConfig"})

    def is_wrap(self, call: cst.Call | None) -> bool:
        """A call that makes a PEFT model of its first argument."""
        if call is None:
            return False
        owner = receiver(call)
        made = callee(call) == "from_pretrained" and isinstance(owner, cst.Name) and owner.value.startswith("Peft")
        return callee(call) == "get_peft_model" or callee(call).startswith(("PeftModel", "PeftMixed")) or made

    @cached_property
    def trainings(self) -> list[Training]:
        """All trainers and optimizers whose model can be seen, in source order."""
        trainings = []
        for call in self.calls:
            name = callee(call)
            if name.endswith("Trainer"):
                lightning = any(n.partition(".")[0] in _LIGHTNING for n in self.names(call.func))
                model = argument(call, "model", 0 if self.is_hf_trainer(call.func) else None)
                if model is not None and not lightning:
                    trainings.append(Training(call, model, True))
            elif any(part in name for part in OPTIMIZERS):
                sources = [arg.value for arg in call.args]
                sources += [value for source in sources if (value := self.value_at(source)) not in (None, source)]
                for getter in calls_in(sources, "parameters", "named_parameters"):
                    if (model := receiver(getter)) is not None:
                        trainings.append(Training(call, model, False))
        return trainings
