"""What may be chosen of a network: its pieces and sites by its file, less what another reading of it lacks."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from sluice.core.deployment import ON_CPU
from sluice.core.errors import SluiceError
from sluice.passes.search_space import SearchSpace, agreed, called_like, find_search_space, read_onnx
from sluice.profiler.pieces.partition import Partition, partition_static, static_at, with_small
from sluice.profiler.table.fingerprint import Fingerprint
from sluice.solver.options import EditSpace

__all__ = ["check_choice", "limited", "partition_of"]


def partition_of(
    model: onnx.ModelProto,
    fingerprint: Fingerprint,
    exclude: Sequence[str],
    methods: Sequence[str],
    like: SearchSpace | None,
) -> tuple[Partition, SearchSpace]:
    """The network at the batch of the deployment, its pieces, and what it can become."""
    static = static_at(model, fingerprint.batch)
    space = find_search_space(read_onnx(static), exclude)
    if like is not None:
        space = called_like(space, like)
    partition = partition_static(static, space.analysis, fingerprint.batch)
    # Less work takes no less time where a small batch leaves an accelerator idle, or threads wait for each other.
    if fingerprint.runtime in ON_CPU and fingerprint.threads == 1:
        partition = with_small(partition, model)
    if tuple(methods) == ("filter",):
        check_choice(space if like is None else agreed(space, like), EditSpace())
    return partition, space


def limited(space: SearchSpace, options: EditSpace, like: SearchSpace) -> tuple[SearchSpace, EditSpace, frozenset[str]]:
    """The sites and edits that ``like`` has as well, and the sites that stay dense for want of it.

    This comes after measuring, so a table serves whether or not the other reading was at hand when it was filled.
    """
    groups = {group.name for group in space.analysis.groups}
    space = agreed(space, like)
    drops, merges = {f"{block.name}|drop" for block in space.blocks}, {site.switch for site in space.merges}
    left = EditSpace(
        tuple(option for option in options.ranks if option.param in space.ranks),
        {switch: drop for switch, drop in options.drops.items() if switch in drops},
        {switch: merge for switch, merge in options.merges.items() if switch in merges},
    )
    check_choice(space, left)
    shut = groups - {group.name for group in space.analysis.groups}
    shut |= {name for option in options.ranks if option not in left.ranks for name in (option.switch, option.rank)}
    shut |= (options.drops.keys() - left.drops.keys()) | (options.merges.keys() - left.merges.keys())
    return space, left, frozenset(shut)


def check_choice(space: SearchSpace, options: EditSpace) -> None:
    """Something must be left to choose."""
    if not (space.analysis.groups or options.ranks or options.drops or options.merges):
        raise SluiceError(f"nothing in this model can be cut: {dict(list(space.left_alone.items())[:3])}")
