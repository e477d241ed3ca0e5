"""Where a solver has no say: weights from measured gains, their scale, and the way back to a prior without signal."""

from __future__ import annotations

import torch
from torch import Tensor

from marble_core._check import describe, require, require_float, require_prior, require_range, require_vector


def soft_min_weights(gain: Tensor, prior: Tensor, strength: float, *, keep: float = 0.0) -> Tensor:
    """Weights of the K gradients whose sum is the gradient of the soft minimum of the gains.

    Let ``pi = prior / sum(prior)``, ``F = -1/strength log sum_k pi_k exp(-strength gain_k)``, ``grad gain_k = g_k``.
    The gradient of F is ``sum_k w_k g_k`` with ``w_k`` proportional to ``pi_k exp(-strength gain_k)``. F lies between
    the smallest gain and that plus ``log(1/pi_k)/strength`` (of the smallest), and strength 0 gives the mean with
    weights pi: a step along ``sum_k w_k g_k`` raises the rewards that lag. Where the gains were measured before the
    batch, ``E[sum_k w_k g_k]`` is exactly that gradient however noisy the ``g_k`` are; gains of the same batch bias it
    by their correlation with its gradients.

    With ``keep`` it is the gradient of ``keep mean + (1 - keep) F``, the mean of the gains and their soft minimum: no
    weight falls below ``keep pi_k``, and none rises above that plus ``1 - keep``, whatever the gains.

    Args:
        gain: ``[..., K]``, how far each reward has come, in units that can be compared (standard deviations). NaN
            where it is not known: that reward counts as the prior's mean of the known ones.
        prior: ``[..., K]`` or ``[K]``, non-negative; need not sum to 1.
        strength: at least 0, in units of 1 / gain. A reward that is ``1/strength`` ahead of another has 1/e of its
            share.
        keep: in [0, 1], the share of the weights that stays the prior's.

    Returns:
        ``[..., K]`` on the simplex, in the dtype of ``gain``. All NaN for an item whose prior is all 0.

    Raises:
        ValueError: ``prior`` has another K or negative entries, ``strength`` is negative or not finite, or
            ``keep`` is not in [0, 1].

    Example:
        >>> soft_min_weights(torch.tensor([0.0, 0.5]), torch.tensor([0.5, 0.5]), 2.0)
        tensor([0.7311, 0.2689])
        >>> soft_min_weights(torch.tensor([0.0, 0.5]), torch.tensor([0.5, 0.5]), 2.0, keep=0.5)
        tensor([0.6155, 0.3845])

    Reference: tilted empirical risk (Li et al., ICLR 2021), smooth Tchebycheff scalarization (Lin et al., ICML 2024);
    docs/design/0003-noise.md.
    """
    require_float("gain", gain, "[..., K]", range(1, 65))
    require_prior(prior, gain.shape[-1])
    require_range("strength", strength, 0.0, 1e9)
    require_range("keep", keep, 0.0, 1.0)
    g, p = gain.detach().double(), prior.detach().double()
    known = ~g.isnan()
    mass = (p * known).sum(-1, keepdim=True)
    mean = torch.where(known, p * g, 0.0).sum(-1, keepdim=True) / torch.where(mass > 0, mass, 1.0)
    g = torch.where(known, g, mean)
    tilted = torch.softmax(p.log() - strength * g, dim=-1)
    return (keep * p / p.sum(-1, keepdim=True) + (1.0 - keep) * tilted).to(gain.dtype)


def lag_weights(gain: Tensor, prior: Tensor, ahead: float) -> Tensor:
    """Weights in proportion to how far each reward is behind the level that all are to reach.

    The level is ``ahead`` above the smallest gain: ``w_k`` is proportional to ``prior_k max(0, 1 - (gain_k - min_l
    gain_l) / ahead)``, minus the gradient of ``1/2 sum_k prior_k max(0, level - gain_k)^2`` at a fixed level. The last
    reward has its prior's weight, one that is half of ``ahead`` in front of it half of that, one further than ``ahead``
    none. As what a solve asks for (``noise_aware_weights``) they close the gaps in proportion, and a reward that is far
    in front is not protected, so that it cannot hold up the others.

    Args:
        gain: ``[..., K]``, how far each reward has come, in units that can be compared (standard deviations). NaN
            where it is not known: nothing says that this reward is in front, so it has its prior's weight.
        prior: ``[..., K]`` or ``[K]``, non-negative; need not sum to 1. A reward with 0 is not waited for.
        ahead: above 0, in units of the gain.

    Returns:
        ``[..., K]`` on the simplex, in the dtype of ``gain``. All NaN for an item whose prior is all 0.

    Raises:
        ValueError: ``prior`` has another K or negative entries, or ``ahead`` is not a positive number.

    Example:
        >>> lag_weights(torch.tensor([0.0, 0.1, 0.5]), torch.ones(3), 0.25)
        tensor([0.6250, 0.3750, 0.0000])

    Reference: this project, docs/design/0006-catching-up.md.
    """
    require_float("gain", gain, "[..., K]", range(1, 65))
    require_prior(prior, gain.shape[-1])
    require_range("ahead", ahead, 1e-9, 1e9)
    g, p = gain.detach().double(), prior.detach().double()
    known = ~g.isnan()
    last = torch.where(known & (p > 0), g, torch.inf).amin(-1, keepdim=True)
    gap = torch.where(known & (g > last), (g - last) / ahead, 0.0)
    w = p * (1.0 - gap).clamp(min=0)
    return (w / w.sum(-1, keepdim=True)).to(gain.dtype)


