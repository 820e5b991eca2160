"""Questions about a node of a syntax tree that the node alone can answer."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import libcst as cst

Node = TypeVar("Node", bound=cst.CSTNode)


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
