"""UPGrad: every gradient projected onto the cone of directions that lower no reward, and the weighted mean of them."""

from __future__ import annotations

import torch
from torch import Tensor

from marble_core._check import require_gram, require_prior
from marble_core.cone import cone_weights


def upgrad_weights(gram: Tensor, prior: Tensor, *, precision: float = 2.0**-24) -> Tensor:
    """Coefficients of UPGrad's direction: each gradient is projected onto the cone that lowers no reward, then added.

    With ``P`` the projection onto ``{d : <d, g_l> >= 0 for every l}``, ``d = sum_k prior_k P(g_k)``. It raises every
    reward by what is left of its own gradient, ``<d, g_k> >= prior_k |P(g_k)|^2``, and that is 0 only if the others'
    gradients cancel it: at a Pareto-stationary point. ``|d| <= sum_k prior_k |g_k|``. With ``nu_k`` of ``cone_weights``
    for ``g_k`` alone, ``c = sum_k prior_k (e_k + nu_k)``, so that ``c_k >= prior_k``.

    Where no two gradients conflict, c is the prior. ``cone_weights`` projects the sum instead, and leaves a reward that
    the sum lowers at exactly 0. Solved as K problems of ``cone_weights``, with its precision, its batches and its
    treatment of zero gradients, NaN and transforms.

    Args:
        gram: ``[..., K, K]``, symmetric PSD, of the raw gradients.
        prior: ``[..., K]`` or ``[K]``, non-negative, the weight of each projection; need not sum to 1.
        precision: relative rounding of the rows that c will multiply: 2**-24 for float32.

    Returns:
        ``[..., K]`` in the dtype of ``gram``, coefficients of the raw gradients.

    Raises:
        ValueError: as ``cone_weights``.

    Example:
        >>> upgrad_weights(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]), torch.tensor([0.5, 0.5]))
        tensor([0.6250, 1.0000])

    Reference: Quinton and Rey (arXiv 2406.16232), definition 2 and section 3; TorchJD's ``UPGradWeighting``, without
    its regularization; docs/theory.md, section 12.
    """
    require_gram("gram", gram)
    require_prior(prior, gram.shape[-1])
    p = prior.detach().double() + torch.zeros_like(gram[..., 0], dtype=torch.float64)
    G = gram.detach().double().unsqueeze(-3).expand(*p.shape, *gram.shape[-2:])
    return cone_weights(G, torch.diag_embed(p), precision=precision).sum(-2).to(gram)
