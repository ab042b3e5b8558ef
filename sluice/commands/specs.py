"""The values that words of the command line name: a model, its example inputs, its data.

``package.module:factory`` is called without arguments and returns a module, or batches; ``factory?width=8&deep=True``
is called with these, as Python reads their values, or as words. ``sluice:NAME`` is a network of `sluice.models`, and
``timm:NAME``, ``torchvision:NAME``, ``hf:CONFIG``, ``diffusers:CLASS`` and ``ultralytics:NAME`` are those of other
packages (`sluice.commands.zoos`). The folder in which the command runs is searched for modules, as ``python -m`` does.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from sluice.commands.input_options import NamedInput
from sluice.commands.zoos import ZOOS, make_published, published_inputs
from sluice.core.errors import SluiceError

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import nn

__all__ = [
    "check_batch",
    "data_of",
    "dense_in",
    "evaluate_of",
    "fixed_rows",
    "inputs_of",
    "is_onnx",
    "loss_given",
    "model_of",
]

OWN = "sluice:"


def is_onnx(spec: str) -> bool:
    """Is ``spec`` the path of an ONNX file rather than a factory?"""
    return spec.endswith(".onnx")


def dense_in(
    path: str,
    shape: tuple[int, ...] | None,
    inputs: Sequence[NamedInput] = (),
    weights: str | None = None,
    fixed: Mapping[str, float] | None = None,
) -> onnx.ModelProto:
    """The dense network of an ONNX file, which says the shapes of its inputs itself, as far as they are not open.

    Raises:
        SluiceError: the file cannot be read, a shape is given, or the file is not in fp32.
    """
    from sluice.commands.onnx_input import model_in

    if weights is not None:
        raise SluiceError(f"--weights is for a factory, the ONNX file {path!r} holds its tensors itself; leave it out")
    model = model_in(path, inputs, fixed)
    if shape is not None:
        raise SluiceError(
            f"--shape {','.join(map(str, shape))} is for a factory, the ONNX file {path!r} says its shapes itself; "
            f"leave it out, and name sizes that it leaves open by --input"
        )
    if reason := _not_float32(model):
        raise SluiceError(
            f"{path!r} is not in fp32: {reason}; give the file that `sluice export --names` writes, and the precision "
            f"of the deployment as --precision"
        )
    return model


def fixed_rows(model: onnx.ModelProto) -> dict[str, int]:
    """The first size of every input of a file whose batch is fixed; empty where any of them is free."""
    from sluice.passes.graph.onnx_graph import OnnxGraph

    shapes = {name: info.type.tensor_type.shape.dim for name, info in OnnxGraph(model).inputs.items()}
    first = {name: dims[0] for name, dims in shapes.items() if dims}
    return {name: dim.dim_value for name, dim in first.items()} if all(map(_is_fixed, first.values())) else {}


def check_batch(model: onnx.ModelProto, batch: int, path: str) -> None:
    """Check the batch: a file whose batch is fixed can be used at no other one.

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


def model_of(spec: str, weights: str | None = None) -> nn.Module:
    """The module that the factory makes, with the tensors of the safetensors file ``weights``, if one is given.

    Raises:
        SluiceError: there is no such module or factory, it raises, its result is no ``nn.Module``, or the file does
            not have the tensors of that module.
    """
    from torch import nn

    made = _made(f"sluice.models:{spec.removeprefix(OWN)}" if spec.startswith(OWN) else spec, spec)
    if not isinstance(made, nn.Module):
        raise SluiceError(f"{spec!r} returned {type(made).__name__}; let the factory return a torch.nn.Module")
    if weights is not None:
        _fill(made, weights, spec)
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


def loss_given(spec: str | None) -> str | Callable[..., Any] | None:
    """A ready loss by its name, or the function itself; None where none is given."""
    if spec is None or ":" not in spec:
        return spec
    found: Callable[..., Any] = _found(spec, spec)
    return found


