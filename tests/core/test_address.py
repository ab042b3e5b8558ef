from __future__ import annotations

import pytest

from sluice.core.address import host_and_port, split_target, target_at
from sluice.core.deployment import Deployment, check_fit, check_target
from sluice.core.errors import SluiceError


@pytest.mark.parametrize(
    ("target", "address", "parts"),
    [
        ("tensorrt@jetson:8000", "jetson:8000", ("jetson", 8000)),
        ("tensorrt@jetson", "jetson:8765", ("jetson", 8765)),
        ("tensorrt@10.0.0.2:1", "10.0.0.2:1", ("10.0.0.2", 1)),
        ("tensorrt@[::1]:65535", "[::1]:65535", ("::1", 65535)),
        ("tensorrt@[fe80::2%eth0]", "[fe80::2%eth0]:8765", ("fe80::2%eth0", 8765)),
        ("tensorrt@my-board.local", "my-board.local:8765", ("my-board.local", 8765)),
    ],
)
def test_a_target_elsewhere(target: str, address: str, parts: tuple[str, int]) -> None:
    assert split_target(target) == ("tensorrt", address)
    assert host_and_port(address) == parts
    assert check_target(target) == target
    deployment = Deployment(target, 3, precision="fp16")
    assert (deployment.target, deployment.address, deployment.place) == ("tensorrt", address, f"tensorrt@{address}")
    assert deployment == Deployment("tensorrt", 3, precision="fp16", address=address)


def test_a_target_here_has_no_address() -> None:
    assert split_target("tensorrt") == ("tensorrt", "") and target_at("tensorrt", "") == "tensorrt"
    assert Deployment("tensorrt").place == "tensorrt" and Deployment("tensorrt").address == ""


@pytest.mark.parametrize(
    "address",
    ["", ":8765", "jetson:", "jetson:0", "jetson:65536", "jetson:8765/x", "a b", "a@b:1", "::1", "[::1", "[]:1", "-x:1",
     "jetson:-1", "jetson:80\n", "http://jetson:1", "jetson:٣"],
)  # fmt: skip
def test_what_is_no_address(address: str) -> None:
    for refuse in (check_target, Deployment, lambda target: check_fit(target, "fp32")):
        with pytest.raises(SluiceError, match=r"is no address of a device; give HOST:PORT with a port of 1 to 65535"):
            refuse(f"ort-cpu@{address}")


def test_the_name_is_checked_as_ever() -> None:
    with pytest.raises(SluiceError, match=r"^there is no target 'abacus@jetson'; choose one of ort-cpu"):
        check_target("abacus@jetson")
    with pytest.raises(SluiceError, match=r"cannot be timed in int8"):
        Deployment("torch-cuda@jetson", precision="int8")
    with pytest.raises(SluiceError, match="is no address"):
        Deployment("ort-cpu@jetson:1", address="jetson:2")
