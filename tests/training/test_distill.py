"""Logit distillation against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sluice.core.errors import SluiceError
from sluice.training.distill import logit_distillation


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 7)) * 3, rng.normal(size=(5, 7)) * 3, np.asarray([0, 6, 3, 3, 1])


def test_logit_distillation_equals_numpy(logits: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    s, t, labels = logits
    p, q = softmax(t / 4), softmax(s / 4)
    soft = 16 * (p * np.log(p / q)).sum(1).mean()
    hard = -np.log(softmax(s)[np.arange(5), labels]).mean()
    student, teacher, y = map(torch.from_numpy, logits)
    assert logit_distillation(student, teacher).item() == pytest.approx(soft, rel=1e-10)
    both = logit_distillation(student, teacher, y, alpha=0.3)
    assert both.item() == pytest.approx(0.3 * soft + 0.7 * hard, rel=1e-10)


def test_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2) at T = 1: KL = 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812."""
    teacher = torch.tensor([[np.log(3.0), 0.0]])
    value = logit_distillation(torch.zeros(1, 2, dtype=torch.float64), teacher.double(), temperature=1.0)
    assert value.item() == pytest.approx(0.1308120, rel=1e-5)


def test_against_itself_nothing_is_learned_and_the_teacher_never_learns() -> None:
    torch.manual_seed(0)
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher = student.detach().clone().requires_grad_()
    value = logit_distillation(student, teacher)
    value.backward()
    assert abs(value.item()) < 1e-12
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-9
    assert teacher.grad is None


def test_positions_of_a_dense_prediction_are_samples() -> None:
    torch.manual_seed(1)
    s, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    y = torch.randint(5, (2, 3))
    expected = logit_distillation(s.reshape(6, 5), t.reshape(6, 5), y.reshape(6))
    assert logit_distillation(s, t, y).item() == pytest.approx(expected.item(), rel=1e-6)


def test_half_precision_is_computed_in_single() -> None:
    torch.manual_seed(2)
    s, t = torch.randn(4, 5).half(), torch.randn(4, 5).half()
    assert logit_distillation(s, t).dtype == torch.float32
    assert logit_distillation(s, t).item() == pytest.approx(logit_distillation(s.float(), t.float()).item(), rel=1e-6)


def test_refusals() -> None:
    s = torch.zeros(3, 5)
    with pytest.raises(SluiceError, match=r"student logits have shape \(3, 5\), teacher logits \(3, 4\)"):
        logit_distillation(s, torch.zeros(3, 4))
    with pytest.raises(SluiceError, match="temperature is 0"):
        logit_distillation(s, s, temperature=0.0)
    with pytest.raises(SluiceError, match=r"labels have shape \(2,\)"):
        logit_distillation(s, s, torch.zeros(2, dtype=torch.long))
