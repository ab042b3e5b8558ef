"""Profile one network on this device: dissect, explore, measure, join, calibrate.

Everything that the table knows already is not measured again, so a second call, another network with equal pieces or
a run after a kill costs only what is missing. Needs onnx and a runtime, not torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from sluice.errors import SluiceError
from sluice.latency import LatencyModel
from sluice.passes.options import Options, check_methods
from sluice.profiler.alternatives import find_alternatives
from sluice.profiler.anchor import anchor_model, make_anchor
from sluice.profiler.assemble import assemble
from sluice.profiler.calibrate import calibrate
from sluice.profiler.fingerprint import Fingerprint, host_device
from sluice.profiler.measure import Anchor
from sluice.profiler.pieces import Dissection, dissect
from sluice.profiler.sweep import Bench, explore, joint_points, piece_points
from sluice.profiler.table import LatencyTable
from sluice.runtime.runner import Runner, make_runner

__all__ = ["Profile", "fingerprint_here", "profile_onnx"]


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """A calibrated latency model, what it was measured on, and the graph it speaks of."""

    latency: LatencyModel
    dissection: Dissection
    fingerprint: Fingerprint
    target: str
    anchor_ms: float
    options: Options = field(default_factory=Options)

    def anchor(self, runner: Runner) -> Anchor:
        """The reference engine that makes times of different moments comparable."""
        return Anchor(runner.build(anchor_model()), self.anchor_ms)

    def runner(self) -> Runner:
        return make_runner(self.target, self.fingerprint.threads)


def fingerprint_here(target: str, threads: int, batch: int) -> Fingerprint:
    """What a table measured now, on this machine, must carry."""
    import onnxruntime

    clock = make_runner(target, threads).clock
    return Fingerprint(host_device(), target, onnxruntime.__version__, threads, "fp32", batch, clock)


def profile_onnx(
    model: onnx.ModelProto,
    table: str | os.PathLike[str] = ":memory:",
    *,
    batch: int,
    target: str = "ort-cpu",
    threads: int = 1,
    exclude: Sequence[str] = (),
    methods: Sequence[str] = ("filter",),
    seed: int = 0,
    progress: bool = True,
) -> Profile:
    """Measure what is missing in ``table`` for ``model`` and return its calibrated latency model.

    Args:
        model: dense ONNX whose initialisers carry parameter names.
        table: SQLite file, made if it does not exist; refused if it belongs to another device or setting.
        batch: batch size of the deployment.
        methods: what may be chosen, of ``filter``, ``rank``, ``block``, ``merge``.
        progress: bars with the time left, on standard error.
    Raises:
        SluiceError: nothing can be cut; the table is foreign, damaged or cannot be written.
    """
    methods = check_methods(methods)
    runner = make_runner(target, threads)
    dissection = dissect(model, batch, exclude)
    if not dissection.analysis.groups:
        raise SluiceError(f"nothing in this model can be cut: {dict(list(dissection.analysis.frozen.items())[:3])}")
    fingerprint = fingerprint_here(target, threads, batch)
    rng = np.random.default_rng(seed)
    with LatencyTable.open_or_create(table, fingerprint) as opened:
        bench = Bench(opened, runner, make_anchor(opened, runner, rng), rng)
        with _bar("staircases", progress) as advance:
            stairs = explore(dissection, replace(bench, progress=advance))
        with _bar("pieces", progress) as advance:
            replace(bench, progress=advance).pieces(dissection, piece_points(dissection, stairs))
        with _bar("joints", progress) as advance:
            replace(bench, progress=advance).joints(dissection, joint_points(dissection, stairs))
        with _bar("alternatives", progress) as advance:
            own = replace(bench, progress=advance)
            alternatives = find_alternatives(dissection, stairs, own, batch, methods, exclude)
        latency = assemble(dissection, stairs, opened, alternatives)
        with _bar("engines", progress) as advance:
            latency = calibrate(dissection, latency, replace(bench, progress=advance), alternatives)
    return Profile(latency, dissection, fingerprint, target, bench.anchor.ms, alternatives.options)


class _bar:
    """A tqdm bar that is told (done, total) of successive batches of points."""

    def __init__(self, name: str, show: bool):
        self.name, self.show = name, show

    def __enter__(self) -> Callable[[int, int], None]:
        from tqdm import tqdm

        self.bar = tqdm(desc=f"profile: {self.name}", unit="point", disable=not self.show, leave=False, delay=1.0)
        self.before = 0

        def advance(done: int, total: int) -> None:
            if done <= self.before:  # a new batch of points
                self.before = 0
            if self.before == 0:
                self.bar.total = self.bar.n + total
            self.bar.update(done - self.before)
            self.before = done if done < total else 0

        return advance

    def __exit__(self, *error: object) -> None:
        self.bar.close()
