"""``sluice bench``: engines as they are, measured in turns."""

from __future__ import annotations

import argparse
from typing import Any

from sluice.commands.specs import check_batch
from sluice.commands.words import print_result
from sluice.core.address import split_target
from sluice.core.errors import SluiceError
from sluice.core.files import read_bytes

__all__ = ["bench"]

ENGINES = (".engine", ".plan", ".trt")


def bench(args: argparse.Namespace) -> int:
    """Measure one engine or several in turns: ONNX files, or engines of TensorRT."""
    import numpy as np

    from sluice.profiler.timing.measure import measure
    from sluice.runtime.base.inputs import parsed
    from sluice.runtime.targets import make_runner

    built = [path for path in args.models if path.endswith(ENGINES)]
    if built and split_target(args.target)[0] != "tensorrt":
        raise SluiceError(f"{built[0]!r} is an engine of TensorRT, --target is {args.target}; give --target tensorrt")
    for path in args.models:
        if path not in built:
            check_batch(parsed(path), args.batch, path)
    if built and split_target(args.target)[1]:
        raise SluiceError(f"{built[0]!r} would be run as it is on another machine; give the ONNX file, built there")
    runner = make_runner(args.target, args.threads)
    sessions = [_loaded(runner, p) if p in built else runner.build(p, batch=args.batch) for p in args.models]
    found = measure(sessions, min_bursts=60, max_bursts=240, target_spread=0.01, rng=np.random.default_rng(0))
    data: dict[str, Any] = {
        "engines": [{"file": f, "ms": m.ms, "spread": m.spread} for f, m in zip(args.models, found, strict=True)],
        "clock": found[0].clock,
    }
    lines = [f"{f}: {m.ms:.4g} ms (spread {m.spread:.1%})" for f, m in zip(args.models, found, strict=True)]
    if len(found) == 2:
        data["ratio"] = found[1].ms / found[0].ms
        lines.append(f"second/first {data['ratio']:.1%}")
    return print_result(args, data, lines)


def _loaded(runner: Any, path: str) -> Any:
    """A session of an engine that was built before, with the batch that it was built for."""
    return runner.load(read_bytes(path, "an engine"), path)
