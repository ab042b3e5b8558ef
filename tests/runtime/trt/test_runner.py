"""Sessions and the runner, on a driver and a TensorRT that exist in memory; on a GPU the real ones."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sluice.core.errors import SluiceError
from sluice.passes.precision.to_precision import to_precision
from sluice.runtime.base import nvidia
from sluice.runtime.base import runner as runner_module
from sluice.runtime.base.compare import assert_close
from sluice.runtime.base.cuda import Cuda
from sluice.runtime.base.runner import PLAIN, TRIAL, TRIALS_MS
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.targets import make_runner
from sluice.runtime.trt import runner as tensorrt
from sluice.runtime.trt.build import listener, static_model
from sluice.runtime.trt.inspect import EngineLayer, Tensor, kernels, node_name
from sluice.runtime.trt.runner import TensorRtRunner, missing
from sluice.runtime.trt.session import TensorRtSession
from sluice.runtime.trt.settings import Settings
from tests.device import chain
from tests.fake_tensorrt import MS, FakeCuda, fake_tensorrt
from tests.runtime.trt.test_borders import drawn, graph, heads, node

BATCH = 3
X = np.random.default_rng(1).standard_normal((BATCH, 3, 9, 9)).astype(np.float32)
Here = Callable[..., tuple[FakeCuda, ModuleType]]


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine here computes in earnest, slowly, and its clock is as high as it gets."""
    monkeypatch.setattr(runner_module, "TRIALS_MS", 0.01)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """Put a fake driver and a fake TensorRT in place."""

    def install(cuda: FakeCuda | None = None, **faults: Any) -> tuple[FakeCuda, ModuleType]:
        cuda = cuda or FakeCuda()
        trt = fake_tensorrt(cuda, **faults)
        monkeypatch.setattr(tensorrt, "find_tensorrt", lambda: trt)
        monkeypatch.setattr(Cuda, "load", lambda: cuda)
        monkeypatch.setattr(nvidia, "gpu_names", lambda: ("NVIDIA Some", "NVIDIA Other"))
        monkeypatch.setattr(nvidia, "driver_version", lambda: "580.65.06")
        monkeypatch.setattr(nvidia, "sm_clock_mhz", lambda: 1410)
        return cuda, trt

    return install


def identity(kind: int, shape: list[int]) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(name, kind, shape) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", infos[:1], infos[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def two_inputs() -> onnx.ModelProto:
    shapes = {"a": [2, 5], "b": [2, 1], "difference": [2, 5], "product": [2, 5]}
    infos = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    nodes = [helper.make_node("Sub", ["a", "b"], ["difference"]), helper.make_node("Mul", ["a", "b"], ["product"])]
    graph = helper.make_graph(nodes, "two", [infos["a"], infos["b"]], [infos["difference"], infos["product"]])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(session: Any, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    return session.run(feeds)["y"]


def test_outputs_are_those_of_the_model(here: Here) -> None:
    here()
    model = chain([5, 7], batch="N")
    session = make_runner("tensorrt").build(model, batch=BATCH)
    for feed in (X, X[::-1], np.asfortranarray(2 * X)):
        assert_close(run(session, {"x": feed}), run(OrtRunner().build(model), {"x": np.ascontiguousarray(feed)}), 1e-5)


def test_every_tensor_has_its_own_memory(here: Here) -> None:
    """Two inputs and two outputs, by name and in any order."""
    here()
    session = TensorRtRunner().build(two_inputs())
    a, b = (
        np.random.default_rng(k).standard_normal(shape).astype(np.float32) for k, shape in enumerate([(2, 5), (2, 1)])
    )
    found = session.run({"b": b, "a": a})
    assert_close(found, {"difference": a - b, "product": a * b}, 1e-6)
    assert_close(session.run({"a": -a, "b": b}), {"difference": -a - b, "product": -a * b}, 1e-6)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TensorProto.FLOAT, np.float32),
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
        (TensorProto.INT8, np.int8),
        (TensorProto.INT64, np.int64),
        (TensorProto.BOOL, np.bool_),
    ],
)
def test_types_of_inputs_and_outputs(here: Here, kind: int, dtype: Any) -> None:
    cuda, _ = here()
    session = TensorRtRunner().build(identity(kind, [4, 33]))
    values = (np.arange(132).reshape(4, 33) - 66).astype(dtype)
    found = run(session, {"x": values})
    assert found.dtype == values.dtype and np.array_equal(found, values)
    session.sample(1)
    (resident,) = {bytes(content) for content in cuda.memory.values()}  # the input, and its copy in the output
    data = np.frombuffer(resident, dtype).astype(np.float64)
    assert np.count_nonzero(data) > 0.9 * data.size
    if kind not in (TensorProto.INT64, TensorProto.BOOL):
        assert np.unique(data).size > 60 and data.min() < 0 < data.max()


