"""A GPU that takes the kernels of TensorRT-RTX's engines, each for a time by its roofline; it needs no GPU.

RTX builds engines on a CPU and lists the kernels of each: kind, tensors, and the ONNX operators in it. A kernel takes

    ms = LAUNCH + max(macs' / RATE, bytes / BANDWIDTH)

``macs'`` are those of the convolutions and matrix products in it, with channels rounded up to blocks of 8 (4 in fp32),
``bytes`` those of all tensors that it reads and writes. An operator that is told of several kernels counts for those
that are no mere arithmetic, in equal parts. An engine takes the sum of its kernels. Rates are those of a small desktop
GPU, where half of the kernels of a small network are bound by their launch.

So engines and their parts differ as they do on a device where nothing but the choice of kernels matters: fusion across
borders of parts, changes of layout, kernels that come and go. Times of single kernels are no forecast of any GPU.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from sluice.artifacts.macs import macs_by_node
from sluice.core.errors import SluiceError
from sluice.pipeline.pairs import structure
from sluice.runtime.base.runner import Clock
from sluice.runtime.trt.borders import on_rows
from sluice.runtime.trt.build import build_engine, find_tensorrt, is_rtx, listener, make_builder, product, static_model
from sluice.runtime.trt.inspect import EngineLayer, Tensor, node_name
from sluice.runtime.trt.products import products_on_rows, without_copies

__all__ = ["Kernel", "RooflineRunner", "RooflineSession", "kernels_in"]

LAUNCH = 1.5e-3  # ms
RATE = {2: 3e10, 4: 1.5e10}  # MACs per ms, by the bytes of a number
BLOCK = {2: 8, 4: 4}
BANDWIDTH = 2.7e8  # bytes per ms
ITEM = {"Half": 2, "BFloat16": 2, "Int8": 1, "Bool": 1, "Int64": 8}  # else 4
ARITHMETIC = "kgen"  # kernels that RTX writes itself, for what is no convolution or matrix product

LINE = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)$", re.MULTILINE)
SECTION = re.compile(r"(Inputs|Constants|Outputs): \[ (\{.*?\})\]")
TENSOR = re.compile(r"\{ Name: .*?, Dimensions: \[([\d,]*)\],.*?Datatype: (\w+)")
TACTIC = re.compile(r"TacticName: ([^,]*)")
NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel as the builder lists it: its tensors as shapes and types, and the names of its ONNX operators."""

    name: str
    kind: str
    tactic: str
    reads: tuple[tuple[tuple[int, ...], str], ...]
    writes: tuple[tuple[tuple[int, ...], str], ...]
    nodes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * ITEM.get(kind, 4) for shape, kind in (*self.reads, *self.writes))

    @property
    def item(self) -> int:
        return 2 if any(ITEM.get(kind) == 2 for _, kind in self.reads) else 4

    @property
    def layer(self) -> EngineLayer:
        """As the inspector of an engine tells it."""
        reads, writes = (tuple(Tensor("", *each, "") for each in side) for side in (self.reads, self.writes))
        return EngineLayer(self.name, self.kind, self.nodes, reads, writes, self.tactic)

    @property
    def identity(self) -> Hashable:
        """Equal for kernels that do the same to tensors of the same sizes."""
        return self.kind, self.tactic, self.reads, self.writes


def kernels_in(told: str) -> list[Kernel]:
    """The kernels in the builder's list of layers, in execution order."""
    found = []
    for line in LINE.finditer(told):
        sections: dict[str, tuple[tuple[tuple[int, ...], str], ...]] = {}
        for name, content in SECTION.findall(line["rest"]):
            sections[name] = tuple(
                (tuple(int(n) for n in dims.split(",") if n), kind) for dims, kind in TENSOR.findall(content)
            )
        tactic = TACTIC.search(line["rest"])
        reads = sections.get("Inputs", ()) + sections.get("Constants", ())
        nodes = tuple(dict.fromkeys(NODE.findall(line["rest"])))
        found.append(
            Kernel(line["name"], line["kind"], tactic[1] if tactic else "", reads, sections.get("Outputs", ()), nodes)
        )
    return found


