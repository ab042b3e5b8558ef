"""A runner over the line is the runner of the device: same engines, same fingerprint, same points."""

from __future__ import annotations

import gc
import hashlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sluice.core.deployment import Deployment
from sluice.core.errors import LostLine, SluiceError
from sluice.profiler.profile import fingerprint_here, profile_onnx
from sluice.profiler.table.latency_table import LatencyTable
from sluice.profiler.timing import sm_clock, timing_cache
from sluice.profiler.timing.measure import measure
from sluice.runtime.base.host import host_identity
from sluice.runtime.base.inputs import parsed
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.remote.client import RemoteRunner
from sluice.runtime.remote.device import Device
from sluice.runtime.remote.server import DeviceServer
from sluice.runtime.targets import make_runner
from tests.device import FINGERPRINT, FakeRunner, FakeSession, chain, profile_on, staircase
from tests.remote import serve_in_process

X = np.random.default_rng(0).standard_normal((2, 3, 9, 9)).astype(np.float32)


@pytest.fixture(scope="module")
def real() -> Iterator[str]:
    with serve_in_process(OrtRunner()) as (address, _):
        yield address


def sessions_of(server: DeviceServer) -> int:
    lease = server.device._lease
    return 0 if lease is None else len(lease.sessions)


def soon(true: Callable[[], bool]) -> bool:
    for _ in range(500):
        if true():
            return True
        time.sleep(0.01)
    return False


def test_same_outputs_and_parts(real: str) -> None:
    there, here, model = make_runner(f"ort-cpu@{real}"), OrtRunner(), chain([4, 3], batch="N")
    wanted = here.build(model, batch=2).run({"x": X})
    for given in (model, model.SerializeToString()):
        found = there.build(given, batch=2).run({"x": X})
        assert found.keys() == wanted.keys() and np.array_equal(found["y"], wanted["y"])
    shaped = there.build(model, feeds_shapes={"x": (2, 3, 9, 9)})
    assert np.array_equal(shaped.run({"x": X})["y"], wanted["y"]) and shaped.sample(3) > 0
    assert isinstance(there, RemoteRunner)
    part, own = there.build_part(chain([4, 3])), here.build_part(chain([4, 3]))
    assert part.kernels is not None and own.kernels is not None
    assert sorted(part.kernels.values()) == sorted(own.kernels.values()) and part.sample(1) > 0
    assert part.kernels == there.build_part(chain([4, 3])).kernels != there.build_part(chain([4, 4])).kernels
    assert shaped.kernels is None and shaped.ramps is False


