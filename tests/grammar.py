"""Random networks cut by random plans of all edits: nothing is cut wrongly, in torch or in ONNX.

``python -m tests.grammar --networks 300`` makes networks (`tests.grammar_networks`), and plans of random widths, ranks,
dropped blocks and merged runs of each. A mismatch is one of these:

1. the torch graph and the exported ONNX graph have other groups, or leave other layers alone;
2. the cut torch network, or the cut ONNX file, differs from the masked original by more than `TOL`. Where rounding
   errors are larger than that (a norm of next to nothing), the file may be `ROUNDING` times as far from the original
   in float64 as the original in float32 is;
3. an exception, anywhere.

`tests.grammar_operators.ENOUGH` networks have every operator of the table; one that they lack is an error as well.
The last line is JSON: networks, plans, mismatches.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from sluice.core.errors import SluiceError
from sluice.core.plan import Edits, Factorize, Plan
from sluice.passes.cut.export import to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.gates.gating import insert_gates
from sluice.passes.graph.capture import capture
from sluice.passes.search_space import SearchSpace, find_search_space, read_onnx
from sluice.pipeline.close import close
from sluice.pipeline.problem import Solution
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.ort.cpu import OrtRunner
from sluice.solver.decide import Choice
from tests.grammar_networks import random_network
from tests.grammar_operators import ENOUGH, missing, reached, readings_agree
from tests.networks import random_kept
from tests.passes.graph.test_readings_agree import groups

__all__ = ["TOL", "Found", "check", "run"]

TOL = 1e-5
ROUNDING = 4.0
PLANS = 3
Rewrites = tuple[Callable[..., fx.GraphModule], Callable[..., onnx.ModelProto]]
REWRITES: Rewrites = (rewrite_torch, rewrite_onnx)


@dataclass(frozen=True)
class Found:
    """``kinds``: how many plans had each kind of edit. ``operators``: those of the network, as `reached` names them."""

    plans: int
    mismatches: tuple[str, ...]
    kinds: Counter[str]
    operators: frozenset[str] = frozenset()


def random_edits(space: SearchSpace, rng: np.random.Generator, widths: bool) -> Edits:
    """Edits that share no layer, as the solver's rules demand; runs that tie two widths only where none is chosen."""
    used: set[str] = set()
    ranks, drops, merges = [], [], []

    def takes(names: frozenset[str], share: float) -> bool:
        if used & names or rng.random() > share:
            return False
        used.update(names)
        return True

    for block in space.blocks:
        if takes(frozenset(block.params), 0.4):
            drops.append(block.drop())
    for site in space.merges:
        if not (site.ties and widths) and takes(frozenset(site.gone), 0.5):
            merges.append(site.merge)
    for param, rank in space.ranks.items():
        if takes(frozenset({param}), 0.6):
            form = sorted(rank.forms)[rng.integers(len(rank.forms))]
            ranks.append(Factorize(param, form, int(rng.integers(1, rank.forms[form] + 1))))
    return Edits(tuple(ranks), tuple(drops), tuple(merges))


def ran(model: onnx.ModelProto, inputs: tuple[Tensor, ...]) -> np.ndarray:
    feeds = {value.name: x.numpy() for value, x in zip(model.graph.input, inputs, strict=True)}
    return next(iter(OrtRunner().build(model).run(feeds).values()))


