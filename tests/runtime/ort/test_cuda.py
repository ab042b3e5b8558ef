"""ONNX Runtime's CUDA session; its logic runs on the CPU provider, in the place of which only the hardware differs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sluice.core.errors import SluiceError
from sluice.passes.cut.export import to_onnx
from sluice.passes.precision.to_precision import to_precision
from sluice.runtime.base import nvidia
from sluice.runtime.base.compare import assert_close
from sluice.runtime.base.cuda import Cuda
from sluice.runtime.ort import cpu as ort
from sluice.runtime.ort import cuda as ort_cuda
from sluice.runtime.ort import session as ort_session
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.ort.cuda import CUDA, VARIABLE, OrtCudaRunner, Provider, missing
from sluice.runtime.ort.session import load_library
from sluice.runtime.targets import available_targets
from tests.device import chain
from tests.fake_tensorrt import FakeCuda
from tests.networks import build

ON_CPU = OrtCudaRunner(Provider("CPUExecutionProvider", "cpu"))


@pytest.fixture(autouse=True)
def loaded_anew() -> Iterator[None]:
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a module with this source in the place of ONNX Runtime, on a machine with a GPU."""

    def place(source: str) -> None:
        (tmp_path / "onnxruntime.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "onnxruntime")
        monkeypatch.setattr(nvidia, "gpu_names", lambda: ("Some GPU",))

    return place


def image(batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((batch, 3, 9, 9)).astype(np.float32)}


@pytest.mark.parametrize("batch", [2, "n"])
def test_it_computes_what_onnx_runtime_computes(batch: int | str) -> None:
    model = chain([7, 5], batch=batch)
    session = ON_CPU.build(model)
    want = OrtRunner().build(model).run(image())
    assert_close(session.run(image()), want, 1e-6)
    if batch == 2:
        assert session.sample(3) > 0
        assert_close(session.run(image()), want, 1e-6)
    assert session.clock == ON_CPU.clock == "wall" and session.ramps


def test_inputs_and_outputs_stay_on_the_device_at_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads and writes fixed addresses."""
    made: list[Any] = []
    allocate = onnxruntime.OrtValue.ortvalue_from_shape_and_type

    def spy(shape: Any, dtype: Any, device: str, index: int) -> Any:
        made.append((tuple(shape), device, index, allocate(shape, dtype, device, index)))
        return made[-1][-1]

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", spy)
    model = chain([7])
    session = ON_CPU.build(model)
    session.sample(1)
    session.sample(2)
    ((shape, device, index, value),) = made
    assert (shape, device, index) == ((2, 5), "cpu", 0)
    (bound,) = session._binding.get_outputs()
    assert bound.data_ptr() == value.data_ptr()
    # The outputs of what is timed are those of the data that is bound.
    data = ort_session.resident_inputs(session._session, {}, "here")
    assert_close(value.numpy(), session.run(data)["y"], 1e-6)


def test_the_bursts_are_timed_on_the_wall_after_one_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    session = ON_CPU.build(chain([7]))
    session.sample(1)
    events: list[str] = []
    times = iter([1_000_000, 7_000_000])

    def now() -> int:
        events.append("clock")
        return next(times)

    monkeypatch.setattr(ort_cuda.time, "perf_counter_ns", now)
    monkeypatch.setattr(
        session, "_session", SimpleNamespace(run_with_iobinding=lambda binding: events.append("inference"))
    )
    monkeypatch.setattr(session, "_binding", SimpleNamespace(synchronize_outputs=lambda: events.append("wait")))
    assert session.sample(3) == pytest.approx(2.0)
    assert events == ["inference", "wait", "clock", *["inference"] * 3, "wait", "clock"]


def test_dynamic_shapes_are_for_run_alone() -> None:
    with pytest.raises(SluiceError, match=r"input 'x' has dynamic shape \['n', 3"):
        ON_CPU.build(chain([7], batch="n")).sample(1)
    assert ON_CPU.build(chain([7], batch="n"), batch=2).sample(1) > 0


def test_a_session_that_fell_back_to_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself would only log it; without its strictness the list of providers shows it."""
    monkeypatch.setattr(ort_cuda, "load_library", lambda *, cuda: "")
    lax = OrtCudaRunner(Provider(CUDA.name, "cuda"))
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(SluiceError, match="did not start"):
        lax.build(chain([7]))


def test_an_operator_on_the_cpu_is_refused_where_shapes_are_static(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_cuda, "load_library", lambda *, cuda: "")
    monkeypatch.setattr(Cuda, "load", FakeCuda)
    with pytest.warns(UserWarning), pytest.raises(SluiceError, match=r"cannot load the model in memory: .*CPU EP"):
        OrtCudaRunner().build(chain([7]))
    with pytest.warns(UserWarning), pytest.raises(SluiceError, match="did not start"):
        OrtCudaRunner().build(chain([7], batch="n"))


@pytest.mark.parametrize("batch", [2, "n"])
def test_what_a_session_is_told(batch: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    def load(model: Any, shapes: Any, provider: Any, *, entries: Any) -> Any:
        told.update(provider=provider, entries=entries)
        return SimpleNamespace(get_providers=lambda: [CUDA.name, "CPUExecutionProvider"])

    monkeypatch.setattr(ort_cuda, "load_library", lambda *, cuda: "")
    monkeypatch.setattr(ort_cuda, "load_session", load)
    monkeypatch.setattr(Cuda, "load", FakeCuda)
    OrtCudaRunner().build(chain([7], batch=batch))
    name, options = told["provider"]
    assert name == "CUDAExecutionProvider" and options["cudnn_conv_algo_search"] == "EXHAUSTIVE"
    assert ("enable_cuda_graph" in options) == ("user_compute_stream" in options) == (batch == 2)
    assert told["entries"] == ({"session.disable_cpu_ep_fallback": "1"} if batch == 2 else {})


def test_the_layout_is_the_users_and_part_of_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of the two layouts hold times of other kernels."""
    given: list[dict[str, str]] = []

    def load(model: Any, shapes: Any, provider: Any, *, entries: Any) -> Any:
        given.append(provider[1])
        return SimpleNamespace(get_providers=lambda: [CUDA.name])

    monkeypatch.setattr(ort_cuda, "load_library", lambda *, cuda: "")
    monkeypatch.setattr(ort_cuda, "load_session", load)
    monkeypatch.setattr(Cuda, "load", FakeCuda)
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    versions = []
    for value in (None, "prefer_nhwc=0", " prefer_nhwc=1"):
        monkeypatch.delenv(VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(VARIABLE, value)
        runner = OrtCudaRunner()
        runner.build(chain([7]))
        versions.append(runner.version)
    assert [options.get("prefer_nhwc") for options in given] == [None, None, "1"]
    assert versions[0] == versions[1] and versions[2] == f"{versions[0]}, channels last"
    for wrong in ("nhwc", "prefer_nhwc", "prefer_nhwc=2", "prefer_nhwc=1,level=3"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(SluiceError, match=f"{VARIABLE} holds '{wrong}'; give prefer_nhwc=1"):
            OrtCudaRunner()


LINKED = """
import os, sys
if "SEEN" not in os.environ:
    raise ImportError("libcudart.so.13: cannot open shared object file\\nmore")
preloaded = []
def preload_dlls():
    preloaded.append(None)
    print("Failed to load some.so")
def get_available_providers():
    return ["CUDAExecutionProvider"] if preloaded else []
"""


@pytest.mark.parametrize("way", ["torch", "packages"])
def test_the_libraries_of_cuda_come_before_onnx_runtime(
    way: str,
    pretend: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is linked against them: imported without them it fails, here as there."""
    pretend(LINKED)
    monkeypatch.setenv("SEEN", "")
    monkeypatch.delenv("SEEN")
    if way == "torch":
        (tmp_path / "torch.py").write_text("import os\nos.environ['SEEN'] = 'by torch'\n")
        monkeypatch.delitem(sys.modules, "torch")
    else:
        here = ort_session.find_spec
        monkeypatch.setattr(ort_session, "find_spec", lambda name: None if name == "torch" else here(name))
    monkeypatch.setattr(Cuda, "load", lambda: os.environ.setdefault("SEEN", "by name"))
    assert missing() == ""
    assert os.environ["SEEN"] == ("by torch" if way == "torch" else "by name")
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "Failed to load some.so\n"


@pytest.mark.parametrize("torch_too", [False, True])
def test_what_cannot_be_imported_is_one_sentence(
    torch_too: bool, pretend: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend("raise ImportError('libcudart.so.13: cannot open shared object file\\nmore')")
    if torch_too:
        (tmp_path / "torch.py").write_text("raise OSError('libtorch_cuda.so: it is broken as well')")
        monkeypatch.delitem(sys.modules, "torch")
    else:
        monkeypatch.setattr(ort_session, "find_spec", lambda name: None)
    reason = (
        "the installed ONNX Runtime cannot be imported (libcudart.so.13: cannot open shared object file); "
        "install what it needs"
    )
    assert missing() == ort.missing() == reason
    with pytest.raises(SluiceError) as refused:
        OrtCudaRunner().build(chain([7]))
    assert str(refused.value) == f"cannot run the model in memory: {reason}"
    found = available_targets()
    assert found["ort-cpu"] == found["ort-cuda"] == reason
    if torch_too:
        assert found["torch-cuda"].startswith("the installed torch cannot be imported (libtorch_cuda.so: it is broken")


def test_on_the_cpu_cuda_is_loaded_only_where_it_is_needed(
    pretend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[None] = []
    monkeypatch.setattr(ort_session, "_load_cuda", lambda: loads.append(None))
    pretend("")
    assert ort.missing() == "" and not loads


def test_a_build_for_gpus_gets_cuda_on_the_cpu_too(
    pretend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(LINKED)
    monkeypatch.delenv("SEEN", raising=False)
    monkeypatch.setattr(ort_session, "_load_cuda", lambda: monkeypatch.setenv("SEEN", "1"))
    assert ort.missing() == ""


def nameless(kernel: int = 3) -> onnx.ModelProto:
    """A convolution whose input has a batch and a width without names, and a named height."""
    weight = np.random.default_rng(0).standard_normal((5, 3, kernel, kernel)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])],
        "nameless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3, "h", None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 5, None, None])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("kind", ["proto", "bytes", "file"])
def test_dimensions_without_a_name_become_static_as_well(kind: str, tmp_path: Path) -> None:
    """No override reaches them; the session itself must know the sizes, or a graph is captured of shapes that vary."""
    model = nameless()
    content = model.SerializeToString()
    path = tmp_path / "nameless.onnx"
    onnx.save(onnx.load_from_string(content), path, save_as_external_data=True, size_threshold=0)
    given = {"proto": model, "bytes": content, "file": path}[kind]
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 3, 9, 11)).astype(np.float32)}
    for runner in (ON_CPU, OrtRunner()):
        session = runner.build(given, batch=2, feeds_shapes={"x": (2, 3, 9, 11)})
        assert session._session.get_inputs()[0].shape == [2, 3, 9, 11]
        assert session._session.get_outputs()[0].shape == [2, 5, 7, 9]
        assert session.sample(1) > 0
        assert_close(session.run(feeds), OrtRunner().build(model).run(feeds), 1e-6)
    assert model.SerializeToString() == content  # the caller's model is as it was


