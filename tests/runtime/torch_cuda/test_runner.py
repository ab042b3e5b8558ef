from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch

from sluice.core.errors import SluiceError
from sluice.passes.cut.export import to_onnx
from sluice.passes.precision.to_precision import to_precision
from sluice.profiler.timing.measure import measure
from sluice.runtime.base import nvidia
from sluice.runtime.base.compare import assert_close
from sluice.runtime.base.runner import LEAST_LAUNCH_MS, TRIAL, TRIALS_MS
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.torch_cuda import driver as torch_driver
from sluice.runtime.torch_cuda import runner as torch_cuda
from sluice.runtime.torch_cuda.driver import CudaDriver, cuda_driver, kernel_choice
from sluice.runtime.torch_cuda.runner import WARM_UPS, TorchCudaRunner, missing
from tests.device import chain
from tests.networks import build
from tests.runtime.fake_cuda import LAUNCH_MS, FakeDriver

Fake = Callable[..., FakeDriver]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return lambda **settings: FakeDriver(monkeypatch, **settings)


def image(batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 3, 9, 9)).astype(np.float32)}


def runner(driver: FakeDriver) -> TorchCudaRunner:
    return TorchCudaRunner(lambda: driver)


def test_replays_compute_what_onnx_runtime_computes(fake: Fake) -> None:
    model = chain([7, 5])
    session = runner(fake()).build(model)
    for seed in (0, 1):  # the buffers are filled anew
        assert_close(session.run(image(seed=seed)), OrtRunner().build(model).run(image(seed=seed)), 1e-6)


def test_it_takes_a_proto_its_bytes_and_a_file(fake: Fake, tmp_path: Path) -> None:
    model = chain([7], batch="n")
    path = tmp_path / "chain.onnx"
    want = OrtRunner().build(model).run(image())
    onnx.save(model, path, save_as_external_data=True, size_threshold=0)
    given = onnx.load(path)
    content = given.SerializeToString()
    for source in (given, content, path, str(path)):
        assert_close(runner(fake()).build(source, batch=2).run(image()), want, 1e-6)
    assert given.SerializeToString() == content  # the caller's model is as it was


def test_it_warms_up_before_the_capture(fake: Fake) -> None:
    driver = fake(inference_ms=1.0)
    runner(driver).build(chain([7]))
    trials = math.ceil(TRIALS_MS / TRIAL)
    assert driver.log == ["inference"] * WARM_UPS + ["capture of 1"] + ["replay"] * trials * (1 + TRIAL)


@pytest.mark.parametrize("inference_ms", [0.0004, 0.002, 0.06, 0.7])
def test_a_small_network_is_captured_several_times_over(fake: Fake, inference_ms: float) -> None:
    """Launch by launch every inference would seem to take a launch."""
    driver = fake(inference_ms=inference_ms)
    session = runner(driver).build(chain([7]))
    (graph,) = driver.graphs  # the one for trial is gone
    tried = max(LAUNCH_MS, inference_ms)
    assert graph.inferences == math.ceil(LEAST_LAUNCH_MS / tried)
    for repeats in (1, 7, 500):
        assert session.sample(repeats) == pytest.approx(max(inference_ms, LAUNCH_MS / graph.inferences))
    assert_close(session.run(image()), OrtRunner().build(chain([7])).run(image()), 1e-6)


