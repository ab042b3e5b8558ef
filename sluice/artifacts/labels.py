"""What a file says of itself: names that its reader chose, and where it comes from.

1. The open axis 0 of the inputs is called ``batch`` in the whole file. Every node has a name. Inputs and outputs keep
   the names of the arguments and values of ``forward()``, or take those that are given.
2. Metadata says where it comes from: the version of this package and, of a slim network, the SHA-256 of its plan, the
   budget, the milliseconds that were promised and measured, and the device, runtime and precision that they hold for.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx

from sluice.artifacts.report import Report
from sluice.core.errors import SluiceError
from sluice.core.plan import Plan
from sluice.core.version import __version__
from sluice.passes.graph.onnx_graph import OnnxGraph

__all__ = ["BATCH", "labelled", "provenance"]

BATCH = "batch"


def labelled(
    model: onnx.ModelProto, origin: Mapping[str, str], inputs: Sequence[str] = (), outputs: Sequence[str] = ()
) -> onnx.ModelProto:
    """A copy with the names of rule 1, and metadata that says where it comes from.

    Args:
        origin: the entries of rule 2, of `provenance`; each gets the prefix "sluice.".
        inputs, outputs: names in the order of the file; empty keeps those that it has.
    Raises:
        SluiceError: another number of names than the file has inputs or outputs, or a name that is taken.
    """
    done = onnx.ModelProto()
    done.CopyFrom(model)
    graph = done.graph
    given = list(OnnxGraph(done).inputs.values())
    names: dict[str, str] = {}
    for what, infos, wanted in (("input", given, inputs), ("output", list(graph.output), outputs)):
        if wanted and len(wanted) != len(infos):
            have = ", ".join(info.name for info in infos)
            raise SluiceError(f"there are {len(wanted)} names for the {len(infos)} {what}s ({have}); give one for each")
        names |= {info.name: name for info, name in zip(infos, wanted or [i.name for i in infos], strict=True)}
    taken = _values(graph) - names.keys()
    for name, count in Counter(names.values()).items():
        if count > 1 or name in taken:
            raise SluiceError(f"the file has another value called {name!r}; give that input or output another name")
    _rename(graph, {old: new for old, new in names.items() if old != new})
    _name_batch(graph, given)
    used = {node.name for node in graph.node}
    fresh = (name for k in range(len(graph.node) + len(used)) if (name := f"node_{k}") not in used)
    for node in graph.node:
        node.name = node.name or next(fresh)
    entries = {f"sluice.{name}": value for name, value in origin.items()}
    others = [entry for entry in done.metadata_props if entry.key not in entries]
    del done.metadata_props[:]
    done.metadata_props.extend([*others, *(onnx.StringStringEntryProto(key=k, value=v) for k, v in entries.items())])
    return done


def provenance(plan: Plan | None = None, report: Report | None = None) -> dict[str, str]:
    """The entries of rule 2."""
    entries = {"version": __version__}
    if plan is not None:
        entries["plan"] = hashlib.sha256(plan.to_json().encode()).hexdigest()
    if report is not None:
        times = {"budget": report.budget_ms, "promised": report.promised_ms, "measured": report.measured_ms}
        entries |= {f"{name}_ms": f"{ms:.6g}" for name, ms in times.items() if ms is not None}
        entries["measured_on"] = json.dumps(dict(report.fingerprint), sort_keys=True)
    return entries


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from _graphs(inner)


def _values(graph: onnx.GraphProto) -> set[str]:
    found = set()
    for each in _graphs(graph):
        found |= {info.name for info in (*each.input, *each.output)} | {init.name for init in each.initializer}
        found |= {name for node in each.node for name in (*node.input, *node.output)}
    return found


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for each in _graphs(graph) if names else ():
        for info in (*each.input, *each.output, *each.value_info):
            info.name = names.get(info.name, info.name)
        for node in each.node:
            for side in (node.input, node.output):
                side[:] = [names.get(name, name) for name in side]


def _name_batch(graph: onnx.GraphProto, inputs: Sequence[onnx.ValueInfoProto]) -> None:
    shapes = [info.type.tensor_type.shape for info in inputs]
    open_axes = (shape.dim[0].dim_param for shape in shapes if shape.dim and shape.dim[0].dim_param)
    symbol = next(open_axes, None)
    if symbol is None:
        return
    for info in (*graph.input, *graph.output, *graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_param = BATCH
