"""The dense engine and a slim one in turns: how often they are measured, and how well they are known then.

1. One *run* measures both in turns, since a busy host slows both. What counts is the slim engine's *share* of the
   budget, which may itself be a share of the dense time. A run is uncertain by

       u = hypot(REBUILT, spread of slim / 3, spread of dense / 3)

   An engine that is built again differs by 1 to 2% from itself, because of the place of its memory. A time is the mean
   of three turns and the spread is their range, so a third of the range is about the error of the mean.
2. Of k runs the median share counts. It is uncertain by ``u / sqrt(k)``, or by the median deviation of the runs from it
   if that is more. Runs on a machine that was never quiet count only where there is no other.
3. One run is enough where the share is farther from the limit that decides than it is uncertain by. Otherwise both
   engines are built anew and measured again, `RUNS` times at most.
4. The dense engine of a first run serves the first runs of all slim engines, and is kept, unless its file is beyond one
   protobuf or lies on the disk. Those of further runs are rare, are built anew, and go with their run.
5. Latency does not depend on the weights. So engines of equal structure (`structure`) are one engine, which is known
   once it is measured.
6. The first engine of every structure is compared with fp32, where that is given (`sluice.artifacts.engine_check`). One
   that the runtime computes wrongly is refused. A file that its precision does not suit is not: it is not trained yet.
7. A run waits for a quiet machine for `PATIENCE_MS`, and a quarter of that where the last one waited in vain: two
   engines that take turns are slowed together.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from sluice.artifacts.engine_check import EngineCheck, check_engine
from sluice.core.budget_spec import BudgetSpec
from sluice.core.errors import EngineFault, LostLine
from sluice.core.weight_bytes import Parked, is_large
from sluice.passes.graph.onnx_graph import attributes
from sluice.profiler.table.measurement import Measurement
from sluice.profiler.timing.measure import QUIET, ReferenceEngine, Waiting, measure
from sluice.profiler.view import Profile
from sluice.runtime.base.faults import building, running
from sluice.runtime.base.inputs import parsed
from sluice.runtime.base.runner import Runner, Session

__all__ = ["APART", "PairTimes", "Pairs", "engine_check", "is_faster", "structure"]

RUNS = 3
REBUILT = 0.015
BURSTS = 40
TARGET_SPREAD = 0.015
PATIENCE_MS = 2500.0
APART = 0.01  # relative, by which the file of plain export must be faster to count
SHAPE_LIKE = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)


@dataclass(frozen=True, slots=True)
class PairTimes:
    """Milliseconds of the dense and of the slim engine, from the same runs, and what the slim one may take.

    Attributes:
        runs, dense_runs: how often the slim engine was measured, built anew each time, and how often the dense one was.
        uncertainty: of the share of the budget, relative (rule 2).
        quiet: whether the machine was quiet for a moment of these runs, or close to it; otherwise the times are not to
            be relied on.
        slower: by how much the reference engine exceeded its quiet time in the quietest of these runs, relative; 0
            where the machine was quiet for a moment.
    """

    budget_ms: float
    dense_ms: float
    slim_ms: float
    runs: int
    dense_runs: int
    uncertainty: float
    quiet: bool
    slower: float = 0.0

    @property
    def share(self) -> float:
        """What the slim engine takes of the budget."""
        return self.slim_ms / self.budget_ms


@dataclass(frozen=True, slots=True)
class _Run:
    dense: Measurement
    slim: Measurement
    slower: float

    @property
    def uncertainty(self) -> float:
        """Rule 1."""
        return math.hypot(REBUILT, self.dense.spread / 3, self.slim.spread / 3)

    @property
    def quiet(self) -> bool:
        return not (self.dense.uncertain or self.slim.uncertain)


@dataclass(slots=True, eq=False)
class Pairs:
    """What was measured of slim engines beside the dense one, for one budget.

    Attributes:
        dense: the file of the dense engine, as it is.
        waiting: told of the waiting for a quiet machine (`sluice.profiler.timing.measure`).
        patience_ms: how long a run waits for it.
    """

    profile: Profile
    dense: onnx.ModelProto | Parked
    budget: BudgetSpec
    waiting: Waiting | None = None
    patience_ms: float = PATIENCE_MS
    _runner: Runner | None = None
    _reference: ReferenceEngine | None = None
    _dense_engine: Session | None = None
    _runs: dict[str, list[_Run]] = field(default_factory=dict)
    _in_vain: bool = False

    def settle(self, slim: onnx.ModelProto, limit: float, wide: onnx.ModelProto | None = None) -> PairTimes:
        """The times of a file as it is, clear enough to say whether it takes ``limit`` of the budget (rule 3).

        Args:
            wide: the network in fp32, for rule 6.
        Raises:
            SluiceError: the runtime computes another network.
        """
        runs = self._runs.setdefault(structure(slim), [])
        while not runs or (len(runs) < RUNS and _near(self._times(runs), limit)):
            runs.append(self._run(slim, len(runs), wide if not runs else None))
        return self._times(runs)

    def once(self, slim: onnx.ModelProto | Parked) -> PairTimes:
        """The times of a file as it is, from one run, or from those that there are."""
        runs = self._runs.setdefault(structure(slim), [])
        if not runs:
            runs.append(self._run(slim, 0))
        return self._times(runs)

    def _times(self, runs: list[_Run]) -> PairTimes:
        """Rule 2."""
        counted = [run for run in runs if run.quiet] or runs
        shares = np.array([run.slim.ms / self.budget.ms(run.dense.ms) for run in counted])
        order, half = np.argsort(shares), len(counted) // 2
        middle = [counted[k] for k in order[(len(counted) - 1) // 2 : half + 1]]
        dense_ms, slim_ms = (float(np.mean(ms)) for ms in zip(*((m.dense.ms, m.slim.ms) for m in middle), strict=True))
        one = float(np.mean([run.uncertainty for run in counted]))
        apart = float(np.median(np.abs(shares / np.median(shares) - 1.0)))
        return PairTimes(
            budget_ms=self.budget.ms(dense_ms),
            dense_ms=dense_ms,
            slim_ms=slim_ms,
            runs=len(runs),
            dense_runs=sum(map(len, self._runs.values())),
            uncertainty=max(one / math.sqrt(len(counted)), apart),
            quiet=counted[0].quiet,
            slower=min(run.slower for run in counted),
        )

    def _run(self, slim: onnx.ModelProto | Parked, number: int, wide: onnx.ModelProto | None = None) -> _Run:
        """One run; a fault of the runtime leaves no engine behind that may have gone with it."""
        try:
            return self._timed(slim, number, wide)
        except EngineFault as error:
            if isinstance(error, LostLine) and (revive := getattr(self._runner, "revive", None)) is not None:
                revive()
            self._runner = self._reference = None
            self._dense_engine = None
            raise

    def _timed(self, slim: onnx.ModelProto | Parked, number: int, wide: onnx.ModelProto | None) -> _Run:
        batch = self.profile.fingerprint.batch
        if self._runner is None:
            self._runner = self.profile.runner()
        if self._reference is None:
            self._reference = self.profile.reference(self._runner)
        with building(self.profile.target):
            engine = self._runner.build(slim, batch=batch)
        if wide is not None:  # before there is a dense engine, since both take the memory of several files
            assert isinstance(slim, onnx.ModelProto), "a parked file is timed, and not compared"
            with running(self.profile.target):
                check = engine_check(self.profile, engine, slim, wide)
            if check.runtime and not check.same:
                raise check.refusal(f"the engine of {self.profile.target}")
        with building(self.profile.target):
            dense = None if number else self._dense_engine
            if dense is None:
                dense = self._runner.build(self.dense, batch=batch)
            if not number and isinstance(self.dense, onnx.ModelProto) and not is_large(self.dense):
                self._dense_engine = dense
        engines = [dense, engine]
        with running(self.profile.target):
            dense_ms, slim_ms, witness = measure(
                engines, min_bursts=BURSTS, target_spread=TARGET_SPREAD, reference=self._reference,
                with_reference=True, patience_ms=self.patience_ms / 4 if self._in_vain else self.patience_ms,
                waiting=self.waiting, rng=np.random.default_rng(sum(map(len, self._runs.values()))),
            )  # fmt: skip
        excess = witness.ms / self._reference.ms - 1.0
        self._in_vain = excess > QUIET
        return _Run(dense_ms, slim_ms, excess if self._in_vain else 0.0)


def engine_check(profile: Profile, session: Session, slim: onnx.ModelProto, wide: onnx.ModelProto) -> EngineCheck:
    """The comparison of an engine of the profile's deployment with the network in fp32."""
    form = profile.fingerprint
    return check_engine(session, slim, wide, form.precision, target=form.runtime, batch=form.batch)