def test_of_a_batch_alone_the_rest_stays_dynamic() -> None:
    session = ON_CPU.build(nameless(), batch=2)
    assert session._session.get_inputs()[0].shape[:3] == [2, 3, "h"]
    with pytest.raises(SluiceError, match=r"dynamic shape \[2, 3, 'h', None\]"):
        session.sample(1)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "gpu_names", lambda: ())
    assert "no NVIDIA GPU" in missing()
    monkeypatch.setattr(nvidia, "gpu_names", lambda: ("Some GPU",))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "no CUDA provider" in missing()
    devices = [SimpleNamespace(ep_name="CPUExecutionProvider"), SimpleNamespace(ep_name="SomeExecutionProvider")]
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices)
    assert "no CUDA provider" in missing()
    devices.append(SimpleNamespace(ep_name=CUDA.name))
    assert missing() == ""  # a plugin
    monkeypatch.delattr(onnxruntime, "get_ep_devices")
    assert "no CUDA provider" in missing()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA.name, "CPUExecutionProvider"])
    assert missing() == "" and OrtCudaRunner().device == "Some GPU"
    monkeypatch.setattr(ort_cuda, "find_spec", lambda name: None)
    assert "not installed" in missing()


def test_the_version_names_toolkit_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "driver_version", lambda: "580.1")
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(nvidia, "cudnn_version", lambda: "9.13.1")
    monkeypatch.setattr(nvidia, "uuid", lambda: "GPU-1")
    assert OrtCudaRunner().version == f"{onnxruntime.__version__}, CUDA 13.0, cuDNN 9.13.1, driver 580.1, GPU-1"


