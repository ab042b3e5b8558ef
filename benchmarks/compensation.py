"""What refitting by least squares gives back to a network that is cut and not trained.

    python -m benchmarks.compensation
    python -m benchmarks.compensation --show

ResNet-20 for digits, accuracy on the 1,000 test digits right after the cut and after `sluice.training.compensate` with
1,024 training digits, labels unseen. Cuts: the largest channels of every group by magnitude; all 3x3 layers but the
first at a share of their rank, by form; both. CPU seconds of the refit.

Last line: JSON by cut.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from torch import Tensor, fx

from sluice.core.plan import Edits, Factorize, Plan
from sluice.models import resnet20_mnist
from sluice.models.mnist import accuracy, load_digits
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_torch import rewrite_captured
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture, clone
from sluice.passes.graph.groups import Analysis
from sluice.training.compensate import compensate

RESULT = Path("benchmarks/results/compensation-resnet20.json")
INPUTS, BATCH = 1024, 64
# Share of the channels, form, divisor of the rank.
CUTS: dict[str, tuple[float, str, int]] = {
    "75% of channels": (0.75, "", 0),
    "50% of channels": (0.5, "", 0),
    "rank / 3, kxk-1x1": (1.0, "kxk-1x1", 3),
    "rank / 3, 1x1-kxk": (1.0, "1x1-kxk", 3),
    "rank / 2, kx1-1xk": (1.0, "kx1-1xk", 2),
    "75% of channels, rank / 2, kx1-1xk": (0.75, "kx1-1xk", 2),
}


def largest(analysis: Analysis, state: dict[str, Tensor], share: float) -> dict[str, list[int]]:
    """The channels of largest weights of every group, by the sum of squares over all matrices that they lie on."""
    kept = {}
    for group in analysis.groups:
        scores = np.zeros(group.size)
        for ref in group.refs:
            tensor = state[ref.param].double()
            if tensor.ndim > 1:
                squares = tensor.square().movedim(ref.axis, 0).flatten(1).sum(1).numpy()
                mine = ref.channels >= 0
                np.add.at(scores, ref.channels[mine], squares[mine])
        kept[group.name] = sorted(np.argsort(-scores)[: max(1, round(share * group.size))].tolist())
    return kept


def plan_of(dense: fx.GraphModule, share: float, form: str, divisor: int) -> Plan:
    state = dense.state_dict()
    layers = [name for name, tensor in state.items() if tensor.ndim == 4 and tensor.shape[-1] == 3][1:]
    ranks = [Factorize(name, form, max(1, state[name].shape[0] // divisor)) for name in layers if form]
    analysis = analyze(dense)
    return make_plan(analysis, largest(analysis, state, share), (), Edits(tuple(ranks)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true", help="print the committed result")
    found: dict[str, dict[str, float]] = {}
    if parser.parse_args().show:
        found = json.loads(RESULT.read_text())
    else:
        digits = load_digits()
        dense = capture(resnet20_mnist(), digits.test_x[:8]).eval()
        data = digits.train_x[:INPUTS].split(BATCH)
        for name, cut in CUTS.items():
            plan, slim = plan_of(dense, *cut), clone(dense)
            rewrite_captured(slim, plan, merged=False)
            before, started = accuracy(slim, digits.test_x, digits.test_y), time.process_time()
            compensate(slim, dense, plan, data, inputs=INPUTS)
            seconds = time.process_time() - started
            found[name] = {"cut": before, "refitted": accuracy(slim, digits.test_x, digits.test_y), "seconds": seconds}
            print(name, found[name], file=sys.stderr, flush=True)
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    for name, row in found.items():
        print(f"{name:<36} {row['cut']:5.1f} -> {row['refitted']:5.1f}%  {row['seconds']:.1f} s")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
