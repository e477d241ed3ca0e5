"""The solver behind ``simplex.min_norm_weights``: minimize ``w^T G w`` over the simplex, exactly, ties canonical.

With norms ``s_k = sqrt(G_kk)``, ``G_hat = G / (s s^T)``, ``a = min(s) / s`` and ``u = w s`` the problem reads
``min u^T G_hat u`` with ``a^T u = 1``, ``u >= 0``: a unit diagonal whatever the scales. On a support S the minimizer
is proportional to ``(G_hat_SS + b b^T)^-1 b`` with ``b = a_S / max(a_S)``, regular whenever the gradients of S are
affinely independent. Easy problems (a unique, well-conditioned solution) are solved by principal pivoting; the others
by trying every support (K <= 8), or by an active-set method and a projection onto the face of minimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import mul

import torch
from torch import Tensor

# Weights on a support S up to scale, and the slack of the KKT conditions outside; None where that is ill-posed.
_SolveOn = Callable[[list[int], list[int]], "tuple[list[float], list[float]] | None"]

ENUMERATED = 8  # up to this K all 2^K - 1 supports can be tried at once
_EPS = torch.finfo(torch.float64).eps
_FLOATS = 16  # up to this K Python floats are quicker than a LAPACK call per step


def apply_floor(G: Tensor, floor: float, c: float | Tensor) -> Tensor:
    """Gram of ``c g_k + floor sum_l g_l``: with ``w = floor + c v`` its min-norm ``v`` is on the plain simplex."""
    row = G.sum(-1, keepdim=True)
    return c * c * G + c * floor * (row + row.mT) + floor * floor * row.sum(-2, keepdim=True)


def solve(G: Tensor) -> Tensor:
    """One Gram ``[K, K]`` on the host: the easy case in plain floats or a few LAPACK calls, else with every care."""
    K = G.shape[-1]
    rows = G.tolist() if K <= _FLOATS else []
    diagonal = [rows[i][i] for i in range(K)] if rows else G.diagonal().tolist()
    if min(diagonal) > 0.0 and max(diagonal) < math.inf:
        easy = _pivot(K, _on_floats(rows, min(diagonal)) if rows else _on_tensors(G, 0.0, 1e-4))
        if easy is not None:
            return torch.tensor(easy, dtype=torch.float64, device=G.device)
    if K <= ENUMERATED:
        return enumerate_supports(G)
    if not G.isfinite().all():
        return torch.full_like(G[0], math.nan)
    zero = G.diagonal() <= 0
    if zero.any():
        return zero.double() / zero.sum()
    a, G_hat = _unit_diagonal(G)
    order = _canonical_order(G_hat)
    u = torch.empty_like(a)
    u[order] = _solve_degenerate(G[order][:, order], a[order], G_hat[order][:, order])
    w = u * a
    return w / w.sum()


def solve_batch(G: Tensor) -> Tensor:
    """Host Grams ``[..., K, K]`` one by one, so that a batch and a loop agree to the last bit."""
    items = [solve(item) for item in G.reshape(-1, *G.shape[-2:])]
    return torch.stack(items).reshape(G.shape[:-1]) if items else G.sum(-1)


def _unit_diagonal(G: Tensor) -> tuple[Tensor, Tensor]:
    """``a = min(s) / s`` and ``G_hat = G / (s s^T)`` for the norms ``s = sqrt(diag G)``; weights are ``w ~ a u``."""
    s = G.diagonal(dim1=-2, dim2=-1).sqrt()
    a = s.amin(-1, keepdim=True) / s
    return a, G / s.unsqueeze(-1) / s.unsqueeze(-2)


def _flat(eigenvalues: Tensor) -> Tensor:
    """Ascending eigenvalues up to this are rounding: moving along their vectors changes nothing."""
    return _EPS * (8.0 * eigenvalues[..., -1:] + 32.0)


def _canonical_order(G_hat: Tensor) -> Tensor:
    """An order of the gradients that does not depend on their labels, so that rounding does not either."""
    return (G_hat.pow(2).sum(-1) + G_hat.pow(3).sum(-1)).argsort(dim=-1, stable=True)


def _pivot(K: int, solve_on: _SolveOn) -> list[float] | None:
    """Block principal pivoting (Kim and Park, 2011) from the full support on.

    On a support the weights solve ``(G + m 1 1^T) w = 1`` up to scale, for any ``m > 0``; entries with a negative
    weight or slack change sides until there is none. None where a support is too close to singular, or it takes too
    long. The full support comes first, so a solution is that of a strictly convex problem: unique.
    """
    S, out = list(range(K)), list[int]()
    fewest, patience = K + 1, 3
    for _ in range(40):
        solved = solve_on(S, out)
        if solved is None:
            return None
        w, slack = solved
        wrong = [i for i, w_i in zip(S, w, strict=True) if w_i <= 0.0]
        wrong += [k for k, y in zip(out, slack, strict=True) if y < 0.0]
        if not wrong:
            weights, total = [0.0] * K, sum(w)
            for i, w_i in zip(S, w, strict=True):
                weights[i] = w_i / total
            return weights
        if len(wrong) < fewest:
            fewest, patience = len(wrong), 3
        elif patience > 0:
            patience -= 1
        else:  # Murty's rule, slow and finite: exchange the last one alone
            wrong = [max(wrong)]
        inside = set(S).symmetric_difference(wrong)
        S, out = sorted(inside), [k for k in range(K) if k not in inside]
    return None


def _on_floats(G: list[list[float]], m: float) -> _SolveOn:
    """Solve on supports of a small Gram in Python floats."""

    def solve_on(S: list[int], out: list[int]) -> tuple[list[float], list[float]] | None:
        w = _solve_support(G, m, S)
        if w is None:
            return None
        shift = m * sum(w) - 1.0
        return w, [sum([G[k][j] * w_j for j, w_j in zip(S, w, strict=True)]) + shift for k in out]

    return solve_on


def _on_tensors(G: Tensor, ridge: float, least_pivot: float) -> _SolveOn:
    """Solve on supports of a Gram by LAPACK, refined once; a ridge (relative to the diagonal) makes it regular."""
    d = G.diagonal()
    M = G + d.min() + torch.diag(ridge * d)
    ones = torch.ones_like(d).unsqueeze(-1)

    def solve_on(S: list[int], out: list[int]) -> tuple[list[float], list[float]] | None:
        i = torch.tensor(S, device=G.device)
        rows, d_S, b = (M[i], d[i], ones[: len(S)]) if out else (M, d, ones)
        A = rows[:, i] if out else M
        L, info = torch.linalg.cholesky_ex(A)
        if info or (L.diagonal().square() < least_pivot * d_S).any():
            return None
        w = torch.cholesky_solve(b, L)
        w = w + torch.cholesky_solve(b - A @ w, L)
        slack = (w.mT @ rows).squeeze(0).tolist() if out else []
        return w.squeeze(-1).tolist(), [slack[k] - 1.0 for k in out]

    return solve_on


def _solve_support(G: list[list[float]], m: float, S: list[int]) -> list[float] | None:
    """Solve ``(G_SS + m 1 1^T) w = 1`` by Cholesky; None if a pivot is below 1e-4 of its diagonal entry."""
    L: list[list[float]] = []
    z: list[float] = []
    for i in S:
        G_i = G[i]
        row: list[float] = []
        for j, L_j in zip(S, L, strict=False):  # L is still shorter than S
            row.append((G_i[j] + m - sum(map(mul, row, L_j))) / L_j[-1])
        pivot = G_i[i] + m - sum(map(mul, row, row))
        if not pivot >= 1e-4 * G_i[i]:
            return None
        root = math.sqrt(pivot)
        z.append((1.0 - sum(map(mul, row, z))) / root)
        row.append(root)
        L.append(row)
    for i in range(len(z) - 1, -1, -1):
        L_i = L[i]
        z[i] = w_i = z[i] / L_i[i]
        for j in range(i):
            z[j] -= L_i[j] * w_i
    return z


def _solve_degenerate(G: Tensor, a: Tensor, G_hat: Tensor) -> Tensor:
    """The canonical minimizer when the problem is singular or nearly so: any optimum, then the shortest one."""
    start = _pivot(len(a), _on_tensors(G, 1e-8, 0.0))
    u = a if start is None else torch.tensor(start, dtype=a.dtype, device=a.device) / a
    u = _active_set(G_hat, a, 1.0 / a, u)
    return _shortest_minimizer(G_hat, a, u)


def _active_set(G_hat: Tensor, a: Tensor, s: Tensor, u: Tensor) -> Tensor:
    """Active set for ``min u^T G_hat u``, ``a^T u = 1``, ``u >= 0`` from a feasible ``u``; G_hat may be singular.

    Each step is a correction of the current point, so rounding is refined away; a ridge of a few ulp makes a step
    along a flat direction long enough to reach the boundary. ``s`` weighs the violation of each KKT condition.
    """
    K = a.shape[0]
    S, banned, steps = u > 0, torch.zeros(K, dtype=torch.bool, device=a.device), 0
    best, least = u, math.inf
    for _ in range(10 * K + 20):
        top = a[S].abs().max()
        b = a / top
        u = u / (b @ u)
        g = G_hat @ u
        r = (u @ g) * b - g
        violation = torch.where(S, r.abs(), r) * s * top
        tol = 1e-13 * float(u @ g) + 2.0 * _EPS * float((s * top * (G_hat.abs() @ u)).max())
        excess = float(violation.max()) / tol
        steps = 0 if excess < 0.9 * least else steps  # a support that is hard to solve may take many steps
        if excess < least:
            best, least = u, excess
        if least <= 1.0:
            break
        # near the end the support must be solved better than to tol: what depends on it magnifies its error
        if steps < 3 and float(violation[S].max()) > (0.01 * tol if excess < 1e3 else tol):
            u, S, moved = _step(G_hat, b, r, u, S)
            steps = steps + 1 if moved == 1.0 else 0
            banned &= moved == 0.0
        else:
            k = int(torch.where(S | banned, -math.inf, violation).argmax())
            if S[k] or banned[k] or not violation[k] > tol:
                break
            S[k], banned[k], steps = True, True, 0
    return best


def _step(G_hat: Tensor, b: Tensor, r: Tensor, u: Tensor, S: Tensor) -> tuple[Tensor, Tensor, float]:
    """Newton step on the support ``S`` along ``b^T p = 0``, cut at the boundary; what it hits leaves ``S``."""
    i = S.nonzero().squeeze(-1)
    A = torch.addr(G_hat[i][:, i], b[i], b[i])
    ridge = 2.0 * _EPS * len(i)
    L, info = torch.linalg.cholesky_ex(A + ridge * torch.eye(len(i), dtype=A.dtype, device=A.device))
    while info:
        ridge *= 8.0
        L, info = torch.linalg.cholesky_ex(A + ridge * torch.eye(len(i), dtype=A.dtype, device=A.device))
    H_r, H_b = torch.cholesky_solve(torch.stack([r[i], b[i]], -1), L).unbind(-1)
    p = H_r - H_b * (b[i] @ H_r) / (b[i] @ H_b)
    ratio = torch.where(p < 0, u[i] / -p, math.inf)
    t = min(1.0, float(ratio.min()))
    u, S = u.clone(), S.clone()
    u[i] = torch.where(ratio <= t, 0.0, u[i] + t * p) if t < 1.0 else u[i] + p
    S[i] = ratio > t if t < 1.0 else True
    return u, S, t


def _shortest_minimizer(G_hat: Tensor, a: Tensor, u: Tensor) -> Tensor:
    """Of all minimizers the shortest, from one of them: the projection of 0 onto the optimal face."""
    b = a / a[u > 0].max()
    u = u / (b @ u)
    g = G_hat @ u
    slack = (g - (u @ g) * b) / b
    i = ((slack <= 1e-9 * (G_hat.abs() @ u / b).max()) | (u > 0)).nonzero().squeeze(-1)
    eigenvalues, Q = torch.linalg.eigh(torch.addr(G_hat[i][:, i], b[i], b[i]))
    Z = Q[:, eigenvalues <= _flat(eigenvalues)]
    if Z.shape[1] == 0:
        return u
    p = u[i] - Z @ (Z.mT @ u[i])
    if p.min() < 0:  # shortest y with p + Z y >= 0: least distance programming (Lawson and Hanson, 1974, ch. 23)
        ZZ = Z @ Z.mT
        y = (p == p.min()).double()
        y = _active_set(ZZ, -p, torch.ones_like(p), y)
        p = (p - ZZ @ y * (p @ y) / (y @ ZZ @ y)).clamp(min=0)
    i, p = i[p > 0], p[p > 0]
    M = torch.addr(G_hat[i][:, i], b[i], b[i])
    eigenvalues, Q = torch.linalg.eigh(M)
    inverse = torch.where(eigenvalues > _flat(eigenvalues), 1.0 / eigenvalues, 0.0)
    candidates = []
    for _ in range(6):  # take back the projection's rounding
        r = b[i] * (p @ M @ p) / (b[i] @ p) - M @ p
        p = (p + Q @ (inverse * (Q.mT @ r))).clamp(min=0)
        candidates.append(torch.zeros_like(u).index_copy_(0, i, p))
    found = torch.stack([*candidates, u])
    found = found / (found @ a).unsqueeze(-1)
    g, noise = found @ G_hat / a, (found @ G_hat.abs() / a).amax(-1)
    gap = (found @ G_hat * found).sum(-1) - g.amin(-1)
    best = int((gap[:-1] / noise[:-1]).argmin())
    return found[best] if gap[best] <= torch.maximum(gap[-1], 8.0 * _EPS * noise[best]) else found[-1]


def enumerate_supports(G: Tensor) -> Tensor:
    """All 2^K - 1 supports of ``[..., K, K]`` Grams at once, without a look at any value: exact and canonical."""
    K = G.shape[-1]
    bad = ~G.isfinite().all(-1).all(-1)
    G = torch.where(bad[..., None, None], 0.0, (G + G.mT) / 2)
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    zero = diagonal <= 0
    eye = torch.eye(K, dtype=G.dtype, device=G.device)
    safe = torch.where(zero.unsqueeze(-1) | zero.unsqueeze(-2), eye, G)  # zero gradients are dealt with at the end
    a, G_hat = _unit_diagonal(safe)
    order = _canonical_order(G_hat)
    a = a.gather(-1, order)
    G_hat = G_hat.gather(-2, order.unsqueeze(-1).expand(G.shape)).gather(-1, order.unsqueeze(-2).expand(G.shape))
    bits = torch.arange(1, 2**K, device=G.device).unsqueeze(-1) >> torch.arange(K, device=G.device)
    m = (bits & 1).to(G.dtype)  # [2^K - 1, K], one support a row
    b = m * a.unsqueeze(-2)
    b = b / b.amax(-1, keepdim=True)
    M = (G_hat.unsqueeze(-3) + b.unsqueeze(-1) * b.unsqueeze(-2)) * m.unsqueeze(-1) * m.unsqueeze(-2)
    eigenvalues, Q = torch.linalg.eigh(M + torch.diag_embed(1.0 - m))
    inverse = torch.where(eigenvalues > _flat(eigenvalues), 1.0 / eigenvalues, 0.0).unsqueeze(-1)
    r, u = b.unsqueeze(-1), torch.zeros_like(b).unsqueeze(-1)
    for _ in range(2):  # the second pass refines
        u = u + Q @ (inverse * (Q.mT @ r))
        r = b.unsqueeze(-1) - M @ u
    u = u.squeeze(-1).clamp(min=0) * m
    u = u / (u * a.unsqueeze(-2)).sum(-1, keepdim=True)
    chosen = _choose_support(G_hat, a, u)
    w = torch.zeros_like(chosen).scatter(-1, order, chosen * a)
    w = torch.where(zero.any(-1, keepdim=True), zero.to(G.dtype), w)
    return torch.where(bad.unsqueeze(-1), math.nan, w / w.sum(-1, keepdim=True))


def _excess(G_hat: Tensor, a: Tensor, u: Tensor) -> Tensor:
    """How far ``u [..., S, K]`` with ``a^T u = 1`` are from optimal, in units of what rounding leaves."""
    g = u @ G_hat
    g_abs = u @ G_hat.abs()
    s = 1.0 / a.unsqueeze(-2)
    norm2, noise = (u * g).sum(-1, keepdim=True), (u * g_abs).sum(-1, keepdim=True)
    return ((norm2 - g * s) / (1e-12 * norm2.clamp(min=0) + 4.0 * _EPS * (noise + g_abs * s))).amax(-1)


def _choose_support(G_hat: Tensor, a: Tensor, u: Tensor) -> Tensor:
    """Of the candidates ``u [..., S, K]`` the shortest that is optimal to rounding, or the one nearest to that."""
    excess = torch.where(u.isfinite().all(-1), _excess(G_hat, a, u), math.inf)
    length = torch.where(excess <= 1.0, u.pow(2).sum(-1), math.inf)
    best = torch.where((excess <= 1.0).any(-1), length.argmin(-1), excess.argmin(-1))
    return u.gather(-2, best[..., None, None].expand(*best.shape, 1, u.shape[-1])).squeeze(-2)
