"""The command ``sluice``: arguments -> one call of the Python interface -> print.

The result goes to standard output (``--json``: for programs), progress and errors to standard error. Exit status
0: done; 1: a mistake of the user's, told in one sentence, or a check that failed; 2: wrong usage of the command.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from sluice import cli_options as options
from sluice.cli_model import (
    blocks_in,
    data_of,
    factorable_in,
    inputs_of,
    is_onnx,
    model_of,
    read_module,
    read_onnx,
    runs_in,
)
from sluice.errors import SluiceError

__all__ = ["main"]

TOLERANCE = 1e-5  # relative, of `sluice check`


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status."""
    args = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            # torch 2.13 exports by copying its own pytree specs, which calls what it has itself deprecated.
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
            return int(args.run(args))
    except SluiceError as error:
        print(f"sluice: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sluice: interrupted; what was measured is kept in the table", file=sys.stderr)
        return 130


def inspect(args: argparse.Namespace) -> int:
    """Show what can be cut, factorised, dropped and merged, and what is left alone and why."""
    if is_onnx(args.model):
        found, view, chains, tensors = read_onnx(args.model, args.exclude)
    else:
        model = model_of(args.model)
        found, view, chains, tensors = read_module(model, inputs_of(args.model, args.shape, 2), args.exclude)
    weights, dense = factorable_in(view, tensors, args.exclude)
    blocks, additions = blocks_in(view)
    runs, alone = runs_in(chains, tensors, args.exclude)
    groups = {g.name: {"size": g.size, "axes": [[r.param, r.axis] for r in g.refs]} for g in found.groups}
    lines = [f"{len(found.groups)} groups, {sum(g.size for g in found.groups)} channels that can be cut"]
    for g in found.groups:
        lines.append(f"  {g.name}: {g.size} in {', '.join(f'{r.param}[{r.axis}]' for r in g.refs)}")
    lines.append(f"{len(weights)} weights that can be factorised, with the rank at which nothing is lost")
    for name, w in weights.items():
        forms = ", ".join(f"{form} {rank}" for form, rank in w["forms"].items())
        lines.append(f"  {name} {'x'.join(map(str, w['shape']))}: {forms}")
    lines.append(f"{len(blocks)} residual blocks that can be dropped")
    for b in blocks:
        lines.append(f"  {b['name']}: {', '.join(b['layers'])}; {_closes(b)}")
    lines.append(f"{len(runs)} runs that can be merged, with the kernels that are possible")
    lines += [f"  {r['layers'][0]}..{r['layers'][-1]}: {' '.join(r['kernels'])}" for r in runs]
    data: dict[str, Any] = {"groups": groups, "weights": weights, "blocks": blocks, "runs": runs}
    for key, title, why in (
        ("frozen", "left alone", dict(found.frozen)),
        ("dense", "not factorised", dense),
        ("additions", "additions that are no residual block", additions),
        ("alone", "not merged", alone),
    ):
        data[key] = why
        if why or key == "frozen":
            lines += [f"{title}: {len(why)}", *(f"  {name}: {reason}" for name, reason in why.items())]
    return _print(args, data, lines)


def profile(args: argparse.Namespace) -> int:
    """Measure, on this device, what the table does not know yet."""
    from sluice.passes.decide import least_ms, restricted

    settings = _settings(args)
    if is_onnx(args.model):
        from sluice.onnx_file import load_onnx
        from sluice.profiler.profile import profile_onnx

        measured = profile_onnx(load_onnx(args.model), **settings)
    else:
        from sluice import profile as measure

        measured = measure(model_of(args.model), inputs_of(args.model, args.shape, args.batch), **settings)
    model, offered, methods = measured.latency, measured.options, settings["methods"]

    def least_with(*names: str) -> float:
        return least_ms(restricted(model, offered.sites(model, names))).promised_ms

    least = least_with(*methods)
    alone = {name: least_with(name) for name in methods} if len(methods) > 1 else {}
    ranks = {option.rank for option in offered.ranks}
    data: dict[str, Any] = {
        "dense_ms": model.dense_ms(),
        "least_ms": least,
        "least_ms_alone": alone,
        "error": dict(model.error),
        "levels": {g: list(v) for g, v in model.levels.items() if g not in model.switches and g not in ranks},
        "ranks": {option.switch: list(model.levels[option.rank]) for option in offered.ranks},
        "blocks": [drop.name for drop in offered.drops.values()],
        "merges": list(offered.merges),
    }
    lines = [
        f"dense {model.dense_ms():.4g} ms, least reachable {least:.4g} ms ({least / model.dense_ms():.1%})",
        f"calibration on {model.error['n']:.0f} engines: median error {model.error['median_abs_err']:.1%}, 95th "
        f"percentile {model.error['p95_abs_err']:.1%}, rank correlation {model.error.get('spearman', 1.0):.3f}",
        *(f"  by {name} alone {ms:.4g} ms ({ms / model.dense_ms():.1%})" for name, ms in alone.items()),
        "widths worth having",
        *(f"  {group}: {' '.join(map(str, widths))}" for group, widths in data["levels"].items()),
    ]
    if offered.ranks:
        lines += [f"ranks worth having: {len(ranks)}", *(f"  {s}: {_words(v)}" for s, v in data["ranks"].items())]
    if offered.drops:
        lines += [f"blocks that can be dropped: {len(offered.drops)}", *(f"  {name}" for name in data["blocks"])]
    if offered.merges:
        lines += [f"runs worth merging: {len(offered.merges)}", *(f"  {name}" for name in data["merges"])]
    return _print(args, data, lines)


