"""Neuron selectivity transfer (NST): the student's neurons should respond like the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pointcmt.objectives.base import Objective, full_precision
from pointcmt.types import StudentState, TeacherOutput


class NeuronSelectivityTransfer(Objective):
    """Squared maximum mean discrepancy between the response patterns of the two networks' neurons.

    The paper takes a convolutional map: a neuron's pattern is its response over the positions of one image. A
    shape feature has no positions, so here the pattern of a neuron is its response over the B shapes of the
    batch, scaled to unit length as in the paper. Kernel: polynomial, (x·y)², the paper's choice. The two
    features may differ in size.

    Args:
        weight: 50, the factor of MMD² for this kernel in the authors' public code
            (TuSimple/neuron-selectivity-transfer: ``kt_weight`` in config/cfgs.py, applied to MMD² itself in
            symbol/transfer.py), and in that of Tian et al. (HobbitLong/RepDistiller, ``-b 50``).

    Source: Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
    arXiv 1707.01219, 2017; kernel with d = 2, c = 0 and mean over all pairs as in the authors' public code.
    """

    default_name = "nst"

    def __init__(self, weight: float = 50.0, name: str | None = None) -> None:
        super().__init__(weight, name)

    def forward(self, student: StudentState, teacher: TeacherOutput) -> Tensor:
        # differences of nearly equal sums: not for half precision
        with torch.autocast(student.feature.device.type, enabled=False):
            ours = F.normalize(full_precision(student.feature).T, dim=1)
            theirs = F.normalize(full_precision(teacher.feature).T, dim=1)
            return _kernel(theirs, theirs) + _kernel(ours, ours) - 2 * _kernel(ours, theirs)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Mean of (a_i·b_j)² over the rows i of a and j of b.

    (a_i·b_j)² is the inner product of outer products, so the mean over all pairs is that of two B × B second
    moments: for the usual B below D this is less work than all D × D pairs.
    """
    return ((a.T @ a) * (b.T @ b)).sum() / (a.shape[0] * b.shape[0])