def test_a_type_that_numpy_cannot_hold_is_refused(here: Here) -> None:
    here()
    with pytest.raises(SluiceError, match="'y' of the model in memory is DOUBLE"):
        TensorRtRunner().build(identity(TensorProto.DOUBLE, [2]))


def test_warm_up_capture_and_launches_come_in_this_order(here: Here) -> None:
    cuda, _ = here()
    session = TensorRtRunner().build(chain([5]), batch=2)
    assert session.captured is None
    assert session.sample(5) == pytest.approx(MS)
    assert session.captured is True
    assert [entry for entry in cuda.log if entry.startswith("address")] == ["address of y", "address of x"]
    work = [entry for entry in cuda.log if entry not in ("malloc", "stream", "event")]
    assert work == [
        *("address of y", "address of x", "upload", "synchronize"),
        *("enqueue", "enqueue", "synchronize", "begin_capture", "enqueue", "end_capture"),
        *("launch", "record", *TRIAL * ["launch"], "record"),
        *("launch", "record", *5 * ["launch"], "record"),
    ]
    del cuda.log[:]
    assert session.sample(3) == pytest.approx(MS)
    assert cuda.log == ["launch", "record", "launch", "launch", "launch", "record"]


def test_the_burst_is_divided_by_its_length(here: Here) -> None:
    cuda, _ = here()
    session = TensorRtRunner().build(chain([5]), batch=2)
    for repeats in (1, 4, 16):
        before = cuda.now
        assert session.sample(repeats) == pytest.approx(MS)
        assert cuda.now - before > repeats * MS


@pytest.mark.parametrize(("ms", "copies"), [(0.0004, 34), (0.001, 34), (0.03, 7), (0.19, 2), (1.5, 1)])
def test_launches_are_not_what_is_timed(here: Here, ms: float, copies: int) -> None:
    """As many inferences in one as make 0.2 ms of what looks like one, which is never less than a launch."""
    cuda, _ = here(FakeCuda(ms=ms, launch_ms=0.006))
    session = TensorRtRunner().build(chain([5]), batch=2)
    for repeats in (1, 5, 300):
        del cuda.log[:]
        assert session.sample(repeats) == pytest.approx(ms)
    assert cuda.log.count("launch") == 1 + math.ceil(300 / copies)
    assert run(session, {"x": X[:2]}).shape == (2, 5)


