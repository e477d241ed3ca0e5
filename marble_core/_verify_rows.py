"""The check behind ``shared_cotangent_rows(verify=True)``: one combination of the rows against autograd."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from marble_core._check import require, wide
from marble_core._patched_layers import some

_FIX = (
    "A layer's rows are not those of signal: they are moved or mixed, another dimension of its input is as large as B, "
    'or a hook changes gradients. Pass fallback="all", or freeze these parameters.'
)


def require_equal(
    rows: Mapping[str, Tensor],
    signal: Tensor,
    module: nn.Module,
    weights: Tensor,
    *,
    autocast: bool,
    retain: bool,
) -> None:
    """Raise unless ``sum_k r_k rows_k`` is the gradient of ``sum_b (weights r)_b signal_b``, to rounding.

    Both are linear in the weights of the rows, so that rows which are wrong agree for an ``r`` of probability 0. The
    ``r`` is the same in every call, and torch's own generators are left alone. Rows that are not finite are passed.
    """
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(weights.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    w = weights @ r.to(weights)
    params = dict(module.named_parameters())
    inputs = [params[name] for name in rows]
    found = torch.autograd.grad(signal, inputs, w.to(signal), retain_graph=retain, allow_unused=True)
    pairs = [_error_and_scale(row, g, r) for row, g in zip(rows.values(), found, strict=True)]
    error, scale = torch.stack([e for e, _ in pairs]), torch.stack([s for _, s in pairs])
    eps = _coarsest(signal, module, autocast=autocast)
    # A gradient that is 0 but for rounding (of a key's bias, say) has the rounding of the largest one.
    largest = scale.nan_to_num(0.0, posinf=0.0).max()
    bound = min(eps**0.5, 0.04) * scale + min(100 * eps, 0.02) * largest
    wrong = [name for name, bad in zip(rows, ((error > bound) & scale.isfinite()).tolist(), strict=True) if bad]
    require(not wrong, "module", "rows that agree with autograd", f"others for {some(wrong)}", _FIX)


def _error_and_scale(row: Tensor, g: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor]:
    """Length of the difference for a parameter, and a length that it is small beside."""
    row = row.to(wide(row.dtype))
    r = r.to(row)
    own = torch.tensordot(r, row, dims=1)
    expected = torch.zeros_like(own) if g is None else g.to(own.dtype)
    size = r.abs() @ torch.linalg.vector_norm(row.flatten(1), dim=1) + torch.linalg.vector_norm(expected)
    return torch.linalg.vector_norm(own - expected).cpu().double(), size.cpu().double()


def _coarsest(signal: Tensor, module: nn.Module, *, autocast: bool) -> float:
    """The coarsest rounding on the way back: frozen parameters have part in it, matrix products in TF32, and float32
    inside of norms and softmaxes whatever the model is in."""
    dtypes = {torch.float32, signal.dtype, *(p.dtype for p in module.parameters() if p.is_floating_point())}
    dtypes |= {torch.bfloat16} if autocast else set()
    exact = signal.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return max(*(torch.finfo(dtype).eps for dtype in dtypes), 0.0 if exact else 2**-10)