def inputs_of(
    spec: str, shape: tuple[int, ...] | None, batch: int, given: Sequence[NamedInput] = ()
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Standard normal input (batch, *shape), the same on every call; own networks know their shape.

    Args:
        given: name, sizes with the batch, and type of every argument, in place of a shape; integers are ones.
    """
    import torch

    _refuse_onnx(spec)
    generator = torch.Generator().manual_seed(0)
    if given:
        names = [name for name, _, _ in given]
        if shape is not None or len(set(names)) < len(names):
            raise SluiceError(f"--input names {', '.join(names)}; name every argument once, and leave out --shape")
        for name in names:
            if not name.isidentifier():  # inputs of ONNX files may be called anything
                raise SluiceError(f"--input names {name!r}, which no argument of forward() is called; give its name")
        types = {name: getattr(torch, dtype) for name, _, dtype in given}
        return {
            name: torch.randn(sizes, generator=generator)
            if types[name].is_floating_point
            else torch.ones(sizes).to(types[name])
            for name, sizes, _ in given
        }
    zoo, name = _published(spec)
    if zoo:
        place, arguments = _with_arguments(name)
        return published_inputs(zoo, place, arguments, shape, batch)
    if shape is None:
        if not spec.startswith(OWN):
            raise SluiceError(
                f"the input of {spec!r} is not known; give its shape without the batch, --shape 3,32,32, or every "
                "argument of forward() by --input NAME=1,3,32,32:float32"
            )
        from sluice.models import example_inputs

        return example_inputs(spec.removeprefix(OWN).partition("?")[0], batch)[0]
    return torch.randn(batch, *shape, generator=generator)


def _found(spec: str, written: str) -> Any:
    """The callable of that name; ``written`` is the user's word for it."""
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


def _published(spec: str) -> tuple[str, str]:
    """The package and what it is asked for; empty where the word means a factory."""
    zoo, _, name = spec.partition(":")
    return (zoo, name) if zoo in ZOOS else ("", spec)


def _with_arguments(spec: str) -> tuple[str, dict[str, Any]]:
    place, _, words = spec.partition("?")
    return place, {name: _value(word) for name, word in parse_qsl(words, keep_blank_values=True)}


def _made(spec: str, written: str) -> Any:
    """The result of the factory."""
    zoo, rest = _published(spec)
    place, known = _with_arguments(rest)
    found = None if zoo else _found(place, written)
    try:
        return make_published(zoo, place, known) if found is None else found(**known)
    except SluiceError:
        raise
    except Exception as error:
        how = f"with {', '.join(known)}" if known else "without arguments"
        raise SluiceError(f"{written!r} raised {_reason(error)}; it is called {how}, mend it") from error


def _fill(made: nn.Module, path: str, spec: str) -> None:
    """Give the module the tensors of a file; of a tensor with several names the file may have one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        missing, unknown = load_model(made, path, strict=False)
    except (OSError, SafetensorError) as error:
        raise SluiceError(f"cannot read the weights {path!r}: {_reason(error)}; give a safetensors file") from error
    except RuntimeError as error:  # a tensor of another shape; the first line names the class alone
        said = str(error).strip().splitlines()[-1].strip()
        raise SluiceError(f"{path!r} has not the weights of {spec!r}: {said}; give those of that network") from error
    for name, what in (*((n, "lacks") for n in sorted(missing)), *((n, "has also") for n in sorted(unknown))):
        raise SluiceError(f"{path!r} has not the weights of {spec!r}: it {what} {name!r}; give those of that network")


def _value(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def _is_fixed(dim: onnx.TensorShapeProto.Dimension) -> bool:
    return dim.dim_value > 0  # some exporters write -1 for an open one


def _not_float32(model: onnx.ModelProto) -> str:
    """The first thing in the file that no fp32 network has; empty where there is none."""
    from onnx import TensorProto

    # Constants of an fp32 network may be float64. A network in float64 shows by the type of its inputs.
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
