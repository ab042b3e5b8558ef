"""What a device refuses: clients without a token or a lease, and requests of every wrong kind, each with a sentence."""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sluice.core.errors import SluiceError
from sluice.runtime.ort.cpu import OrtRunner
from sluice.runtime.remote.device import MOST_SESSIONS
from sluice.runtime.remote.door import called_by_number, check_token, is_loopback, is_token, listen
from sluice.runtime.remote.server import MOST_WAITING
from sluice.runtime.remote.wire import MOST_BYTES, MOST_JSON
from sluice.runtime.targets import make_runner
from tests.device import FakeRunner, chain
from tests.remote import serve_in_process, started
from tests.runtime.remote.test_models import model, outside

ME = {"X-Sluice-Client": "a-client-of-tests"}
MODEL = chain([4, 3]).SerializeToString()


@pytest.fixture
def address() -> Iterator[str]:
    with serve_in_process(FakeRunner()) as (address, _):
        yield address


class Client:
    """Asks what it likes."""

    def __init__(self, address: str) -> None:
        self.connection = http.client.HTTPConnection(address, timeout=20)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.connection.close()

    def ask(self, path: str, body: Any = b"", method: str = "POST", **headers: str) -> tuple[int, Any]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.connection.request(method, path, content, {**ME, **headers})
        response = self.connection.getresponse()
        found = response.read()
        return response.status, json.loads(found)

    def refused(self, path: str, body: Any = b"", **headers: str) -> str:
        status, found = self.ask(path, body, **headers)
        assert 400 <= status < 600 and found.keys() == {"error"} and "\n" not in found["error"]
        return str(found["error"])


