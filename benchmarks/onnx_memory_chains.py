"""Large files for `benchmarks.onnx_memory`, made here: what packages ship is small, and memory matters for large ones.

Weights are random and keep the scale of their inputs. Layers of one size in a row are one piece of a profile, so that
a file of 80 MB is compressed in about the time of a small one. What is beyond 2 GiB has its weights in a second file,
written one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

__all__ = ["CHAINS", "Chain", "made", "size_of"]

PRODUCTS, SIZE = 10, 1400
LAYERS, WIDE = 11, 7136  # 2.24 GB


@dataclass(slots=True)
class Chain:
    """A file of one input, whose example has ``shape``. ``apart``: weights lie in a file of their own."""

    shape: tuple[int, ...]
    build: Callable[[], tuple[list[onnx.NodeProto], Iterator[onnx.TensorProto], int]]
    apart: bool = False


def _weight(rng: np.random.Generator, name: str, *shape: int) -> onnx.TensorProto:
    inputs = np.prod(shape[1:])
    return numpy_helper.from_array(rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / inputs)), name)


def _products() -> tuple[list[onnx.NodeProto], Iterator[onnx.TensorProto], int]:
    """Products with and without a bias of their own, in turns."""
    nodes, value = list[onnx.NodeProto](), "x"
    for k in range(PRODUCTS):
        if k % 2:
            nodes.append(helper.make_node("Gemm", [value, f"w{k}", f"b{k}"], [f"a{k}"], transB=1))
        else:
            nodes.append(helper.make_node("MatMul", [value, f"w{k}"], [f"p{k}"]))
            nodes.append(helper.make_node("Add", [f"p{k}", f"b{k}"], [f"a{k}"]))
        nodes.append(helper.make_node("Relu", [f"a{k}"], [value := f"r{k}"]))
    nodes[-1] = helper.make_node("Identity", [nodes[-1].input[0]], ["y"])
    return nodes, _weights(PRODUCTS, SIZE), SIZE


def _layers() -> tuple[list[onnx.NodeProto], Iterator[onnx.TensorProto], int]:
    """Layers with a bias; the last has no activation."""
    nodes = [
        node
        for k in range(LAYERS)
        for node in (
            helper.make_node("Gemm", [f"r{k}" if k else "x", f"w{k}", f"b{k}"], [f"a{k}"], transB=1),
            helper.make_node("Relu", [f"a{k}"], [f"r{k + 1}"]),
        )
    ]
    nodes[-1] = helper.make_node("Identity", [nodes[-1].input[0]], ["y"])
    return nodes, _weights(LAYERS, WIDE), WIDE


def _weights(count: int, size: int) -> Iterator[onnx.TensorProto]:
    rng = np.random.default_rng(0)
    for k in range(count):
        yield _weight(rng, f"w{k}", size, size)
        yield numpy_helper.from_array(np.zeros(size, np.float32), f"b{k}")


CHAINS = {
    "made/products.onnx": Chain((SIZE,), _products),
    "made/layers.onnx": Chain((WIDE,), _layers, apart=True),
}


def size_of(path: Path) -> int:
    """Bytes of a file and of its weights, where these lie apart."""
    apart = _beside(path)
    return path.stat().st_size + (apart.stat().st_size if apart.is_file() else 0)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


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
        kept = list(_apart(tensors, _beside(path)) if chain.apart else tensors)
        graph = helper.make_graph(nodes, path.stem, ends[:1], ends[1:], kept)
        onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def _apart(tensors: Iterator[onnx.TensorProto], path: Path) -> Iterator[onnx.TensorProto]:
    """The tensors without their bytes, which are appended to the file."""
    with path.open("wb") as file:
        for tensor in tensors:
            offset, length = file.tell(), file.write(tensor.raw_data)
            set_external_data(tensor, path.name, offset, length)
            tensor.ClearField("raw_data")
            yield tensor
