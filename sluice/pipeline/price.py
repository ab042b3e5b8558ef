"""From methods and data to the question that the solver answers, and which reading of the losses to trust.

1. Filters alone are priced by the scores of their channels (`amplitude_losses`): nothing has to be measured.
2. As soon as ranks or depth compete, everything is priced in one currency, the measured increase of the loss
   (`sluice.importance.sensitivity`).
3. Prices are of single changes, before training. So the plans that follow from several readings of them (all methods;
   each method alone; structure at half and at twice its price) are cut and trained for a few steps, unless they are
   far too dear, and the reading whose plan trains best is the one that is settled (`sluice.training.rehearse`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx, nn

from sluice.artifacts.store import input_specs
from sluice.core.errors import SluiceError, Unreachable
from sluice.importance.fisher_label_free import label_free_scores
from sluice.importance.loss_increase import Judge
from sluice.importance.sensitivity import measured_losses
from sluice.importance.taylor import fisher_scores
from sluice.passes.cut.drop_torch import view_torch
from sluice.passes.cut.factor import singular_values
from sluice.passes.gates.gating import Gated, insert_gates, strip_gates
from sluice.passes.graph.blocks import find_blocks
from sluice.passes.graph.capture import Inputs, capture
from sluice.pipeline.bsr import beam_question
from sluice.pipeline.layermerge import BONUSES, DepthQuestion
from sluice.pipeline.verify import Answer, Question
from sluice.profiler.profile import Profile
from sluice.solver.decide import amplitude_losses, restricted
from sluice.solver.options import BSR, Options
from sluice.training.rehearse import rehearse
from sluice.training.train import Data, Loss, default_loss, split_batch

__all__ = ["Reading", "ask", "choose", "insert_all", "one_shot_scores"]

PRICES = (0.5, 2.0)
HOPELESS = 3.0  # times the least price: not worth a rehearsal
ENERGY = 0.9


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """One reading of the losses, the plan that follows from it, and its held-out loss in rehearsal."""

    name: str
    question: Question
    answer: Answer
    rehearsed: tuple[float, ...] = ()


def insert_all(
    model: nn.Module, example_inputs: Inputs, measured: Profile, methods: Sequence[str], *, steps: int,
    exclude: Sequence[str] = (),
) -> Gated | None:  # fmt: skip
    """Gates for what the methods may do: filters, ranks and blocks together, as DF has them; merges have none.

    A weight is thresholded in the form that is fastest among ranks that keep `ENERGY` of it. A block whose output no
    tensor can close has no gate; None where nothing has one.
    """
    options = measured.options
    gm = capture(model, example_inputs)
    ranks = _best_forms(measured, dict(gm.named_parameters())) if "rank" in methods else {}
    blocks: dict[str, tuple[str, ...]] = {}
    if "block" in methods:
        found, _ = find_blocks(view_torch(gm))
        known = measured.latency.switches.intersection(options.drops)
        blocks = {b.name: b.closing for b in found if b.closing and f"{b.name}|drop" in known}
    filters = "filter" in methods and measured.dissection.analysis.groups
    kinds = [k for k, on in (("filter", filters), ("rank", ranks), ("block", blocks)) if on]
    if not kinds:
        return None
    return insert_gates(model, example_inputs, steps=steps, exclude=exclude, kinds=kinds, ranks=ranks, blocks=blocks)


def _best_forms(measured: Profile, weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    model = measured.latency
    best: dict[str, tuple[float, str]] = {}
    for option in measured.options.ranks:
        values = singular_values(weights[option.param].detach().cpu().numpy(), option.form)
        kept = np.cumsum(values**2) / max(float((values**2).sum()), 1e-30)
        for rank in model.levels[option.rank]:
            if kept[min(rank, len(kept)) - 1] >= ENERGY:
                ms = model.ms({**model.dense, **option.at(rank)})
                best[option.param] = min(best.get(option.param, (np.inf, "")), (ms, option.form))
    return {param: form for param, (_, form) in best.items()}


def one_shot_scores(gated: Gated, data: Data, loss: Loss = default_loss) -> dict[str, np.ndarray]:
    """Scores of channels without training: of labels where there are some and the loss is the common one, else of the
    network's own outputs, since a network that is its own teacher has no gradient."""
    _, labels = split_batch(next(iter(data)))
    if labels is not None and loss is default_loss:
        return fisher_scores(gated, data)
    return label_free_scores(gated, data, outputs="categorical" if loss is default_loss else "gaussian")