def test_a_clock_that_comes_up_during_the_trials_is_waited_for(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the clock of an idle device an inference of 0.06 ms takes 0.36 ms, and one would seem to be enough."""
    driver = fake(inference_ms=0.06)
    elapsed = FakeDriver.elapsed_ms
    monkeypatch.setattr(
        FakeDriver, "elapsed_ms", lambda self, work: elapsed(self, work) * (6 if self.clock_ms < 2.0 else 1)
    )
    session = runner(driver).build(chain([7]))
    (graph,) = driver.graphs
    assert graph.inferences == 4 and session.sample(4) == pytest.approx(0.06)


def test_a_burst_is_repeats_replays_and_one_before(fake: Fake) -> None:
    driver = fake(inference_ms=0.7)
    session = runner(driver).build(chain([7]))
    driver.log.clear()
    session.sample(5)
    assert driver.log == ["replay"] * 6
    assert session.clock == runner(driver).clock == "cuda" and session.ramps


def test_after_a_run_the_data_made_up_comes_back(fake: Fake) -> None:
    session = runner(fake()).build(chain([7]))
    engine = session._engine
    assert engine is not None
    resident = {name: value.clone() for name, value in engine._inputs.items()}
    assert float(resident["x"].std()) == pytest.approx(1.0, abs=0.1)
    session.run({"x": np.zeros((2, 3, 9, 9), np.float32)})
    assert not engine._inputs["x"].any()
    session.sample(1)
    assert_close(dict(engine._inputs), resident, 0)


def test_flat_data_comes_back_as_well(fake: Fake) -> None:
    """What needs no other layout must not be its own spare copy."""
    graph = onnx.parser.parse_graph("g (float[3, 5] x) => (float[3, 5] y) { y = Relu(x) }")
    session = runner(fake()).build(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    )
    engine = session._engine
    assert engine is not None
    resident = engine._inputs["x"].clone()
    session.run({"x": np.zeros((3, 5), np.float32)})
    session.sample(1)
    assert_close(engine._inputs["x"], resident, 0)


def test_buffers_stay_where_they_are(fake: Fake) -> None:
    session = runner(fake()).build(chain([7]))
    engine = session._engine
    assert engine is not None and engine._graph is not None
    before = [value.data_ptr() for value in (*engine._inputs.values(), *engine._graph.outputs)]
    first = session.run(image())["y"]
    session.sample(2)
    second = session.run(image(seed=1))["y"]
    assert [value.data_ptr() for value in (*engine._inputs.values(), *engine._graph.outputs)] == before
    assert abs(first - second).max() > 0  # what was handed out is not overwritten


def test_where_capture_fails_it_runs_kernel_by_kernel_and_says_so(fake: Fake) -> None:
    driver = fake(inference_ms=0.7, refuses=RuntimeError("operation not permitted\nwhen stream is capturing"))
    with pytest.warns(RuntimeWarning, match=r"the model in memory cannot be captured .*\(operation not permitted\)"):
        session = runner(driver).build(chain([7]))
    assert_close(session.run(image()), OrtRunner().build(chain([7])).run(image()), 1e-6)
    assert session.sample(3) == pytest.approx(0.7 + 10 * LAUNCH_MS)


@pytest.mark.parametrize(
    "refuses", [RuntimeError("operation not permitted\nmore"), torch.OutOfMemoryError("operation not permitted")]
)
def test_where_several_inferences_are_not_captured_the_graph_of_one_stays(fake: Fake, refuses: Exception) -> None:
    driver = fake(inference_ms=0.002, refuses=refuses, sound=1)
    with pytest.warns(RuntimeWarning, match=r"34 inferences of the model .*\(operation not permitted\);.*one"):
        session = runner(driver).build(chain([7]))
    (graph,) = driver.graphs
    assert graph.inferences == 1 and session._engine is not None and session._engine._graph is graph
    assert_close(session.run(image()), OrtRunner().build(chain([7])).run(image()), 1e-6)
    assert session.sample(3) == pytest.approx(LAUNCH_MS)


def test_a_full_memory_is_the_users_to_mend(fake: Fake) -> None:
    driver = fake(refuses=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    with pytest.raises(SluiceError, match=r"no room for the model in memory \(CUDA out of memory.*smaller batch"):
        runner(driver).build(chain([7]))


def test_shapes_that_are_not_static_are_for_run_alone(fake: Fake) -> None:
    model = chain([7], batch="n")
    session = runner(fake()).build(model)
    for batch in (1, 3):
        assert_close(session.run(image(batch)), OrtRunner().build(model).run(image(batch)), 1e-6)
    with pytest.raises(SluiceError, match=r"cannot time the model in memory: input 'x' has dynamic shape \['n', 3"):
        session.sample(1)
    assert runner(fake(inference_ms=0.7)).build(model, batch=2).sample(1) == pytest.approx(0.7)


@pytest.mark.parametrize(
    "feeds",
    [
        {},
        {"x": np.zeros((2, 3, 9, 9), np.float32), "z": np.zeros(1, np.float32)},
        {"x": np.zeros((3, 3, 9, 9), np.float32)},
        {"x": np.zeros((2, 3, 9), np.float32)},
        {"x": np.zeros((2, 3, 9, 9), np.float64)},
    ],
)
def test_feeds_must_match(fake: Fake, feeds: dict[str, Any]) -> None:
    with pytest.raises(SluiceError, match=r"cannot run the model in memory with input.*takes x: torch.float32 \[2, 3"):
        runner(fake()).build(chain([7])).run(feeds)


def test_what_torch_cannot_run_is_refused_when_it_is_built(fake: Fake) -> None:
    model = chain([7], batch="n")
    model.graph.node[1].op_type = "NonZero"
    with pytest.raises(SluiceError, match="NonZero 'a0' of the model in memory has no counterpart in torch"):
        runner(fake()).build(model)
    with pytest.raises(SluiceError, match="no input 'z'"):
        runner(fake()).build(chain([7]), feeds_shapes={"z": (1,)})


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_bit_parts_take_and_give_their_type(fake: Fake, precision: str) -> None:
    part = to_precision(chain([7]), precision, part=True)
    feeds = image() if precision == "bf16" else {"x": image()["x"].astype(np.float16)}
    (found,) = runner(fake()).build(part).run(feeds).values()
    assert found.dtype == (np.float32 if precision == "bf16" else np.float16)
    (want,) = OrtRunner().build(chain([7])).run(image()).values()
    assert_close(found, want, 3e-2)


def test_many_engines_are_measured_and_then_forgotten(fake: Fake) -> None:
    driver = fake(inference_ms=0.3)
    sessions = [runner(driver).build(chain([width])) for width in range(1, 7)]
    assert len(driver.graphs) == 6
    found = measure(sessions, min_bursts=3, max_bursts=3, rng=np.random.default_rng(0))
    assert [m.ms for m in found] == pytest.approx([0.3] * 6)
    gone = [weakref.ref(session) for session in sessions]
    del sessions
    gc.collect()
    assert not driver.graphs and not any(ref() for ref in gone)


def settings() -> tuple[object, ...]:
    cudnn: Any = torch.backends.cudnn
    return cudnn.benchmark, cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("own", ["none", "ieee", "tf32"])
def test_settings_of_the_process_are_put_back(own: str) -> None:
    """Also those that a user made in torch's newer way, after which torch refuses the older one."""
    products: Any = torch.backends.cuda.matmul
    given = products.fp32_precision
    products.fp32_precision = own
    try:
        before = settings()
        with suppress(ZeroDivisionError), kernel_choice():
            assert settings() == (True, "tf32", "tf32") != before
            raise ZeroDivisionError
        assert settings() == before
    finally:
        products.fp32_precision = given


class FakeCudaGraph:
    """What `torch.cuda.CUDAGraph` is asked for."""

    calls: ClassVar[list[object]] = []

    def capture_begin(self, pool: object) -> None:
        self.calls.append(pool)
        if "no begin" in self.calls:
            raise RuntimeError("cannot begin")

    def capture_end(self) -> None:
        self.calls.append("end")
        if "broken" in self.calls:
            raise RuntimeError("capture failed")

    def replay(self) -> None:
        self.calls.append("replay")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> CudaDriver:
    pools = iter(range(100))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeCudaGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: FakeCudaGraph.calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def stop(index: int, pool: object) -> None:
        FakeCudaGraph.calls.append(("stop", index, pool))
        if "stopped" in FakeCudaGraph.calls:
            raise RuntimeError("not currently recording to the pool")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", stop, raising=False)
    monkeypatch.setattr(FakeCudaGraph, "calls", [])
    return CudaDriver()


def test_graphs_share_a_pool_until_none_is_left(driver: CudaDriver) -> None:
    first, second = driver.capture(list), driver.capture(list)
    del first
    third = driver.capture(list)
    assert FakeCudaGraph.calls == ["empty", 0, "end", 0, "end", 0, "end"]
    del second, third
    gc.collect()
    FakeCudaGraph.calls.clear()
    kept = driver.capture(list)
    assert FakeCudaGraph.calls == ["empty", 1, "end"] and kept.outputs == []


def test_a_capture_that_breaks_is_ended_and_reported(driver: CudaDriver) -> None:
    def compute() -> list[torch.Tensor]:
        FakeCudaGraph.calls.append("broken")
        raise RuntimeError("not while capturing")

    with pytest.raises(RuntimeError, match="not while capturing"):
        driver.capture(compute)
    assert FakeCudaGraph.calls[-2:] == ["end", ("stop", 0, 0)]


@pytest.mark.parametrize("alive", [False, True])
@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("where", ["begin", "end", "compute"])
def test_after_a_capture_that_ended_badly_others_go_on(
    driver: CudaDriver, where: str, stopped: bool, alive: bool
) -> None:
    """torch goes on taking memory from its pool until it is told to stop, and cannot empty its caches meanwhile."""
    kept = driver.capture(list) if alive else None
    calls = FakeCudaGraph.calls
    calls[:] = ["stopped"] * stopped + ["no begin"] * (where == "begin") + ["broken"] * (where == "end")

    def compute() -> list[torch.Tensor]:
        if where == "compute":
            calls.append("broken")
            raise RuntimeError("not while capturing")
        return []

    with pytest.raises(RuntimeError, match={"begin": "cannot begin", "end": "capture failed"}.get(where, "not while")):
        driver.capture(compute)
    assert calls[-1] == ("stop", 0, 0)
    calls.clear()
    after = driver.capture(list)
    assert calls == [1, "end"]  # another pool, and the caches are left alone
    del kept, after
    gc.collect()
    calls.clear()
    assert driver.capture(list).outputs == [] and calls == [2, "end"]


def test_a_computation_that_fails_but_ends_well_keeps_the_pool(driver: CudaDriver) -> None:
    kept = driver.capture(list)
    with pytest.raises(ZeroDivisionError):
        driver.capture(lambda: [torch.zeros(1 // 0)])
    FakeCudaGraph.calls.clear()
    driver.capture(list)
    assert FakeCudaGraph.calls == [0, "end"] and kept.outputs == []


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_collected_while_capturing(driver: CudaDriver, enabled: bool, fails: bool) -> None:
    seen: list[bool] = []

    def compute() -> list[torch.Tensor]:
        seen.append(gc.isenabled())
        if fails:
            raise RuntimeError("not while capturing")
        return []

    (gc.enable if enabled else gc.disable)()
    try:
        with suppress(RuntimeError):
            driver.capture(compute)
        assert seen == [False] and gc.isenabled() == enabled
    finally:
        gc.enable()


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "gpu_names", lambda: ())
    assert missing().startswith("there is no NVIDIA GPU")
    monkeypatch.setattr(nvidia, "gpu_names", lambda: ("Some GPU",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing() == f"torch {torch.__version__} cannot use the GPU; install a CUDA build that fits the driver"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert missing() == "" and TorchCudaRunner().device == "Some GPU"
    monkeypatch.setattr(torch_cuda, "find_spec", lambda name: None)
    assert missing().startswith("torch is not installed")


def test_the_version_names_all_that_times_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "driver_version", lambda: "580.1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    version = TorchCudaRunner().version
    assert version.startswith(torch.__version__) and "CUDA 13.0" in version and version.endswith("driver 580.1")


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["plain", "squeeze_excite", "shuffle", "tokens", "norms", "volume"])
def test_on_a_gpu(name: str) -> None:
    model, inputs = build(name)
    dense = to_onnx(model, inputs)
    feeds = {info.name: value.numpy() for info, value in zip(dense.graph.input, inputs, strict=True)}
    want = OrtRunner().build(dense).run(feeds)
    for precision, tol in (("fp32", 5e-3), ("fp16", 2e-2), ("bf16", 1e-1)):
        session = TorchCudaRunner().build(to_precision(dense, precision), batch=len(inputs[0]))
        assert_close(session.run(feeds), want, tol)
        assert session.sample(3) > 0
        assert_close(session.run(feeds), want, tol)
        assert session._engine is not None and session._engine._graph is not None


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_memory_of_many_engines_on_a_gpu_is_modest() -> None:
    """24 engines with a wide inner tensor: the sum of their weights and borders, and the inner tensors of one."""
    torch_driver.cuda_driver()
    wide = chain([256, 3], batch=16, size=57)
    inner = 16 * 256 * 57 * 57 * 4
    before = torch.cuda.memory_reserved()
    sessions = [TorchCudaRunner().build(wide) for _ in range(24)]
    taken = torch.cuda.memory_reserved() - before
    assert taken < 12 * inner
    assert all(session.sample(2) > 0 for session in sessions)
    del sessions
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < taken
    assert cuda_driver() is cuda_driver()
