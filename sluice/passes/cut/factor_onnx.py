"""Carry out factorizations on an ONNX graph; no torch needed.

1. A weight read by one ``Conv`` (no groups), ``Gemm`` or ``MatMul``, the latter two perhaps through a ``Transpose``,
   becomes two initialisers (`sluice.passes.cut.factor`), transposed if the weight is stored transposed.
2. The node becomes two. The first takes the input and has no bias; the second keeps bias, ``alpha``, ``beta`` and the
   name of the output, so that no node behind it changes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.core.plan import Factorize
from sluice.passes.cut.factor import Split, check_form, factors, first_name, per_axis, second_name
from sluice.passes.graph.onnx_graph import OnnxGraph, attributes, infer_checked, is_hollow

__all__ = ["factorize_onnx"]

Node = onnx.NodeProto


@dataclass(frozen=True, slots=True)
class _Layer:
    """Indices of the node and of the ``Transpose`` before it; ``flipped``: the weight is stored as ``(c, n)``."""

    node: int
    transpose: int | None
    flipped: bool


def factorize_onnx(model: onnx.ModelProto, edits: Sequence[Factorize], split: Split = factors) -> onnx.ModelProto:
    """A copy of the model in which every named weight is two.

    Args:
        model: its initialisers carry the parameter names of the edits.
        split: makes the factors; `sluice.passes.cut.factor.random_factors` where only shapes matter.
    Raises:
        SluiceError: a weight is missing, is not the weight of exactly one such layer, or has no such form.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, read = result.graph, OnnxGraph(result)
    tensors = read.initializers
    new_nodes: dict[int, list[Node]] = {}
    new_tensors: dict[str, list[onnx.TensorProto]] = {}
    gone: set[str] = set()
    for edit in edits:
        if edit.param not in tensors or edit.param in new_tensors:
            raise SluiceError(
                f"cannot factorize {edit.param!r}: the ONNX graph has no such dense weight; apply the plan once, to "
                "the model that it was made for"
            )
        weight = _numbers(tensors[edit.param])
        layer = _find(read, edit.param, weight.ndim)
        check_form(edit, weight.shape)
        first, second = split(weight.T if layer.flipped else weight, edit.form, edit.rank)
        stored = [first.T, second.T] if layer.flipped else [first, second]
        names = [first_name(edit.param), second_name(edit.param)]
        if any(read.is_taken(name) for name in names):
            raise SluiceError(
                f"cannot factorize {edit.param!r}: the names {names} of its factors are in use; rename those tensors"
            )
        names = [read.fresh(name) for name in names]
        new_tensors[edit.param] = [
            numpy_helper.from_array(np.ascontiguousarray(value), name)
            for value, name in zip(stored, names, strict=True)
        ]
        if layer.transpose is not None:
            turn = graph.node[layer.transpose]
            turned = [read.fresh(f"{turn.output[0]}_v"), read.fresh(f"{turn.output[0]}_u")]
            new_nodes[layer.transpose] = [
                _node(turn, suffix, [name], value, attributes(turn))
                for suffix, name, value in zip("vu", names, turned, strict=True)
            ]
            gone.add(turn.output[0])
            names = turned
        node = graph.node[layer.node]
        middle = read.fresh(f"{node.output[0]}_v")
        kernels = (first.shape[2:], second.shape[2:])
        before, after = _conv(node, edit.form, kernels) if node.op_type == "Conv" else _product(node)
        new_nodes[layer.node] = [
            _node(node, "v", [node.input[0], names[0]], middle, before),
            _node(node, "u", [middle, names[1], *node.input[2:]], node.output[0], after),
        ]
        gone.add(edit.param)
    nodes = [new for index, old in enumerate(graph.node) for new in new_nodes.get(index, [old])]
    initializers = [new for old in graph.initializer for new in new_tensors.get(old.name, [old])]
    _replace(graph.node, nodes)
    _replace(graph.initializer, initializers)
    _replace(graph.value_info, [info for info in graph.value_info if info.name not in gone])
    _replace(graph.input, [info for info in graph.input if info.name not in gone])
    known = {info.name: info for info in copy.deepcopy(list(graph.value_info))}
    infer_checked(result)
    for info in result.graph.value_info:  # with the names of open sizes that it had
        if info.name in known:
            info.CopyFrom(known[info.name])
    return result