def ask(
    gated: Gated,
    measured: Profile,
    methods: Sequence[str],
    scores: Mapping[str, np.ndarray],
    *,
    data: Data | None = None,
    loss: Loss,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Question:
    """The question for these methods (rules 1 and 2)."""
    options, analysis = measured.options, gated.meta["analysis"]
    model = restricted(measured.latency, options.sites(measured.latency, methods))
    stripped = strip_gates(gated, thresholded=True).eval()
    groups = {g.name: model.levels[g.name] for g in analysis.groups if g.name in model.levels}
    if tuple(methods) == ("filter",):
        losses = amplitude_losses(groups, scores)
    elif data is None:
        raise SluiceError(f"methods {list(methods)} are priced by measuring the loss; give data")
    elif tuple(methods) == (BSR,):
        return beam_question(measured, analysis, model, input_specs(stripped), Judge(stripped, data, loss))
    else:
        losses = measured_losses(
            stripped, analysis, gated.meta["placement"], model, options, scores, data, loss=loss, advance=advance
        )
    if tuple(methods) == ("merge",):
        return DepthQuestion(measured, analysis, model, losses, scores, input_specs(stripped))
    return Question(measured, analysis, model, losses, scores, input_specs(stripped))


def choose(
    question: Question,
    methods: Sequence[str],
    target_ms: float,
    build: Callable[[Answer], fx.GraphModule],
    *,
    data: Data,
    teacher: nn.Module,
    loss: Loss,
    lr: float,
    steps: int,
    progress: bool = True,
) -> list[Reading]:
    """All readings whose plans differ, the one to trust first (rule 3).

    Args:
        target_ms: promised milliseconds of every plan.
        build: makes the trainable slim network of a plan.
        steps: of the first round of the rehearsal; 0 trusts the losses as they are.
    """
    readings = _readings(question, methods, target_ms)
    if len(readings) == 1 or not steps:
        return readings
    found = rehearse(
        [build(r.answer) for r in readings], data, teacher=teacher, loss=loss, lr=lr, steps=steps, progress=progress
    )
    heard = [replace(r, rehearsed=tuple(losses)) for r, losses in zip(readings, found, strict=True)]
    return sorted(heard, key=lambda r: (-len(r.rehearsed), r.rehearsed[-1]))


def _readings(question: Question, methods: Sequence[str], target_ms: float) -> list[Reading]:
    options, latency = question.profile.options, question.profile.latency
    asked = {"together": question}
    if isinstance(question, DepthQuestion):
        others = {f"bonus {bonus:g}": replace(question, bonus=bonus) for bonus in BONUSES if bonus != question.bonus}
        asked = {f"bonus {question.bonus:g}": question, **others}
    if len(methods) > 1:
        for price in PRICES:
            asked[f"structure at {price:g}"] = replace(question, losses=_priced(question.losses, options, price))
        for method in methods:
            alone = restricted(latency, options.sites(latency, [method]))
            asked[f"{method} alone"] = replace(question, model=alone)
    readings: list[Reading] = []
    for name, one in asked.items():
        try:
            answer = one.answer(target_ms)
        except Unreachable:
            if one.model is question.model:
                raise
            continue  # this method alone does not get there
        if all(answer.plan != reading.answer.plan for reading in readings):
            readings.append(Reading(name, one, answer))
    prices = [_price(question, reading.answer) for reading in readings]
    return [r for r, price in zip(readings, prices, strict=True) if price <= HOPELESS * min(prices)]


def _price(question: Question, answer: Answer) -> float:
    """The sum of the losses as measured."""
    levels, widths = question.model.levels, answer.choice.widths
    return sum(
        float(values[levels[site].index(widths[site])])
        for site, values in question.losses.items()
        if widths[site] in levels[site]
    )


def _priced(losses: Mapping[str, np.ndarray], options: Options, price: float) -> dict[str, np.ndarray]:
    structural = {name for o in options.ranks for name in (o.switch, o.rank)} | {*options.drops, *options.merges}
    return {site: values * price if site in structural else values for site, values in losses.items()}
