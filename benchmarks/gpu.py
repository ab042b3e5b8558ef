"""Staircases, fidelity and halved networks on a GPU, with whatever runtimes it has, within a time limit.

    python -m benchmarks.gpu [--seconds 540] [--target torch-cuda ort-cuda tensorrt] [--network resnet50] [--batch 1]
                             [--skip-staircases] [--out benchmarks/results] [--plots docs] [--tables build/gpu]
    python -m benchmarks.gpu --check                         the tests that need a GPU, and two small networks
    python -m benchmarks.gpu --small --target ort-cpu        the same code on a machine without a GPU

1. Cheap stages come first: staircases of one convolution, then whole dense networks, then, network by network, a
   profile with its calibration, random plans against their promise, and a plan for half of the dense time.
2. After every stage the file ``gpu-<device>.json`` is written anew, and the last line is the same JSON. A stage that is
   cut off by the limit says so. The next call goes on from there: it takes finished stages from the file, measured
   points from the tables. ``seconds`` of a stage are those of all calls.
3. A call may name other targets than the one before. All stages of a target that it does not name stay. Those of a
   target that it names stay as long as its version, the driver's included, is the same. Tables have device and version
   in their names, as a short hash, so no table of other conditions is opened.
4. A stage that fails is recorded with its reason, and the others go on. The exit status is then 1.

Needs torch, numpy, onnx, a runtime, and: onnxscript with onnx_ir (export), onnx_graphsurgeon (pieces), scipy (solver),
ml_dtypes (16-bit graphs). scipy and ml_dtypes are compiled, so carry those for the Python of the GPU's machine.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_plot import staircase_plot
from benchmarks.gpu_stages import (
    CHECK,
    FULL,
    SMALL,
    Layer,
    Network,
    Sizes,
    dense,
    device_tests,
    fidelity,
    half,
    pieces,
    profiled,
    staircase,
)
from sluice.core.deployment import ON_CPU
from sluice.core.errors import SluiceError
from sluice.core.files import write_atomically
from sluice.passes.cut.export import to_onnx
from sluice.runtime.base import nvidia
from sluice.runtime.base.runner import Runner
from sluice.runtime.targets import available_targets, make_runner

__all__ = ["main"]

AGAIN_S = 0.25
SAME = ("device", "precision", "small")  # of all results in one file
MEASURED = ("dense", "profile", "pieces", "half", "fidelity")  # of every network, target and batch
NEEDED = ("onnxscript", "onnx_ir", "onnx_graphsurgeon", "scipy", "ml_dtypes")


class TimeUp(BaseException):
    """The limit has come; no `Exception`, so that no handler of failures on the way catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` in the block after ``seconds``; where the system has no timers, only before the block."""
    if seconds <= 0:
        raise TimeUp
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again, since an exception that is raised in a destructor or in a runtime's log callback is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Record:
    """Figures by stage, written after each of them; those of earlier calls stay as rule 3 says.

    ``head["targets"]`` are versions by target. One word of a stage's name is its target.
    Raises `SluiceError` where the file holds results of another device, precision or size.
    """

    def __init__(self, path: Path, seconds: float, head: dict[str, Any]) -> None:
        self.path, self.end = path, time.monotonic() + seconds
        before = _read(path, head) if path.exists() else {"stages": {}}
        versions, now = before.get("targets", {}), head.get("targets", {})
        gone = {target for target, version in now.items() if versions.get(target) != version}
        kept = {name: stage for name, stage in before["stages"].items() if not gone & set(name.split())}
        self.found: dict[str, Any] = {**head, "targets": {**versions, **now}, "stages": kept}
        self.failed = False

    def known(self, name: str) -> Any:
        """The result of an earlier call, or None."""
        return self.found["stages"].get(name, {}).get("result")

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of ``work``, or None where it did not finish; the file keeps the part that JSON can hold."""
        started, clock = time.monotonic(), nvidia.sm_clock_mhz()
        before = self.found["stages"].get(name, {})
        result: Any = None
        try:
            with time_limit(self.end - started):
                result = work()
            entry: dict[str, Any] = {"result": _plain(result)}
        except TimeUp:
            late = {"reason": "the time limit came first; call again with the same tables"}
            entry = {"result": before["result"]} if before.get("result") else late
        except SluiceError as error:
            entry = {"reason": str(error)}
            self.failed = True
        except Exception as error:  # the other stages go on
            traceback.print_exc()
            entry = {"reason": f"{type(error).__name__}: {error}"}
            self.failed = True
        if result is None:
            gc.collect()  # engines that the exception kept alive, in cycles with its frames
        entry |= {
            "seconds": round(before.get("seconds", 0.0) + time.monotonic() - started, 1),
            "sm_clock_mhz_before": clock,  # of a device at rest
            "sm_clock_mhz_after": nvidia.sm_clock_mhz(),
        }
        self.found["stages"][name] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.found, indent=1).encode())
        print(f"{name}: {json.dumps(entry)[:300]}", file=sys.stderr, flush=True)
        return result


def run(sizes: Sizes, runners: Mapping[str, Runner], record: Record, tables: Path, plots: Path) -> None:
    for precision in sizes.staircases:
        for batch in sizes.batches:
            for target, runner in runners.items():
                name = f"staircase {target} batch {batch} {precision}"
                if not record.known(name):
                    record.stage(name, partial(staircase, runner, sizes.layer, batch, precision))
    _draw(record, sizes.layer, plots)
    jobs = [
        (name, batch, target)
        for name in sizes.networks
        for batch in sizes.batches
        for target in runners
        if not all(record.known(f"{kind} {name} {target} batch {batch} {sizes.precision}") for kind in MEASURED)
    ]
    models = {}
    for name in dict.fromkeys(name for name, _, _ in jobs):
        model = record.stage(f"export {name}", partial(_export, sizes.networks[name]))
        if model is not None:
            models[name] = model
    jobs = [job for job in jobs if job[0] in models]
    for name, batch, target in jobs:
        stage = f"dense {name} {target} batch {batch} {sizes.precision}"
        if not record.known(stage):
            record.stage(stage, partial(dense, runners[target], models[name], batch, sizes.precision))
    for name, batch, target in jobs:
        which = f"{name} {target} batch {batch} {sizes.precision}"
        if all(record.known(f"{kind} {which}") for kind in MEASURED[1:]):
            continue
        table = tables / f"{name}-{target}-b{batch}-{sizes.precision}-{_conditions(runners[target])}.db"
        made = record.stage(
            f"profile {which}",
            partial(profiled, models[name], table, batch=batch, target=target, precision=sizes.precision),
        )
        if made is None:
            continue
        if not record.known(f"pieces {which}"):
            record.stage(f"pieces {which}", partial(pieces, made["profile"]))
        if not record.known(f"half {which}"):
            record.stage(f"half {which}", partial(half, made["profile"]))
        if not record.known(f"fidelity {which}"):
            record.stage(f"fidelity {which}", partial(fidelity, made["profile"], table, sizes.plans))


def _draw(record: Record, layer: Layer, plots: Path) -> None:
    """All staircases of the file, those of other calls too."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, stage in record.found["stages"].items():
        if name.startswith("staircase ") and stage.get("result"):
            _, target, _, batch, precision = name.split()
            panels.setdefault(f"batch {batch}, {precision}", {})[target] = stage["result"]
    if not panels:
        return
    title = f"{layer.kernel}x{layer.kernel} convolution, {layer.into} channels in, {layer.size}x{layer.size}"
    plots.mkdir(parents=True, exist_ok=True)
    picture = staircase_plot(f"{title}, on {record.found['device']}", panels)
    write_atomically(plots / f"{record.path.stem}-staircase.svg", picture.encode())


def _conditions(runner: Runner) -> str:
    """Device and version, short enough for the name of a file."""
    return hashlib.sha256(f"{runner.device}\n{runner.version}".encode()).hexdigest()[:8]


def _export(network: Network) -> Any:
    torch.manual_seed(0)
    return to_onnx(network.make().eval(), (torch.randn(2, *network.image),))


def _read(path: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """The results of an earlier call; `SluiceError` where the file holds none, or those of other conditions."""
    advice = "move it away, or give another folder with --out"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SluiceError(f"cannot read the results in {path} ({error}); {advice}") from error
    stages, versions = (found.get("stages"), found.get("targets", {})) if isinstance(found, dict) else (None, None)
    sound = isinstance(stages, dict) and all(isinstance(stage, dict) for stage in stages.values())
    if not sound or not isinstance(versions, dict):
        raise SluiceError(f"{path} holds no results of this benchmark; {advice}")
    for key in SAME:
        if found.get(key) != head.get(key):
            raise SluiceError(f"{path} holds results with {key} {found.get(key)!r}, not {head.get(key)!r}; {advice}")
    return dict(found)


def _plain(result: Any) -> Any:
    """The part of a stage's result that JSON can hold."""
    if isinstance(result, dict):
        return {key: value for key, value in result.items() if key != "profile"}
    return result if isinstance(result, list) else None


def _targets(asked: Sequence[str] | None) -> list[str]:
    """The targets of the arguments, or all that run on a GPU here."""
    if asked:
        return list(asked)
    found = [target for target, reason in available_targets().items() if not reason and target not in ON_CPU]
    # Torch comes first: it chooses its kernels fastest.
    found.sort(key=lambda target: target != "torch-cuda")
    if not found:
        reasons = "; ".join(f"{target}: {reason}" for target, reason in available_targets().items() if reason)
        raise SluiceError(f"no target that needs a GPU can run here ({reasons}); name one with --target")
    return found


def _chosen(sizes: Sizes, networks: Sequence[str] | None, batches: Sequence[int] | None) -> Sizes:
    unknown = sorted(set(networks or ()) - set(sizes.networks))
    if unknown:
        raise SluiceError(f"there is no network {unknown[0]!r} here; choose of {', '.join(sizes.networks)}")
    kept = {name: network for name, network in sizes.networks.items() if not networks or name in networks}
    return replace(sizes, networks=kept, batches=tuple(batches or sizes.batches))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540.0, help="limit of the whole run (default 540)")
    parser.add_argument("--target", nargs="+", metavar="TARGET", help="default: all that run on a GPU here")
    parser.add_argument("--network", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--batch", nargs="+", type=int, metavar="N", help="default: 1 and 32")
    parser.add_argument("--skip-staircases", action="store_true", help="measure networks alone")
    parser.add_argument(
        "--check", action="store_true", help="`pytest -m device`, then ResNet-20 and MobileNetV2 in fp16 at batch 8"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes: a test of the code, not a measurement")
    parser.add_argument("--out", type=Path, help="folder of the JSON file (default benchmarks/results)")
    parser.add_argument("--plots", type=Path, help="folder of the plot (default docs)")
    parser.add_argument(
        "--tables", type=Path, default=Path("build/gpu"), help="folder of the tables (default build/gpu)"
    )
    options = parser.parse_args(arguments)
    apart = Path("build/gpu-small")
    try:
        absent = [name for name in NEEDED if not find_spec(name)]
        if absent:
            raise SluiceError(f"the packages {', '.join(absent)} are missing here; install them or carry their wheels")
        targets = _targets(options.target)
        sizes = _chosen(SMALL if options.small else CHECK if options.check else FULL, options.network, options.batch)
        if options.skip_staircases:
            sizes = replace(sizes, staircases=())
        runners = {target: make_runner(target) for target in targets}
        device = runners[targets[0]].device
        head = {
            "device": device,
            "targets": {target: runner.version for target, runner in runners.items()},
            "missing": {target: reason for target, reason in available_targets().items() if reason},
            "precision": sizes.precision,
            "small": options.small,
        }
        out = options.out or (apart if options.small else Path("benchmarks/results"))
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        record = Record(out / f"gpu-{slug}.json", options.seconds, head)
    except SluiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    plots = options.plots or (apart if options.small else Path("docs"))
    options.tables.mkdir(parents=True, exist_ok=True)
    if options.check and not record.known("tests"):
        record.stage("tests", device_tests)
    run(sizes, runners, record, options.tables, plots)
    print(json.dumps(record.found))
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
