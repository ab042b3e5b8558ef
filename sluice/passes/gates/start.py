"""Gates that start at a plan: their decisions are those of a configuration, the nearest ones the easiest to undo.

1. *Widths*. Channels are ordered by their scores, r = 0, 1, ... from the best. With w of n kept,

       a_r = a_0 clip((w - r - 1/2) / (n / 2), -1, 1),

   so the decision is the configuration's, the masks of the safest channels are 1, and those at the edge, which the
   scores can hardly tell apart, are near the decision.
2. *Ranks*. The threshold lies midway, by ratio, between the last singular value that stays and the first that goes. A
   weight that stays dense keeps the low threshold of its gate.
3. *Blocks, merges*. The logit is `STRENGTH` for what the configuration does, ``-STRENGTH`` or less for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from sluice.passes.gates.filter_gates import INITIAL_LOGIT, BlockGate, Gate, Gates
from sluice.passes.gates.merge_gates import STRENGTH, MergeGate
from sluice.passes.gates.rank_gates import RankGate

__all__ = ["start_at"]

EDGE = 0.5  # of the channels, on either side of the width
RANK = "|rank"  # ends the site of a rank, behind the switch of its form


@torch.no_grad()
def start_at(gates: Gates, configuration: Mapping[str, int], scores: Mapping[str, np.ndarray]) -> None:
    """Move all gates to the values that a configuration of the latency model has for their sites.

    Args:
        scores: by axis group, which channels go last, shape ``(size,)``.
    """
    for site, gate in gates.items():
        value = configuration.get(site)
        if isinstance(gate, RankGate):
            if value is not None and configuration.get(site.removesuffix(RANK)):
                _start_rank(gate, value)
        elif value is None:
            continue
        elif isinstance(gate, MergeGate):
            gate.start(bool(value))
        elif isinstance(gate, BlockGate):
            gate.open.logit.fill_(-STRENGTH if value else STRENGTH)
        else:
            _start_width(gate, value, scores[site])


def _start_width(gate: Gate, width: int, scores: np.ndarray) -> None:
    place = np.empty(gate.size)
    place[np.argsort(-scores, kind="stable")] = np.arange(gate.size)
    logits = INITIAL_LOGIT * np.clip((width - place - 0.5) / (EDGE * gate.size), -1.0, 1.0)
    gate.logit.copy_(torch.from_numpy(logits).to(gate.logit))


def _start_rank(gate: RankGate, rank: int) -> None:
    if rank < gate.size:
        kept, gone = (gate.values[k] / gate.values[0] for k in (rank - 1, rank))
        gate.theta.fill_(0.5 * (math.log(float(kept)) + math.log(max(float(gone), 1e-6))))