def _near(times: PairTimes, limit: float) -> bool:
    return abs(times.share - limit) <= times.share * times.uncertainty


def is_faster(plain: PairTimes | None) -> bool:
    """Whether budgets in percent count from the plain file (`sluice.pipeline.plain`, rule 1)."""
    return plain is not None and plain.share * (1.0 + plain.uncertainty) <= 1.0 - APART


def structure(model: onnx.ModelProto | Parked) -> str:
    """A hash of a graph without the names and the values of its weights, in whatever order its operators come.

    Values that shapes may follow from (integers of 64 bits) and attributes count; attributes at their defaults do not.
    """
    model = parsed(model)
    graph, versions = model.graph, {one.domain: one.version for one in model.opset_import}
    known = {"": ""}
    for info in graph.initializer:
        values = numpy_helper.to_array(info).tobytes() if info.data_type in SHAPE_LIKE else b""
        known[info.name] = _hash(info.data_type, list(info.dims), values)
    for k, value in enumerate(v for v in graph.input if v.name not in known):
        tensor = value.type.tensor_type
        known[value.name] = _hash(k, tensor.elem_type, [d.dim_value for d in tensor.shape.dim])
    nodes = []
    for node in graph.node:
        usual = _defaults(node, versions.get(node.domain, 0))
        own = sorted((k, v) for k, v in attributes(node).items() if k not in usual or usual[k] != v)
        nodes.append(_hash(node.domain, node.op_type, own, [known[name] for name in node.input]))
        known |= {name: _hash(nodes[-1], k) for k, name in enumerate(node.output) if name}
    return _hash(sorted(nodes), [known[value.name] for value in graph.output])


def _defaults(node: onnx.NodeProto, version: int) -> dict[str, object]:
    try:
        schema = onnx.defs.get_schema(node.op_type, max(version, 1), node.domain)
    except onnx.defs.SchemaError:
        return {}
    given = {name: one.default_value for name, one in schema.attributes.items()}
    return {name: onnx.helper.get_attribute_value(v) for name, v in given.items() if v.type}


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
