"""The command ``sluice``: arguments -> one call of the Python interface -> print.

The result goes to standard output (``--json``: for programs), progress and errors to standard error. Exit status
0: done; 1: a mistake of the user's, told in one sentence, or a check that failed; 2: wrong usage of the command;
130: interrupted; 141: the reader of the output has gone.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sluice.commands import options
from sluice.commands.bench import bench
from sluice.commands.blame import blamed
from sluice.commands.parser import make_parser
from sluice.commands.report import report
from sluice.commands.serve import serve
from sluice.commands.specs import (
    check_batch,
    data_of,
    dense_in,
    evaluate_of,
    inputs_of,
    is_onnx,
    loss_given,
    model_of,
)
from sluice.commands.words import print_report, print_result
from sluice.core.errors import SluiceError
from sluice.core.files import JOB, ONNX, PLAN, check_output
from sluice.core.stdout import Unwritable, give_up, keep_stdout
from sluice.core.version import INSTALL_TORCH

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status."""
    args = parser().parse_args(argv)
    if argv is None:
        keep_stdout()
    try:
        with warnings.catch_warnings():
            # torch 2.13 exports by copying its own pytree specs, which calls what it has itself deprecated.
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
            read = [args.model] if hasattr(args, "model") else getattr(args, "models", [])
            with blamed([*read, *([args.folder] if getattr(args, "folder", None) else [])]):
                status = int(args.run(args))
        sys.stdout.flush()  # an output that cannot be written is an error here rather than at exit
        return status
    except SluiceError as error:
        print(f"sluice: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print(f"sluice: error: this needs PyTorch; {INSTALL_TORCH}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sluice: interrupted; what was measured is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        give_up()  # `sluice table csv t.db | head` stops reading
        return 141
    except Unwritable as error:
        give_up()
        print(f"sluice: error: {error}", file=sys.stderr)
        return 1


def inspect(args: argparse.Namespace) -> int:
    """Show what can be cut, factorised, dropped and merged, and what is left alone and why."""
    from sluice.commands.inspect import inspection

    return print_result(
        args,
        *inspection(args.model, args.shape, args.exclude, args.inputs, args.weights, args.verbose, dict(args.fixed)),
    )


def profile(args: argparse.Namespace) -> int:
    """Measure the network, and plans on its way to the least time, on this device; with --pack, write a job instead."""
    from sluice.commands.engine_layers import check_inspector, place_profile, placement_lines
    from sluice.profiler.need import walk
    from sluice.profiler.profile import profile_onnx, profile_shard
    from sluice.profiler.summary import profile_summary, shard_summary

    if args.pack:
        return _pack(args)
    if args.out or not args.table:
        args.wrong("give --table TABLE.db, or --pack with -o JOB.zip")
    if args.layers and args.shard is not None:
        args.wrong("--layers is told of the whole network, --shard measures a share of it; leave out one of the two")
    if args.shard is not None and args.minutes:
        args.wrong("--minutes ends with estimates, --shard measures its share of all points; leave out one of the two")
    settings = options.settings(args)
    if args.layers:
        check_inspector(args.target)
    dense = _dense_onnx(args)
    if args.shard is not None:
        return print_result(args, *shard_summary(profile_shard(dense, shard=args.shard, **settings)))
    if not is_onnx(args.model):
        from sluice.pipeline.attention_form import marked_for

        dense = marked_for(dense, settings["deployment"])
    measured = profile_onnx(dense, complete=args.complete, **settings)
    if not args.complete:
        walk(measured, settings["methods"])
    data, lines = profile_summary(measured, settings["methods"])
    if args.layers:
        placed = place_profile(measured)
        data, lines = {**data, "layers": asdict(placed)}, [*lines, *placement_lines(placed)]
    return print_result(args, data, lines)


def _pack(args: argparse.Namespace) -> int:
    from sluice.profiler.job import Job, known_table, write_job

    if not args.out or args.shard is not None:
        args.wrong("--pack writes one job for all shards: give -o JOB.zip, and --shard where the job is run")
    if args.layers:
        args.wrong("--layers asks the runtime of this machine, --pack is for another; leave out one of the two")
    check_output(args.out, {"the network": args.model, "the latency table": args.table}, JOB)
    settings = options.settings(args)
    job = Job(settings["deployment"], settings["methods"], tuple(args.exclude))
    known = known_table(args.table, job) if args.table else None
    size = write_job(args.out, _dense_onnx(args), job, known)
    lines = [f"{args.out}: {size:,} bytes; on the device: python {Path(args.out).name} -o TABLE.db"]
    return print_result(args, {"out": args.out, "bytes": size}, lines)


def _dense_onnx(args: argparse.Namespace) -> Any:
    """The dense network with its parameter names, from its file or its factory."""
    if is_onnx(args.model):
        dense = dense_in(args.model, args.shape, args.inputs, args.weights, dict(args.fixed))
        check_batch(dense, args.batch, args.model)
        return dense
    from sluice.core.progress import stage
    from sluice.passes.cut.export import to_onnx
    from sluice.pipeline.prepare import check_float32

    model = model_of(args.model, args.weights)
    check_float32(model)
    with stage("export", not args.quiet):
        return to_onnx(model, inputs_of(args.model, args.shape, args.batch, args.inputs))


def compress(args: argparse.Namespace) -> int:
    """Make a network or an ONNX file fit the budget, or as fast as its accuracy allows: decide, cut, train, export."""
    from sluice.core.address import target_at

    settings, figure = options.settings(args), evaluate_of(args.evaluate) if args.evaluate else None
    settings |= {"keep": dict(args.keep), "multiple": dict(args.multiple)}
    if is_onnx(args.model):
        from sluice import compress_onnx
        from sluice.commands.compress_file import file_arguments
        from sluice.core.heap import give_back_blocks

        give_back_blocks()
        report = compress_onnx(args.model, **file_arguments(args, settings, data_of, figure)).report
        print_report(args, report)
        return 0 if report.met() else 1
    if args.steps:
        raise SluiceError("--steps trains an ONNX file towards its own outputs; give --epochs for a network")
    from sluice import compress as run

    deployment = asdict(settings.pop("deployment"))
    deployment["target"] = target_at(deployment["target"], deployment.pop("address"))
    done = run(
        model_of(args.model, args.weights), inputs_of(args.model, args.shape, args.batch, args.inputs),
        budget=options.budget_of(args),
        data=data_of(args.data), out=args.out, gate_epochs=args.gate_epochs, epochs=args.epochs,
        rehearsal=args.rehearsal, gates=args.gates, progressive=args.progressive, rotate=args.rotate,
        recovery=options.recovery_settings(args), evaluate=figure, loss=loss_given(args.loss), seed=args.seed,
        **deployment, **settings,
    )  # fmt: skip
    print_report(args, done.report)
    least = done.report.least
    return 0 if done.report.met() and (least is None or least.met()) else 1


def plan(args: argparse.Namespace) -> int:
    """Make a plan in one shot, without training."""
    from sluice.pipeline.one_shot import plan_one_shot, plan_summary

    check_output(args.out, {"the latency table": args.table}, PLAN)
    settings = options.settings(args)
    model, inputs = model_of(args.model, args.weights), inputs_of(args.model, args.shape, args.batch, args.inputs)
    found = plan_one_shot(
        model, inputs, budget=args.budget, data=data_of(args.data), loss=loss_given(args.loss), **settings
    )
    found.plan.save(args.out)
    return print_result(args, *plan_summary(found, args.out))


def apply(args: argparse.Namespace) -> int:
    """Cut a dense ONNX file by a plan; needs no torch."""
    from sluice.commands.onnx_input import applied
    from sluice.core.plan import Plan
    from sluice.passes.graph.onnx_file import save_onnx

    check_output(args.out, {"the dense network": args.model, "the plan": args.plan}, ONNX)
    slim = applied(args.model, Plan.load(args.plan), args.inputs, dict(args.fixed))
    size = save_onnx(slim, args.out)
    return print_result(args, {"out": args.out, "bytes": size}, [f"{args.out}: {size:,} bytes"])


def export(args: argparse.Namespace) -> int:
    """Write deployment-ready ONNX of the dense network or, with --plan, of the slim one; with --engine, build it."""
    from sluice.artifacts.in_precision import deploy_onnx, rounding_error
    from sluice.artifacts.rounding_check import compare_precisions
    from sluice.commands.export import check_files, outcome
    from sluice.commands.export_engine import Asked, asked_with, check_place
    from sluice.core.address import split_target
    from sluice.core.deployment import check_fit, check_precision
    from sluice.passes.graph.onnx_file import save_onnx

    check_precision(args.precision)
    if args.calibration and args.precision != "int8":
        raise SluiceError(f"--calibration is for int8, not {args.precision}; leave it out, or give --precision int8")
    if args.exclude and args.precision != "int8":
        raise SluiceError(f"--exclude keeps layers out of int8, not {args.precision}; leave it out")
    if args.reduce_range is not None and args.precision != "int8":
        raise SluiceError(f"--reduce-range is about weights in int8, not {args.precision}; leave it out")
    if args.names and (args.engine or args.precision != "fp32"):
        raise SluiceError("--names writes what plans are applied to, in fp32; leave out --engine and --precision")
    if args.table and not args.engine:
        raise SluiceError("--table gives an engine the timing cache of that table; give --engine, or leave it out")
    if args.engine and args.target not in (None, "tensorrt"):
        raise SluiceError(
            f"--engine is built by the TensorRT of this machine, not for --target {args.target}; leave out one of the "
            f"two, or build it where it runs"
        )
    place = "" if args.engine else args.target or ""
    if args.target:
        check_fit(args.target, args.precision)
        args.target, _ = split_target(args.target)  # a file is the same wherever its runtime is
    check_files(args.out, args.engine, args.plan, args.table)
    check_place(args.out, args.engine, place)
    asked = None
    if args.engine:
        asked = asked_with(args.engine, args.table) if args.table else Asked(args.engine)
    target = args.target or ("tensorrt" if args.engine else "ort-cpu")
    if is_onnx(args.model):
        from sluice.commands.export_file import file_to_export

        given = file_to_export(args, data_of)
    else:
        from sluice.commands.export_network import network_to_export

        given = network_to_export(args)
        if args.names:
            size = save_onnx(given.wide, args.out)
            return print_result(args, {"out": args.out, "bytes": size}, [f"{args.out}: {size:,} bytes"])
    wide = given.wide
    form = {"target": target, "exclude": args.exclude, "reduce_range": args.reduce_range}
    done = given.label(deploy_onnx(wide, args.precision, given.calibration, **form))
    save_onnx(done, args.out)
    error, rounding = None, None
    if args.precision != "fp32":
        with suppress(SluiceError):  # a file that this machine cannot run is of use on another
            error = rounding_error(done, wide, given.first)
            rounding = compare_precisions(done, wide, args.precision, given.specs)
    found = outcome(
        done, args.out, asked, precision=args.precision, target=target, batch=args.batch, error=error, wide=wide,
        place=place, sized=given.sized(done),
    )  # fmt: skip
    print_result(args, found.data, found.lines)
    if rounding is not None and not rounding.same:
        raise rounding.refusal(args.out)
    if found.refusal is not None:
        raise found.refusal
    return 0


def check(args: argparse.Namespace) -> int:
    """Compare the slim network in torch, its ONNX files in all precisions, and the dense ONNX graph cut by the plan."""
    from onnx import ModelProto

    from sluice.artifacts.check import check as run
    from sluice.artifacts.check import check_deployed
    from sluice.commands.onnx_input import model_in
    from sluice.passes.cut.pools_onnx import padded_pools

    of_file = is_onnx(args.model) and not args.weights
    dense = model_in(args.model, args.inputs, dict(args.fixed)) if of_file else model_of(args.model, args.weights)
    errors = run(dense, args.folder)
    worst = max(errors.values())
    notes = [f"{name} {why}" for name, why in padded_pools(dense).items()] if isinstance(dense, ModelProto) else []
    lines = [*notes, *(f"{pair}: {value:.1e}" for pair, value in errors.items()), f"tolerance {args.tolerance:.1e}"]
    deployed = check_deployed(args.folder)
    for name, found in deployed.items():
        as_run = "" if found.as_run == found.error else f" by its weights, {found.as_run:.1e} as it runs on noise"
        lines.append(
            f"{name} and slim.onnx: {found.error:.1e}{as_run}, {'the same' if found.same else 'ANOTHER'} network"
        )
        lines.append(f"tolerance of its rounding {found.tolerance:.1e}; by chance {found.by_chance:.1e}")
    data = {"errors": errors, "worst": worst, "tolerance": args.tolerance}
    print_result(args, {**data, "deployed": {name: asdict(found) for name, found in deployed.items()}}, lines)
    return 0 if worst <= args.tolerance and all(found.same for found in deployed.values()) else 1


def models(args: argparse.Namespace) -> int:
    """List the reference networks, with the shapes of their inputs, and the packages whose networks have names."""
    from sluice.commands.inspect import known_networks

    return print_result(args, *known_networks())


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    return make_parser((inspect, profile, compress, plan, apply, export, check, report, bench, serve, models))
