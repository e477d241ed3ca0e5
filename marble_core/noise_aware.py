"""A solve that knows how noisy its gradients are: unbiased signals, shrunk by their error, and the step's noise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from marble_core._check import describe, require, require_float, require_gram, require_same_shape
from marble_core.simplex import min_norm_weights

_RANK = 1e-10  # eigenvalues below this share of the largest are rounding of float32 gradients' products
_STATIONARY = 1e-5  # what is left of a combination that cancels to this share is rounding, too


class SignalGram(NamedTuple):
    """Gram matrix of K signals ``[..., K, K]``, unbiased and symmetric, and the variance ``[...]`` of all its entries.

    Attributes:
        gram: estimate of ``S_kl = <s_k, s_l>``; need not be PSD.
        variance: estimate of ``E |gram - S|_F^2``.
    """

    gram: Tensor
    variance: Tensor


def signal_gram(cross: Tensor) -> SignalGram:
    """Symmetric part of a cross-Gram matrix, with its error read off the antisymmetric part.

    ``C_kl = <a_k, b_l>`` of two independent batches has mean ``S_kl``, which is symmetric. So ``(C_kl - C_lk) / 2`` is
    nothing but noise, and where the noises of different rewards are not correlated it has the variance of
    ``(C_kl + C_lk) / 2``: an error estimate from a single pair of batches. The diagonal, which has no antisymmetric
    part, is taken to be as noisy as the mean of the other entries (with equally noisy rewards it has twice their
    variance).

    *Limit.* Where noise dominates and that of two rewards has correlation q, the variance of the symmetric entry is
    ``(1 + q^2) / (1 - q^2)`` times what the antisymmetric one says: 9.5 at 0.9, without bound for near-duplicates.

    Args:
        cross: ``[..., K, K]``, as from ``cross_gram``, or a weighted mean of such matrices, or the cross-Gram of two
            moments: the error is that of whatever is given.

    Returns:
        ``SignalGram`` in float64. With K = 1 the variance is 0: nothing is known of it.

    Raises:
        ValueError: ``cross`` is not a square floating-point matrix.

    Example:
        >>> signal_gram(torch.tensor([[2.0, 1.5], [0.5, 3.0]]))
        SignalGram(gram=tensor([[2., 1.],
                [1., 3.]], dtype=torch.float64), variance=tensor(1., dtype=torch.float64))

    Reference: this project, docs/design/0004-solve-under-noise.md.
    """
    require_gram("cross", cross)
    C = cross.detach().double()
    K = C.shape[-1]
    anti = ((C - C.mT) / 2).square().sum((-2, -1))
    return SignalGram((C + C.mT) / 2, anti * (K / (K - 1) if K > 1 else 0.0))


def shrink_gram(signal: SignalGram) -> tuple[Tensor, Tensor]:
    """Move an estimated Gram matrix towards equal, orthogonal signals by as much as it is noise.

    ``(1 - rho) S + rho mu I`` with ``mu = tr(S) / K`` and ``rho = min(1, variance / |S - mu I|_F^2)``: the intensity
    that minimizes the expected squared error (Ledoit and Wolf), with its two expectations replaced by estimates. An
    exact estimate is left alone. One that cannot be told from noise becomes ``mu I``, with which every solver gives the
    weights of ``uniform``; where even the trace is not positive, ``mu`` is 1.

    Args:
        signal: from ``signal_gram``.

    Returns:
        ``(gram [..., K, K], rho [...])`` in float64; the PSD part is taken last.

    Raises:
        ValueError: ``signal.gram`` is not a square floating-point matrix.

    Example:
        >>> shrink_gram(SignalGram(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.tensor(2.0)))
        (tensor([[2.5000, 0.5000],
                [0.5000, 1.5000]], dtype=torch.float64), tensor(0.5000, dtype=torch.float64))

    Reference: Ledoit and Wolf (2004), A well-conditioned estimator for large-dimensional covariance matrices.
    """
    require_gram("signal.gram", signal.gram)
    S, variance = signal.gram.detach().double(), signal.variance.detach().double()
    K = S.shape[-1]
    mu = S.diagonal(dim1=-2, dim2=-1).mean(-1)
    none = ~(mu > 0)
    eye = torch.eye(K, dtype=S.dtype, device=S.device)
    target = torch.where(none, 1.0, mu)[..., None, None] * eye
    distance = (S - target).square().sum((-2, -1))
    rho = torch.where(none | (distance <= variance), 1.0, variance / torch.where(distance > 0, distance, 1.0))
    rho = torch.where(distance > 0, rho, 0.0) if K > 1 else torch.zeros_like(rho)
    shrunk = torch.lerp(S, target, rho[..., None, None])
    eigenvalues, Q = torch.linalg.eigh(torch.nan_to_num(shrunk, 0.0, 0.0, 0.0))
    psd = (Q * eigenvalues.clamp(min=0).unsqueeze(-2)) @ Q.mT
    bad = ~shrunk.isfinite().all(-1).all(-1)
    psd = torch.where((eigenvalues[..., :1] < 0).unsqueeze(-1), (psd + psd.mT) / 2, shrunk)
    return torch.where(bad[..., None, None], torch.nan, psd), rho


class NoiseAware(NamedTuple):
    """A direction ``d = sum_k coefficients_k g_k`` of fixed length, and what it is expected to gain.

    Attributes:
        coefficients: ``[..., K]``, of the raw gradients; some may be negative. Their direction has the expected length
            of the mean of all gradients.
        gains: ``[..., K]``, expected ``<d, s_k> / |d|``: of a step of unit length.
        smallest: ``[...]``, the largest value that ``min_k gains_k / wanted_k`` can have.
        stationary: ``[...]`` bool, no direction is expected to raise all wanted rewards. Coefficients are then those of
            ``uniform``.
    """

    coefficients: Tensor
    gains: Tensor
    smallest: Tensor
    stationary: Tensor


def noise_aware_weights(signal: Tensor, gram: Tensor, wanted: Tensor | None = None) -> NoiseAware:
    """Coefficients of the step of fixed length with the largest smallest expected gain.

    The gradients of a batch are ``g_k = s_k + n_k``. With coefficients that do not depend on that batch, a step of
    length one along ``d = sum_k c_k g_k`` gains ``(S c)_k / sqrt(c^T G c)`` of reward k in expectation: the signals
    give, the noise in ``G = E <g_k, g_l>`` takes. This solves ``max_c min_k (S c)_k / (wanted_k sqrt(c^T G c))``, or
    ``min c^T G c`` subject to ``S c >= wanted``. Its dual is a min-norm problem: with ``H = S G^-1 S``,
    ``w = argmin over the simplex of sum_kl w_k w_l H_kl / (wanted_k wanted_l)``, ``c`` is proportional to
    ``G^-1 S (w / wanted)``. By the KKT conditions every ``gains_k / wanted_k`` is at least ``smallest``, with equality
    where ``w_k > 0``.

    Without noise (``G = S``) and with ``wanted = |s_k|`` these are MARBLE's coefficients. With equal, orthogonal
    signals (no information), and no noise so opposed that ``G wanted`` has a negative entry, they are ``wanted``.

    Args:
        signal: ``S [..., K, K]``, PSD: the first item of what ``shrink_gram`` returns, or ``psd_part`` of an averaged
            ``cross_gram``.
        gram: ``G [..., K, K]``, Gram matrix of batches of the size of a step, noise included (an average of them).
        wanted: ``[..., K]``, positive: gains in proportion to which a step should serve the rewards. None for
            ``sqrt(S_kk)``, equal cosines, as MARBLE. A reward with 0 is left to itself.

    Returns:
        ``NoiseAware`` in float64. NaN in an item makes that item NaN.

    Raises:
        ValueError: shapes do not match, or K > 8 where values cannot be read (inside ``torch.func`` or
            ``torch.compile``, or of some tensor subclasses).

    Example:
        >>> S = torch.tensor([[4.0, -1.0], [-1.0, 1.0]])
        >>> noise_aware_weights(S, S).gains  # equal cosines: twice as much for the longer one
        tensor([1.0000, 0.5000], dtype=torch.float64)
        >>> noise_aware_weights(S, S + 100 * torch.eye(2)).gains  # noise takes nine tenths
        tensor([0.0891, 0.0445], dtype=torch.float64)

    Reference: this project, docs/design/0004-solve-under-noise.md; duality as for the min-norm point (Wolfe, 1976).
    """
    require_gram("signal", signal)
    require_gram("gram", gram)
    require_same_shape("gram", gram, "signal", signal)
    S, G = ((x.detach().double() + x.detach().double().mT) / 2 for x in (signal, gram))
    K = S.shape[-1]
    p = S.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt() if wanted is None else wanted.detach().double()
    require_float("wanted", p, "[..., K]", range(1, 65))
    fits = p.shape[-1] == K and p.shape[:-1] in (torch.Size(), S.shape[:-2])
    require(fits, "wanted", f"K = {K} entries, one a reward, in {list(S.shape[:-1])} or [{K}]", describe(p))
    p = p.expand(S.shape[:-1])
    on = p > 0
    bad = ~(S.isfinite().all(-1).all(-1) & G.isfinite().all(-1).all(-1) & p.isfinite().all(-1))
    S, G = (torch.where(bad[..., None, None], 0.0, x) for x in (S, G))
    inverse = torch.where(on, 1.0 / torch.where(on, p, 1.0), 0.0)
    A = _pseudo_inverse(G) @ S
    H = (S @ A) * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    w = min_norm_weights(torch.where(on.unsqueeze(-1) & on.unsqueeze(-2), (H + H.mT) / 2, _outside(H, on)))
    c = (A @ (w * inverse).unsqueeze(-1)).squeeze(-1)
    u = torch.full_like(c, 1.0 / K)
    length = _length(G, u) / torch.where(_length(G, c) > 0, _length(G, c), 1.0)
    apart = (w.square() * H.diagonal(dim1=-2, dim2=-1) * on).sum(-1).clamp(min=0).sqrt()  # without any cancellation
    stationary = ~(_length(H, w * on) > _STATIONARY * apart)
    c = torch.where(stationary.unsqueeze(-1), u, c * length.unsqueeze(-1))
    c = torch.where(bad.unsqueeze(-1), torch.nan, c)
    norm = _length(G, c).unsqueeze(-1)
    gains = torch.where(norm == 0, 0.0, (S @ c.unsqueeze(-1)).squeeze(-1) / torch.where(norm == 0, 1.0, norm))
    return NoiseAware(c, gains, torch.where(on, gains * inverse, torch.inf).amin(-1), stationary & ~bad)


def _length(G: Tensor, c: Tensor) -> Tensor:
    """``sqrt(c^T G c) [...]``."""
    return (c * (G @ c.unsqueeze(-1)).squeeze(-1)).sum(-1).clamp(min=0).sqrt()


def _outside(H: Tensor, on: Tensor) -> Tensor:
    """A diagonal for the rewards that nobody wants, so long that the min-norm point gives them no weight."""
    far = 1e6 * (H.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) + 1.0)
    return torch.diag_embed(torch.where(on, 0.0, far))


def _pseudo_inverse(G: Tensor) -> Tensor:
    """Inverse of a PSD matrix on the range that its float32 rows can tell from rounding, whatever their lengths."""
    s = G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    unit = torch.where(s > 0, 1.0 / torch.where(s > 0, s, 1.0), 0.0)
    eigenvalues, Q = torch.linalg.eigh(G * unit.unsqueeze(-1) * unit.unsqueeze(-2))
    kept = eigenvalues > _RANK * eigenvalues[..., -1:]
    inverse = torch.where(kept, 1.0 / torch.where(kept, eigenvalues, 1.0), 0.0)
    found: Tensor = (Q * inverse.unsqueeze(-2)) @ Q.mT * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    return found
