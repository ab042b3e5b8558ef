"""The time of the file that plain ``torch.onnx.export`` writes, beside that of our dense file.

1. A budget in percent is a promise to somebody who deploys a file today, and that is the plain one. Ours is mostly as
   fast. Where the plain one is faster by more than `sluice.pipeline.pairs.APART`, and by more than the comparison is
   uncertain, budgets in percent count from it.
2. Both engines are built once and measured in turns (`sluice.pipeline.pairs`), without much waiting for a quiet
   machine: only their ratio is wanted. Engines of one structure are one engine.
3. Only fp32 is compared, since plain export writes no other precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from sluice.core.budget_spec import BudgetSpec
from sluice.core.errors import SluiceError
from sluice.core.progress import Advance, told_to
from sluice.core.weight_bytes import Parked, parked
from sluice.passes.graph.onnx_file import finalize
from sluice.pipeline.pairs import Pairs, PairTimes, is_faster, structure
from sluice.profiler.view import Profile

if TYPE_CHECKING:
    from torch import nn

    from sluice.passes.graph.capture import Inputs

__all__ = ["counted_from", "plain_share", "share_beside"]

PATIENCE_MS = 500.0
WHOLE = BudgetSpec.parse("100%")


def plain_share(
    profile: Profile, model: nn.Module, example_inputs: Inputs, dense: onnx.ModelProto, advance: Advance | None = None
) -> PairTimes | None:
    """The plain file (``slim_ms``) beside ours (``dense_ms``), in turns; None where nothing can be compared.

    Args:
        model: as the user gave it.
        dense: our file of it, with parameter names.
    """
    from sluice.passes.cut.export import plain_export

    asked = profile.fingerprint
    if asked.precision != "fp32" or not profile.open:
        return None
    plain = plain_export(model, example_inputs, asked.batch)
    return None if plain is None else share_beside(profile, plain, profile.engine(finalize(dense)), advance)


def share_beside(
    profile: Profile, plain: onnx.ModelProto, ours: onnx.ModelProto | Parked, advance: Advance | None = None
) -> PairTimes | None:
    """The file that users deploy (``slim_ms``) beside our engine's (``dense_ms``), as `plain_share`."""
    if profile.fingerprint.precision != "fp32" or not profile.open:
        return None
    if structure(plain) == structure(ours):
        ms = profile.latency.dense_ms()
        return PairTimes(ms, ms, ms, runs=0, dense_runs=0, uncertainty=0.0, quiet=True)
    try:
        file = parked(plain)
        del plain  # its engine is made from the file
        return Pairs(profile, ours, WHOLE, told_to(advance), PATIENCE_MS).once(file)
    except SluiceError:  # the runtime refuses the plain file
        return None


def counted_from(plain: PairTimes | None, budget: BudgetSpec) -> BudgetSpec:
    """The budget, counted from the plain file where that is faster."""
    return budget.of(plain.share) if plain is not None and is_faster(plain) else budget
