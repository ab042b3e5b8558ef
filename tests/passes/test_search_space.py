"""One search space per network: both readings give the same, exclusions hold everywhere, nothing is left unnamed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sluice.core.errors import SluiceError
from sluice.passes.cut.export import to_onnx
from sluice.passes.graph.capture import capture
from sluice.passes.graph.groups import AxisGroup, agreeing, module_of, without_groups
from sluice.passes.search_space import SearchSpace, agreed, find_search_space, read_onnx, read_torch
from tests.networks import NETWORKS, build


def spaces(model: nn.Module, *inputs: Tensor, exclude: tuple[str, ...] = ()) -> tuple[SearchSpace, SearchSpace]:
    """Of the torch graph and of the ONNX graph."""
    torch_space = find_search_space(read_torch(capture(model, inputs)), exclude)
    return torch_space, find_search_space(read_onnx(to_onnx(model, inputs)), exclude)


def sites(space: SearchSpace, tensors: Collection[str]) -> dict[str, Any]:
    """What both readings must agree on; an exporter's constants, which are not among ``tensors``, have no name."""
    return {
        "groups": {
            group.name: sorted((r.param, r.axis, r.channels.tolist()) for r in group.refs if r.param in tensors)
            for group in space.analysis.groups
        },
        "ranks": dict(space.ranks),
        "blocks": [set(block.params) for block in space.blocks],
        "merges": [(site.merge, site.switch, site.gone, site.apart, site.ties) for site in space.merges],
        "alone": {name for name in space.left_alone if not name.endswith(".weight")},
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_both_readings_give_the_same(name: str) -> None:
    model, inputs = build(name)
    torch_space, onnx_space = spaces(model.eval(), *inputs)
    names = model.state_dict().keys()
    assert sites(torch_space, names) == sites(onnx_space, names)
    both = agreed(onnx_space, torch_space), agreed(torch_space, onnx_space)
    assert sites(both[0], names)["groups"] == sites(both[1], names)["groups"] == sites(torch_space, names)["groups"]
    assert not both[0].unmatched


class Residual(nn.Module):
    """(N, 3, 8, 9) to (N, 4): a block with a projection in its shortcut, and a wide layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 9, 3, padding=1), nn.BatchNorm2d(9)
        self.first, self.second = nn.Conv2d(9, 11, 3, padding=1), nn.Conv2d(11, 10, 3, padding=1)
        self.project, self.head = nn.Conv2d(9, 10, 1), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.second(self.first(x)) + self.project(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("pattern", ["first", "project", "f*", "second.weight"])
def test_what_is_excluded_is_in_no_site(pattern: str) -> None:
    for space in spaces(Residual().eval(), torch.randn(2, 3, 8, 9), exclude=(pattern,)):
        free = find_search_space(read_torch(capture(Residual().eval(), torch.randn(2, 3, 8, 9))))
        gone = {"f*": "first"}.get(pattern, pattern.removesuffix(".weight")) + ".weight"
        assert gone in free.ranks or gone == "project.weight"
        assert gone not in space.ranks and f"excluded by {pattern!r}" in space.unfactorised.values()
        assert not [block for block in space.blocks if gone in block.params]
        assert free.merges and not [site for site in space.merges if gone in site.gone]
        assert (gone, 0) not in {(ref.param, ref.axis) for group in space.analysis.groups for ref in group.refs}
        assert space.left_alone[module_of(gone)] == f"excluded by {pattern!r}"


def test_a_pattern_that_means_nothing_is_a_mistake() -> None:
    with pytest.raises(SluiceError, match=r"exclude pattern 'thrid' matches no layer; layers are \['stem.weight'"):
        spaces(Residual().eval(), torch.randn(2, 3, 8, 9), exclude=("thrid",))


class Silent(nn.Module):
    """(N, 7) of tokens to (N, 4): an embedding, a recurrent layer, and a weight that is divided by its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.gru = nn.Embedding(12, 9), nn.GRU(9, 10, batch_first=True)
        self.mid, self.scaled = nn.Linear(10, 11), nn.Parameter(torch.randn(13, 11))
        self.head = nn.Linear(13, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.mid(self.gru(self.words(x))[0].mean(1)))
        return self.head(F.relu(F.linear(y, self.scaled / self.scaled.norm(dim=1, keepdim=True))))


def test_every_parameter_with_rows_and_columns_is_named() -> None:
    model = Silent().eval()
    torch_space, onnx_space = spaces(model, torch.ones(2, 7, dtype=torch.int64))
    for space in (torch_space, onnx_space):
        on = {ref.param for group in space.analysis.groups for ref in group.refs}
        alone = space.left_alone
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1 and name in space.analysis.tensors:
                assert name in on or module_of(name) in alone or name in alone, (space.kind, name)
        assert {g.name: g.size for g in space.analysis.groups} == {"words": 9, "gru": 10, "mid": 11, "scaled": 13}


def lacking(space: SearchSpace, *names: str) -> SearchSpace:
    """As a reading that has lost some groups, and numbers the others from there."""
    analysis = without_groups(space.analysis, dict.fromkeys(names, "unknown operator"))
    stem = names[0].partition("#")[0]
    left = [group for group in analysis.groups if group.name.partition("#")[0] == stem]
    again = {group.name: stem + (f"#{k + 1}" if k else "") for k, group in enumerate(left)}
    groups = tuple(replace(group, name=again.get(group.name, group.name)) for group in analysis.groups)
    return replace(space, analysis=replace(analysis, groups=groups), kind="onnx")


def lies(group: AxisGroup) -> set[tuple[str, int]]:
    return {(ref.param, ref.axis) for ref in group.refs}


def test_a_group_is_known_by_where_it_lies_and_not_by_its_name() -> None:
    """Where one reading has lost ``x``, its ``x`` is the other's ``x#2``."""
    model, inputs = build("splits")
    whole = find_search_space(read_torch(capture(model.eval(), inputs)))
    names = [group.name for group in whole.analysis.groups]
    lost = next(name for name in names if f"{name}#2" in names)
    onnx = lacking(whole, lost)
    assert lies(onnx.analysis.group(lost)) == lies(whole.analysis.group(f"{lost}#2"))

    both = agreed(onnx, whole)
    assert {g.name for g in both.analysis.groups} == set(names) - {lost}
    assert lies(both.analysis.group(f"{lost}#2")) == lies(whole.analysis.group(f"{lost}#2"))
    assert both.left_alone[lost] == "unknown operator"

    mine = agreed(whole, both)
    assert [g.name for g in mine.analysis.groups] == [g.name for g in both.analysis.groups]
    assert "is no group of the ONNX graph" in mine.left_alone[lost]
    for value in mine.analysis.values:
        assert mine.analysis.groups_on(value) <= set(range(len(mine.analysis.groups)))


def test_a_site_that_one_reading_lacks_is_none() -> None:
    whole = find_search_space(read_torch(capture(Residual().eval(), torch.randn(2, 3, 8, 9))))
    less = replace(whole.without(["first.weight"]), kind="onnx")
    both = agreed(whole, less)
    assert "first.weight" in whole.ranks and "first.weight" not in both.ranks
    assert "cannot be factorised in the ONNX graph" in both.left_alone["first.weight"]
    assert (
        [site.switch for site in both.merges]
        == [site.switch for site in less.merges]
        != [site.switch for site in whole.merges]
    )
    assert both.blocks == less.blocks != whole.blocks


def test_agreeing_with_itself_changes_nothing() -> None:
    model, inputs = build("splits")
    analysis = find_search_space(read_torch(capture(model.eval(), inputs))).analysis
    same = agreeing(analysis, analysis, "never")
    assert [g.name for g in same.groups] == [g.name for g in analysis.groups] and same.frozen == analysis.frozen
    assert without_groups(analysis, {}) is analysis