def restore_spread(weights: Tensor, A: Tensor) -> Tensor:
    """Scale weights so that the advantage they combine is as spread out as its parts are.

    A mean of K advantages varies less than each: what is independent in them averages out, and what is opposed cancels.
    The gradient shrinks as much, so that anything beside it, such as a pull to a base model, grows in proportion.
    With ``s(x) = sqrt(mean_n x_n^2)`` the result is ``c = weights sum_k |weights_k| s(A_k) / s(A weights)``: weights
    that sum to 1 make an advantage with ``s(A c)`` equal to the weighted mean of the ``s(A_k)``. One reward, or K
    copies of it, stays as it is; advantages of unit variance give one of unit variance. The factor lies between 1 and
    K, where it is cut: what is left of rewards that cancel each other is not blown up without bound.

    Args:
        weights: ``[K]``.
        A: ``[N, K]``, advantages of the images of a batch, centred.

    Returns:
        ``[K]``, coefficients of the advantages, in proportion to ``weights`` and in their dtype. ``weights``
        themselves where all advantages are 0.

    Raises:
        ValueError: ``A`` is not ``[N, K]`` or ``weights`` not ``[K]``.

    Example:
        >>> restore_spread(torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]))
        tensor([0.7071, 0.7071])

    Reference: the last step of GDPO (Liu et al., arXiv 2601.05242, eq. 6), which divides by ``s(A weights)``: the same
    for advantages of unit variance and weights that sum to 1.
    """
    require_float("A", A, "[N, K]", (2,))
    require_vector("weights", weights, A.shape[1], "K")
    w, a = weights.detach().double(), A.detach().double()
    parts = w.abs() @ a.square().mean(0).sqrt()
    combined = (a @ w).square().mean().sqrt()
    factor = parts / torch.maximum(combined, parts / A.shape[1])
    return torch.where(parts > 0, w * factor, w).to(weights.dtype)


def shrink_to_prior(weights: Tensor, prior: Tensor, signal: Tensor, standard_error: Tensor) -> Tensor:
    """Move each reward's share towards its prior's, as far as its signal cannot be told from zero.

    With ``z_k = signal_k / standard_error_k``, a reward keeps ``a_k = max(0, 1 - 1/z_k^2)`` of its weight (the
    positive-part James-Stein factor of one estimate) and the prior gives the rest:
    ``a_k w_k + (1 - a_k) prior_k``. At or below one standard error, or where the error is not known, it is the
    prior's alone. The result is not normalized: of weights and a prior on the simplex its sum may be well above or
    below 1.

    Args:
        weights: ``[..., K]``: what a solver found.
        prior: ``[..., K]`` or ``[K]``, non-negative, in the units of ``weights``.
        signal: ``[..., K]``, unbiased estimates of ``|s_k|^2`` or of signal shares; may be negative.
        standard_error: ``[..., K]``, of ``signal``; NaN or infinite counts as unknown.

    Returns:
        ``[..., K]`` in the dtype of ``weights``.

    Raises:
        ValueError: shapes differ, or ``prior`` has negative entries.

    Example:
        >>> shrink_to_prior(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]),
        ...                 torch.tensor([2.0, 0.1]), torch.tensor([1.0, 1.0]))
        tensor([0.8750, 0.5000])

    Reference: James and Stein (1961); docs/design/0003-noise.md.
    """
    require_float("weights", weights, "[..., K]", range(1, 65))
    K = weights.shape[-1]
    require_prior(prior, K)
    for name, x in (("signal", signal), ("standard_error", standard_error)):
        require_float(name, x, "[..., K]", range(1, 65))
        require(x.shape[-1] == K, name, f"K = {K} entries, as weights has", describe(x))
    w, p = weights.detach().double(), prior.detach().double()
    s, error = signal.detach().double(), standard_error.detach().double()
    sure = (s > error) & error.isfinite()
    ratio = torch.where(sure, error / torch.where(sure, s, 1.0), 1.0)
    a = 1.0 - ratio.square()
    return torch.where(a > 0, a * w + (1.0 - a) * p, p).to(weights.dtype)
