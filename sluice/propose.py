"""A plan without training: score, price, solve."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from sluice.budget import parse_budget
from sluice.choose import ask, one_shot_scores
from sluice.passes.capture import Inputs
from sluice.passes.gating import insert_gates
from sluice.passes.options import METHODS, check_methods
from sluice.plan import Plan
from sluice.prepare import check_reachable, profile
from sluice.train import Data, check_data, default_loss

__all__ = ["Proposal", "propose"]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan made without training, and what it promises; ``retained`` is the kept share of the importance."""

    plan: Plan
    budget_ms: float
    dense_ms: float
    promised_ms: float
    retained: float


def propose(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    budget: str | Mapping[str, str | float],
    data: Data,
    table: str | os.PathLike[str] = ":memory:",
    batch: int = 1,
    target: str = "ort-cpu",
    threads: int = 1,
    exclude: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    progress: bool = True,
) -> Proposal:
    """A plan in one shot: Fisher scores on a few labelled batches of ``data``, then the solver; nothing is trained.

    Arguments and errors are those of `compress`. With a table that knows the model this takes seconds.
    """
    methods = check_methods(methods)
    parse_budget(budget, 1.0)
    check_data(model, data)
    measured = profile(
        model, example_inputs, table, batch=batch, target=target, threads=threads, exclude=exclude, methods=methods,
        progress=progress,
    )  # fmt: skip
    check_reachable(measured, methods, budget)
    gated = insert_gates(model, example_inputs, exclude=exclude)
    target_ms = parse_budget(budget, measured.latency.dense_ms())
    scores = one_shot_scores(gated, data)
    question = ask(gated, measured, methods, scores, data=data, loss=default_loss)
    answer = question.answer(target_ms)
    choice = answer.choice
    return Proposal(answer.plan, target_ms, measured.latency.dense_ms(), choice.promised_ms, choice.retained)