def compress(args: argparse.Namespace) -> int:
    """Make the network fit the budget: profile, train, decide, verify, cut, fine-tune, export, measure."""
    from rich.console import Console

    from sluice import compress as run

    if args.rehearsal < 0:
        raise SluiceError(f"--rehearsal {args.rehearsal} is no number of steps; give 0 or more")
    settings = _settings(args)
    done = run(
        model_of(args.model), inputs_of(args.model, args.shape, args.batch), budget=args.budget,
        data=data_of(args.data), out=args.out, gate_epochs=args.gate_epochs, epochs=args.epochs,
        rehearsal=args.rehearsal, lr=args.lr, **settings,
    )  # fmt: skip
    if args.json:
        print(done.report.to_json(), end="")
    else:
        done.report.render(Console(width=None if sys.stdout.isatty() else 160))
    return 0 if done.report.met() else 1


def plan(args: argparse.Namespace) -> int:
    """Make a plan in one shot, without training; again for another budget takes seconds."""
    from sluice.propose import propose
    from sluice.report import edit_rows

    settings = _settings(args)
    model, inputs = model_of(args.model), inputs_of(args.model, args.shape, args.batch)
    found = propose(model, inputs, budget=args.budget, data=data_of(args.data), **settings)
    found.plan.save(args.out)
    edits = edit_rows(found.plan)
    data = {
        "dense_ms": found.dense_ms,
        "budget_ms": found.budget_ms,
        "promised_ms": found.promised_ms,
        "retained": found.retained,
        "widths": dict(found.plan.widths),
        "edits": [asdict(edit) for edit in edits],
    }
    line = (
        f"promised {found.promised_ms:.4g} ms of {found.dense_ms:.4g} ms dense (budget {found.budget_ms:.4g} ms), "
        f"{found.retained:.1%} of the importance retained; {args.out}"
    )
    return _print(args, data, [line, *(f"  {edit.method} {edit.name}: {edit.detail}" for edit in edits)])


def apply(args: argparse.Namespace) -> int:
    """Cut a dense ONNX file by a plan; needs no torch."""
    from sluice.onnx_file import finalize, load_onnx, save_onnx
    from sluice.passes.rewrite_onnx import rewrite_onnx
    from sluice.plan import Plan

    slim = finalize(rewrite_onnx(load_onnx(args.model), Plan.load(args.plan)))
    save_onnx(slim, args.out)
    return _print(args, {"out": args.out, "bytes": slim.ByteSize()}, [f"{args.out}: {slim.ByteSize():,} bytes"])


def export(args: argparse.Namespace) -> int:
    """Write deployment-ready ONNX of the dense network or, with --plan, of the slim one."""
    from sluice import export as write
    from sluice import load

    inputs = inputs_of(args.model, args.shape, 2)
    model = load(model_of(args.model), args.plan, example_inputs=inputs) if args.plan else model_of(args.model)
    if args.names:
        from sluice.onnx_file import save_onnx
        from sluice.passes.export import to_onnx

        done = to_onnx(model, inputs)
        save_onnx(done, args.out)
    else:
        done = write(model, args.out, inputs)
    return _print(args, {"out": args.out, "bytes": done.ByteSize()}, [f"{args.out}: {done.ByteSize():,} bytes"])


