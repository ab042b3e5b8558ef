"""A small fixed engine takes part in every measurement, so that points measured at different times compare.

1. The reference engine says when the machine was quiet (`sluice.profiler.timing.measure`, rule 4). Its quiet time is
   measured once, long, and kept in the table. It is the lowest 3% of a thousand bursts: the lowest three were once 4%
   quicker than any burst after them.
2. A host that is busy for the whole of that first measurement makes the quiet time too long, and then the machine
   always seems quiet. On two threads, with a quiet time 13% too long, a ResNet-1D came out 8% too slow, without a word.
   So where the reference engine takes less in a later call, by `QUIET`, its quiet time is taken anew, and counts if it
   is lower by more than `NOISE`. Where it was off by `OFF`, everything in the table by then is marked as uncertain, and
   that call is made again.
3. A table belongs to the host that began it. Hosts of one kind differ by some percent, so another host measures nothing
   into it. It may read the table (`sluice.profiler.profile.profile_known`), or begin one of its own and merge this one
   into that, in its own time (`sluice.profiler.table_tools.merge`).
"""

from __future__ import annotations

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.table.measurement import UNCERTAIN, Measurement
from sluice.profiler.timing.measure import QUIET, ReferenceEngine, measure
from sluice.runtime.base.faults import building, running
from sluice.runtime.base.host import host_identity
from sluice.runtime.base.runner import Runner, Session

__all__ = ["is_of_another_host", "make_reference_engine", "reference_model", "was_slow"]

KEY = "anchor-v1"
TRIES, ANEW = 8, 2
OFF, NOISE = 0.03, 0.005
HOST = "host"


def reference_model() -> onnx.ModelProto:
    """Two 3x3 convolutions with ReLU, 32 channels at 28x28, fixed random weights."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((32, 32, 3, 3)).astype(np.float32) * 0.06 for _ in range(2)]
    nodes = []
    for k in range(2):
        nodes.append(helper.make_node("Conv", [f"x{k}", f"w{k}"], [f"y{k}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"y{k}"], [f"x{k + 1}"]))
    graph = helper.make_graph(
        nodes,
        "reference",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [1, 32, 28, 28])],
        [helper.make_tensor_value_info("x2", TensorProto.FLOAT, [1, 32, 28, 28])],
        [numpy_helper.from_array(w, f"w{k}") for k, w in enumerate(weights)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def make_reference_engine(table: LatencyTable, runner: Runner, rng: np.random.Generator) -> ReferenceEngine:
    """The reference engine with the quiet time that the table knows, or that is measured now and recorded.

    Raises:
        SluiceError: another host began the table.
    """
    if is_of_another_host(table, runner):
        raise SluiceError(
            f"{table.path} was begun on another host, whose times are not those of this one; begin a new table here, "
            f"where only what is asked for is measured, and take these points along by `sluice table merge NEW "
            f"{table.path} -o BOTH` if they are wanted"
        )
    target = table.fingerprint.runtime
    with building(target):
        session, known = runner.build(reference_model()), table.get(KEY, ())
    if known is None:
        with running(target):
            known = _quiet(session, TRIES, rng)
        table.put(KEY, (), known)
        table.describe(KEY, "reference engine measured along with every point")
        table.put_blob(HOST, json.dumps(sorted(_identity(runner))).encode())
    return ReferenceEngine(session, known.ms)


def is_of_another_host(table: LatencyTable, runner: Runner) -> bool:
    """Whether another host than that of the runner began the table; False where either cannot be told."""
    there, here = frozenset(json.loads(table.get_blob(HOST) or b"[]")), _identity(runner)
    return bool(there and here) and not there & here


def _identity(runner: Runner) -> frozenset[str]:
    found: frozenset[str] = getattr(runner, "host_identity", host_identity)()
    return found


def was_slow(reference: ReferenceEngine, ms: float, table: LatencyTable) -> bool:
    """Whether the quiet time was off by `OFF`, given the ``ms`` of this call; a shorter one is kept (rule 2)."""
    if ms >= (1.0 - QUIET) * reference.ms:
        return False
    before, found = reference.ms, _quiet(reference.session, ANEW, np.random.default_rng(0))
    if found.ms > (1.0 - NOISE) * before:
        return False
    off = found.ms < (1.0 - OFF) * before
    if off:
        table.mark_uncertain(UNCERTAIN + before / found.ms - 1.0)
    table.put(KEY, (), found)
    reference.ms = found.ms
    return off


def _quiet(session: Session, tries: int, rng: np.random.Generator) -> Measurement:
    found = [measure([session], min_bursts=1000, max_bursts=1000, rng=rng)[0] for _ in range(tries)]
    return min(found, key=lambda m: m.ms)
