"""Gradient matrices ``[K, P]`` from named hard classes, drawn on purpose: hypothesis seeds them and shrinks K."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

CLASSES = (
    "random",
    "correlated",
    "lognormal norms",
    "norms 1e-8..1e8",
    "one tiny",
    "duplicates",
    "identical",
    "opposite pair",
    "collinear",
    "rank K/2",
    "zero rows",
    "all zero",
    "stationary",
    "bf16",
)


def randn(*shape: int, seed: int) -> Tensor:
    """Seeded float64 normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(kind: str, K: int, seed: int) -> Tensor:
    """K gradients ``[K, P]`` of one class; conflicts are common, as P is not much larger than K."""
    g = randn(K, K + 4, seed=seed)
    scale = randn(K, 1, seed=seed + 1)
    if kind == "correlated":
        g = g + 2 * randn(1, K + 4, seed=seed + 2)
    elif kind == "lognormal norms":
        g = g * (2 * scale).exp()
    elif kind == "norms 1e-8..1e8":
        g = g * 10 ** (16 * torch.special.ndtr(scale) - 8)
    elif kind == "one tiny":
        g = g / g.norm(dim=1, keepdim=True)
        g[seed % K] *= 1e-6
    elif kind == "duplicates":
        g = g[torch.arange(K) % max(1, K // 2)]
    elif kind == "identical":
        g = g[:1].expand(K, -1).clone()
    elif kind == "opposite pair":
        g[-1] = -g[0] if K > 1 else g[0]
    elif kind == "collinear":
        g = g[:1] + 1e-6 * g
    elif kind == "rank K/2":
        g = randn(K, max(1, K // 2), seed=seed + 2) @ g[: max(1, K // 2)]
    elif kind == "zero rows":
        g[:: max(2, K - 1)] = 0
    elif kind == "all zero":
        g = 0 * g
    elif kind == "stationary":  # 0 = sum of w_k g_k with all w_k well above 0
        w = scale[:, 0].sigmoid() + 0.2
        g[-1] = -(w[:-1] @ g[:-1]) / w[-1] if K > 1 else 0.0
    elif kind == "bf16":
        g = g.bfloat16().double()
    return g


def gradient_matrices(kinds: tuple[str, ...] = CLASSES, min_K: int = 1, max_K: int = 12) -> st.SearchStrategy[Tensor]:
    """A class, a K and a seed."""
    return st.builds(gradients, st.sampled_from(kinds), st.integers(min_K, max_K), st.integers(0, 2**20))


REGULAR = (
    "random",
    "correlated",
    "lognormal norms",
    "norms 1e-8..1e8",
    "one tiny",
    "bf16",
)  # almost surely not stationary
