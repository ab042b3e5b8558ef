"""Distillation from the logits of the dense network.

With student logits s and teacher logits t, shape (..., classes), temperature T and batch mean, the loss is

    alpha * T^2 * KL(softmax(t/T) || softmax(s/T)) + (1 - alpha) * CE(softmax(s), labels)

1. T^2 keeps the gradient's scale independent of T.
2. The teacher receives no gradient.
3. Dimensions before the last (samples, positions of a dense prediction) are one batch.

Sources: Hinton et al. 2015, in the form of AFD's base term and of LayerMerge's fine-tuning.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sluice.core.errors import SluiceError

__all__ = ["logit_distillation"]


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
