"""What the command line's words stand for: a model, its example inputs, its data; and what a model can become.

``package.module:factory`` is called without arguments and returns a module, or batches; ``sluice:NAME`` is a network
of `sluice.models`. The folder in which the command runs is searched for modules, as ``python -m`` does.
"""

from __future__ import annotations

import fnmatch
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sluice.errors import SluiceError

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch
    from torch import nn

    from sluice.passes.chain import Chain
    from sluice.passes.sites import Analysis
    from sluice.passes.view import View

    Readings = tuple[Analysis, View, tuple[Chain, ...], dict[str, np.ndarray]]

__all__ = [
    "blocks_in",
    "check_batch",
    "data_of",
    "dense_in",
    "evaluate_of",
    "factorable_in",
    "fixed_rows",
    "inputs_of",
    "is_onnx",
    "model_of",
    "read_module",
    "read_onnx",
    "runs_in",
]

OWN = "sluice:"


def is_onnx(spec: str) -> bool:
    """Is ``spec`` the path of an ONNX file rather than a factory?"""
    return spec.endswith(".onnx")


def dense_in(path: str, shape: tuple[int, ...] | None) -> onnx.ModelProto:
    """The dense network of an ONNX file, which says the shapes of its inputs itself.

    Raises:
        SluiceError: the file cannot be read, a shape is given, or it is in another precision: all starts from fp32.
    """
    from sluice.onnx_file import load_onnx

    model = load_onnx(path)
    if shape is not None:
        raise SluiceError(
            f"--shape {','.join(map(str, shape))} is for a factory, the ONNX file {path!r} says its shapes itself; "
            f"leave it out"
        )
    if reason := _not_float32(model):
        raise SluiceError(
            f"{path!r} is not in fp32: {reason}; give the file that `sluice export --names` writes, and the precision "
            f"of the deployment as --precision"
        )
    return model


def fixed_rows(model: onnx.ModelProto) -> dict[str, int]:
    """The first size of every input of a file whose batch is fixed; empty where any of them is free."""
    initializers = {init.name for init in model.graph.initializer}
    shapes = {info.name: info.type.tensor_type.shape.dim for info in model.graph.input if info.name not in initializers}
    first = {name: dims[0] for name, dims in shapes.items() if dims}
    return {name: dim.dim_value for name, dim in first.items()} if all(map(_is_fixed, first.values())) else {}


def check_batch(model: onnx.ModelProto, batch: int, path: str) -> None:
    """A file whose batch is fixed can be used at that one alone.

    Raises:
        SluiceError: no input has ``batch`` rows; an input beside the one with the batch may have rows of its own.
    """
    rows = fixed_rows(model)
    if rows and batch not in rows.values():
        name, fixed = next(iter(rows.items()))
        raise SluiceError(
            f"{path!r} fixes its batch: input {name!r} has {fixed} rows, not {batch}; give --batch {fixed}, or a file "
            f"that leaves its batch free"
        )


def model_of(spec: str) -> nn.Module:
    """The module that the factory makes.

    Raises:
        SluiceError: there is no such module or factory, it raises, or what it returns is no ``nn.Module``.
    """
    from torch import nn

    made = _made(f"sluice.models:{spec.removeprefix(OWN)}" if spec.startswith(OWN) else spec, spec)
    if not isinstance(made, nn.Module):
        raise SluiceError(f"{spec!r} returned {type(made).__name__}; let the factory return a torch.nn.Module")
    return made


def data_of(spec: str) -> Iterable[Any]:
    """The batches that the factory makes."""
    made = _made(spec, spec)
    if not isinstance(made, Iterable):
        raise SluiceError(f"{spec!r} returned {type(made).__name__}; let it return batches, a DataLoader for one")
    return made


def evaluate_of(spec: str) -> Callable[[Any], float]:
    """The function itself, from a module to a number; it is not called."""
    found: Callable[[Any], float] = _found(spec, spec)
    return found


