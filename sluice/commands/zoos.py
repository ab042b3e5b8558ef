"""Networks of other packages by name: ``timm:NAME``, ``torchvision:NAME``, ``hf:CONFIG``, ``diffusers:CLASS`` and
``ultralytics:NAME``.

1. A package is imported when one of its names is used, never before, and nothing is downloaded: weights are random,
   the same on every call, unless the user gives a file.
2. Words behind ``?`` are arguments of the package's own factory, of its configuration for ``hf:``. There
   ``architecture=BertForMaskedLM`` chooses the class, the model without a head by default, ``attn_implementation`` how
   attention is written, and ``outputs=logits`` returns that output alone. ``hf:./folder`` reads ``config.json``, which
   names its class.
3. The example inputs are those that the configuration speaks of: image sizes, channels, a context of 32 tokens.
   A network is taken as it is deployed: no cache of keys and values, a detection head that returns its boxes.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sluice.commands.zoos_config import diffusers_inputs, diffusers_network, hf, hf_inputs, sides
from sluice.core.errors import SluiceError

if TYPE_CHECKING:
    import torch
    from torch import nn

    Inputs = torch.Tensor | dict[str, torch.Tensor]

__all__ = ["ZOOS", "make_published", "package_of", "published_inputs"]

ZOOS = ("timm", "torchvision", "hf", "diffusers", "ultralytics")
PACKAGES = {"hf": "transformers"}
# Schemas that torchvision describes at import; a build for another torch does not bring the operators themselves.
OPERATORS = {name: "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")}


def make_published(zoo: str, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The network ``name`` of ``zoo``, one of `ZOOS`, with random weights that are the same on every call.

    Raises:
        SluiceError: the package is not installed, or it has no such network.
    """
    import torch

    package = package_of(zoo, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = _MAKERS[zoo](package, name, arguments)
    return made


def published_inputs(
    zoo: str, name: str, arguments: Mapping[str, Any], shape: tuple[int, ...] | None, batch: int
) -> Inputs:
    """Example inputs at that batch, the same on every call.

    Args:
        shape: of the input without the batch, in place of the one of the configuration; of tokens their number.
    Raises:
        SluiceError: the configuration does not tell the inputs.
    """
    import torch

    package = package_of(zoo, name)
    generator = torch.Generator().manual_seed(0)
    if zoo == "hf":
        return hf_inputs(package, name, arguments, shape, batch, generator)
    if zoo == "diffusers":
        return diffusers_inputs(package, name, arguments, shape, batch, generator)
    found = shape or _SHAPES[zoo](package, name, arguments)
    return torch.randn(batch, *found, generator=generator)


def package_of(zoo: str, name: str) -> Any:
    """The imported package behind ``zoo``; `SluiceError` where it is not installed, with the command."""
    wanted = PACKAGES.get(zoo, zoo)
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")  # installing is the user's decision
    try:
        if importlib.util.find_spec("torchvision") is not None:  # the others import it where it is installed
            _import_torchvision()
        return importlib.import_module(wanted)
    except ModuleNotFoundError as error:
        raise SluiceError(
            f"'{zoo}:{name}' needs the package {error.name!r}, which is not installed; "
            f"pip install 'torch-sluice[{zoo}]'"
        ) from error


def _import_torchvision() -> None:
    """Import torchvision, also one whose operators were built for another torch: no classifier uses them."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import torch

        for operator, schema in OPERATORS.items():
            torch.library.define(f"torchvision::{operator}", schema)
        for half in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[half]
        importlib.import_module("torchvision")


def _timm(timm: Any, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    made: nn.Module = timm.create_model(name, **arguments)
    return made


def _timm_shape(timm: Any, name: str, arguments: Mapping[str, Any]) -> tuple[int, ...]:
    known = timm.models.get_pretrained_cfg(name)
    if known is None:
        raise SluiceError(f"timm does not say the input of {name!r}; give its shape without the batch, --shape 3,32,32")
    channels, *size = known.input_size
    size = sides(arguments.get("img_size", arguments.get("image_size", size)))
    return (arguments.get("in_chans", channels), *size)


def _torchvision(torchvision: Any, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    known = torchvision.models.list_models()
    if name not in known:
        raise _unknown("torchvision", name, known)
    made: nn.Module = torchvision.models.get_model(name, **{"weights": None, **_no_backbone(name), **arguments})
    return made


def _no_backbone(name: str) -> dict[str, Any]:
    """Networks around a classifier load its weights, unless they are told not to."""
    from torchvision import models

    taken = inspect.signature(models.get_model_builder(name)).parameters
    return {"weights_backbone": None} if "weights_backbone" in taken else {}


def _torchvision_shape(torchvision: Any, name: str, arguments: Mapping[str, Any]) -> tuple[int, ...]:
    if "image_size" in arguments:
        return (3, *sides(arguments["image_size"]))
    known = torchvision.models.get_model_weights(name).DEFAULT.transforms.keywords
    size = known.get("crop_size", known.get("resize_size"))
    if size is None:
        raise SluiceError(
            f"torchvision does not say the input of {name!r}; give its shape without the batch, --shape 3,224,224"
        )
    return (3, *sides(size)) if "mean" not in known or len(sides(size)) == 2 else (3, *size)


def _ultralytics(ultralytics: Any, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    config = _yolo_config(tasks, name)
    kinds = {
        "detect": tasks.DetectionModel,
        "classify": tasks.ClassificationModel,
        "segment": tasks.SegmentationModel,
        "pose": tasks.PoseModel,
        "obb": tasks.OBBModel,
    }
    kind = kinds.get(tasks.guess_model_task(config))
    if kind is None:
        raise SluiceError(f"the head of {name!r} is none of {', '.join(kinds)}; give a factory of your own")
    made: nn.Module = kind(config, verbose=False, **arguments)
    for part in made.modules():
        if hasattr(part, "export"):
            vars(part).update(export=True, format="onnx", dynamic=True)  # as its own exporter does
    return made.eval()


def _yolo_config(tasks: Any, name: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = tasks.yaml_model_load(f"{name}.yaml")
    except FileNotFoundError as error:
        raise SluiceError(
            f"ultralytics has no network {name!r}; write the name of one of its files, yolo11n or yolov8s-seg"
        ) from error
    return config


def _ultralytics_shape(ultralytics: Any, name: str, arguments: Mapping[str, Any]) -> tuple[int, ...]:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    side = 224 if tasks.guess_model_task(_yolo_config(tasks, name)) == "classify" else 640
    return (arguments.get("ch", 3), side, side)


def _unknown(zoo: str, name: str, known: list[str]) -> SluiceError:
    import difflib

    near = difflib.get_close_matches(name, known, 3)
    return SluiceError(f"{zoo} has no network {name!r}; it has {', '.join(near) or f'{len(known)} others'}")


_MAKERS = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": hf,
    "diffusers": diffusers_network,
    "ultralytics": _ultralytics,
}
_SHAPES = {"timm": _timm_shape, "torchvision": _torchvision_shape, "ultralytics": _ultralytics_shape}