def check(model: nn.Module, inputs: tuple[Tensor, ...], seed: int, rewrites: Rewrites = REWRITES,
          agree: bool = True) -> Found:  # fmt: skip
    """Both readings of a network, which ``agree``, then `PLANS` plans of it."""
    in_torch, in_onnx = rewrites
    wrong: list[str] = []
    kinds: Counter[str] = Counter()
    captured = capture(model, inputs)
    exported = to_onnx(captured, inputs)
    try:
        gated = insert_gates(captured, inputs)
    except SluiceError as error:
        assert "nothing in this model can be cut" in str(error), error
        gated = insert_gates(captured, inputs, kinds=())
    space: SearchSpace = gated.meta["space"]
    theirs = find_search_space(read_onnx(exported)).analysis
    named = space.analysis.tensors
    if agree and groups(space.analysis, named) != groups(theirs, named):
        wrong.append(f"readings: {[(g.name, g.size) for g in space.analysis.groups]} in torch, "
                     f"{[(g.name, g.size) for g in theirs.groups]} in ONNX")  # fmt: skip
    if agree and set(space.analysis.frozen) != set(theirs.frozen):
        wrong.append(f"readings: left alone {set(space.analysis.frozen) ^ set(theirs.frozen)} by one alone")
    for index in range(PLANS):
        rng = np.random.default_rng([seed, index])
        kept = (
            random_kept(space.analysis, index) if index != 1 else {g.name: range(g.size) for g in space.analysis.groups}
        )
        kept = {name: tuple(channels) for name, channels in kept.items()}
        edits = random_edits(space, rng, widths=index != 1) if index else Edits()
        plan = make_plan(space.analysis, kept, (), edits)
        kinds.update(kind for kind in ("slices", "factorizations", "drops", "merges") if getattr(plan, kind))
        try:
            compare(gated, captured, exported, inputs, Solution(Choice({}, 0.0, 0.0, 1.0, 0.0, 0.0), kept, plan),
                    in_torch, in_onnx)  # fmt: skip
        except Exception as error:
            where = "" if isinstance(error, AssertionError) else traceback.format_exc()[-600:]
            wrong.append(f"plan {index}: {type(error).__name__} {error} {brief(plan)} {where}")
    return Found(PLANS, tuple(wrong), kinds, reached(captured, exported))


@torch.no_grad()
def compare(gated: fx.GraphModule, captured: fx.GraphModule, exported: onnx.ModelProto, inputs: tuple[Tensor, ...],
            solution: Solution, in_torch: Callable[..., fx.GraphModule],
            in_onnx: Callable[..., onnx.ModelProto]) -> None:  # fmt: skip
    masked = close(gated, solution).eval()
    reference = masked(*inputs)
    assert_close(in_torch(captured, solution.plan, inputs).eval()(*inputs), reference, TOL, "torch")
    found = ran(in_onnx(exported, solution.plan), inputs)
    if relative_error(found, reference) > TOL:
        exact = copy.deepcopy(masked).double()(*(x.double() for x in inputs))
        assert_close(found, exact, max(TOL, ROUNDING * relative_error(reference, exact)), "ONNX")


def brief(plan: Plan) -> str:
    return (f"{len(plan.slices)} slices, {[(f.param, f.form, f.rank) for f in plan.factorizations]}, "
            f"{[d.name for d in plan.drops]}, {[m.name for m in plan.merges]}")  # fmt: skip


def run(
    networks: int, seed: int = 0, rewrites: Rewrites = REWRITES, show: bool = True
) -> tuple[dict[str, int], Counter[str], set[str]]:
    """The figures, how many plans had each kind of edit, and all operators that were met."""
    plans = mismatches = 0
    kinds: Counter[str] = Counter()
    operators: set[str] = set()
    for number in range(seed, seed + networks):
        said = ""
        try:
            model, inputs, said = random_network(number)
            found = check(model, inputs, number, rewrites, readings_agree(said))
        except Exception:
            found = Found(0, (traceback.format_exc()[-900:],), Counter())
        plans, mismatches, kinds = plans + found.plans, mismatches + len(found.mismatches), kinds + found.kinds
        operators |= found.operators
        for line in found.mismatches if show else ():
            print(f"network {number} ({said}): {line}", flush=True)
    return {"networks": networks, "plans": plans, "mismatches": mismatches}, kinds, operators


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures, edits, met = run(args.networks, args.seed)
    print(dict(edits))
    absent = missing(met)
    print("operators of the table that no network has:", ", ".join(absent) or "none")
    print(json.dumps(figures))
    sys.exit(bool(figures["mismatches"] or (absent and args.networks >= ENOUGH)))
