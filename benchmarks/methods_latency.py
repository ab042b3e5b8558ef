"""Measured shares: what a file takes of the plain export of the dense network.

1. *Plain export* is ``torch.onnx.export(..., dynamo=True)``, what anybody would deploy without this package. A file and
   the plain one are measured in turns; of several turns, each with both engines built anew, the median ratio counts.
2. What a search asks about networks that are not trained yet is one turn, kept by the shapes of their parameters, since
   latency does not depend on weights. It is kept in a file beside the table, for all budgets.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from torch import Tensor, nn

from sluice.core.files import write_atomically
from sluice.passes.graph.onnx_file import quiet
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.timing.measure import measure
from sluice.runtime.targets import make_runner

__all__ = ["Shares", "our_file", "pair_ms", "plain_export"]

TARGET, THREADS = "ort-cpu", 1
TURNS = 3
OURS = "our engine"


def plain_export(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """The file that torch writes."""
    import torch

    with tempfile.TemporaryDirectory() as folder, quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "plain.onnx"
        torch.onnx.export(model.eval(), (example,), path, dynamo=True, verbose=False)
        return onnx.load(path)


def our_file(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """The file of a network as ours deploys it, which budgets of `sluice.compress` are shares of."""
    from sluice.passes.cut.export import finalize, to_onnx

    return to_precision(finalize(to_onnx(model, example)), "fp32", target=TARGET, threads=THREADS)


def pair_ms(dense: onnx.ModelProto, slim: onnx.ModelProto, batch: int, turns: int = TURNS) -> tuple[float, float]:
    """Milliseconds of both engines; of the turns those with the median ratio."""
    runner, rng, runs = make_runner(TARGET, THREADS), np.random.default_rng(0), []
    for _ in range(turns):
        sessions = [runner.build(model, batch=batch) for model in (dense, slim)]
        runs.append(measure(sessions, min_bursts=60, max_bursts=160, target_spread=0.015, rng=rng))
    first, second = sorted(runs, key=lambda pair: pair[1].ms / pair[0].ms)[turns // 2]
    return first.ms, second.ms


@dataclass(slots=True, eq=False)
class Shares:
    """Shares of one job's plain export, which is made once; those of rule 2 are kept at ``path``."""

    model: nn.Module
    example: Tensor
    batch: int
    path: Path
    _plain: onnx.ModelProto | None = None
    _known: dict[str, float] = field(default_factory=dict)

    def plain(self) -> onnx.ModelProto:
        if self._plain is None:
            self._plain = plain_export(self.model, self.example)
            self._known = json.loads(self.path.read_text()) if self.path.is_file() else {}
        return self._plain

    def measured(self, file: onnx.ModelProto) -> tuple[float, float]:
        """Milliseconds of the plain export and of a finished file."""
        return pair_ms(self.plain(), file, self.batch)

    def about(self, model: nn.Module, kind: str = "") -> float:
        """Rule 2, for the plain export of ``model``; ``kind`` tells architectures of equal shapes apart."""
        plain = self.plain()
        shapes = [(name, *p.shape) for name, p in model.named_parameters()]
        return self._kept(kind + hashlib.sha256(repr(shapes).encode()).hexdigest()[:24], plain, model)

    def _kept(self, key: str, plain: onnx.ModelProto, model: nn.Module) -> float:
        if key not in self._known:
            dense_ms, ms = pair_ms(plain, plain_export(model, self.example), self.batch, turns=1)
            self._save(key, ms / dense_ms)
        return self._known[key]

    def of_ours(self, file: onnx.ModelProto) -> float:
        """The share of our file of the dense network, which our budgets are fractions of; measured once."""
        plain = self.plain()
        if OURS not in self._known:
            found = [ms / dense_ms for dense_ms, ms in (pair_ms(plain, file, self.batch) for _ in range(TURNS))]
            self._save(OURS, statistics.median(found))
        return self._known[OURS]

    def _save(self, key: str, share: float) -> None:
        self._known[key] = share
        write_atomically(self.path, (json.dumps(self._known, indent=1) + "\n").encode())
