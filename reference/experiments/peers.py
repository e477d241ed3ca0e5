"""Balancing rules of other work, as solvers for ``--balance module:callable``."""

from __future__ import annotations

import torch
from torch import Tensor

from marble_core import cone_weights


def upgrad(gram: Tensor) -> Tensor:
    """Coefficients of UPGrad: every gradient is projected onto the cone that lowers no reward, then the mean is taken.

    Args:
        gram: ``[K, K]``, of the raw gradients.

    Returns:
        ``[K]``, coefficients of the raw gradients.

    Example:
        >>> upgrad(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]))
        tensor([0.6250, 1.0000])

    Reference: Quinton and Rey (arXiv 2406.16232); TorchJD's ``UPGradWeighting``, without its regularization.
    """
    K = gram.shape[-1]
    each = torch.eye(K, dtype=gram.dtype, device=gram.device) / K
    return cone_weights(gram.expand(K, K, K), each).sum(0)
