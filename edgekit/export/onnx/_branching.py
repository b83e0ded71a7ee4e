"""The shipping form of an encoder-decoder's decoder: keys and values of the encoder's states are computed once.

Knows the names that optimum-onnx gives to caches, and no operator of a layer: whatever a quantizer made of those stays
as it is. The inputs and outputs are those of `decoder_model_merged.onnx` as optimum and transformers.js know it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.errors import EdgekitError
from edgekit.export.onnx._optimum_child import behind

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

BRANCH = "use_cache_branch"
PAST, PRESENT = "past_key_values", "present"


def branch(model: ModelProto) -> None:
    """Let the decoder `model` take `past_key_values.N.encoder.*` back where `use_cache_branch`, bool (1), is true.

    What computes `present.N.encoder.*` moves into the branch of an If that is taken when it is false; in the other one
    the outputs are what was given. All other nodes are there once, so that one node reads each weight.
    Raises EdgekitError for a graph without such outputs.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    outputs = [value for value in graph.output if ".encoder." in value.name]
    if not outputs or any(value.name == BRANCH for value in graph.input):
        raise EdgekitError("the graph is no decoder that computes the encoder's keys", "export the model again")
    moved = _exclusive(graph, {value.name for value in outputs})
    fresh = {value.name: f"{value.name}/computed" for value in outputs}
    computed, kept = [_renamed(node, fresh) for node in moved], []
    for value in outputs:
        past = value.name.replace(PRESENT, PAST, 1)
        kept.append(helper.make_node("Identity", [past], [f"{value.name}/kept"], name=f"/{value.name}/kept"))
        graph.input.append(_named(value, past))
    branches = {
        "then_branch": helper.make_graph(kept, "kept", [], [_named(v, f"{v.name}/kept") for v in outputs]),
        "else_branch": helper.make_graph(computed, "computed", [], [_named(v, fresh[v.name]) for v in outputs]),
    }
    whether = helper.make_node("If", [BRANCH], [value.name for value in outputs], name="/cross/If", **branches)
    gone = {id(node) for node in moved}
    rest = [_renamed(node, {}) for node in graph.node if id(node) not in gone]
    del graph.node[:]
    # behind what the branch reads, before what reads it: the first node that wants a key
    at = next((i for i, node in enumerate(rest) if set(node.input) & fresh.keys()), len(rest))
    graph.node.extend([*rest[:at], whether, *rest[at:]])
    graph.input.append(helper.make_tensor_value_info(BRANCH, TensorProto.BOOL, [1]))


def _exclusive(graph: GraphProto, names: set[str]) -> list[NodeProto]:
    """The nodes that `names` are computed by and nothing else."""
    inside = behind(graph, names)
    made = {name for node in inside for name in node.output}
    ids = {id(node) for node in inside}
    read = {name for node in graph.node if id(node) not in ids for name in node.input} & made
    shared = {id(node) for node in behind(graph, read - names)}
    return [node for node in inside if id(node) not in shared]


def _renamed(node: NodeProto, names: dict[str, str]) -> NodeProto:
    """A copy; outputs of `names`, and inputs that read them, called otherwise."""
    from onnx import NodeProto as Node

    copy = Node()
    copy.CopyFrom(node)
    for each in (copy.input, copy.output):
        each[:] = [names.get(name, name) for name in each]
    return copy


def _named(value: ValueInfoProto, name: str) -> ValueInfoProto:
    from onnx import ValueInfoProto as Value

    copy = Value()
    copy.CopyFrom(value)
    copy.name = name
    return copy