def milliseconds(kernels: Sequence[Kernel], model: onnx.ModelProto) -> float:
    """What these kernels of an engine of ``model`` take."""
    holders: dict[str, list[int]] = {}
    for index, kernel in enumerate(kernels):
        for name in kernel.nodes:
            holders.setdefault(name, []).append(index)
    macs = [0.0] * len(kernels)
    for node, count in _rounded(model, BLOCK[min((k.item for k in kernels), default=4)]):
        own = holders.get(node_name(node), [])
        own = [k for k in own if kernels[k].kind != ARITHMETIC] or own
        for index in own:
            macs[index] += count / len(own)
    return sum(LAUNCH + max(count / RATE[k.item], k.bytes / BANDWIDTH) for k, count in zip(kernels, macs, strict=True))


def _rounded(model: onnx.ModelProto, block: int) -> list[tuple[onnx.NodeProto, float]]:
    """MACs of every operator, with the channels of a constant weight in whole blocks."""
    weights = {init.name: init.dims for init in model.graph.initializer}
    found = []
    for node, count in macs_by_node(model):
        ends = list(weights.get(node.input[1], ())[:2])
        wide = [block * math.ceil(n / block) / n for n in ends if n > 1]
        found.append((node, count * math.prod(wide)))
    return found


class RooflineSession:
    """An engine that takes ``ms``; ``inside``: the kernels that a network has in its place, if others."""

    clock: Clock = "cuda"
    ramps = False

    def __init__(self, kernels: Sequence[Kernel], ms: float, inside: Counter[Hashable] | None = None) -> None:
        self.list, self.ms = kernels, ms
        self.kernels: Counter[Hashable] = inside or Counter(kernel.identity for kernel in kernels)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise SluiceError("the engine was built on a CPU, which cannot run it; only its kernels are known")

    def sample(self, repeats: int) -> float:
        return self.ms


class RooflineRunner:
    """Builds with TensorRT-RTX; engines of one structure are built once.

    Raises:
        SluiceError: RTX is not here.
    """

    clock: Clock = "cuda"
    device = "a roofline of kernels"
    free_borders = True

    def __init__(self) -> None:
        self.trt = find_tensorrt()
        if not is_rtx(self.trt):
            raise SluiceError(
                "this needs TensorRT-RTX, which lists kernels without a GPU; install tensorrt-rtx-cu13-libs"
            )
        self.notes: list[str] = []
        listener(self.trt).notes = self.notes
        self.builder: Any = make_builder(self.trt)
        self.known: dict[tuple[str, bool], RooflineSession] = {}
        self.parts: dict[str, RooflineSession] = {}

    @property
    def version(self) -> str:
        return product(self.trt)

    @property
    def builds(self) -> int:
        return len(self.known)

    def build(
        self,
        model: onnx.ModelProto,
        *,
        batch: int | None = None,
        feeds_shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> RooflineSession:
        return self._built(static_model(model, batch, feeds_shapes), part=False)

    def build_part(self, model: onnx.ModelProto) -> RooflineSession:
        key = _key(model)
        if key not in self.parts:
            self.parts[key] = self._part(model)
        return self.parts[key]

    def _part(self, model: onnx.ModelProto) -> RooflineSession:
        """As `sluice.runtime.trt.runner.TensorRtRunner.build_part`."""
        found = self._built(model, part=True)
        layers = {kernel.layer: kernel for kernel in found.list}
        rows = products_on_rows(model, [*layers])
        if rows is model:
            turned = on_rows(model, positions_first=True)
            other = found if turned is model else self._built(turned, part=True)
            return other if len(other.list) < len(found.list) else found
        written = self._built(rows, part=True)
        inside = Counter(layers[layer].identity for layer in without_copies([*layers]))
        return RooflineSession(written.list, written.ms, inside)

    def fused(self, model: onnx.ModelProto, *, batch: int | None = None) -> list[list[str]]:
        return [list(kernel.nodes) for kernel in self.build(model, batch=batch).list]

    def _built(self, model: onnx.ModelProto, *, part: bool) -> RooflineSession:
        key = _key(model), part
        if key not in self.known:
            self.notes.clear()
            build_engine(self.trt, model, builder=self.builder, part=part)
            listed = next((note for note in reversed(self.notes) if note.startswith("Layers:")), "")
            kernels = kernels_in(listed)
            self.known[key] = RooflineSession(kernels, milliseconds(kernels, model))
        return self.known[key]


def _key(model: onnx.ModelProto) -> str:
    return structure(model) + ",".join(info.doc_string for info in (*model.graph.input, *model.graph.output))