def test_from_a_file(real: str, tmp_path: Path) -> None:
    onnx.save_model(chain([4, 3]), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    found = make_runner(f"ort-cpu@{real}").build(tmp_path / "m.onnx").run({"x": X})
    assert np.array_equal(found["y"], OrtRunner().build(tmp_path / "m.onnx").run({"x": X})["y"])


def test_same_fingerprint(real: str) -> None:
    assert fingerprint_here(Deployment(f"ort-cpu@{real}", 2)) == fingerprint_here(Deployment(batch=2))
    there = make_runner(f"ort-cpu@{real}")
    assert isinstance(there, RemoteRunner)
    assert there.host_identity() == host_identity() and there.cache is None and there.sm_clock_mhz() is None


def test_errors_of_the_runtime_are_told(real: str) -> None:
    runner = make_runner(f"ort-cpu@{real}")
    session = runner.build(chain([4, 3]))
    with pytest.raises(SluiceError, match=rf"^ort-cpu@{real}: ONNX Runtime cannot run .* the model takes x"):
        session.run({"z": X})
    with pytest.raises(SluiceError, match="has no input 'z'"):
        runner.build(chain([4, 3], batch="N"), feeds_shapes={"z": (1,)})
    broken = chain([4, 3])
    broken.graph.node[0].op_type = "Nonsense"
    with pytest.raises(SluiceError, match=r"ONNX Runtime cannot load the model in memory: .*; check the model$"):
        runner.build(broken)
    with pytest.raises(SluiceError, match="cannot build the model in memory with batch=0; give 1 or more"):
        runner.build(chain([4, 3]), batch=0)
    with pytest.raises(SluiceError, match="cannot time the model in memory: input 'x' has dynamic shape"):
        runner.build(chain([4, 3], batch="N")).sample(1)
    assert session.run({"x": X})["y"].shape == (2, 5)  # the line and the engine are still there


def test_the_table_is_the_device_s(tmp_path: Path) -> None:
    """Points, fingerprint and host are those of a run on the device itself, which then goes on with the table."""
    model, own, far = chain([9, 7], batch="N"), tmp_path / "own.db", tmp_path / "far.db"
    with serve_in_process(FakeRunner(staircase(8))) as (address, _):
        deployment = Deployment(f"ort-cpu@{address}", 2)
        profile = profile_onnx(model, far, deployment=deployment, progress=False)
        assert profile.address == address and profile.target == "ort-cpu"
        assert profile.runner().build(profile.partition.model).sample(1) > 0
    local = FakeRunner(staircase(8))
    with pytest.MonkeyPatch.context() as patch:
        profile_on(lambda target, threads=1: local, patch)
        wanted = profile_onnx(model, own, deployment=Deployment(batch=2), progress=False)
        assert local.built > 0
        local.built = 0
        profile_onnx(model, far, deployment=Deployment(batch=2), progress=False)
        assert local.built == 0
    assert wanted.latency.dense_ms() == profile.latency.dense_ms()
    with LatencyTable.open(own) as one, LatencyTable.open(far) as other:
        assert one.fingerprint == other.fingerprint and other.fingerprint.runtime == "ort-cpu"
        assert set(one.keys()) == set(other.keys()) and len(one) == len(other) > 5
        for key in one.keys():  # noqa: SIM118
            assert {e: m.ms for e, m in one.points(key).items()} == {e: m.ms for e, m in other.points(key).items()}
        assert one.get_blob("host") == other.get_blob("host")


def test_another_host_is_noticed(tmp_path: Path) -> None:
    """The identity in the table is that of the machine with the device, not of the one with the table."""
    from sluice.profiler.timing.reference_engine import make_reference_engine

    with serve_in_process(FakeRunner()) as (address, server):
        object.__setattr__(server.device.hello, "host", ("jetson",))
        runner = make_runner(f"ort-cpu@{address}")
        with LatencyTable.create(tmp_path / "t.db", FINGERPRINT) as table:
            make_reference_engine(table, runner, np.random.default_rng(0))
            assert table.get_blob("host") == b'["jetson"]'


class Counting(FakeSession):
    def __init__(self) -> None:
        super().__init__(0.2)
        self.asked: list[int] = []

    def sample(self, repeats: int) -> float:
        self.asked.append(repeats)
        return self.ms + 1e-4 * len(self.asked)


class Builds(FakeRunner):
    """Hands out this session, or fails as told."""

    def __init__(self, session: Any = None, failure: BaseException | None = None) -> None:
        super().__init__()
        self.session, self.failure = session, failure

    def build(self, model: Any, *, batch: int | None = None, feeds_shapes: Any = None) -> Any:
        if self.failure is not None:
            raise self.failure
        return self.session


def test_a_turn_is_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    session, asked = Counting(), []
    with serve_in_process(Builds(session)) as (address, server):
        there = make_runner(f"ort-cpu@{address}").build(chain([4, 3]))
        real = server.device.sample
        monkeypatch.setattr(server.device, "sample", lambda *a: asked.append(a[2:]) or real(*a))
        assert there.turn(4, 3) == pytest.approx([0.2001, 0.2002, 0.2003])
        assert asked == [(4, 3)] and session.asked[:3] == [4, 4, 4]
        asked.clear()
        (found,) = measure([there], min_bursts=9, max_bursts=9, burst_ms=0.2, rng=np.random.default_rng(0))
        assert found.samples == 9 and (1, 4) not in asked and {count for _, count in asked} > {1}


class Slow(FakeSession):
    """An inference takes a millisecond; counts those that nobody asked for."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__(1.0)
        self.taken, self.failure = 0, failure

    def sample(self, repeats: int) -> float:
        self.taken += 1
        if self.failure is not None and self.taken > 1:
            raise self.failure
        time.sleep(1e-3)
        return self.ms


def test_the_device_does_not_rest_between_questions() -> None:
    with serve_in_process(Builds(session := Slow())) as (address, _):
        there = make_runner(f"ort-cpu@{address}").build(chain([4, 3]))
        assert there.sample(1) == 1.0
        time.sleep(0.3)
        taken = session.taken
        assert 2 < taken < 100  # for a while, and not for longer
        time.sleep(0.1)
        assert session.taken == taken
        for _ in range(3):
            assert there.sample(1) == 1.0
    with serve_in_process(Builds(Slow(RuntimeError("once is enough")))) as (address, _):
        there = make_runner(f"ort-cpu@{address}").build(chain([4, 3]))
        assert there.sample(1) == 1.0
        with pytest.raises(SluiceError, match="once is enough"):
            there.sample(1)
    with serve_in_process(Builds(quick := Counting())) as (address, _):
        make_runner(f"ort-cpu@{address}").build(chain([4, 3])).sample(1)
        assert len(quick.asked) <= 3  # what takes no time keeps nothing awake


def test_engines_are_closed_there_when_they_are_collected_here() -> None:
    with serve_in_process(FakeRunner()) as (address, server):
        runner = make_runner(f"ort-cpu@{address}")
        for _ in range(5):
            kept = [runner.build(chain([4, 3])) for _ in range(4)]
        assert sessions_of(server) == 8  # the last four go with the next request
        del kept
        gc.collect()
        assert runner.build(chain([4, 3])).sample(1) > 0
        del runner
        gc.collect()
        assert soon(lambda: server.device._lease is None)


def test_lines_are_shared_and_hung_up() -> None:
    with serve_in_process(FakeRunner()) as (address, server):
        first, second = make_runner(f"ort-cpu@{address}"), make_runner(f"ort-cpu@{address}")
        sessions = [first.build(chain([4, 3])), second.build(chain([4, 3]))]
        assert sessions_of(server) == 2
        del first, second
        assert sessions[0].sample(1) > 0  # an engine holds the line
        del sessions
        gc.collect()
        assert soon(lambda: server.device._lease is None)


def test_an_idle_line_is_made_again_but_its_engines_are_lost() -> None:
    with serve_in_process(FakeRunner(), idle_s=0.05) as (address, server):
        runner = make_runner(f"ort-cpu@{address}")
        assert runner.build(chain([4, 3])).sample(1) > 0
        session = None
        for _ in range(3):
            assert soon(lambda: server.device._lease is None)
            session = runner.build(chain([4, 3]))
            if _ < 2:
                session = None
        assert soon(lambda: server.device._lease is None) and session is not None
        message = rf"^the line to ort-cpu@{address} was lost \(.*\); what was measured is kept, see that `sluice serve`"
        for _ in range(2):
            with pytest.raises(LostLine, match=message):
                session.sample(1)
        # An engine of the new line that has the old one's number is not taken for it.
        again = runner.build(chain([4, 3]))
        with pytest.raises(LostLine, match="the engines there went with it"):
            session.sample(1)
        assert again.sample(1) > 0


def test_nobody_there() -> None:
    with pytest.raises(
        LostLine, match=r"^nobody answers at 127\.0\.0\.1:1 \(.*\); run `sluice serve --target ort-cpu`"
    ):
        make_runner("ort-cpu@127.0.0.1:1")


@pytest.mark.parametrize("failure", [RuntimeError("out of\nmemory"), MemoryError(), OSError(28, "no space left")])
def test_what_goes_wrong_in_a_runtime(failure: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    with serve_in_process(Builds(failure=failure)) as (address, _):
        runner = make_runner(f"ort-cpu@{address}")
        kind = type(failure).__name__
        with pytest.raises(SluiceError, match=rf"the device failed at /build: {kind}: .*; see whether it has memory"):
            runner.build(chain([4, 3]))
        with pytest.raises(SluiceError, match="the device failed"):
            runner.build(chain([4, 3]))
    errors = capfd.readouterr().err
    assert errors.count("\n") == 2 and errors.startswith("sluice serve: the device failed at /build")


def test_times_that_are_none() -> None:
    session = FakeSession(float("nan"))
    with serve_in_process(Builds(session)) as (address, _):
        there = make_runner(f"ort-cpu@{address}").build(chain([4, 3]))
        with pytest.raises(SluiceError, match="reports nan ms per inference; its clock is broken"):
            measure([there], rng=np.random.default_rng(0))


def test_another_target_or_number_of_threads() -> None:
    with serve_in_process(FakeRunner()) as (address, _):
        for target, threads in (("ort-cpu", 2), ("tensorrt", 1)):
            with pytest.raises(SluiceError, match=rf"^{address} serves ort-cpu with threads=1, not {target} with"):
                make_runner(f"{target}@{address}", threads)


def test_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_in_process(FakeRunner(), token="0123456789abcdef") as (address, _):
        for given in ("", "0123456789abcdeg", "0123456789abcde"):
            monkeypatch.setenv("SLUICE_TOKEN", given)
            with pytest.raises(SluiceError, match="the token is missing or wrong; set SLUICE_TOKEN to the device's"):
                make_runner(f"ort-cpu@{address}")
        monkeypatch.setenv("SLUICE_TOKEN", "0123456789abcdef\n")
        assert make_runner(f"ort-cpu@{address}").build(chain([4, 3])).sample(1) > 0


class Caching(FakeRunner):
    """Has a timing cache, which grows with every engine."""

    clock = "cuda"

    def __init__(self) -> None:
        super().__init__()
        self.content, self.serialised = b"", 0

    @property
    def cache(self) -> bytes:
        self.serialised += 1
        return self.content

    @cache.setter
    def cache(self, content: bytes) -> None:
        self.content = content

    def fused(self, model: Any, *, batch: int | None = None) -> list[list[str]]:
        return [[f"{node.output[0]} at {batch}" for node in parsed(model).graph.node]]

    def build(self, model: Any, *, batch: int | None = None, feeds_shapes: Any = None) -> FakeSession:
        self.content += b"k"
        session = super().build(model, batch=batch, feeds_shapes=feeds_shapes)
        session.clock = "cuda"
        return session

    def sm_clock_mhz(self) -> int:
        return 1980


def test_a_timing_cache_comes_but_does_not_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    device = Caching()
    with LatencyTable.create(tmp_path / "t.db", FINGERPRINT) as table, caplog.at_level(logging.WARNING):
        with serve_in_process(device) as (address, _):
            runner = make_runner(f"ort-cpu@{address}")
            sm_clock.keep(runner, table)
            assert sm_clock.clock_range(table) == (1980, 1980)
            for _ in range(2):
                assert runner.build(chain([4, 3])).ramps is True
                timing_cache.keep(runner, table)
            assert table.get_blob(timing_cache.NAME) == b"kk"
            again = make_runner(f"ort-cpu@{address}")
            timing_cache.restore(again, b"k")  # it was the device's own
            again.build(chain([4, 3]))
            timing_cache.keep(again, table)
            assert table.get_blob(timing_cache.NAME) == b"kkk" and not caplog.records
        with serve_in_process(other := Caching()) as (address, _):
            runner = make_runner(f"ort-cpu@{address}")
            timing_cache.restore(runner, table.get_blob(timing_cache.NAME))
            assert "was started after the table was filled" in caplog.text
            runner.build(chain([4, 3]))
            timing_cache.keep(runner, table)
            assert table.get_blob(timing_cache.NAME) == b"kkk" and other.cache == b"k"


def test_a_timing_cache_is_serialised_once_for_a_batch_and_not_for_every_engine(tmp_path: Path) -> None:
    device = Caching()
    with LatencyTable.create(tmp_path / "t.db", FINGERPRINT) as table, serve_in_process(device) as (address, _):
        runner = make_runner(f"ort-cpu@{address}")
        before = device.serialised
        for _ in range(5):
            runner.build(chain([4, 3]))
        assert device.serialised == before
        for _ in range(2):  # nothing was built between them
            timing_cache.keep(runner, table)
        assert device.serialised == before + 1
        assert table.get_blob(timing_cache.NAME) == b"kkkkk"


def test_the_kernels_of_an_engine_come_over_the_line() -> None:
    with serve_in_process(Caching()) as (address, _):
        told = make_runner(f"ort-cpu@{address}").fused(chain([4, 3]), batch=2)  # type: ignore[attr-defined]
    assert told == [[f"{node.output[0]} at 2" for node in chain([4, 3]).graph.node]]
    with serve_in_process(FakeRunner()) as (address, _):
        assert not hasattr(make_runner(f"ort-cpu@{address}"), "fused")


def test_what_answers_is_no_device() -> None:
    """Another server, one that says nonsense, and one that says nothing."""
    with serve_in_process(FakeRunner()) as (address, server):
        object.__setattr__(server.device.hello, "clock", "sundial")
        with pytest.raises(SluiceError, match="times by 'sundial', which is unknown here"):
            make_runner(f"ort-cpu@{address}")
        object.__setattr__(server.device.hello, "format", 2)
        with pytest.raises(SluiceError, match="it speaks format 2, this is 1"):
            make_runner(f"ort-cpu@{address}")
    heads = ("404 Not Found\r\nContent-Length: 2", "200 OK\r\nContent-Length: 2", "200 OK\r\nContent-Length: 9")
    answers = [f"HTTP/1.1 {head}\r\n\r\nno".encode() for head in heads]
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"
    for answer in (b"", b"SSH-2.0-OpenSSH\r\n", cut, *answers):
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def once(listening: socket.socket = listening, answer: bytes = answer) -> None:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)

            thread = threading.Thread(target=once)
            thread.start()
            # An answer that does not end was lost, however much of it came.
            kind = LostLine if answer in (b"", cut, answers[-1]) else SluiceError
            with pytest.raises(kind):
                make_runner(f"ort-cpu@127.0.0.1:{listening.getsockname()[1]}")
            thread.join()


def test_kernels_are_told_short() -> None:
    class Parts(FakeRunner):
        def build_part(self, model: Any) -> FakeSession:
            session = FakeSession(1.0)
            session.kernels = OrtRunner().build_part(chain([4, 3])).kernels  # type: ignore[attr-defined]
            return session

    told = Device(Parts(), "ort-cpu")
    lease = told.lease("a-client", object())
    found = told.build(lease, chain([4, 3]).SerializeToString(), True, None, {})["kernels"]
    assert all(len(name) == 32 for name, _ in found) and len({name for name, _ in found}) == len(found)
    assert hashlib.sha256(b"").hexdigest()[:32] not in {name for name, _ in found}
