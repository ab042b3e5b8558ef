"""Networks cut by Torch-Pruning 1.6.1 (Fang et al., CVPR 2023) to a measured latency.

1. Global ranking of channel groups by Taylor or L2 importance, in `STEPS` iterative steps, the gradients of Taylor
   taken anew before each, on `PRICED` batches; widths rounded to a multiple or not. The classifier is left alone.
2. Channel ratios say nothing of milliseconds, so the ratio is sought: between one that is too slow and one that is fast
   enough, by interpolation of the logarithm of the measured share, until it takes `ENOUGH` to `ACCEPTED` of the target
   or `ASKED` networks were measured. Of all that are within ``ACCEPTED`` the slowest counts.
3. A deeper cut may be slower (narrow depthwise layers). So where the deepest cut is too slow, milder ones are tried.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.methods_jobs import Job
from sluice.core.errors import SluiceError
from sluice.pipeline.verify import ACCEPTED, ENOUGH
from sluice.training.train import split_batch

__all__ = ["VARIANTS", "prune", "search"]

STEPS = 5
PRICED = 8
ASKED = 8
RATIOS = 512  # steps of the ratio
DEEPEST = (0.97, 0.9, 0.8, 0.7, 0.6, 0.5)
VARIANTS = tuple(
    f"{importance}{'' if rounded is None else f' {rounded}'}"
    for importance in ("taylor", "l2")
    for rounded in (None, 8, 16)
)


def torch_pruning() -> Any:
    """The package that is compared with.

    Raises:
        SluiceError: it is not installed.
    """
    try:
        import torch_pruning as found
    except ImportError as error:
        raise SluiceError(
            f"the arm torch-pruning lacks {error.name}; install it with 'pip install --no-deps torch-pruning==1.6.1'"
        ) from None
    return found


def prune(job: Job, variant: str, ratio: float) -> nn.Module:
    """A copy of the job's network without ``ratio`` of its channels, in eval mode.

    Raises:
        SluiceError: Torch-Pruning is not installed.
    """
    tp = torch_pruning()
    name, _, rounded = variant.partition(" ")
    model = copy.deepcopy(job.plain).eval()
    importance = tp.importance.GroupTaylorImportance() if name == "taylor" else tp.importance.GroupMagnitudeImportance()
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    pruner = tp.pruner.BasePruner(
        model, job.example, importance, global_pruning=True, pruning_ratio=ratio, iterative_steps=STEPS,
        ignored_layers=classifier, round_to=int(rounded) if rounded else None,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(STEPS):
            if name == "taylor":
                _gradients(model, job)
            pruner.step()
    model.zero_grad()
    return model


def _gradients(model: nn.Module, job: Job) -> None:
    model.zero_grad()
    for batch in itertools.islice(job.data(0), PRICED):
        inputs, labels = split_batch(batch)
        with torch.no_grad():
            taught = job.model.eval()(*inputs)
        job.price(model(*inputs), taught, labels).backward()


def search(share_at: Callable[[float], float], budget: float) -> tuple[float | None, float]:
    """The ratio whose network takes the most within the budget, None if there is none; and the least share seen.

    Args:
        share_at: measured share of dense latency at a ratio, 1 at 0.
        budget: a share.
    """
    target, known = ACCEPTED * budget, {0: 1.0}

    def ask(step: int) -> float:
        if step not in known:
            known[step] = share_at(step / RATIOS)
        return known[step]

    fast = next((step for step in (round(r * RATIOS) for r in DEEPEST) if ask(step) <= target), None)
    if fast is None:
        return None, min(known.values())
    slow = 0
    while len(known) < ASKED + 1 and fast - slow > 1 and known[fast] < ENOUGH * budget:
        above, below = math.log(known[slow]), math.log(known[fast])
        part = (above - math.log((ENOUGH + ACCEPTED) / 2 * budget)) / (above - below) if above > below else 0.5
        step = min(fast - 1, max(slow + 1, round(slow + min(0.85, max(0.15, part)) * (fast - slow))))
        fast, slow = (step, slow) if ask(step) <= target else (fast, step)
    best = max((step for step in known if known[step] <= target), key=lambda step: known[step])
    return best / RATIOS, min(known.values())