def inputs_of(spec: str, shape: tuple[int, ...] | None, batch: int) -> torch.Tensor:
    """Standard normal input (batch, *shape), the same on every call; own networks know their shape."""
    import torch

    _refuse_onnx(spec)
    if shape is None:
        if not spec.startswith(OWN):
            raise SluiceError(f"the input of {spec!r} is not known; give its shape without the batch, --shape 3,32,32")
        from sluice.models import example_inputs

        return example_inputs(spec.removeprefix(OWN), batch)[0]
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


def read_onnx(path: str, shape: tuple[int, ...] | None, exclude: Sequence[str]) -> Readings:
    """Axis groups, operators, chains of convolutions and tensors of an ONNX file."""
    from onnx import numpy_helper

    from sluice.passes.drop_onnx import view_onnx
    from sluice.passes.merge_onnx import chains_onnx
    from sluice.passes.onnx_axes import analyze_onnx

    model = dense_in(path, shape)
    tensors = {init.name: numpy_helper.to_array(init) for init in model.graph.initializer}
    return analyze_onnx(model, exclude), view_onnx(model), chains_onnx(model), tensors


def read_module(model: nn.Module, inputs: torch.Tensor, exclude: Sequence[str]) -> Readings:
    """The same of a torch module."""
    from sluice import analyze, capture
    from sluice.passes.drop_torch import view_torch
    from sluice.passes.merge_torch import chains_torch

    gm = capture(model, inputs)
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in gm.state_dict().items()}
    return analyze(gm, exclude), view_torch(gm), chains_torch(gm), tensors


def blocks_in(view: View) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Residual blocks (name, layers, whether a gate can close them and why not), and why other additions are none."""
    from sluice.passes.blocks import find_blocks

    found, refused = find_blocks(view)
    blocks = [
        {"name": b.name, "layers": list(b.layers), "closes": b.closing is not None, "reason": b.reason} for b in found
    ]
    return blocks, dict(refused)


def factorable_in(
    view: View, tensors: Mapping[str, np.ndarray], exclude: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Weights with their shape and, by form, the rank at which nothing is lost; and why other weights have no form."""
    from sluice.passes.factor import forms_of, max_rank

    reads = [name for node in view.nodes for name in node.tensors]
    found: dict[str, dict[str, Any]] = {}
    left: dict[str, str] = {}
    for node in view.nodes:
        weight = next((t for t in node.tensors if tensors[t].ndim > 1), None) if node.kind == "weighted" else None
        if weight is None:
            continue
        shape = tensors[weight].shape
        into = next((view.shapes[v] for v in node.inputs if v in view.shapes and v not in view.derived), None)
        forms = {form: max_rank(shape, form) for form in forms_of(shape)}
        if (pattern := _excluded(weight, exclude)) is not None:
            left[weight] = f"excluded by {pattern!r}"
        elif reads.count(weight) > 1:
            left[weight] = f"is read {reads.count(weight)} times"
        elif "transpose" in node.op.lower():
            left[weight] = f"is the weight of {node.op}"
        elif len(shape) > 2 and into is not None and into[1] != shape[1]:
            left[weight] = f"is the weight of {into[1] // shape[1]} groups"
        elif max(forms.values()) < 2:
            left[weight] = f"has rank 1 as it is, shape {shape}"
        else:
            found[weight] = {"shape": list(shape), "forms": forms}
    return found, left