def _numbers(init: onnx.TensorProto) -> np.ndarray:
    """The weight; of one that has a shape alone (`random_factors` looks at nothing else) zeros that take no memory."""
    if not is_hollow(init):
        return numpy_helper.to_array(init)
    return np.broadcast_to(np.zeros((), helper.tensor_dtype_to_np_dtype(init.data_type)), tuple(init.dims))


def _find(graph: OnnxGraph, param: str, rank: int) -> _Layer:
    """The one layer that reads the weight."""
    transpose: int | None = None
    where, node = _reader(graph, param, param)
    name = param
    if node.op_type == "Transpose" and rank == 2 and attributes(node).get("perm", [1, 0]) == [1, 0]:
        transpose, name = where, node.output[0]
        where, node = _reader(graph, name, param)
    known = node.op_type == "Conv" if rank > 2 else node.op_type in ("Gemm", "MatMul")
    if not known or node.domain not in ("", "ai.onnx") or [k for k, i in enumerate(node.input) if i == name] != [1]:
        raise SluiceError(
            f"cannot factorize {param!r}: the {node.op_type} that reads it does not use it as the weight of a "
            "convolution or linear layer; leave it dense"
        )
    a = attributes(node)
    if a.get("group", 1) != 1:
        raise SluiceError(
            f"cannot factorize {param!r}: its convolution has group={a['group']}, only group=1 can be; leave it dense"
        )
    stored_as_c_n = rank == 2 and not a.get("transB", 0)
    return _Layer(where, transpose, stored_as_c_n != (transpose is not None))


def _reader(graph: OnnxGraph, name: str, param: str) -> tuple[int, Node]:
    readers = [(index, node) for index, node in enumerate(graph.graph.node) if name in node.input]
    output = name in graph.outputs
    if len(readers) != 1 or output:
        also = " and it is an output of the graph" if output else ""
        raise SluiceError(
            f"cannot factorize {param!r}: {len(readers)} nodes read it{also}, and it must be the weight of exactly one "
            "layer; leave it dense"
        )
    return readers[0]


def _conv(node: Node, form: str, kernels: tuple[Sequence[int], Sequence[int]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes of the two convolutions."""
    a = attributes(node)
    dims = len(kernels[0])
    halves: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    pads = a.get("pads") or [0] * (2 * dims)
    strides = per_axis(form, a.get("strides") or [1] * dims, 1)
    dilations = per_axis(form, a.get("dilations") or [1] * dims, 1)
    begins, ends = per_axis(form, pads[:dims], 0), per_axis(form, pads[dims:], 0)
    automatic = a.get("auto_pad", b"NOTSET")
    for k, half in enumerate(halves):
        half["kernel_shape"] = list(kernels[k])
        half["strides"], half["dilations"] = strides[k], dilations[k]
        # Along an axis with kernel 1 and stride 1 no automatic mode pads anything.
        if automatic == b"NOTSET":
            half["pads"] = begins[k] + ends[k]
        else:
            half["auto_pad"] = automatic
    return halves


def _product(node: Node) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes of the two ``Gemm`` or ``MatMul`` nodes."""
    a = attributes(node)
    if node.op_type == "MatMul":
        return {}, {}
    return {k: a[k] for k in ("transA", "transB") if k in a}, {k: v for k, v in a.items() if k != "transA"}


def _node(old: Node, suffix: str, inputs: Sequence[str], output: str, values: dict[str, Any]) -> Node:
    name = f"{old.name}_{suffix}" if old.name else None
    new = helper.make_node(old.op_type, inputs, [output], name=name, doc_string=old.doc_string or None, **values)
    new.metadata_props.extend(old.metadata_props)
    return new


def _replace(field: Any, values: list[Any]) -> None:
    del field[:]
    field.extend(values)
