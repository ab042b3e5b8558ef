"""What is kept of a compression on its way, and what is found of it again (`sluice.training.stages`).

    gates       tensors of the gated network after its training
    stops       tensors of the network behind the last stop on the way to a deep budget
    prices      scores of channels, and the loss of every level of every site
    rate        of the rehearsal
    rehearsal   held-out losses of the plans that it was given, in their order
    verified    the solution that was settled on, the times of its engine, and what the rehearsal gave
    trial       runs and setting of the fine-tune
    fine-tune   state after the last epoch (`sluice.training.epochs`)

Whatever does not fit what is asked for now counts as not found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import torch
from torch import fx, nn

from sluice.core.errors import SluiceError
from sluice.core.plan import Plan
from sluice.passes.graph.capture import clone
from sluice.pipeline.pairs import PairTimes
from sluice.pipeline.problem import Problem, Solution
from sluice.pipeline.verify import VerifiedSolution
from sluice.solver.decide import Choice
from sluice.training.stages import Stage, Stages
from sluice.training.trial import Run, Setting, Trial

__all__ = [
    "Reading",
    "found_prices",
    "gates_once",
    "keep_prices",
    "loaded_once",
    "rate_once",
    "rehearsed_once",
    "trial_once",
    "verified_once",
]

Reading = tuple[str, float, tuple[float, ...]]  # of a scenario: name, promised milliseconds, held-out losses
Prices = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # scores by axis group, losses by site
Found = TypeVar("Found")


def gates_once(stages: Stages, gated: nn.Module, train: Callable[[], object]) -> None:
    """Train the gates, unless their training was kept."""
    found = stages.find("gates")
    if found is not None and _loaded(gated, found.arrays):
        gated.eval()
        return
    train()
    stages.keep("gates", Stage(_arrays(gated)))


def loaded_once(
    stages: Stages, name: str, dense: fx.GraphModule, train: Callable[[], fx.GraphModule | None]
) -> fx.GraphModule | None:
    """A network in the architecture of ``dense``, trained unless it was kept; what ``train`` gives none for is not."""
    found, made = stages.find(name), clone(dense)
    if found is not None and _loaded(made, found.arrays):
        return made.eval()
    trained = train()
    if trained is not None:
        stages.keep(name, Stage(_arrays(trained)))
    return trained


def found_prices(stages: Stages) -> Prices | None:
    return _of(stages, "prices", _prices)


def keep_prices(stages: Stages, problem: Problem) -> None:
    arrays = {f"score.{name}": np.asarray(values) for name, values in problem.scores.items()}
    arrays |= {f"loss.{name}": np.asarray(values) for name, values in problem.losses.items()}
    stages.keep("prices", Stage(arrays, [list(problem.scores), list(problem.losses)]))


def rate_once(stages: Stages, find: Callable[[], float]) -> float:
    return _once(stages, "rate", float, find, lambda rate: rate)


def rehearsed_once(
    stages: Stages, name: str, plans: Sequence[Plan], rehearse: Callable[[], list[tuple[float, ...]]]
) -> list[tuple[float, ...]]:
    """The losses of these plans, trained unless they were kept."""
    own = stages.for_([plan.to_json() for plan in plans])
    return _once(own, name, lambda words: [tuple(map(float, losses)) for losses in words], rehearse, list)


def trial_once(stages: Stages, try_settings: Callable[[], Trial]) -> Trial:
    return _once(stages, "trial", lambda words: _trial(**words), try_settings, asdict)


def verified_once(
    stages: Stages, problems: Mapping[str, Problem], verify: Callable[[], tuple[VerifiedSolution, list[Reading]]]
) -> tuple[VerifiedSolution, list[Reading]]:
    """The solution that is settled on, and the readings of the rehearsal.

    Args:
        problems: by name of the network that is cut. A solution of another problem counts as one of the first.
    """
    return _once(
        stages, "verified", lambda words: _verified(problems, words), verify, lambda found: _words(problems, found)
    )


def _once(
    stages: Stages, name: str, read: Callable[[Any], Found], make: Callable[[], Found], words: Callable[[Found], Any]
) -> Found:
    """What was kept under the name, or else what is made now, and kept as ``words``."""
    found = _of(stages, name, lambda stage: read(stage.words))
    if found is None:
        found = make()
        stages.keep(name, Stage({}, words(found)))
    return found


def _of(stages: Stages, name: str, read: Callable[[Stage], Found]) -> Found | None:
    stage = stages.find(name)
    try:
        return None if stage is None else read(stage)
    except (SluiceError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def _arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: t.detach().cpu().numpy() for name, t in module.state_dict().items()}


def _loaded(gated: nn.Module, arrays: Mapping[str, np.ndarray]) -> bool:
    try:
        gated.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in arrays.items()})
    except RuntimeError:
        return False
    return True


def _prices(stage: Stage) -> Prices:
    scored, priced = stage.words
    return (
        {name: stage.arrays[f"score.{name}"] for name in scored},
        {name: stage.arrays[f"loss.{name}"] for name in priced},
    )


def _trial(chosen: dict[str, Any], runs: list[dict[str, Any]], **others: Any) -> Trial:
    made = tuple(Run(Setting(**run["setting"]), run["steps"], run["held_out"]) for run in runs)
    return Trial(Setting(**chosen), runs=made, **others)


def _words(problems: Mapping[str, Problem], found: tuple[VerifiedSolution, list[Reading]]) -> dict[str, Any]:
    """The inverse of `_verified`."""
    verified, readings = found
    return {
        "network": next((name for name, one in problems.items() if one is verified.problem), next(iter(problems))),
        "choice": asdict(verified.choice), "times": asdict(verified.times), "rounds": verified.rounds,
        "engine": verified.engine, "foreseen": verified.foreseen, "readings": readings,
        "plan": verified.plan.to_json(),
        "kept": {name: list(channels) for name, channels in verified.solution.kept.items()},
    }  # fmt: skip


def _verified(problems: Mapping[str, Problem], words: dict[str, Any]) -> tuple[VerifiedSolution, list[Reading]]:
    problem = problems[words["network"]]
    choice = Choice(**words["choice"])
    if choice.widths.keys() != problem.profile.latency.dense.keys():
        raise ValueError("the choice is about other sites")
    kept = {name: tuple(channels) for name, channels in words["kept"].items()}
    solution = Solution(choice, kept, Plan.from_json(words["plan"]))
    times = PairTimes(**words["times"])
    verified = VerifiedSolution(solution, times, words["rounds"], words["engine"], words["foreseen"], problem)
    return verified, [(name, ms, tuple(losses)) for name, ms, losses in words["readings"]]