def raw(address: str, content: bytes, wait: bool = True) -> bytes:
    """Send bytes, and read until the server has had enough."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            found = b""
            while wait and (piece := connection.recv(1 << 16)):
                found += piece
            return found
        except OSError:
            return b""


def test_an_engine_from_build_to_close(address: str) -> None:
    with Client(address) as client:
        status, hello = client.ask("/hello", method="GET")
        assert status == 200 and hello["target"] == "ort-cpu" and hello["format"] == 1 and hello["threads"] == 1
        status, built = client.ask("/build?batch=2", MODEL)
        assert status == 200 and built["clock"] == "thread_cpu" and built["kernels"] is None
        asked = {"session": built["session"], "repeats": 3, "count": 2}
        status, found = client.ask("/sample", asked)
        assert status == 200 and len(found["ms"]) == 2
        assert client.ask("/close", {"sessions": [built["session"], 99, "x"]}) == (200, {})
        assert "there is no engine 1 of this client" in client.refused("/sample", asked)


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/nowhere", b"", "there is no such thing here"),
        ("//[", b"", "there is no such thing here"),
        ("/hello", b"", "there is no such thing here"),
        ("/build", b"no model", "what was sent is no ONNX model"),
        ("/build", MODEL[:-9], "what was sent is no ONNX model"),
        ("/build?part=1", MODEL, "ort-cpu builds no parts of networks"),
        ("/build?part=2", MODEL, "part is 0 or 1"),
        ("/build?batch=-1", MODEL, "'-1' is no whole number"),
        ("/build?batch=1e9", MODEL, "'1e9' is no whole number"),
        ("/build?shapes=[", MODEL, "not JSON"),
        ("/build?shapes=[]", MODEL, "the shapes are no lists"),
        ("/build?shapes={%22x%22:[1.5]}", MODEL, "the shapes are no lists"),
        ("/build", model(weights=(outside(),)).SerializeToString(), "lies in a file beside the model"),
        ("/sample", b"{", "not JSON"),
        ("/sample", b"[" * 60_000, "nested too deeply"),
        ("/sample", b"\xff\xff", "not JSON"),
        ("/sample", [], "the body is no JSON object"),
        ("/sample", {}, "a burst cannot have None inferences"),
        ("/sample", {"session": 1, "repeats": 0}, "a burst cannot have 0 inferences; give 1 to 1048576"),
        ("/sample", {"session": 1, "repeats": 1 << 40}, "a burst cannot have"),
        ("/sample", {"session": 1, "repeats": True}, "a burst cannot have True"),
        ("/sample", {"session": 1, "repeats": "1" * 500}, "..."),
        ("/sample", {"session": 1, "repeats": 1, "count": 2000}, "there cannot be 2000 bursts in a row"),
        ("/sample", {"session": [1], "repeats": 1}, "there is no engine [1]"),
        ("/run?session=7", b"[]\n", "there is no engine 7"),
        ("/run", b"", "'' is no whole number"),
        ("/close", {"sessions": 3}, "the engines to close are no list"),
    ],
)
def test_what_cannot_be_asked(path: str, body: Any, sentence: str, address: str) -> None:
    with Client(address) as client:
        assert sentence in client.refused(path, body)
        assert client.ask("/build", MODEL)[0] == 200  # on the same connection


def test_a_body_that_is_too_long_is_not_read(address: str) -> None:
    for path, length in (("/build", MOST_BYTES + 1), ("/run", MOST_BYTES + 1), ("/sample", MOST_JSON + 1)):
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-Sluice-Client: a-client\r\nContent-Length: {length}\r\n\r\n"
        )
        found = raw(address, head.encode() + b"x" * 100_000)
        assert found.startswith(b"HTTP/1.1 413 ") and b"are more than the device takes at" in found
        assert b"Connection: close" in found


@pytest.mark.parametrize(
    "length", ["-1", "x", "", "1e3", "0x10", "1_0", "+5", "99999999999999999999", "5\r\nContent-Length: 5", "٣"]
)
def test_lengths_that_are_none(length: str, address: str) -> None:
    head = f"POST /sample HTTP/1.1\r\nHost: localhost\r\nX-Sluice-Client: a-client\r\nContent-Length: {length}\r\n\r\n"
    found = raw(address, head.encode("utf-8") + b"{}")
    assert found.startswith(b"HTTP/1.1 4"), found
    assert b"give one Content-Length" in found or (not length and b"a burst cannot" in found)


def test_a_body_in_pieces_or_cut_short(address: str) -> None:
    head = "POST /sample HTTP/1.1\r\nHost: localhost\r\nX-Sluice-Client: a-client\r\n"
    found = raw(address, f"{head}Transfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n".encode())
    assert found.startswith(b"HTTP/1.1 400 ") and b"give one Content-Length" in found
    found = raw(address, f"{head}Content-Length: 500\r\n\r\n{{}}".encode())
    assert found.startswith(b"HTTP/1.1 400 ") and b"the body ends early" in found


def test_a_client_without_a_name(address: str) -> None:
    for name in ("", "short", "x" * 65, "with blanks in it", "ünïcödé-name"):
        with Client(address) as client:
            assert "the client gives itself no name" in client.refused(
                "/clock", **{"X-Sluice-Client": name.encode().decode("latin-1")}
            )


def test_a_page_in_a_browser(address: str) -> None:
    with Client(address) as client:
        assert "the device is called localhost or by its number" in client.refused("/clock", Host="evil.example:8765")
        assert client.ask("/clock", Host="localhost:1")[0] == 200
    assert b"501" in raw(address, b"OPTIONS /build HTTP/1.1\r\nHost: localhost\r\n\r\n").splitlines()[0]


def test_the_token_comes_first(capfd: pytest.CaptureFixture[str]) -> None:
    token = "0123456789abcdef"
    with serve_in_process(FakeRunner(), token=token) as (address, _):
        for header in (
            {},
            {"Authorization": token},
            {"Authorization": f"Bearer {token}x"},
            {"Authorization": "Bearer "},
        ):
            for path in ("/hello", "/build", "/nowhere"):
                with Client(address) as client:
                    assert "the token is missing or wrong" in client.refused(path, MODEL, **header)
        with Client(address) as client:  # by any name
            assert client.ask("/build", MODEL, Authorization=f"Bearer {token}", Host="jetson:8765")[0] == 200
    assert token not in "".join(capfd.readouterr())


def test_two_clients() -> None:
    with serve_in_process(FakeRunner()) as (address, server):
        other = {"X-Sluice-Client": "another-client"}
        with Client(address) as first, Client(address) as second:
            assert first.ask("/build", MODEL)[0] == 200
            status, found = second.ask("/build", MODEL, **other)
            assert status == 409 and "another client measures on this device; try again" in found["error"]
            assert second.ask("/hello", method="GET")[0] == 200
            assert first.ask("/sample", {"session": 1, "repeats": 1})[0] == 200
            server.device._patience_s = 20.0
            first.connection.close()  # a client may go in the middle of another's asking
            assert second.ask("/build", MODEL, **other)[0] == 200
        with Client(address) as client:
            assert client.ask("/build", MODEL)[0] == 200


def test_a_client_that_comes_back_takes_its_lease_over(address: str) -> None:
    with Client(address) as first, Client(address) as again:
        assert first.ask("/build", MODEL)[1]["session"] == 1
        assert "there is no engine 1" in again.refused("/sample", {"session": 1, "repeats": 1})
        assert again.ask("/build", MODEL)[1]["session"] == 1
        first.connection.close()
        time.sleep(0.05)
        assert again.ask("/sample", {"session": 1, "repeats": 1})[0] == 200


def test_an_idle_client_loses_the_device() -> None:
    with serve_in_process(FakeRunner(), idle_s=0.1) as (address, server):
        server.device._patience_s = 20.0
        with Client(address) as first, Client(address) as second:
            assert first.ask("/build", MODEL)[0] == 200
            assert second.ask("/build", MODEL, **{"X-Sluice-Client": "another-client"})[0] == 200


def test_engines_have_a_limit() -> None:
    with serve_in_process(FakeRunner()) as (address, server), Client(address) as client:
        assert client.ask("/build", MODEL)[0] == 200
        sessions = server.device._lease.sessions  # type: ignore[union-attr]
        sessions.update({number: sessions[1] for number in range(2, MOST_SESSIONS + 1)})
        assert f"there are {MOST_SESSIONS} engines of this client on the device" in client.refused("/build", MODEL)


def test_open_connections_keep_nobody_out(address: str) -> None:
    host, _, port = address.rpartition(":")
    with Client(address) as client:
        assert client.ask("/build", MODEL)[0] == 200
        idle = [socket.create_connection((host, int(port)), timeout=20) for _ in range(MOST_WAITING + 8)]
        try:
            assert idle[0].recv(1) == b""  # the oldest went
            assert client.ask("/sample", {"session": 1, "repeats": 1})[0] == 200
            with Client(address) as other:
                assert other.ask("/hello", method="GET")[0] == 200
        finally:
            for connection in idle:
                connection.close()


def wrong_requests(count: int) -> Iterator[bytes]:
    rng = random.Random(0)
    paths = ["/", "/build", "/sample", "/run?session=1", "/close", "/hello", "/offer", "/cache", "/%00", "//[",
             "/../etc/passwd", "/build?batch=999999999999", "/build?shapes=" + "[" * 5000,
             "/" + "a" * 70_000]  # fmt: skip
    lengths = ["-1", "0", "5", "1000", "2147483648", "9" * 30, "x", "1, 2"]
    bodies = [b"", b"{}", b"[" * 60_000, b"{" * 500, MODEL[:300], MODEL[:-3], b"\x00" * 99, b'{"session": 1e400}',
              b'{"session": "' + b"9" * 300 + b'", "repeats": 1}', b"[1, 2, 3]\n",
              b'[["x", "O", [1]]]\n12345678']  # fmt: skip
    for number in range(count):
        if number % 5 == 0:
            yield rng.randbytes(rng.randrange(1, 2000))
            continue
        body = rng.choice(bodies) if rng.random() < 0.8 else rng.randbytes(rng.randrange(500))
        lines = [f"{rng.choice(['POST', 'GET', 'PUT', 'post', 'HEAD', ''])} {rng.choice(paths)} "
                 f"{rng.choice(['HTTP/1.1', 'HTTP/1.0', 'HTTP/9.9', '', 'HTTP/x'])}"]  # fmt: skip
        lines += ["Host: localhost"] if rng.random() < 0.9 else []
        lines += [f"X-Sluice-Client: {rng.choice(['a-client-of-tests', 'b' * 99, ''])}"] if rng.random() < 0.9 else []
        lines += ["Authorization: Bearer x"] if rng.random() < 0.2 else []
        lines += [f"X-{k}: {k}" for k in range(200)] if rng.random() < 0.05 else []
        length = str(len(body)) if rng.random() < 0.7 else rng.choice(lengths)
        lines += [f"Content-Length: {length}"]
        yield "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def test_500_requests_that_are_none(tmp_path: Path) -> None:
    """No traceback, no file, and a device that serves as ever."""
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir(), temporary.mkdir()
    with started(work, environment={"TMPDIR": str(temporary)}) as served:
        for number, content in enumerate(wrong_requests(500)):
            raw(served.address, content, wait=number % 3 > 0)
        runner = make_runner(served.target)
        assert runner.build(chain([4, 3])).sample(2) > 0
        assert served.process.poll() is None
        errors = served.errors.read_text()
        assert "Traceback" not in errors and "Error" not in errors, errors
        assert not [*work.iterdir(), *temporary.iterdir()]
        assert "HTTP" not in errors


def test_the_real_runtime_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with serve_in_process(OrtRunner()) as (address, _), Client(address) as client:
        assert client.ask("/build?part=1", MODEL)[0] == 200
        for cut in range(1, 200, 7):
            changed = bytearray(MODEL)
            changed[cut * 5 % len(changed)] ^= 1 << cut % 8
            client.ask("/build", bytes(changed))
            client.ask("/build?part=1", MODEL[:-cut])
        assert client.ask("/build", MODEL)[0] == 200
    assert not [*tmp_path.iterdir()]


def test_who_needs_a_token() -> None:
    token = "0123456789abcdef"
    assert check_token("127.0.0.1", "") == check_token("localhost", "") == check_token("::1", "") == ""
    assert check_token("0.0.0.0", token) == token
    for host in ("0.0.0.0", "", "10.0.0.2", "jetson", "::"):
        with pytest.raises(SluiceError, match="could use this device; set SLUICE_TOKEN or give --token-file"):
            check_token(host, "")
    for short in ("0123456789abcde", "0123456789 abcdef", "0123456789abcdé!", "0123456789\tabcdef"):
        with pytest.raises(SluiceError, match="the token is too short or not plain; give 16 or more letters"):
            check_token("127.0.0.1", short)
    assert is_token(f"Bearer {token}", token) and not is_token(token, token) and not is_token("", token)
    assert is_loopback("127.9.9.9") and not is_loopback("localhost.example")
    assert called_by_number("[::1]:8765") and called_by_number("10.0.0.2") and not called_by_number("a.example:80")


def test_an_address_that_cannot_be_had() -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(SluiceError, match=f"cannot listen at 127.0.0.1, port {port} .*; give another --host or"):
            listen("127.0.0.1", port)
    for host, port in (("127.0.0.1", 70_000), ("a" * 80, 0)):
        with pytest.raises(SluiceError, match="give another --host or --port"):
            listen(host, port)


def test_a_connection_that_resets(address: str) -> None:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sendall(
        b"POST /build HTTP/1.1\r\nHost: localhost\r\nX-Sluice-Client: a-client\r\nContent-Length: 99\r\n\r\n"
    )
    time.sleep(0.05)
    connection.close()
    with Client(address) as client:
        time.sleep(0.05)
        assert client.ask("/build", MODEL)[0] == 200
