"""Cutting is exact: the slim network computes what the closed one computes, for any plan."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from sluice import models
from sluice.core.errors import SluiceError
from sluice.core.plan import Plan, Slice
from sluice.passes.cut.resolve import make_plan, masks_of_slices
from sluice.passes.cut.rewrite_torch import rewrite_captured, rewrite_torch
from sluice.passes.gates.gating import bake, close_gates, insert_gates, strip_gates
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, clone
from sluice.passes.graph.groups import Analysis, keep_masks
from sluice.passes.graph.placement_torch import Placement, place_gates
from sluice.runtime.base.compare import assert_close
from tests.networks import NETWORKS, build, random_kept

REFERENCE = ("resnet20", "resnet56", "vgg16_bn", "mobilenet_v2", "densenet", "se_resnet", "resnet1d")


@functools.cache
def prepared(name: str) -> tuple[fx.GraphModule, tuple[Tensor, ...], Analysis, Placement]:
    model, inputs = build(name)
    dense = capture(model, inputs)
    analysis = analyze(dense)
    return dense, inputs, analysis, place_gates(dense, analysis)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@torch.no_grad()
def test_cutting_is_exact(name: str, data: st.DataObject) -> None:
    dense, inputs, analysis, placement = prepared(name)
    kept = {
        g.name: data.draw(st.sets(st.integers(0, g.size - 1), min_size=1).map(sorted), g.name) for g in analysis.groups
    }
    plan = Plan.from_json(make_plan(analysis, kept).to_json())
    closed = bake(dense, analysis, placement, keep_masks(analysis, kept))
    slim = rewrite_torch(dense, plan, inputs)
    assert_close(slim(*inputs), closed(*inputs))
    if not placement.norms:
        assert_close(rewrite_torch(closed, plan, inputs)(*inputs), closed(*inputs), what="cut after closing")
    shapes = {cut.param: slim.state_dict()[cut.param].shape[cut.axis] for cut in plan.slices if cut.axis == 0}
    assert all(shapes[cut.param] == len(cut.keep) for cut in plan.slices if cut.axis == 0)
    for before, after in zip(keep_masks(analysis, kept), masks_of_slices(analysis, plan.slices), strict=True):
        assert (before == after).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_slim_is_a_network_of_its_own(name: str) -> None:
    """Same names, other batch sizes, trainable, can be captured and cut again."""
    dense, inputs, analysis, _ = prepared(name)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    slim = rewrite_torch(dense, make_plan(analysis, random_kept(analysis, 3)), inputs)
    assert list(slim.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items()), "the dense network is left alone"
    more = tuple(torch.cat([x, x]) for x in inputs)
    with torch.no_grad():
        whole, half = slim(*more), slim(*inputs)
    pairs = zip(whole.values(), half.values(), strict=True) if isinstance(whole, dict) else [(whole, half)]
    if name != "spatial":  # sums over the batch
        for a, b in pairs:
            assert_close(a, torch.cat([b, b]))
    out = slim.train()(*inputs)
    sum(o.sum() for o in (out.values() if isinstance(out, dict) else [out])).backward()
    again = capture(slim.eval(), inputs)
    with torch.no_grad():
        assert_close(again(*inputs), slim(*inputs), 1e-6)


def test_cut_twice() -> None:
    dense, inputs, analysis, _ = prepared("in_place")
    half = rewrite_torch(dense, make_plan(analysis, {"conv1": [0, 2, 3, 5]}), inputs)
    network = insert_gates(half, inputs)
    kept = {"conv1": [1, 3]}
    closed = close_gates(network, kept)
    slim = rewrite_torch(strip_gates(network), make_plan(network.meta["space"].analysis, kept), inputs)
    with torch.no_grad():
        assert_close(slim(*inputs), closed(*inputs))
    assert slim.state_dict()["twice.weight"].shape == (2, 2, 3, 3)


def test_tied_weights_stay_tied() -> None:
    dense, inputs, analysis, _ = prepared("tied")
    name = analysis.groups[0].name
    slim = rewrite_torch(dense, make_plan(analysis, {name: [0, 4]}), inputs)
    assert slim.encode.weight is slim.decode.weight
    assert slim.encode.weight.shape == (2, 5) and slim.unused.shape == (4,)


@pytest.mark.parametrize("name", ["splits", "tied", "norms"])
def test_an_analysis_at_hand_is_not_made_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _, analysis, _ = prepared(name)
    plan = make_plan(analysis, random_kept(analysis, 2))
    read, given = clone(dense), clone(dense)
    rewrite_captured(read, plan)
    monkeypatch.setattr("sluice.passes.cut.rewrite_torch.analyze", None)
    rewrite_captured(given, plan, analysis=analysis)
    assert given.code == read.code
    assert all(torch.equal(v, given.state_dict()[k]) for k, v in read.state_dict().items())


def test_a_plan_is_held_to_an_analysis_at_hand() -> None:
    dense, _, analysis, _ = prepared("norms")
    plan = make_plan(analysis, random_kept(analysis, 2))
    first = plan.slices[0]
    wrong = Slice(first.param, first.axis, first.size, tuple(range(len(first.keep) % first.size + 1)))
    one_differs = Plan(plan.fingerprint, (wrong, *plan.slices[1:]), plan.inputs, plan.widths)
    with pytest.raises(SluiceError, match="does not fit this graph"):
        rewrite_captured(clone(dense), one_differs, analysis=analysis)


def test_order_of_slices_is_irrelevant() -> None:
    dense, inputs, analysis, _ = prepared("splits")
    plan = make_plan(analysis, random_kept(analysis, 1))
    turned = Plan(plan.fingerprint, plan.slices[::-1], plan.inputs, plan.widths)
    one, two = rewrite_torch(dense, plan, inputs), rewrite_torch(dense, turned, inputs)
    assert one.code == two.code
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_empty_plan_changes_nothing() -> None:
    dense, inputs, analysis, _ = prepared("norms")
    plan = make_plan(analysis, {})
    assert plan.slices == ()
    with torch.no_grad():
        assert_close(rewrite_torch(dense, plan, inputs)(*inputs), dense(*inputs), 0.0)


def test_plan_of_another_model() -> None:
    _, inputs, analysis, _ = prepared("plain")
    other, _ = build("in_place")
    with pytest.raises(SluiceError, match=r"made for another model: 'conv1\.weight' is \(6, 3, 3, 3\)"):
        rewrite_torch(other, make_plan(analysis, {"conv1": [1]}), inputs)


def test_requires_grad_is_kept() -> None:
    model, inputs = build("plain")
    model.conv1.weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    dense = capture(model, inputs)
    slim = rewrite_torch(dense, make_plan(analyze(dense), {"conv1": [1, 2]}), inputs)
    assert not slim.conv1.weight.requires_grad and slim.conv2.weight.requires_grad
    assert isinstance(slim.bn1.running_mean, Tensor) and not isinstance(slim.bn1.running_mean, nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@torch.no_grad()
def test_other_precisions(dtype: torch.dtype) -> None:
    model, inputs = build("plain")
    dense = capture(model.to(dtype), tuple(x.to(dtype) for x in inputs))
    analysis = analyze(dense)
    kept = random_kept(analysis, 1)
    closed = bake(dense, analysis, place_gates(dense, analysis), keep_masks(analysis, kept))
    slim = rewrite_torch(dense, make_plan(analysis, kept), inputs)
    x = inputs[0].to(dtype)
    assert slim(x).dtype == dtype
    assert_close(slim(x), closed(x), 1e-12 if dtype == torch.float64 else 5e-3)


@torch.no_grad()
def check_reference(name: str, plans: int) -> None:
    inputs = models.example_inputs(name, 2)
    dense = capture(models.enliven(getattr(models, name)(), 0, inputs), inputs)
    analysis = analyze(dense)
    placement = place_gates(dense, analysis)
    for seed in range(plans):
        kept = random_kept(analysis, seed)
        closed = bake(dense, analysis, placement, keep_masks(analysis, kept))
        assert_close(
            rewrite_torch(dense, make_plan(analysis, kept), inputs)(*inputs), closed(*inputs), what=f"seed {seed}"
        )


@pytest.mark.parametrize("name", ["resnet20", "densenet"])
def test_reference_networks(name: str) -> None:
    check_reference(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE)
def test_reference_networks_many_plans(name: str) -> None:
    check_reference(name, 20)
