"""``sluice export MODEL.onnx``: a file of others in a precision, cut by a plan if there is one; no torch.

1. In fp32 the file keeps its form: opset where nothing newer is needed, names, open axes, metadata. Other precisions
   need the operators of newer sets, so there the opset may be a newer one.
2. With ``--plan``, a folder gives the file that `sluice compress` wrote there, a plan cuts the file itself.
3. Calibration data are what `sluice compress` takes as data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice.core.errors import SluiceError

if TYPE_CHECKING:
    import onnx

    from sluice.commands.export import Sized
    from sluice.core.plan import InputSpec
    from sluice.passes.files.read import OnnxFile

__all__ = ["ToExport", "file_to_export"]


@dataclass(frozen=True, slots=True, eq=False)
class ToExport:
    """A graph in fp32, finalized; calibration in batches; the inputs it is compared on; and what makes the file."""

    wide: onnx.ModelProto
    calibration: Iterator[Any] | None
    first: list[Any]
    specs: list[InputSpec]
    label: Callable[[onnx.ModelProto], onnx.ModelProto]
    sized: Callable[[onnx.ModelProto], Sized | None] = lambda done: None


def file_to_export(args: argparse.Namespace, made: Callable[[str], Any]) -> ToExport:
    """The words of the command line for a file.

    Args:
        made: the result of a factory, by its name.
    Raises:
        SluiceError: words that are for a factory, or the file cannot be read.
    """
    from sluice.artifacts.labels import provenance
    from sluice.core.plan import InputSpec, Plan
    from sluice.passes.cut.rewrite_onnx import rewrite_onnx
    from sluice.passes.graph.onnx_file import finalize

    for wrong, mend in (
        (args.names, "--names folds nothing of a network; an ONNX file has its names, leave it out"),
        (args.opset is not None, "--opset is for a network; an ONNX file keeps its own, leave it out"),
        (
            args.input_names or args.output_names,
            "an ONNX file keeps its names; leave out --input-names, --output-names",
        ),
        (args.weights is not None, f"--weights is for a factory, {args.model!r} holds its tensors; leave it out"),
        (args.shape is not None, "an ONNX file has its own shapes; leave out --shape, or name open ones with --input"),
    ):
        if wrong:
            raise SluiceError(mend)
    folder = Path(args.plan) if args.plan and Path(args.plan).is_dir() else None
    file, plan = _read(args, str(folder / "slim.onnx") if folder else args.model), None
    model = file.model
    if args.plan:
        plan = Plan.load(folder / "plan.json" if folder else args.plan)
        model = model if folder else rewrite_onnx(model, plan)

    def label(done: onnx.ModelProto) -> onnx.ModelProto:
        made = _formed(file, done, args.precision)
        for key, value in provenance(plan).items():
            made.metadata_props.add(key=f"sluice.{key}", value=value)
        return made

    batches = list(_batches(args, file, made)) if args.calibration else []
    specs = [InputSpec(value.shape, str(value.dtype), name) for name, value in file.inputs.items()]
    first = batches[:1] or [dict(file.inputs)]
    calibration = iter(batches) if batches else None
    return ToExport(finalize(model), calibration, first, specs, label, lambda done: _sized(done, file, args.batch))


def _read(args: argparse.Namespace, path: str) -> OnnxFile:
    from sluice.artifacts.folder import held
    from sluice.commands.onnx_input import onnx_input

    return onnx_input(str(held(path)), args.inputs, dict(args.fixed))


def _batches(
    args: argparse.Namespace, file: OnnxFile, made: Callable[[str], Any]
) -> Iterator[Mapping[str, np.ndarray]]:
    from sluice.commands.compress_file import examples_in
    from sluice.passes.files.rows import rows_of

    return rows_of(file, examples_in(args.calibration, args.model, args.inputs, made)).batches()


def _formed(file: OnnxFile, done: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Rule 1."""
    from sluice.passes.files.read import written_back

    return written_back(file, done, opset=precision == "fp32")


def _sized(done: onnx.ModelProto, file: OnnxFile, batch: int) -> Sized | None:
    """For engines and their commands; None where nothing but the batch is open."""
    import onnx

    from sluice.commands.export import Sized
    from sluice.passes.graph.onnx_graph import OnnxGraph

    if not file.sizes:
        return None
    copy, shapes = onnx.ModelProto(), dict[str, list[int]]()
    copy.CopyFrom(done)
    del copy.graph.value_info[:]
    for name, info in OnnxGraph(copy).inputs.items():
        dims, read = info.type.tensor_type.shape.dim, OnnxGraph(file.model).inputs[name].type.tensor_type.shape.dim
        if any(not dim.HasField("dim_value") for dim in read):
            shapes[name] = [
                d.dim_value if d.HasField("dim_value") else file.sizes.get(d.dim_param, batch) for d in read
            ]
        del dims[:]
        for dim in read:
            size = dim.dim_value if dim.HasField("dim_value") else file.sizes.get(dim.dim_param)
            dims.add(dim_value=size) if size is not None else dims.add(dim_param=dim.dim_param)
    for info in copy.graph.output:
        info.type.tensor_type.ClearField("shape")
    return Sized(copy, shapes)