def check(args: argparse.Namespace) -> int:
    """Compare the slim network in torch, its ONNX file, and the dense ONNX graph cut by the plan."""
    from sluice.check import check as run
    from sluice.onnx_file import load_onnx

    errors = run(load_onnx(args.model) if is_onnx(args.model) else model_of(args.model), args.folder)
    worst = max(errors.values())
    lines = [*(f"{pair}: {value:.1e}" for pair, value in errors.items()), f"tolerance {args.tolerance:.1e}"]
    _print(args, {"errors": errors, "worst": worst, "tolerance": args.tolerance}, lines)
    return 0 if worst <= args.tolerance else 1


def bench(args: argparse.Namespace) -> int:
    """Measure one engine, or two of them in turns."""
    import numpy as np

    from sluice.profiler.measure import measure
    from sluice.runtime.runner import make_runner

    runner = make_runner(args.target, args.threads)
    sessions = [runner.build(path, batch=args.batch) for path in args.models]
    found = measure(sessions, min_rounds=60, max_rounds=240, target_spread=0.01, rng=np.random.default_rng(0))
    data: dict[str, Any] = {
        "engines": [{"file": f, "ms": m.ms, "spread": m.spread} for f, m in zip(args.models, found, strict=True)],
        "clock": found[0].clock,
    }
    lines = [f"{f}: {m.ms:.4g} ms (spread {m.spread:.1%})" for f, m in zip(args.models, found, strict=True)]
    if len(found) == 2:
        data["ratio"] = found[1].ms / found[0].ms
        lines.append(f"second/first {data['ratio']:.1%}")
    return _print(args, data, lines)


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    from sluice import __version__

    top = argparse.ArgumentParser(
        prog="sluice", description="Makes a network fit a latency budget measured on the device."
    )
    top.add_argument("--version", action="version", version=f"sluice {__version__}")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    def verb(run: Callable[[argparse.Namespace], int], *groups: Callable[[argparse.ArgumentParser], None]) -> Any:
        text = str(run.__doc__).strip()
        made = verbs.add_parser(run.__name__, help=text, description=text)
        for group in groups:
            group(made)
        made.add_argument("--json", action="store_true", help="print the result as JSON")
        made.set_defaults(run=run)
        return made

    verb(inspect, options.model, options.exclude)
    verb(profile, options.model, options.table)
    full = verb(compress, options.model, options.table, options.budget)
    full.add_argument("--out", required=True, help="folder for plan, weights, ONNX file and report")
    full.add_argument("--gate-epochs", type=int, default=0, help="epochs with gates; 0 decides in one shot (default 0)")
    full.add_argument("--epochs", type=int, default=10, help="epochs of fine-tuning (default 10)")
    full.add_argument(
        "--rehearsal", type=int, default=40, metavar="N", help="steps of training in which plans are compared "
        "before one is chosen; 0 takes the solver's word (default 40)",
    )  # fmt: skip
    full.add_argument("--lr", type=float, default=1e-3, help="learning rate of the weights (default 1e-3)")
    verb(plan, options.model, options.table, options.budget).add_argument(
        "-o", "--out", required=True, help="the plan to write"
    )
    cut = verb(apply)
    cut.add_argument("model", metavar="MODEL.onnx", help="dense ONNX with parameter names (`sluice export --names`)")
    cut.add_argument("plan", metavar="PLAN.json")
    cut.add_argument("-o", "--out", required=True, help="the ONNX file to write")
    write = verb(export, options.model)
    write.add_argument("--plan", metavar="DIR", help="folder that `sluice compress` wrote, or a plan")
    write.add_argument(
        "--names", action="store_true", help="fold nothing: what `sluice apply` and `sluice profile` take"
    )
    write.add_argument("-o", "--out", required=True, help="the ONNX file to write")
    test = verb(check)
    test.add_argument("model", metavar="MODEL", help=f"{options.MODEL}, or its dense ONNX with parameter names")
    test.add_argument("folder", metavar="DIR", help="folder that `sluice compress` wrote")
    test.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"relative (default {TOLERANCE:g})")
    time = verb(bench, options.device)
    time.add_argument("models", nargs="+", metavar="MODEL.onnx", help="ONNX files, measured in turns")
    return top


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    from sluice.passes.options import check_methods

    names = ("table", "batch", "target", "threads", "exclude")
    settings = {name: getattr(args, name) for name in names}
    return {**settings, "methods": check_methods(args.methods.split(",")), "progress": not args.quiet}


def _closes(block: dict[str, Any]) -> str:
    return "a gate can close it" if block["closes"] else f"no gate can close it: {block['reason']}"


def _words(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def _print(args: argparse.Namespace, data: Any, lines: Iterable[str]) -> int:
    print(json.dumps(data, indent=2) if args.json else "\n".join(lines))
    return 0
