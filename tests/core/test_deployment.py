from __future__ import annotations

import itertools

import pytest

from sluice.core.deployment import PRECISIONS, TARGETS, UNFIT, Deployment
from sluice.core.errors import SluiceError


def test_a_deployment_is_a_value() -> None:
    assert Deployment() == Deployment("ort-cpu", 1, 1, "fp32")
    assert len({Deployment(batch=3), Deployment(batch=3), Deployment(threads=3)}) == 2


@pytest.mark.parametrize(("target", "precision"), list(itertools.product(TARGETS, PRECISIONS)))
def test_all_that_fits_can_be_asked_for(target: str, precision: str) -> None:
    if (target, precision) not in UNFIT:
        assert Deployment(target, precision=precision).target == target
        return
    with pytest.raises(SluiceError, match=f"^{target} cannot be timed in {precision}: .*; choose fp16, or another"):
        Deployment(target, precision=precision)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"target": "abacus"},
            r"^there is no target 'abacus'; choose one of ort-cpu, openvino, ort-cuda, torch-cuda, tensorrt$",
        ),
        ({"precision": "fp8"}, r"^there is no precision 'fp8'; choose one of fp32, fp16, bf16, int8$"),
        ({"batch": 0}, r"^a deployment with batch=0, threads=1 cannot run; give whole numbers of 1 or more$"),
        ({"threads": -3}, "batch=1, threads=-3 cannot run"),
        ({"batch": 2.0}, "batch=2.0, threads=1 cannot run"),
        ({"threads": True}, "batch=1, threads=True cannot run"),
    ],
)
def test_what_no_device_runs_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SluiceError, match=message):
        Deployment(**wrong)  # type: ignore[arg-type]
