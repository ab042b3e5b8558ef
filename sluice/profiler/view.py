"""What a profile shows of a network on one device, and what it measures when it is asked.

The sites and slots follow from the graph. The milliseconds are those of the table at the moment of asking, so a profile
knows more after `Profile.ask`, `Profile.time_engines` and `Profile.learn`, and `Profile.latency` is a snapshot.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx

from sluice.core.address import target_at
from sluice.core.errors import EngineFault, SluiceError
from sluice.core.latency import LatencyModel
from sluice.core.progress import Progress, silent
from sluice.passes.precision.to_precision import to_precision
from sluice.passes.search_space import SearchSpace
from sluice.profiler.fit.assemble import Layout, fill
from sluice.profiler.fit.calibrate import calibrate
from sluice.profiler.pieces.engine import model_key
from sluice.profiler.pieces.partition import Partition
from sluice.profiler.survey import Coverage, coverage, measure_slots
from sluice.profiler.sweep.bench import Bench
from sluice.profiler.sweep.engine_times import measure_engines
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.profiler.table.measurement import UNCERTAIN, Measurement
from sluice.profiler.timing import timing_cache
from sluice.profiler.timing.measure import ReferenceEngine
from sluice.profiler.timing.reference_engine import reference_model
from sluice.runtime.base.runner import Runner
from sluice.runtime.targets import make_runner
from sluice.solver.options import EditSpace

__all__ = ["Profile", "Seen"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Seen:
    """The latency model at one state of the table."""

    revision: tuple[int, ...] = ()
    model: LatencyModel | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """A network on one device: its sites, and a view of the table that grows as it is asked.

    ``shut`` are sites that stay dense: the other reading of the network lacks them. ``address`` says where the target
    is, if not here.
    """

    layout: Layout
    bench: Bench
    space: SearchSpace
    options: EditSpace
    shut: frozenset[str] = frozenset()
    progress: Progress = silent
    address: str = ""
    _seen: Seen = field(default_factory=Seen)

    @property
    def partition(self) -> Partition:
        return self.layout.partition

    @property
    def fingerprint(self) -> Fingerprint:
        return self.bench.table.fingerprint

    @property
    def target(self) -> str:
        return self.fingerprint.runtime

    @property
    def open(self) -> bool:
        """Whether more can be measured: the table is this device's, and there is time."""
        return self.bench.open

    @property
    def latency(self) -> LatencyModel:
        """The calibrated latency model, as the table knows it now; a frozen value."""
        table = self.bench.table
        revision = (*table.revision(), len(self.bench.refused))
        if self._seen.model is None or self._seen.revision != revision:
            self._seen.revision = revision
            model = fill(self.layout, table, self.bench.refused)
            self._seen.model = calibrate(model, self.layout, table).pinned(self.shut)
        return self._seen.model

    def knows(self, widths: Mapping[str, int]) -> bool:
        """Whether every point of a configuration was measured."""
        return self.latency.measured_at(widths)

    def ask(self, configurations: Iterable[Mapping[str, int]]) -> int:
        """Measure what these configurations use and is not known; how many points these were."""
        model = self.latency
        terms = {term.name: term for term in model.terms}
        wanted = [
            (slot, at)
            for widths in configurations
            for slot, at in self.layout.points(widths)
            if not terms[slot.name].measured_at(widths)
        ]
        if not wanted:
            return 0
        with self.progress("points that plans use") as advance:
            return measure_slots(replace(self.bench, progress=advance), wanted)

    def time_engines(self, configurations: Sequence[Mapping[str, int]]) -> None:
        """Measure whole engines in these configurations, which calibrate the model, unless they are known."""
        key, table = self.model_key, self.bench.table
        known = table.engines(key)
        there = [widths for widths, _ in known]
        plans = [dict(widths) for widths in configurations if dict(widths) not in there]
        if plans:
            with self.progress("engines") as advance:
                bench = replace(self.bench, progress=advance)
                try:
                    measure_engines(self.partition, bench, plans, self.options, known=known, record=key)
                except EngineFault as error:
                    self._one_by_one(bench, plans, error)
            self._keep_calibration()

    def _one_by_one(self, bench: Bench, plans: Sequence[Mapping[str, int]], error: EngineFault) -> None:
        """The engines of these plans but those that the runtime fails on; the dense one must be there."""
        bench.stand_up(error)
        for plan in plans:
            known = bench.table.engines(self.model_key)
            try:
                measure_engines(self.partition, bench, [plan], self.options, known=known, record=self.model_key)
            except EngineFault as fault:
                if plan == dict(self.layout.dense):
                    raise SluiceError(f"the dense network does not run here: {fault}") from fault
                bench.stand_up(fault)
                log.warning("a plan is left out of the calibration: %s", fault)

    def learn(self, widths: Mapping[str, int], ratio: float, uncertain: bool = False) -> None:
        """Take note of an engine that was measured elsewhere: ``ratio`` of its time to that of the dense engine."""
        key, table = self.model_key, self.bench.table
        dense = next((m for plan, m in table.engines(key) if plan == dict(self.latency.dense)), None)
        if dense is not None and not self.bench.closed:
            spread = max(dense.spread, 2 * UNCERTAIN if uncertain else 0.0)
            found = Measurement(ratio * dense.ms, spread, dense.samples, dense.clock)
            table.put_engine(key, widths, found)
            self._keep_calibration()

    def _keep_calibration(self) -> None:
        model = self.latency
        self.bench.table.put_calibration(self.model_key, model.slope, model.intercept, model.error)

    @property
    def model_key(self) -> str:
        """The name of the network in the table."""
        return model_key(self.partition, self.layout.dense)

    @property
    def coverage(self) -> Coverage:
        """What the table holds of the network by now."""
        return coverage(self.layout, self.bench.table)

    def reference(self, runner: Runner) -> ReferenceEngine:
        """The reference engine that makes times of different moments comparable."""
        return ReferenceEngine(runner.build(reference_model()), self.bench.reference.ms)

    @property
    def refused(self) -> dict[str, str]:
        """Parts that the runtime fails on, with their sizes, and the reason."""
        names = {slot.part.key: slot.part.description for slot in self.layout.slots}
        found = self.bench.refused.items()
        return {f"{names.get(key, key)} at {'x'.join(map(str, at))}": why for (key, at), why in found}

    def runner(self) -> Runner:
        runner = make_runner(target_at(self.target, self.address), self.fingerprint.threads)
        timing_cache.restore(runner, self.bench.table.get_blob(timing_cache.NAME))
        return runner

    def engine(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """An fp32 network as its engine is timed and deployed: in the profile's precision."""
        form = self.fingerprint
        return to_precision(model, form.precision, target=form.runtime, threads=form.threads)
