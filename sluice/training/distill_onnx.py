"""A cut ONNX file trained towards the outputs of the file that it was cut from, without labels.

1. The file is a module whose parameters are its weights (`sluice.training.file_module`). The targets are the outputs of
   the file as it was, from ONNX Runtime.
2. The loss of an output is the distance by which changes are priced (`sluice.importance.output_distance`), of a batch:
   ``KL(r || y)`` of probabilities, the relative squared distance of others. The mean over the outputs counts.
3. AdamW, the rate falling as a cosine to zero. Each of `RATES` trains a copy for `TRIAL` of the steps, with the same
   batches; that with the least loss over the last quarter of them trains on from the start.
4. Norms keep their statistics, so a batch has no influence on what an example gives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from sluice.core.errors import SluiceError
from sluice.passes.files.rows import Rows
from sluice.passes.graph.onnx_graph import OnnxGraph
from sluice.runtime.base.runner import Session
from sluice.runtime.targets import untimed_runner
from sluice.training.file_module import FileModule

__all__ = ["RATES", "distill_onnx"]

RATES = (1e-3, 3e-4, 1e-4)
TRIAL = 0.1
BATCH = 8
LEAST = 1e-9  # of a probability, and of a scale


def distill_onnx(
    slim: onnx.ModelProto,
    dense: onnx.ModelProto,
    rows: Rows,
    steps: int,
    *,
    loss: str = "auto",
    seed: int = 0,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[onnx.ModelProto, float]:
    """A trained copy of ``slim``, and the rate that was chosen.

    Args:
        slim: ``dense`` with fewer channels, both as `sluice.passes.files.read` reads files.
        rows: examples to train on.
    Raises:
        SluiceError: an operator has no counterpart in torch, or no rate gives a finite loss.
    """
    module, teacher = FileModule(slim), untimed_runner().build(dense)
    short = max(4, round(TRIAL * steps))
    total = steps + len(RATES) * short
    runs = {}
    for k, rate in enumerate(RATES):
        done = partial(_told, advance, k * short, total)
        runs[rate] = _train(copy.deepcopy(module), teacher, rows, short, rate, loss, seed, done)
    best = min(runs, key=runs.__getitem__)
    if not math.isfinite(runs[best]):
        raise SluiceError("training the file gives no finite loss; give other data, or leave out steps")
    _train(module, teacher, rows, steps, best, loss, seed, partial(_told, advance, len(RATES) * short, total))
    return _filled(slim, module.weights()), best


def _told(advance: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    advance(before + done, total)


def _train(
    module: FileModule, teacher: Session, rows: Rows, steps: int, rate: float, loss: str, seed: int,
    advance: Callable[[int], None],
) -> float:  # fmt: skip
    """The mean loss of the last quarter of the steps."""
    rng, size = np.random.default_rng(seed), rows.batch or min(BATCH, rows.count)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    seen, order = list[float](), np.zeros(0, int)
    for step in range(steps):
        if len(order) < size:
            order = rng.permutation(rows.count)
        picked, order = rows.at(order[:size]), order[size:]
        feeds = dict(picked.values)
        want = teacher.run(feeds)
        found = module({name: torch.from_numpy(value) for name, value in feeds.items()})
        distance = _distance(found, want, loss)
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        schedule.step()
        seen.append(float(distance.detach()))
        if not math.isfinite(seen[-1]):
            return math.inf
        advance(step + 1)
    return float(np.mean(seen[-max(1, steps // 4) :]))


def _distance(found: Mapping[str, Tensor], want: Mapping[str, np.ndarray], loss: str) -> Tensor:
    """Rule 2."""
    parts = [
        _between(found[name], torch.from_numpy(value), loss)
        for name, value in want.items()
        if np.issubdtype(value.dtype, np.floating) and value.size and found[name].requires_grad
    ]
    if not parts:
        raise SluiceError("no output of the file can be trained; leave out steps")
    return torch.stack(parts).mean()


def _between(have: Tensor, want: Tensor, loss: str) -> Tensor:
    if loss == "cosine":
        return 1.0 - torch.cosine_similarity(have.flatten(1), want.flatten(1)).mean()
    if loss == "logits":
        return _divergence(have.softmax(-1), want.softmax(-1))
    if loss == "auto" and want.dim() > 1 and want.shape[-1] > 1 and bool(want.min() >= 0):
        sums = want.sum(-1)
        if bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-3)):
            return _divergence(have, want)
    return (have - want).square().sum() / (want - want.mean()).square().sum().clamp_min(LEAST)


def _divergence(have: Tensor, want: Tensor) -> Tensor:
    ratio = want.clamp_min(LEAST).log() - have.clamp_min(LEAST).log()
    return (want * ratio).sum(-1).mean()


def _filled(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    done = onnx.ModelProto()
    done.CopyFrom(model)
    for name, init in OnnxGraph(done).initializers.items():
        if name in weights:
            init.CopyFrom(numpy_helper.from_array(weights[name], name))
    return done