def runs_in(
    chains: Sequence[Chain], tensors: Mapping[str, np.ndarray], exclude: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Runs of convolutions with the kernels that they could merge into; and why other layers are in no run."""
    from sluice.passes.segments import find_segments, folded_norms

    runs: list[dict[str, Any]] = []
    left: dict[str, str] = {}
    for chain in chains:
        patterns = {layer.weight: _excluded(layer.weight, exclude) for layer in chain.layers}
        banned = {weight for weight, pattern in patterns.items() if pattern is not None}
        kernels: dict[tuple[str, ...], list[str]] = {}
        for segment in find_segments(chain, folded_norms(chain, tensors), banned):
            if len(segment.layers) > 1:
                kernels.setdefault(segment.layers, []).append("x".join(map(str, segment.kernel)))
        runs += [
            {"layers": list(layers), "kernels": sorted(set(found), key=_area)} for layers, found in kernels.items()
        ]
        merged = {name for layers in kernels for name in layers}
        for layer in chain.layers:
            if patterns[layer.weight] is not None:
                left[layer.weight] = f"excluded by {patterns[layer.weight]!r}"
            elif len(chain.layers) == 1:
                left[layer.weight] = f"between {chain.before} and {chain.after}"
            elif layer.weight not in merged:
                left[layer.weight] = "no run crosses a stride or part of a residual block"
        left |= {f"{chain.layers[s.start].weight}..": s.barrier for s in chain.spans if s.barrier is not None}
    return runs, left


def _area(kernel: str) -> tuple[int, str]:
    return math.prod(map(int, kernel.split("x"))), kernel


def _excluded(weight: str, exclude: Sequence[str]) -> str | None:
    from sluice.passes.sites import module_of

    names = (weight, module_of(weight))
    return next((p for p in exclude if any(fnmatch.fnmatchcase(name, p) for name in names)), None)


def _found(spec: str, written: str) -> Any:
    """The callable of that name; ``written`` is how the user named it."""
    _refuse_onnx(spec)
    place, _, name = spec.partition(":")
    if not place or not name:
        raise SluiceError(f"{written!r} names no factory; write package.module:factory or sluice:resnet20")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if place != missing and not place.startswith(f"{missing}."):
            raise SluiceError(f"{place!r} imports {missing!r}, which is not installed; install it") from error
        raise SluiceError(f"there is no module {missing!r} for {written!r}; run in its folder or install it") from error
    except Exception as error:
        raise SluiceError(f"{place!r} cannot be imported ({_reason(error)}); mend that module") from error
    found = getattr(module, name, None)
    if not callable(found):
        here = getattr(module, "__all__", [n for n, v in vars(module).items() if callable(v) and n[0] != "_"])
        raise SluiceError(f"{place!r} has no factory {name!r}; it has {', '.join(here[:12]) or 'none'}")
    return found


def _made(spec: str, written: str) -> Any:
    """What the factory returns."""
    found = _found(spec, written)
    try:
        return found()
    except SluiceError:
        raise
    except Exception as error:
        raise SluiceError(f"{written!r} raised {_reason(error)}; it is called without arguments, mend it") from error


def _is_fixed(dim: onnx.TensorShapeProto.Dimension) -> bool:
    return dim.HasField("dim_value")


def _not_float32(model: onnx.ModelProto) -> str:
    """The first thing in the file that no fp32 network has; empty where there is none."""
    from onnx import TensorProto

    # Constants may be in float64, which no deployment is in; weights and inputs in it show by the inputs.
    short = {
        code: name
        for name, code in TensorProto.DataType.items()
        if name.startswith(("FLOAT", "BFLOAT")) and code != TensorProto.FLOAT
    }
    for info in model.graph.input:
        code = info.type.tensor_type.elem_type
        if code in short or code == TensorProto.DOUBLE:
            return f"input {info.name!r} is {TensorProto.DataType.Name(code)}"
    for init in model.graph.initializer:
        if init.data_type in short:
            return f"tensor {init.name!r} is {short[init.data_type]}"
    for node in model.graph.node:
        if "Quantize" in node.op_type or node.op_type.startswith("QLinear") or node.op_type.endswith("Integer"):
            return f"operator {node.name or node.output[0]!r} is {node.op_type}"
        for attribute in node.attribute:
            if attribute.t.data_type in short:
                return f"constant {node.output[0]!r} is {short[attribute.t.data_type]}"
    return ""


def _refuse_onnx(spec: str) -> None:
    if is_onnx(spec):
        raise SluiceError(f"{spec!r} is an ONNX file, this needs the torch model; give package.module:factory")


def _reason(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
