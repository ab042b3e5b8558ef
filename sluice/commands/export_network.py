"""``sluice export FACTORY``: the dense network of a factory or, with ``--plan``, the slim one, to be exported."""

from __future__ import annotations

import argparse
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.commands.export_file import ToExport
from sluice.commands.specs import data_of, inputs_of, model_of

if TYPE_CHECKING:
    import onnx

    from sluice.core.plan import Plan

__all__ = ["network_to_export"]


def network_to_export(args: argparse.Namespace) -> ToExport:
    """The words of the command line for a network; with ``--names`` nothing is folded."""
    from sluice.artifacts.labels import labelled, provenance
    from sluice.artifacts.rounding_check import specs_at
    from sluice.artifacts.store import load
    from sluice.passes.cut.export import OPSET, check_opset, finalize, to_onnx

    # A network that does not leave its batch free is exported at the batch of these inputs.
    inputs = inputs_of(args.model, args.shape, args.batch, args.inputs)
    model = model_of(args.model, args.weights)
    if args.plan:
        model = load(model, args.plan, example_inputs=inputs)
    exported = to_onnx(model, inputs, opset=check_opset(OPSET if args.opset is None else args.opset))
    batches = iter(data_of(args.calibration)) if args.calibration else iter(())
    first = list(islice(batches, 1))  # also of data that can be read only once
    wide = exported if args.names else finalize(exported)

    def label(done: onnx.ModelProto) -> onnx.ModelProto:
        return labelled(done, provenance(_plan_in(args.plan)), args.input_names, args.output_names)

    calibration = chain(first, batches) if args.calibration else None
    return ToExport(wide, calibration, first or [inputs], specs_at(wide, args.batch), label)


def _plan_in(path: str | None) -> Plan | None:
    """The plan of a folder that `compress` wrote, or of a file."""
    from sluice.core.plan import Plan

    if path is None:
        return None
    return Plan.load(Path(path) / "plan.json" if Path(path).is_dir() else path)