@pytest.mark.device
@pytest.mark.skipif(bool(missing()), reason="no GPU for ONNX Runtime")
@pytest.mark.parametrize("name", ["plain", "squeeze_excite", "shuffle"])
def test_on_a_gpu(name: str) -> None:
    model, inputs = build(name)
    dense = to_onnx(model, inputs)
    feeds = {info.name: value.numpy() for info, value in zip(dense.graph.input, inputs, strict=True)}
    want = OrtRunner().build(dense).run(feeds)
    for precision, tol in (("fp32", 5e-3), ("fp16", 2e-2)):
        session = OrtCudaRunner().build(to_precision(dense, precision), batch=len(inputs[0]))
        assert_close(session.run(feeds), want, tol)
        assert session.sample(3) > 0
        assert_close(session.run(feeds), want, tol)


def test_a_burst_is_timed_by_events_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it lies between two events on the stream that the provider was given."""
    cuda = FakeCuda()
    monkeypatch.setattr(Cuda, "load", lambda: cuda)
    provider = Provider("CPUExecutionProvider", "cpu", stream="user_compute_stream")
    given: list[dict[str, str]] = []
    load = ort_cuda.load_session

    def loading(model: Any, shapes: Any, asked: tuple[str, dict[str, str]], **options: Any) -> Any:
        given.append(asked[1])
        return load(model, shapes, asked[0], **options)

    monkeypatch.setattr(ort_cuda, "load_session", loading)
    runner = OrtCudaRunner(provider)
    session = runner.build(chain([7, 5], batch=2))
    (address,) = {handle for handle in cuda.alive if str(handle) == given[0]["user_compute_stream"]}
    assert runner.clock == session.clock == "cuda" and address
    runs: list[bool] = []

    class Counting:
        own = session._session

        def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
            key = "disable_synchronize_execution_providers"
            runs.append(options is not None and options.get_run_config_entry(key) == "1")
            cuda._later(lambda: setattr(cuda, "now", cuda.now + 0.25))
            self.own.run_with_iobinding(binding, options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.own, name)

    session._session = Counting()
    assert session.sample(4) == pytest.approx(0.25)
    assert runs == [False, True, *[True] * 4], "one is waited for, one keeps the device busy"
    assert cuda.log[-2:] == ["record", "record"]
    del session
    gc.collect()
    assert not cuda.alive
    assert OrtCudaRunner(provider).build(chain([7], batch="n")).clock == "cuda" and len(given) == 2
    assert "user_compute_stream" not in given[1], "a network of open sizes is for run alone"