def test_the_trials_last_until_the_clock_has_come_up(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the clock of an idle device an inference of 0.15 ms takes 0.9 ms, and one would seem to be enough."""
    monkeypatch.setattr(runner_module, "TRIALS_MS", TRIALS_MS)
    cuda, _ = here(FakeCuda(ms=0.15))
    elapsed, tried = cuda.elapsed_ms, list[float]()

    def ramped(start: int, end: int) -> float:
        tried.append(elapsed(start, end) * (6 if sum(tried) < 10.0 else 1))
        return tried[-1]

    monkeypatch.setattr(cuda, "elapsed_ms", ramped)
    session = TensorRtRunner().build(chain([5]), batch=2)
    session.sample(1)
    assert session._copies == 2
    assert tried[0] == pytest.approx(6 * TRIAL * 0.15) and sum(tried[:-1]) >= TRIALS_MS > sum(tried[:-2])


def test_after_a_run_the_data_is_random_again(here: Here) -> None:
    cuda, _ = here()
    session = TensorRtRunner().build(identity(TensorProto.FLOAT, [7]))
    session.sample(1)
    resident = {bytes(content) for content in cuda.memory.values()}
    run(session, {"x": np.zeros(7, np.float32)})
    session.sample(1)
    assert {bytes(content) for content in cuda.memory.values()} == resident != {bytes(28)}


@pytest.mark.parametrize("fault", ["the capture is lost", "the context refuses"])
def test_without_a_graph_inferences_are_enqueued(here: Here, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    lost = fault == "the capture is lost"
    cuda, _ = here(FakeCuda(capturable=not lost), runs=lambda count: lost or count != 3)
    session = TensorRtRunner().build(chain([5]), batch=2)
    with caplog.at_level(logging.WARNING):
        assert session.sample(4) == pytest.approx(MS)
    assert session.captured is False
    assert "without a CUDA graph" in caplog.text
    assert "launch" not in cuda.log
    assert cuda.log[-7:] == ["enqueue", "record", *4 * ["enqueue"], "record"]


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("at", [3, 9])
def test_an_interrupted_capture_is_ended(here: Here, capturable: bool, at: int) -> None:
    """In the first graph, or in the one of several copies; after that the session is as good as new."""
    cuda = FakeCuda(ms=0.03)

    def interrupted(count: int) -> bool:
        assert not gc.isenabled() or cuda.capturing is None
        if count == at:
            cuda.capturable = capturable
            raise KeyboardInterrupt
        return True

    here(cuda, runs=interrupted)
    session = TensorRtRunner().build(chain([5]), batch=2)
    with pytest.raises(KeyboardInterrupt):
        session.sample(4)
    assert cuda.capturing is None and gc.isenabled() and session.captured is None
    assert cuda.log.count("end_capture") - cuda.log.count("destroy_graph") == (at > 3)
    cuda.capturable = True
    assert session.sample(4) == pytest.approx(0.03)
    assert session.captured is True
    del session
    gc.collect()
    assert not cuda.alive


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_during_a_capture(here: Here, collects: bool) -> None:
    seen: set[tuple[bool, bool]] = set()

    def runs(count: int) -> bool:
        seen.add((cuda.capturing is not None, gc.isenabled()))
        return True

    cuda, _ = here(runs=runs)
    session = TensorRtRunner().build(chain([5]), batch=2)
    was = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        session.sample(1)
        assert gc.isenabled() is collects
    finally:
        (gc.enable if was else gc.disable)()
    assert seen == {(False, collects), (True, False)}


def test_everything_is_given_back(here: Here) -> None:
    cuda, _ = here()
    session = TensorRtRunner().build(chain([5]), batch=2)
    session.sample(1)
    run(session, {"x": X[:2]})
    assert cuda.alive
    del session
    gc.collect()
    assert not cuda.alive and not cuda.memory
    assert cuda.log.index("destroy_graph") < cuda.log.index("free") < cuda.log.index("destroy_stream")


def test_a_failed_session_gives_back_what_it_took(here: Here) -> None:
    cuda, _ = here(FakeCuda(room=100))
    with pytest.raises(SluiceError, match="out of memory"):
        TensorRtRunner().build(chain([5]), batch=2)
    gc.collect()
    assert not cuda.alive


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (
            {"load_error": "IRuntime: Error Code 6: API Usage Error (wrong version)"},
            "load .* wrong version; build it with",
        ),
        ({"runs": lambda count: False}, "run .* it gives no reason; build it"),
        ({"location": "HOST"}, "'y' of the model in memory has no fixed size on the device"),
    ],
)
def test_what_fails_on_the_device_is_one_sentence(here: Here, faults: dict[str, Any], words: str) -> None:
    here(**faults)
    with pytest.raises(SluiceError, match=words) as caught:
        TensorRtRunner().build(chain([5]), batch=2).sample(1)
    assert "\n" not in str(caught.value)


def test_every_failure_gives_its_own_reason(here: Here) -> None:
    """There is one logger for all of them, whatever was built or loaded first."""
    here(build_error="no kernel for c0", load_error="a wrong version")
    plan = chain([5]).SerializeToString()
    for _ in range(2):
        with pytest.raises(SluiceError, match="cannot build the model in memory: no kernel for c0;"):
            TensorRtRunner().build(chain([5]))
        gc.collect()
        with pytest.raises(SluiceError, match=r"cannot load the engine of .*: a wrong version;"):
            TensorRtRunner().load(plan)
        gc.collect()
    _, trt = here(runs=lambda count: False)
    session = TensorRtRunner().load(plan)
    for call in (lambda: session.sample(1), lambda: session.run({"x": X[:2]})):
        listener(trt).errors.append("what another session was told")
        with pytest.raises(SluiceError, match=r"cannot run the engine of .*: it gives no reason;"):
            call()


def test_one_builder_serves_all_engines(here: Here) -> None:
    _, trt = here()
    runner = TensorRtRunner()
    assert trt.calls["builders"] == 0
    for width in (5, 7, 11):
        runner.build(chain([width]))
    assert (trt.calls["builders"], trt.calls["builds"]) == (1, 3)


def test_an_output_of_unknown_size_is_refused(here: Here) -> None:
    here()
    model = identity(TensorProto.FLOAT, [4])
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "found"
    with pytest.raises(SluiceError, match=r"'y' of the model in memory has no fixed size .*shape \[-1\]"):
        TensorRtRunner().build(model)


@pytest.mark.parametrize(
    "feeds",
    [{}, {"x": X[:1]}, {"x": X.astype(np.float64)}, {"x": X, "z": X}, {"z": X}],
    ids=["missing", "shape", "type", "unknown", "other"],
)
def test_wrong_feeds_are_refused(here: Here, feeds: dict[str, np.ndarray]) -> None:
    here()
    session = TensorRtRunner().build(chain([5], batch=BATCH))
    with pytest.raises(SluiceError, match=r"cannot run on .*; it takes x: float32 \[3, 3, 9, 9\]"):
        session.run(feeds)


def test_the_runner_names_its_device_and_versions(here: Here) -> None:
    here()
    runner = make_runner("tensorrt")
    assert isinstance(runner, TensorRtRunner)
    assert (runner.clock, runner.device) == ("cuda", "NVIDIA Some")
    assert runner.version == "TensorRT 11.4.0.106, driver 580.65.06, streams 1, timings 8"
    assert runner.sm_clock_mhz() == 1410
    assert runner.build(chain([5])).clock == "cuda"
    here(name="tensorrt_rtx_bindings", version="1.7.1.116")
    assert TensorRtRunner().version == "TensorRT-RTX 1.7.1.116, driver 580.65.06, streams 1, timings 8"


def test_what_is_missing(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise SluiceError("TensorRT is not here; install it")

    here()
    assert missing() == ""
    monkeypatch.setattr(nvidia, "gpu_names", lambda: ())
    assert "no NVIDIA GPU" in missing()
    monkeypatch.setattr(tensorrt, "find_tensorrt", fails)
    assert missing() == "TensorRT is not here; install it"
    with pytest.raises(SluiceError, match="TensorRT is not here"):
        make_runner("tensorrt")


@pytest.mark.parametrize(
    ("name", "capability", "said"),
    [
        ("tensorrt_rtx", (9, 0), True),
        ("tensorrt_rtx_bindings", (9, 0), True),
        ("tensorrt_rtx", (8, 9), False),
        ("tensorrt_rtx", (12, 0), False),
        ("tensorrt_rtx", None, False),
        ("tensorrt", (9, 0), False),
    ],
)
def test_a_device_that_rtx_does_not_serve_is_named(
    name: str, capability: tuple[int, int] | None, said: bool, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(name=name, version="1.7.1.116")
    monkeypatch.setattr(nvidia, "compute_capability", lambda: capability)
    reason = (
        "TensorRT-RTX 1.7.1.116 does not support NVIDIA Some (compute capability 9.0); install tensorrt in its place"
    )
    assert missing() == (reason if said else "")


def test_rtx_is_given_its_scratch_memory(here: Here) -> None:
    for name, buffers in (("tensorrt", 2), ("tensorrt_rtx", 3)):
        cuda, _ = here(name=name, version="1.7.1.116")
        session = TensorRtRunner().build(chain([5]), batch=2)
        assert session.sample(2) == pytest.approx(MS)
        assert session.captured is True
        assert len(cuda.memory) == buffers
        del session
        gc.collect()
        assert not cuda.memory


def test_layers_come_from_the_inspector(here: Here) -> None:
    here()
    session = TensorRtRunner().build(chain([5]))
    assert [layer.nodes for layer in session.layers()] == [(f"node_of_{name}",) for name in ("c0", "a0", "p", "f", "y")]


def test_the_timing_cache_goes_round(here: Here) -> None:
    _, trt = here()
    runner = TensorRtRunner(b"[old]")
    runner.build(chain([5]))
    first = runner.cache
    assert trt.calls["caches"] == [b"[old]"] and first.startswith(b"[old]") and len(first) > 5
    runner.build(chain([7]))
    assert trt.calls["caches"] == [b"[old]"], "one object for all builds, parsed once"
    assert runner.cache.startswith(first) and len(runner.cache) > len(first)
    assert trt.calls["serialized"] == 3, "when somebody asks for it, and at no build"
    runner.cache = b"[other]"
    runner.build(chain([9]))
    assert trt.calls["caches"] == [b"[old]", b"[other]"] and runner.cache.startswith(b"[other]")


def test_an_engine_that_is_asked_for_again_is_loaded(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    _, trt = here()
    runner = TensorRtRunner()
    feeds = {"x": X}
    one = runner.build(chain([5], batch="N"), batch=BATCH).run(feeds)
    assert_close(runner.build(chain([5], batch="N"), batch=BATCH).run(feeds), one, 1e-6)
    assert trt.calls["builds"] == 1
    runner.build(chain([5], batch="N"), batch=BATCH + 1)
    runner.build_part(chain([5], batch=BATCH))
    runner.build(chain([5], batch=BATCH))
    assert trt.calls["builds"] == 4, "another batch, a part, and the whole are engines of their own"
    runner.build_part(chain([5], batch=BATCH))
    assert trt.calls["builds"] == 4
    monkeypatch.setattr(tensorrt, "KEPT_BYTES", 1)
    runner.build(chain([6]))
    runner.build(chain([6]))
    assert trt.calls["builds"] == 5
    runner.build(chain([5], batch=BATCH))
    assert trt.calls["builds"] == 6, "what does not fit is built again"


@pytest.mark.parametrize(("before", "kept"), [(b"", b""), (b"[old]", b"[old]"), (b"foreign", b"")])
def test_rtx_keeps_what_it_compiled(before: bytes, kept: bytes, here: Here) -> None:
    _, trt = here(name="tensorrt_rtx")
    runner = TensorRtRunner(before)
    assert runner.cache == before
    session = runner.build(chain([5], batch="N"), batch=BATCH)
    runner.build(chain([6]))
    assert runner.cache == kept + 2 * b"[kernels]" and trt.calls["runtime caches"] == 1 and not trt.calls["caches"]
    assert_close(run(session, {"x": X}), run(OrtRunner().build(chain([5], batch="N")), {"x": X}), 1e-5)
    runner.cache = b"[other]"
    runner.build(chain([5]))
    assert runner.cache == b"[other][kernels]"


def test_int8_on_rtx_is_refused(here: Here) -> None:
    here(name="tensorrt_rtx")
    with pytest.raises(SluiceError, match="gains nothing from int8"):
        TensorRtRunner().build(to_precision(chain([5]), "int8", target="tensorrt"))


def test_an_engine_can_be_loaded_from_its_file(here: Here) -> None:
    here()
    model = chain([5], batch=BATCH)
    session = TensorRtRunner().load(model.SerializeToString(), "out.engine")
    assert isinstance(session, TensorRtSession)
    assert_close(run(session, {"x": X}), run(OrtRunner().build(model), {"x": X}), 1e-5)


@pytest.mark.device
def test_on_a_gpu() -> None:
    if reason := missing():
        pytest.skip(reason)
    runner = TensorRtRunner()
    model = chain([64, 128, 256], batch="N", size=56)
    x = np.random.default_rng(0).standard_normal((8, 3, 56, 56)).astype(np.float32)
    session, small = runner.build(model, batch=8), runner.build(model, batch=1)
    assert_close(run(session, {"x": x}), run(OrtRunner().build(model), {"x": x}), 5e-3)  # TF32
    for _ in range(20):
        session.sample(50)
    assert session.captured
    assert 0 < min(small.sample(50) for _ in range(9)) < min(session.sample(50) for _ in range(9)) < 10
    assert any("Conv" in name or "c1" in name for layer in session.layers() for name in layer.nodes)
    assert runner.sm_clock_mhz() is None or runner.sm_clock_mhz() > 100


def test_a_part_has_the_borders_that_it_has_inside(here: Here) -> None:
    cuda, trt = here()
    model = to_precision(chain([5, 6]), "fp16", part=True)
    part = static_model(model, BATCH)
    name = part.graph.input[0].name
    session = TensorRtRunner().build_part(part)
    # Five channels are no whole vector, so the builder may leave out the padding.
    assert trt.calls["formats"][name] == (1 << trt.TensorFormat.HWC8) | (1 << trt.TensorFormat.HWC)
    assert session.kernels is not None and session.kernels.total() == len(part.graph.node)
    sizes = {len(memory) for memory in cuda.memory.values()}
    dims = [dim.dim_value for dim in part.graph.input[0].type.tensor_type.shape.dim]
    dims[1] = 8  # whole vectors
    assert math.prod(dims) * 2 in sizes
    TensorRtRunner().build(part)
    assert trt.calls["formats"] == {}
    part.graph.input[0].doc_string = PLAIN
    TensorRtRunner().build_part(part)
    assert name not in trt.calls["formats"]


def test_an_engine_runs_in_one_stream(here: Here) -> None:
    _, trt = here()
    runner = TensorRtRunner()
    runner.build(chain([5, 6]), batch=BATCH)
    assert (trt.calls["max_aux_streams"], trt.calls["avg_timing_iterations"]) == (0, 8)
    other = TensorRtRunner(settings=Settings(aux_streams=1, timings=2))
    other.build(chain([5, 6]), batch=BATCH)
    assert (trt.calls["max_aux_streams"], trt.calls["avg_timing_iterations"]) == (1, 2)
    assert runner.version != other.version  # their times do not share a table
    with pytest.raises(SluiceError, match="timings=0"):
        Settings(timings=0)


def test_a_part_whose_product_is_copied_is_built_on_rows(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    _, trt = here()
    nodes = [node("Conv", "x w", "a"), node("Relu", "a", "y")]
    part = graph(nodes, [("x", (BATCH, 3, 4, 4))], [("y", (BATCH, 6, 4, 4))], w=drawn(6, 3, 1, 1))
    shape = (BATCH, 6, 16)
    tensors = {size: (Tensor("t", size, "Half", ""),) for size in (shape, (BATCH, 6, 4, 4))}
    product = EngineLayer("fc", "runtime_fusion", tuple(map(node_name, part.graph.node)), (), tensors[shape])
    copy = EngineLayer("reshape", "kgen", (), tensors[shape], tensors[BATCH, 6, 4, 4])
    monkeypatch.setattr(TensorRtSession, "layers", lambda self: (product, copy))
    session = TensorRtRunner().build_part(part)
    assert trt.calls["builds"] == 2 and trt.calls["formats"] == {}, "rows have no layout"
    assert session.kernels == kernels([product]), "what the network runs"
    monkeypatch.setattr(TensorRtSession, "layers", lambda self: (product,))
    TensorRtRunner().build_part(part)
    assert trt.calls["builds"] == 3


@pytest.mark.parametrize("fewer", [False, True])
def test_a_part_with_rows_in_two_orders_has_the_one_of_fewer_kernels(
    fewer: bool, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trt = here()
    tell = TensorRtSession.layers

    def layers(self: TensorRtSession) -> tuple[EngineLayer, ...]:
        """One more in the file's order, or in the other one."""
        told = tell(self)
        turned = any(layer.name.endswith(":turned") for layer in told)
        return told[:3] if turned == fewer else told[:4]

    monkeypatch.setattr(TensorRtSession, "layers", layers)
    session = TensorRtRunner().build_part(heads())
    assert trt.calls["builds"] == 2
    assert session.kernels is not None and session.kernels.total() == 3
    assert any(layer.name.endswith(":turned") for layer in tell(session)) == fewer
