"""Kokoro's quantised convolutions as float ones: runtimes compute ConvInteger by a slow generic path on some CPUs."""

from collections import defaultdict
from typing import Any

import numpy as np
from onnx import helper, numpy_helper


def with_float_convolutions(model: Any) -> Any:
    """Replace DynamicQuantizeLinear -> ConvInteger (-> Add of the bias) -> Cast -> Mul by Conv, weights dequantised."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    users: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    replaced: dict[int, Any] = {}  # by id of the last node of the pattern
    dropped: set[int] = set()
    for node in [node for node in graph.node if node.op_type == "ConvInteger"]:
        source, weight, _, zero = node.input
        (following,) = users[node.output[0]]
        chain, bias = [node, following], None
        if following.op_type == "Add":
            other = next(name for name in following.input if name != node.output[0])
            bias = _first_constant(other, makers, constants)
            chain.append(users[following.output[0]][0])
        scaled = users[chain[-1].output[0]][0]
        other = next(name for name in scaled.input if name != chain[-1].output[0])
        scale = numpy_helper.to_array(constants[makers[other].input[1]])
        values = numpy_helper.to_array(constants[weight]).astype(np.float32)
        values = (values - numpy_helper.to_array(constants[zero]).astype(np.float32)) * scale
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), f"{weight}_float"))
        inputs = [makers[source].input[0], f"{weight}_float", *([bias] if bias else [])]
        convolution = helper.make_node("Conv", inputs, [scaled.output[0]])
        convolution.attribute.extend(node.attribute)
        replaced[id(scaled)] = convolution
        dropped |= {id(part) for part in chain}
    nodes = [replaced.get(id(node), node) for node in graph.node if id(node) not in dropped]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _first_constant(name: str, makers: dict[str, Any], constants: dict[str, Any]) -> str:
    """The constant that a chain of nodes starts from."""
    while name not in constants:
        name = makers[name].input[0]
    return name
