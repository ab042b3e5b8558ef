"""Distillation losses from the logits of the dense network.

With student logits s and teacher logits t, shape (..., classes), temperature T and batch mean:

1. Logit distillation (Hinton et al. 2015, in the form of AFD's base term and LayerMerge's fine-tuning):
   ``alpha * T^2 * KL(softmax(t/T) || softmax(s/T)) + (1 - alpha) * CE(softmax(s), labels)``.
   T^2 keeps the gradient's scale independent of T.
2. DIST (Huang et al., NeurIPS 2022): with y = softmax(./T) and Pearson's correlation rho,
   ``beta * T^2 * (1 - mean_b rho(y_s[b], y_t[b])) + gamma * T^2 * (1 - mean_c rho(y_s[:, c], y_t[:, c]))``.
   It asks for the teacher's ranking of classes and of samples, not for its probabilities.

The teacher receives no gradient. Dimensions before the last (samples, positions of a dense prediction) are one batch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sluice.core.errors import SluiceError

__all__ = ["dist_loss", "logit_distillation"]

EPSILON = 1e-8


def logit_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 0.9,
    temperature: float = 4.0,
) -> Tensor:
    """Scalar loss between logits of shape ``(..., classes)``; ``labels`` are class indices of shape ``(...)``.

    Without labels the loss is the first term alone, weighted one. That term is zero, and so is its gradient, where the
    student equals the teacher: an untouched copy learns nothing from it.

    Raises:
        SluiceError: shapes that differ, labels of another shape, or a temperature that is not positive.
    """
    student, teacher = _rows(student_logits, teacher_logits, temperature)
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    soft = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2
    if labels is None:
        return soft
    if labels.shape != student_logits.shape[:-1]:
        raise SluiceError(
            f"labels have shape {tuple(labels.shape)}; give class indices of shape {tuple(student_logits.shape[:-1])}"
        )
    return alpha * soft + (1.0 - alpha) * F.cross_entropy(student, labels.reshape(-1))


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Scalar DIST loss between logits of shape ``(..., classes)``; zero, with zero gradient, against itself.

    A batch of one has no correlation over samples: its second term is constant, ``gamma * T^2``.

    Raises:
        SluiceError: shapes that differ, or a temperature that is not positive.
    """
    student, teacher = _rows(student_logits, teacher_logits, temperature)
    student, teacher = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    between = 1.0 - _pearson(student, teacher, dim=1).mean()
    within = 1.0 - _pearson(student, teacher, dim=0).mean()
    return temperature**2 * (beta * between + gamma * within)


def _rows(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both as ``(batch, classes)`` in at least single precision: half loses the tails that distillation is about."""
    if student.shape != teacher.shape or student.ndim < 2:
        raise SluiceError(
            f"student logits have shape {tuple(student.shape)}, teacher logits {tuple(teacher.shape)}; "
            "give both as (..., classes)"
        )
    if not temperature > 0:
        raise SluiceError(f"temperature is {temperature}; give a positive one")
    if student.element_size() < 4:
        student = student.float()
    return student.reshape(-1, student.shape[-1]), teacher.detach().to(student.dtype).reshape(-1, student.shape[-1])


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    return F.cosine_similarity(a, b, dim=dim, eps=EPSILON)
