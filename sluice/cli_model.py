"""What the command line's words stand for: a model, its example inputs, its data.

``package.module:factory`` is called without arguments and returns a module, or batches; ``sluice:NAME`` is a network
of `sluice.models`. The folder in which the command runs is searched for modules, as ``python -m`` does.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sluice.errors import SluiceError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["data_of", "inputs_of", "is_onnx", "model_of"]

OWN = "sluice:"


def is_onnx(spec: str) -> bool:
    """Is ``spec`` the path of an ONNX file rather than a factory?"""
    return spec.endswith(".onnx")


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


def _made(spec: str, written: str) -> Any:
    """What the factory returns; ``written`` is how the user named it."""
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
    try:
        return found()
    except SluiceError:
        raise
    except Exception as error:
        raise SluiceError(f"{written!r} raised {_reason(error)}; it is called without arguments, mend it") from error


def _refuse_onnx(spec: str) -> None:
    if is_onnx(spec):
        raise SluiceError(f"{spec!r} is an ONNX file, this needs the torch model; give package.module:factory")


def _reason(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
