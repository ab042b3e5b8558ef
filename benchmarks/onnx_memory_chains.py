"""Large files for `benchmarks.onnx_memory`, made here: what packages ship is small, and memory matters for large ones.

Weights are random and keep the scale of their inputs. Layers of one size in a row are one piece of a profile, so that
a file of 80 MB is compressed in about the time of a small one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["CHAINS", "Chain", "made"]

PRODUCTS, SIZE = 10, 1400


@dataclass(slots=True)
class Chain:
    """A file of one input, whose example has ``shape``."""

    shape: tuple[int, ...]
    build: Callable[[], tuple[list[onnx.NodeProto], list[onnx.TensorProto], int]]


def _weight(rng: np.random.Generator, name: str, *shape: int) -> onnx.TensorProto:
    inputs = np.prod(shape[1:])
    return numpy_helper.from_array(rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / inputs)), name)


def _products() -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], int]:
    """Products with and without a bias of their own, in turns."""
    rng, nodes, tensors, value = np.random.default_rng(0), list[onnx.NodeProto](), list[onnx.TensorProto](), "x"
    for k in range(PRODUCTS):
        tensors += [_weight(rng, f"w{k}", SIZE, SIZE), numpy_helper.from_array(np.zeros(SIZE, np.float32), f"b{k}")]
        if k % 2:
            nodes.append(helper.make_node("Gemm", [value, f"w{k}", f"b{k}"], [f"a{k}"], transB=1))
        else:
            nodes.append(helper.make_node("MatMul", [value, f"w{k}"], [f"p{k}"]))
            nodes.append(helper.make_node("Add", [f"p{k}", f"b{k}"], [f"a{k}"]))
        nodes.append(helper.make_node("Relu", [f"a{k}"], [value := f"r{k}"]))
    nodes[-1] = helper.make_node("Identity", [nodes[-1].input[0]], ["y"])
    return nodes, tensors, SIZE


CHAINS = {
    "made/products.onnx": Chain((SIZE,), _products),
}


def made(name: str, cache: Path) -> Path:
    """The file of a chain, written where it is not there yet."""
    path, chain = cache / name, CHAINS[name]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        nodes, tensors, outputs = chain.build()
        ends = [
            helper.make_tensor_value_info(end, TensorProto.FLOAT, ["n", *shape])
            for end, shape in (("x", chain.shape), ("y", (outputs,)))
        ]
        graph = helper.make_graph(nodes, path.stem, ends[:1], ends[1:], tensors)
        onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path
