"""The NFT loss: advantages ``A`` to interpolation ``r`` to loss, and its affine decomposition in ``r``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from marble_core._check import require, require_float, require_range, require_same_shape, require_vector, wide

_ANY_RANK = range(65)


class AffineTerms(NamedTuple):
    """The NFT loss as an affine function of ``r``: ``loss = prox + (r - 1/2) signal``, each ``[B]``."""

    prox: Tensor
    signal: Tensor


def interpolation(A: Tensor, *, a_max: float = 5.0) -> Tensor:
    """Advantages to interpolation coefficients: how much of a row's loss is the positive branch.

    ``r = clamp(A / (2 a_max) + 1/2, 0, 1)``, elementwise: no advantage is 1/2, and beyond ``a_max`` on either side
    ``r`` no longer moves. NaN stays NaN; infinities clamp.

    Args:
        A: ``[...]``, advantages, usually ``[B, K]``.
        a_max: the advantage at which ``r`` reaches 1, positive and finite.

    Returns:
        ``[...]`` in the dtype of ``A``, in [0, 1].

    Raises:
        ValueError: ``A`` is not floating-point, or ``a_max`` is out of range.

    Example:
        >>> interpolation(torch.tensor([-9.0, 0.0, 2.5, 5.0]))
        tensor([0.0000, 0.5000, 0.7500, 1.0000])

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eq. 2; DiffusionNFT (Zheng et al., arXiv 2509.16117).
    """
    require_float("A", A, "[...]", _ANY_RANK)
    require_range("a_max", a_max, 0.0, math.inf, open_low=True, open_high=True)
    return (A.to(wide(A.dtype)) / (2 * a_max) + 0.5).clamp(0, 1).to(A.dtype)


def branch_losses(
    v: Tensor,
    v_old: Tensor,
    *,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    beta: float,
    form: Literal["x0", "velocity"] = "x0",
) -> tuple[Tensor, Tensor]:
    """The losses of the positive and of the negative branch, one pair a row.

    ``v_pos = (1 - beta) v_old + beta v``, ``v_neg = (1 + beta) v_old - beta v``, ``target = noise - x0``.
    ``form="velocity"``: ``L_pm = mean((v_pm - target)^2)``. ``form="x0"``, with ``x_t = (1 - t) x0 + t noise`` and
    ``x0_pm = x_t - t v_pm``: ``L_pm = mean((x0_pm - x0)^2) / stopgrad(max(mean|x0_pm - x0|, 1e-5))``. Means run over
    all dimensions but the first. The scale ``a_max / beta`` by which DiffusionNFT multiplies the loss in its x0 form
    is *not* included: two constants of the run, which the caller applies to the loss of either branch or to both.

    ``v_old`` is a constant (detached). Computed as ``v_pm - target = e +- beta delta`` and
    ``x0_pm - x0 = -t (v_pm - target)``, which are the same numbers without cancellation: ``v = v_old`` gives equal
    losses bit for bit. NaN stays in its own row.

    Args:
        v: ``[B, ...]``, velocity of the trained policy.
        v_old: ``[B, ...]``, velocity of the sampling policy.
        x0: ``[B, ...]``, clean latents.
        noise: ``[B, ...]``.
        t: ``[B]``, times in [0, 1].
        beta: strength of the branches, positive and finite.
        form: which loss.

    Returns:
        ``(l_pos, l_neg)``, each ``[B]``, in the dtype of ``v``; float32 where ``v`` is float16 or bfloat16, whose
        digits would not survive ``l_pos - l_neg``.

    Raises:
        ValueError: a shape, a dtype or an option is wrong.

    Example:
        >>> v, x0 = torch.tensor([[2.0, 2.0]]), torch.zeros(1, 2)
        >>> t = torch.ones(1)
        >>> branch_losses(v, torch.zeros(1, 2), x0=x0, noise=torch.ones(1, 2), t=t, beta=1.0, form="velocity")
        (tensor([1.]), tensor([9.]))

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eq. 2; DiffusionNFT (Zheng et al., arXiv 2509.16117) and its
        code for the x0 form.
    """
    require_float("v", v, "[B, ...]", _ANY_RANK[2:])
    for name, x in (("v_old", v_old), ("x0", x0), ("noise", noise)):
        require_float(name, x, "[B, ...]", _ANY_RANK[2:])
        require_same_shape(name, x, "v", v)
    require_vector("t", t, v.shape[0], "B")
    require_range("beta", beta, 0.0, math.inf, open_low=True, open_high=True)
    require(form in ("x0", "velocity"), "form", '"x0" or "velocity"', repr(form))
    v = v.to(wide(v.dtype))
    v_old, x0, noise, t = (x.to(v.dtype) for x in (v_old.detach(), x0, noise, t))
    e, delta = v_old - (noise - x0), v - v_old
    scale = t.reshape(-1, *[1] * (v.ndim - 1)) if form == "x0" else 1.0
    l_pos, l_neg = (_branch_loss(scale * residual, form) for residual in (e + beta * delta, e - beta * delta))
    return l_pos, l_neg


def nft_loss(r: Tensor, l_pos: Tensor, l_neg: Tensor) -> Tensor:
    """The NFT loss of every row, ``r l_pos + (1 - r) l_neg``.

    Nothing else: the scale ``a_max / beta`` of the x0 form and the KL to the base are the caller's. With one column
    of ``r`` a reward it gives all K losses, which differ in ``r`` alone. NaN stays in its own entry; beware that
    it also meets ``r = 0``, as ``0 * NaN`` is NaN.

    Args:
        r: ``[B]`` or ``[B, K]``, interpolation coefficients.
        l_pos: ``[B]``, loss of the positive branch.
        l_neg: ``[B]``, loss of the negative branch.

    Returns:
        ``[B]`` or ``[B, K]``, as ``r``, in the wider of the dtypes.

    Raises:
        ValueError: ``r`` is neither ``[B]`` nor ``[B, K]``, or ``l_pos`` and ``l_neg`` differ in shape.

    Example:
        >>> nft_loss(torch.tensor([[0.5, 1.0]]), torch.tensor([1.0]), torch.tensor([9.0]))
        tensor([[5., 1.]])

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eq. 2; DiffusionNFT (Zheng et al., arXiv 2509.16117).
    """
    _require_losses(l_pos, l_neg)
    B = list(l_pos.shape)
    require_float("r", r, "[B] or [B, K]", _ANY_RANK)
    ok = r.shape == l_pos.shape or r.shape[:-1] == l_pos.shape
    require(ok, "r", f"shape [B] = {B} or [B, K] = {B} and K, as l_pos", list(r.shape))
    if r.ndim > l_pos.ndim:
        l_pos, l_neg = l_pos.unsqueeze(-1), l_neg.unsqueeze(-1)
    return r * l_pos + (1 - r) * l_neg


def affine_terms(l_pos: Tensor, l_neg: Tensor) -> AffineTerms:
    """Split the NFT loss into what depends on the reward and what does not.

    ``nft_loss(r, l_pos, l_neg) == prox + (r - 1/2) signal`` with ``prox = (l_pos + l_neg) / 2`` and
    ``signal = l_pos - l_neg``. With ``r`` of shape ``[B, K]`` write
    ``prox[:, None] + (r - 0.5) * signal[:, None]``. In the velocity form, with ``e = v_old - target`` and
    ``delta = v - v_old``, ``prox = mean(e^2) + beta^2 mean(delta^2)`` and ``signal = 4 beta mean(e delta)``: a
    policy-gradient term and a pull to the old policy. NaN stays in its own row.

    Args:
        l_pos: ``[B]``, loss of the positive branch.
        l_neg: ``[B]``, loss of the negative branch.

    Returns:
        ``AffineTerms(prox, signal)``, each ``[B]``.

    Raises:
        ValueError: the shapes differ or a dtype is not floating-point.

    Example:
        >>> affine_terms(torch.tensor([1.0]), torch.tensor([9.0]))
        AffineTerms(prox=tensor([5.]), signal=tensor([-8.]))

    Reference: this project, docs/theory.md, section 7.
    """
    _require_losses(l_pos, l_neg)
    return AffineTerms(prox=(l_pos + l_neg) / 2, signal=l_pos - l_neg)


def combine_interpolation(weights: Tensor, r: Tensor) -> Tensor:
    """One interpolation coefficient a row that stands for all rewards, exact also where ``r`` is clamped.

    ``r_bar = sum_k weights_k r_k``. As the loss is affine in ``r``, weights on the simplex give
    ``sum_k weights_k loss(r_k) = loss(r_bar)`` with all its derivatives, and ``r_bar`` is in [0, 1] to rounding.
    Split coefficients ``c`` off the simplex into a simplex vector and a scale, ``c = s w``, and scale the loss.
    A NaN in ``r`` makes its own row NaN, whatever its weight.

    Args:
        weights: ``[K]``, on the simplex.
        r: ``[B, K]``, interpolation coefficients.

    Returns:
        ``[B]`` in the dtype of ``r``.

    Raises:
        ValueError: ``r`` is not ``[B, K]`` or ``weights`` not ``[K]``.

    Example:
        >>> combine_interpolation(torch.tensor([0.25, 0.75]), torch.tensor([[0.0, 1.0], [1.0, 0.5]]))
        tensor([0.7500, 0.6250])

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), prop. 1; in r-space: this project, docs/theory.md, section 9.
    """
    return _combine(weights, "r", r)


def combine_advantages(weights: Tensor, A: Tensor) -> Tensor:
    """One advantage a row that stands for all rewards, as in the paper; exact only where nothing is clamped.

    ``A_bar = sum_k weights_k A_k``. ``interpolation(A_bar)`` equals ``combine_interpolation(weights,
    interpolation(A))`` if the weights sum to 1 and no ``|A_k|`` of the row exceeds ``a_max``; ``clamped_fraction``
    says how often that fails. For the signal alone, ``A_bar / (2 a_max)`` is exact for *any* coefficients, on the
    simplex or off it. A NaN in ``A`` makes its own row NaN, whatever its weight.

    Args:
        weights: ``[K]``.
        A: ``[B, K]``, advantages.

    Returns:
        ``[B]`` in the dtype of ``A``.

    Raises:
        ValueError: ``A`` is not ``[B, K]`` or ``weights`` not ``[K]``.

    Example:
        >>> combine_advantages(torch.tensor([0.25, 0.75]), torch.tensor([[4.0, -4.0]]))
        tensor([-2.])

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), section 3.4 and prop. 1.
    """
    return _combine(weights, "A", A)


def clamped_fraction(A: Tensor, *, a_max: float = 5.0) -> Tensor:
    """Share of rows, for each reward, whose advantage ``interpolation`` clamps.

    ``mean over rows of |A| > a_max``; an advantage of exactly ``a_max`` is not clamped, and inapplicable entries,
    whose advantage is 0, count as rows. A NaN makes its own column NaN.

    Args:
        A: ``[B, K]`` (or ``[B]``), advantages.
        a_max: the clamp, positive and finite.

    Returns:
        ``[K]`` (or a scalar), in the dtype of ``A``.

    Raises:
        ValueError: ``A`` is not floating-point of rank 1 or 2, or ``a_max`` is out of range.

    Example:
        >>> clamped_fraction(torch.tensor([[6.0, 1.0], [5.0, -9.0], [0.0, 7.0], [0.0, 0.0]]))
        tensor([0.2500, 0.5000])

    Reference: this project, docs/theory.md, section 9.
    """
    require_float("A", A, "[B, K] or [B]", (1, 2))
    require_range("a_max", a_max, 0.0, math.inf, open_low=True, open_high=True)
    x = A.to(wide(A.dtype))
    return torch.where(x.isnan(), x, (x.abs() > a_max).to(x.dtype)).mean(0).to(A.dtype)


def affine_residual(
    loss_of_r: Callable[[Tensor], Any],
    r0: Tensor,
    r1: Tensor,
    *,
    points: Sequence[float] = (0.11, 0.37, 0.5, 0.83),
) -> Tensor:
    """How far a loss is from affine between two inputs: 0 to rounding if amortization is exact for it.

    The largest ``|f((1 - s) r0 + s r1) - (1 - s) f(r0) - s f(r1)|`` over the mixing points ``s`` and all entries,
    relative to the largest ``|f|`` met on the way; at most 2. The points are uneven so that an odd bend about the
    middle is seen too. ``f`` may take ``r`` or advantages, and may return losses or a gradient: it is the gradient's
    residual that amortization needs. GRPO without clipping passes; PPO's clip, with ratios outside it and advantages
    that change sign, does not. Small at one pair is no proof: try several. A NaN anywhere gives NaN, ``f = 0`` gives 0.

    Args:
        loss_of_r: function of one tensor of the shape of ``r0``, with everything else held fixed, to a tensor or a
            pytree of them, such as the tuple of ``torch.autograd.grad``.
        r0: ``[...]``, one end.
        r1: ``[...]``, the other end.
        points: mixing points, each in (0, 1).

    Returns:
        A scalar, detached, in the dtype ``loss_of_r`` returns.

    Raises:
        ValueError: ``r0`` and ``r1`` differ in shape, a point is not in (0, 1), or there is none, or ``loss_of_r``
            returns no floating-point tensors or other shapes at another point.

    Example:
        >>> r0, r1 = torch.tensor([0.0]), torch.tensor([1.0])
        >>> affine_residual(lambda r: 3 * r - 1, r0, r1) < 1e-6, affine_residual(torch.square, r0, r1)
        (tensor(True), tensor(0.2500))

    Reference: this project, docs/theory.md, section 7; it checks MARBLE (Zhao et al., arXiv 2605.06507), prop. 1.
    """
    require_float("r0", r0, "[...]", _ANY_RANK)
    require_float("r1", r1, "[...]", _ANY_RANK)
    require_same_shape("r1", r1, "r0", r0)
    ok = isinstance(points, Sequence) and len(points) >= 1 and all(isinstance(s, float) and 0 < s < 1 for s in points)
    require(ok, "points", "at least one mixing point, each a float in (0, 1)", points)
    f0, f1, *inner = (_values(loss_of_r((1 - s) * r0 + s * r1)) for s in (0.0, 1.0, *points))
    for f in (f1, *inner):
        require_same_shape("loss_of_r(r)", f, "loss_of_r(r0)", f0)
    deviations = [f - ((1 - s) * f0 + s * f1) for s, f in zip(points, inner, strict=True)]
    scale = torch.stack([f0, f1, *inner]).abs().amax()
    return torch.stack(deviations).abs().amax() / scale.clamp(min=torch.finfo(scale.dtype).tiny)


def _values(found: Any) -> Tensor:
    """The numbers of a tensor or of a pytree of them, as one detached vector."""
    leaves = pytree.tree_leaves(found)
    for x in leaves:
        require_float("loss_of_r(r)", x, "[...], or a pytree of such", _ANY_RANK)
    require(any(x.numel() for x in leaves), "loss_of_r(r)", "at least one number", f"{len(leaves)} tensors without any")
    return torch.cat([x.detach().flatten() for x in leaves])


def _branch_loss(residual: Tensor, form: str) -> Tensor:
    """Mean square of every row; in the x0 form over the row's mean absolute residual, held constant."""
    dims = tuple(range(1, residual.ndim))
    square = residual.square().mean(dims)
    return square / residual.detach().abs().mean(dims).clamp(min=1e-5) if form == "x0" else square


def _combine(weights: Tensor, name: str, x: Tensor) -> Tensor:
    """``sum_k weights_k x_k`` along the last dimension, halves in float32."""
    require_float(name, x, "[B, K]", (2,))
    require_vector("weights", weights, x.shape[1], "K")
    y = x.to(wide(x.dtype))
    return (weights.to(y) * y).sum(-1).to(x.dtype)


def _require_losses(l_pos: Tensor, l_neg: Tensor) -> None:
    """Both branch losses are floating-point tensors of one shape."""
    require_float("l_pos", l_pos, "[B]", _ANY_RANK)
    require_float("l_neg", l_neg, "[B]", _ANY_RANK)
    require_same_shape("l_neg", l_neg, "l_pos", l_pos)
