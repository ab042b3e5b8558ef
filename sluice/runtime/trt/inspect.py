"""Which layers of a TensorRT engine hold which pieces of the network.

1. Each layer of the engine inspector's JSON names its origin: ``Metadata`` holds ``[ONNX Layer: NAME]``
   for every ONNX node in it, whatever stands between them (a blank, or the control characters 0x1e and 0x1f). Layers
   that TensorRT put in by itself, such as changes of format, have none.
2. The JSON of 10.x calls the engine's own inputs and outputs ``Bindings``, a list of names, and gives a tensor's type
   as ``Format/Datatype``; 11 has a list of descriptions, ``I/O Tensors``, and two fields, ``Format`` and ``Datatype``.
3. Pieces are cut from the network in fp32, the engine is built from the deployed network: batch norms are gone, casts
   and quantizers have come. A node of the deployed model belongs to the piece that has a node of its name, else one
   that makes its output, else the only one that reads its weight; else, as the operators that fusion and typing put in,
   to the piece of their input, else of their reader.
4. A compiler fuses across pieces. Such a layer is in several of them, and its time is not divided here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sluice.core.errors import SluiceError

if TYPE_CHECKING:
    import onnx

__all__ = [
    "NO_KERNEL",
    "EngineLayer",
    "EngineLayers",
    "Tensor",
    "kernels",
    "node_name",
    "owners",
    "place_pieces",
    "read_layers",
]

NO_KERNEL = ("NoOp", "Signal", "Wait")  # kinds of layers that compute nothing
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]*)\]")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor between layers: its type and layout in TensorRT's words, empty where it gives none."""

    name: str
    shape: tuple[int, ...]
    datatype: str
    layout: str


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """A layer of an engine; ``nodes`` are the names of the ONNX nodes that it was made of."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    tactic: str = ""


@dataclass(frozen=True, slots=True)
class EngineLayers:
    """Layers by piece, in execution order; ``shared``: pieces by layer where there are several; ``own``: in none."""

    pieces: Mapping[str, tuple[str, ...]]
    shared: Mapping[str, tuple[str, ...]]
    own: tuple[str, ...]


def read_layers(information: str) -> tuple[EngineLayer, ...]:
    """The layers in the engine inspector's JSON (of TensorRT 10 or 11), in execution order.

    Raises:
        SluiceError: it is no such JSON, or the engine was built without descriptions.
    """
    try:
        found = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError):
        raise SluiceError("what the engine inspector returned holds no layers; ask it for the format JSON") from None
    if not all(isinstance(layer, dict) for layer in found):
        raise SluiceError(
            "the engine tells only the names of its layers; build it with the profiling verbosity DETAILED"
        )
    return tuple(
        EngineLayer(
            str(layer["Name"]),
            str(layer.get("LayerType", "")),
            tuple(dict.fromkeys(ONNX_NODE.findall(str(layer.get("Metadata", ""))))),
            tuple(map(_tensor, layer.get("Inputs", ()))),
            tuple(map(_tensor, layer.get("Outputs", ()))),
            str(layer.get("TacticName", "")),
        )
        for layer in found
    )


def kernels(layers: Iterable[EngineLayer]) -> Counter[Hashable]:
    """The kernels of an engine, without their names: kind, tactic and what each reads and writes."""
    computing = [layer for layer in layers if layer.kind not in NO_KERNEL]
    return Counter((layer.kind, layer.tactic, _sizes(layer.inputs), _sizes(layer.outputs)) for layer in computing)


def _sizes(tensors: Iterable[Tensor]) -> tuple[tuple[tuple[int, ...], str], ...]:
    return tuple((tensor.shape, tensor.datatype) for tensor in tensors)


def place_pieces(layers: tuple[EngineLayer, ...], owner: Mapping[str, str]) -> EngineLayers:
    """The layers that hold each piece; ``owner`` is the piece of an ONNX node, by the node's name (`owners`)."""
    pieces: dict[str, list[str]] = {piece: [] for piece in owner.values()}
    shared: dict[str, tuple[str, ...]] = {}
    own: list[str] = []
    for layer in layers:
        held = tuple(dict.fromkeys(owner[name] for name in layer.nodes if name in owner))
        for piece in held:
            pieces[piece].append(layer.name)
        if len(held) > 1:
            shared[layer.name] = held
        elif not held:
            own.append(layer.name)
    return EngineLayers({piece: tuple(names) for piece, names in pieces.items()}, shared, tuple(own))


def owners(deployed: onnx.GraphProto, pieces: Mapping[str, onnx.GraphProto]) -> dict[str, str]:
    """Node of the deployed graph -> the piece that it came from (rule 3); nodes of no piece are left out."""
    by_node = {node_name(node): piece for piece, graph in pieces.items() for node in graph.node}
    by_output = {name: piece for piece, graph in pieces.items() for node in graph.node for name in node.output if name}
    readers: dict[str, set[str]] = {}
    for piece, graph in pieces.items():
        for tensor in graph.initializer:
            readers.setdefault(tensor.name, set()).add(piece)
    by_weight = {name: next(iter(users)) for name, users in readers.items() if len(users) == 1}

    found: dict[str, str] = {}
    made: dict[str, str] = {}
    for node in deployed.node:
        name = node_name(node)
        known = [by_node.get(name), *map(by_output.get, node.output), *map(by_weight.get, node.input)]
        if (origin := _first([*known, *map(made.get, node.input)])) is not None:
            found[name] = origin
            made.update(dict.fromkeys(node.output, origin))
    reads: dict[str, str] = {}
    for node in reversed(deployed.node):
        name = node_name(node)
        if (origin := _first([found.get(name), *map(reads.get, node.output)])) is not None:
            found[name] = origin
            reads.update(dict.fromkeys(node.input, origin))
    return found


def node_name(node: onnx.NodeProto) -> str:
    """The name of a node in TensorRT's parser: its own, or that of its first output."""
    return str(node.name) or f"node_of_{node.output[0]}"


def _first(values: Iterable[str | None]) -> str | None:
    return next((value for value in values if value is not None), None)


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, dict):
        return Tensor(str(value), (), "", "")
    datatype, layout = value.get("Datatype", ""), value.get("Format", "")
    joined = value.get("Format/Datatype")
    return Tensor(
        str(value.get("Name", "")),
        tuple(int(size) for size in value.get("Dimensions", ())),
        str(datatype if joined is None else joined),
        str(layout),
    )
