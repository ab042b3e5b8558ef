"""The ranges of activations, from calibration batches; they give the int8 scales.

The range of a tensor is the amplitude that its scale maps to the last step; larger values saturate. It is a percentile
of ``|x|`` over one slice of a batch, and the largest of those over all slices; 100 is the plain maximum. The network
runs in fp32 in ONNX Runtime with every tensor that will have a scale as an extra output, and one number per tensor is
kept. All those outputs are in memory at once. So a batch is run in slices of at most 16 inputs, where the file leaves
the batch free and all inputs share it; otherwise the slice is the batch.

The default, 99.999, takes off lone outliers of large tensors and is the maximum of small ones. On the trained ResNet-20
(calibrated on three draws of 256 digits, for both forms of int8) it had the smallest root mean square error of the
logits, 1.2% on average; the maximum had 1.4%, the clipping with the least squared error per tensor 1.4%, the
percentiles 99.99, 99.9 and 99.5 1.6%, 6% and 18%. Those figures were taken with percentiles over whole batches; over
slices a percentile lies nearer to the maximum.

Fewer than `FEW` inputs are told in the log: ranges of so few are too small for others.

Inputs that a batch names are matched by name, in any order: by order, two of one shape could be exchanged without an
error. The names are those of the file's inputs. Where the model takes a mapping as one argument, the exporter puts the
argument's name in front of its keys (``batch_x`` for ``batch["x"]``), so those names may have a prefix in common.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper

from sluice.core.errors import SluiceError
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.passes.precision.fold import fold_batch_norms
from sluice.passes.precision.quantize import tensors_to_calibrate

__all__ = ["PERCENTILE", "activation_ranges", "slices"]

PERCENTILE = 99.999
FEW = 100  # inputs, below which ranges are told to be uncertain
log = logging.getLogger(__name__)
ROWS = 16  # of a batch that are run at once


def activation_ranges(
    model: onnx.ModelProto,
    batches: Iterable[Any],
    *,
    percentile: float = PERCENTILE,
    target: str = "ort-cpu",
    exclude: Collection[str] = (),
) -> dict[str, float]:
    """The range of every tensor that is int8, by name.

    Args:
        model: the fp32 network.
        batches: ``(inputs, labels)`` or inputs alone, as for `sluice.compress`. Tensors stand for the network's inputs
            in their order, those of a mapping for the inputs of their names.
        percentile: of ``|x|`` within a slice of a batch, above 0 and up to 100.
        target, exclude: as for `sluice.passes.precision.to_precision.to_precision`.
    Raises:
        SluiceError: there is no batch, one does not fit the network, or a range is not finite.
    """
    if not 0 < percentile <= 100:
        raise SluiceError(f"cannot take percentile {percentile:g} of activations; give one above 0 and up to 100")
    from sluice.runtime.targets import untimed_runner

    names = tensors_to_calibrate(model, target=target, exclude=exclude)
    session = untimed_runner().build(_with_outputs(fold_batch_norms(model), names))
    found: dict[str, float] = {}
    count = 0
    for feeds in slices(batches, model):
        count += max((len(array) for array in feeds.values() if array.ndim), default=1)
        values = {**feeds, **session.run(feeds)}
        for name in names:
            amplitude = _amplitude(values[name], percentile)
            if not math.isfinite(amplitude):
                raise SluiceError(
                    f"tensor {name!r} is not finite on a calibration batch; take out inputs that are not numbers, or "
                    f"mend the network"
                )
            found[name] = max(found.get(name, 0.0), amplitude)
    if names and not found:
        raise SluiceError("there is no calibration batch; give at least one, of inputs as they occur in deployment")
    if names and count < FEW:
        log.warning(
            "int8 was calibrated on %d input%s, too few to know the ranges of activations; give some hundred",
            count, "" if count == 1 else "s",
        )  # fmt: skip
    return found


def _with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Inner tensors as outputs too; ``model`` is changed."""
    there = {info.name for info in [*model.graph.output, *model.graph.input]}
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in there)
    return model


def slices(batches: Iterable[Any], model: onnx.ModelProto) -> Iterator[Mapping[str, np.ndarray]]:
    """The batches, in slices of at most `ROWS` inputs where the network takes batches of any size.

    Raises:
        SluiceError: a batch does not fit the network.
    """
    inputs = OnnxGraph(model).inputs
    names = list(inputs)
    axes = {next((dim.dim_param for dim in info.type.tensor_type.shape.dim), "") for info in inputs.values()}
    for batch in batches:
        feeds = _feeds(batch, names)
        sizes = {len(array) if array.ndim else 1 for array in feeds.values()}
        if len(axes) != 1 or "" in axes or len(sizes) != 1:
            yield feeds
            continue
        for start in range(0, max(sizes), ROWS):
            yield {name: array[start : start + ROWS] for name, array in feeds.items()}


def _feeds(batch: Any, names: list[str]) -> Mapping[str, np.ndarray]:
    """The tensors of a batch by the names of the network's inputs: those of mappings first, the others in order."""
    if isinstance(batch, Mapping) and all(isinstance(batch.get(name), np.ndarray) for name in names):
        return {name: batch[name] for name in names}
    from torch import Tensor
    from torch.utils import _pytree as pytree

    from sluice.training.train import split_batch

    inputs, _ = split_batch(batch)
    arguments = (inputs,) if isinstance(inputs, Mapping) else inputs
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    for mapping in (x for x in arguments if isinstance(x, Mapping)):
        own = {key: x for key, x in _flat(mapping) if isinstance(x, Tensor)}
        free = [name for name in names if name not in found]
        prefix = _prefix(own, free)
        found |= {prefix + key: x for key, x in own.items() if prefix + key in free}
        unknown += [key for key in own if prefix + key not in free]
    others = pytree.tree_leaves([x for x in arguments if not isinstance(x, Mapping)])
    leaves = [x for x in others if isinstance(x, Tensor)]
    rest = [name for name in names if name not in found]
    if unknown or (found and rest and not leaves):
        wrong = [f"lacks {', '.join(rest)}"] if rest and not leaves else []
        wrong += [f"has {', '.join(unknown)}, which the network does not take"] if unknown else []
        raise SluiceError(
            f"a calibration batch {' and '.join(wrong)}; name the inputs ({', '.join(names)}), each once, and put "
            f"labels beside them: (inputs, labels)"
        )
    if len(leaves) != len(rest):
        raise SluiceError(
            f"a calibration batch has {len(found) + len(leaves)} inputs, the network {len(names)} "
            f"({', '.join(names)}); give one for each"
        )
    return {name: x.detach().cpu().numpy() for name, x in (found | dict(zip(rest, leaves, strict=True))).items()}


def _flat(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Leaves under mappings and sequences, named by their keys as the exporter joins them."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, (*path, str(key)))
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            yield from _flat(inner, (*path, str(index)))
    else:
        yield "_".join(path), value


def _prefix(keys: Iterable[str], names: list[str]) -> str:
    """The prefix with which most keys are names; empty where none makes more of them names."""
    keys = list(keys)
    prefixes = {name.removesuffix(key) for key in keys for name in names if name.endswith(f"_{key}")}
    return max(["", *sorted(prefixes)], key=lambda prefix: sum(prefix + key in names for key in keys))


def _amplitude(values: np.ndarray, percentile: float) -> float:
    amplitudes = np.abs(values)
    largest = float(amplitudes.max(initial=0))
    if percentile == 100 or not amplitudes.size or not math.isfinite(largest):
        return largest
    return float(np.percentile(amplitudes, percentile))
