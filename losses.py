"""Losses of DeiT's recipes: distillation from a teacher, and co-training of two submodels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DistillationLoss(nn.Module):
    """(1 - alpha) * base(student, target) + alpha * distance(student, teacher).

    The soft distance is tau^2 KL(softmax(teacher / tau) || softmax(student / tau)), averaged over images; the hard
    distance is the cross-entropy with the teacher's class. A student with a distillation token returns (class logits,
    distillation logits) in training, and the distance is that of the distillation logits; other students have one
    output for both terms.

    Args:
        base: loss of (class logits, target).
        teacher: frozen here and kept in evaluation mode.
        kind: "soft" or "hard".
        alpha: weight of the teacher, 0..1.
        tau: temperature of the soft distance.
    Source: Touvron et al. 2021 (arXiv:2012.12877), eq. 2 and 3. The released code of DeiT also divides the soft
        distance by the number of classes; this code follows the paper.
    """

    def __init__(self, base: nn.Module, teacher: nn.Module, kind: str, alpha: float, tau: float) -> None:
        super().__init__()
        self.base, self.kind, self.alpha, self.tau = base, kind, alpha, tau
        self.teacher = teacher.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        logits, student = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        with torch.no_grad():
            teacher = self.teacher(images)
        if self.kind == "hard":
            distance = F.cross_entropy(student, teacher.argmax(1))
        else:
            distance = self.tau**2 * F.kl_div(
                F.log_softmax(student / self.tau, 1),
                F.log_softmax(teacher / self.tau, 1),
                reduction="batchmean",
                log_target=True,
            )
        return (1 - self.alpha) * self.base(logits, targets) + self.alpha * distance


class CosubLoss(nn.Module):
    """Mean of four binary cross-entropies: each of two submodels with the targets, and with the other's probabilities.

    The submodels are two draws of stochastic depth: the outputs are (2 B, C), for the same B images twice.
    Targets: class indices (B,) or shares of the classes (B, C).
    Source: Touvron et al. 2022 (arXiv:2212.04884), eq. 3, with the weights of the released DeiT code.
    """

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.ndim == 1:
            targets = F.one_hot(targets, outputs.shape[1])
        one, two = outputs.chunk(2)
        pairs = (one, targets), (two, targets), (one, two.detach().sigmoid()), (two, one.detach().sigmoid())
        return sum(F.binary_cross_entropy_with_logits(logits, target.to(logits)) for logits, target in pairs) / 4
