"""What a change costs: nothing where it changes nothing, never less for more, and the network stays as it was."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from sluice.core.errors import SluiceError
from sluice.core.latency import LatencyModel
from sluice.core.plan import Merge
from sluice.importance.curves import FLOOR
from sluice.importance.sensitivity import measured_losses
from sluice.passes.cut.factor import truncations
from sluice.passes.gates.gating import insert_gates, strip_gates
from sluice.passes.graph.blocks import find_blocks
from sluice.passes.graph.groups import Analysis
from sluice.passes.graph.placement_torch import Placement
from sluice.passes.graph.view_torch import view_torch
from sluice.solver.options import EditSpace, RankOption, dense_switch
from sluice.training.train import default_loss
from tests.networks import build, mixed

RANKS = (RankOption("tail2.weight", "kxk-1x1"), RankOption("block2.conv2.weight", "kx1-1xk"))
MERGE = Merge(("tail1.weight", "tail2.weight"), (("tail1.weight", "tail2.weight"),))


def squared(outputs: Tensor, taught: Tensor, labels: object) -> Tensor:
    """Untrained networks say much the same of everything; their outputs still differ."""
    return ((outputs - taught) ** 2).mean()


@dataclass(frozen=True)
class Case:
    gm: fx.GraphModule
    analysis: Analysis
    placement: Placement
    model: LatencyModel
    options: EditSpace
    scores: dict[str, np.ndarray]
    data: Sequence[object]

    def losses(self, **changed: object) -> dict[str, np.ndarray]:
        given = {
            "gm": self.gm, "analysis": self.analysis, "placement": self.placement, "model": self.model,
            "options": self.options, "scores": self.scores, "data": self.data, "loss": squared,
        }  # fmt: skip
        return measured_losses(**(given | changed))  # type: ignore[arg-type]


def case_of(model: nn.Module, inputs: tuple[Tensor, ...], *, structure: bool) -> Case:
    gated = insert_gates(model, inputs)
    gm, analysis = strip_gates(gated).eval(), gated.meta["space"].analysis
    drops = {f"{b.name}|drop": b.drop() for b in find_blocks(view_torch(gm))[0]} if structure else {}
    options = EditSpace(RANKS, drops, {"tail|merge": MERGE}) if structure else EditSpace()
    dense = {g.name: g.size for g in analysis.groups}
    levels = {g: tuple(sorted({1, *range(2, n, 3), n})) for g, n in dense.items()}
    switches = [*(o.switch for o in options.ranks), *options.drops, *options.merges]
    if structure:
        switches += [dense_switch(o.param) for o in RANKS]
        levels |= {o.rank: (2, 5, 8, 11) for o in RANKS} | dict.fromkeys(switches, (0, 1))
        dense |= {o.rank: 11 for o in RANKS} | {s: int(s.endswith("|dense")) for s in switches}
    generator = torch.Generator().manual_seed(7)
    batches = [torch.randn(16, *inputs[0].shape[1:], generator=generator) for _ in range(3)]
    rng = np.random.default_rng(0)
    scores = {g.name: rng.uniform(0.1, 1.0, g.size) for g in analysis.groups}
    return Case(
        gm, analysis, gated.meta["placement"], LatencyModel((), dense, levels, switches=frozenset(switches)),
        options, scores, batches,
    )  # fmt: skip


@functools.cache
def standard() -> Case:
    return case_of(*mixed(), structure=True)


@functools.cache
def found() -> dict[str, np.ndarray]:
    return standard().losses()


def check_curves(model: LatencyModel, losses: dict[str, np.ndarray]) -> None:
    for site, values in losses.items():
        assert values.shape == (len(model.levels[site]),) and np.isfinite(values).all(), site
        assert values[model.levels[site].index(model.dense[site])] == 0, site
        if site in model.switches:
            assert values[1] > 0, site
        else:
            assert (np.diff(values) <= 0).all() and values[0] > 0, site  # at least the floor


def test_zero_when_dense_and_never_less_for_more() -> None:
    case = standard()
    check_curves(case.model, found())
    free = {s for s in case.model.levels if not s.endswith("|dense")}
    assert set(found()) == free


def test_what_matters_costs_more_than_the_floor() -> None:
    top = {site: values.max() for site, values in found().items()}
    floor = FLOOR * np.median(list(top.values()))
    rank = RANKS[1].rank  # of at most eleven that matter little all together
    assert all(value > 10 * floor for site, value in top.items() if site != rank), top


def test_norms_over_the_channels() -> None:
    """Their statistics over the kept channels need another graph."""
    model, inputs = build("norms", 4)
    case = case_of(model, inputs, structure=False)
    assert case.placement.norms
    losses = case.losses()
    assert set(losses) == set(case.model.levels)
    check_curves(case.model, losses)


def with_useless_parts() -> Case:
    """Channels 2, 5 and 7 of tail1 that nothing reads, a branch that adds zero, a weight of rank five."""
    model, inputs = mixed()
    with torch.no_grad():
        model.tail2.weight[:, [2, 5, 7]] = 0
        model.block3.bn2.weight.zero_()
        model.block3.bn2.bias.zero_()
        weight = truncations(model.block2.conv2.weight.numpy().astype(np.float64), "kx1-1xk")(5)
        model.block2.conv2.weight.copy_(torch.from_numpy(weight))
    case = case_of(model, inputs, structure=True)
    case.scores["tail1"][[2, 5, 7]] = [0.01, 0.02, 0.03]
    return case


def test_what_does_nothing_costs_next_to_nothing() -> None:
    case = with_useless_parts()
    levels = {**case.model.levels, "tail1": (1, 8, 11)}
    losses = case.losses(model=LatencyModel((), case.model.dense, levels, switches=case.model.switches))
    floor = 5 * FLOOR * float(np.median([v.max() for v in losses.values()]))
    rank = RANKS[1]
    assert 0 < losses["tail1"][1] < floor < losses["tail1"][0]
    assert 0 < losses["block3|drop"][1] < floor < losses["block2|drop"][1]
    assert 0 < losses[rank.switch][1] < floor
    assert losses[rank.rank][1] < floor < losses[rank.rank][0]  # rank 5, rank 2


def test_wrong_scores_make_it_dear() -> None:
    """The same network, its useless channels kept and others removed."""
    case = with_useless_parts()
    levels = {**case.model.levels, "tail1": (1, 8, 11)}
    model = LatencyModel((), case.model.dense, levels, switches=case.model.switches)
    right = case.losses(model=model)["tail1"][1]
    case.scores["tail1"][[2, 5, 7]] = [9.0, 8.0, 7.0]
    assert case.losses(model=model)["tail1"][1] > 20 * right


def test_the_network_is_left_as_it_was() -> None:
    case = standard()
    before = {name: tensor.clone() for name, tensor in case.gm.state_dict().items()}
    code, modes = case.gm.code, [m.training for m in case.gm.modules()]
    momenta = [getattr(m, "momentum", None) for m in case.gm.modules()]
    case.losses()
    after = case.gm.state_dict()
    assert before.keys() == after.keys() and any("running" in name for name in after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert case.gm.code == code and [m.training for m in case.gm.modules()] == modes
    assert [getattr(m, "momentum", None) for m in case.gm.modules()] == momenta
    assert all(p.grad is None for p in case.gm.parameters())


def test_the_same_data_give_the_same_losses() -> None:
    again = standard().losses()
    assert all(np.array_equal(values, again[site]) for site, values in found().items())


def test_labels_are_not_needed_and_count_where_they_are_given() -> None:
    labelled = [(x, torch.arange(len(x)) % 9) for x in standard().data]  # type: ignore[arg-type]
    without = standard().losses(loss=default_loss)
    with_labels = standard().losses(loss=default_loss, data=labelled)
    for losses in (without, with_labels):
        check_curves(standard().model, losses)
    assert any(not np.allclose(values, with_labels[site]) for site, values in without.items())


def test_only_so_many_examples_are_read() -> None:
    read = 0

    def batches() -> object:
        nonlocal read
        for x in standard().data:
            read += 1
            yield x

    losses = standard().losses(data=batches(), samples=17)
    assert read == 2
    assert any(not np.array_equal(values, losses[site]) for site, values in found().items())


def test_sites_without_a_choice_are_not_measured() -> None:
    case = standard()
    free = ("stem", "block1|drop")
    fixed = {s: own if s in free else (case.model.dense[s],) for s, own in case.model.levels.items()}
    model = LatencyModel((), case.model.dense, fixed, switches=case.model.switches)
    calls: list[tuple[int, int]] = []
    losses = case.losses(model=model, advance=lambda done, total: calls.append((done, total)))
    assert set(losses) == set(free) and calls == [(1, 2), (2, 2)]


def test_a_loss_that_is_not_finite_is_said() -> None:
    broken = torch.full((4, 3, 9, 7), float("nan"))
    with pytest.raises(SluiceError, match="the loss is nan on the first batches; give data"):
        standard().losses(data=[broken])
