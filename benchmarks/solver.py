"""Time and exactness of ``min_norm_weights`` beside its peers, on the same Gram matrices in the same run.

    python benchmarks/solver.py [--quick] [--json PATH]

Peers: TorchJD's MGDA weighting (Frank-Wolfe), quadprog (Goldfarb-Idnani), SciPy's nnls, and Frank-Wolfe with an exact
line search over the two newest vertices as in LibMTL. ``gap`` is the certificate relative to the shortest direction,
``(w^T G w - min_k (G w)_k) / w^T G w``: 0 for an exact solution; ``lost`` counts instances in which the peer's
direction has a negative inner product with a gradient although one without exists; ``-`` stands for no solution (an
exception).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import quadprog
import scipy.optimize
import torch
import torchjd
from torch import Tensor
from torchjd.aggregation import MGDAWeighting

import marble_core

Solver = Callable[[Tensor], Tensor]


def quadprog_weights(G: Tensor) -> Tensor:
    """``min w^T G w`` on the simplex by quadprog, which needs a positive definite matrix."""
    K = G.shape[0]
    C = np.concatenate([np.ones((K, 1)), np.eye(K)], axis=1)
    b = np.concatenate([np.ones(1), np.zeros(K)])
    return torch.from_numpy(quadprog.solve_qp(G.numpy(), np.zeros(K), C, b, 1)[0])


def nnls_weights(G: Tensor) -> Tensor:
    """Along the min-norm weights lies ``argmin |V^T u|^2 + (1^T u - 1)^2`` over ``u >= 0``, with ``G = V V^T``."""
    eigenvalues, Q = np.linalg.eigh(G.numpy() / float(G.diagonal().max()))
    root = (Q * np.sqrt(eigenvalues.clip(min=0))).T
    A = np.concatenate([root, np.ones((1, len(G)))])
    u, _ = scipy.optimize.nnls(A, np.concatenate([np.zeros(len(G)), np.ones(1)]))
    return torch.from_numpy(u / u.sum())


def frank_wolfe_weights(G: Tensor, steps: int = 250, tol: float = 1e-5) -> Tensor:
    """Frank-Wolfe with exact line search, from the best pair of gradients on: the solver common in MTL libraries."""
    M = G.numpy()
    K = len(M)
    w = np.full(K, 1.0 / K)
    for _ in range(steps):
        Mw = M @ w
        k = int(Mw.argmin())
        v11, v12, v22 = w @ Mw, Mw[k], M[k, k]
        gamma = 1.0 if v12 >= v22 else 0.0 if v12 >= v11 else (v11 - v12) / (v11 + v22 - 2 * v12)
        new = (1 - gamma) * w
        new[k] += gamma
        if np.abs(new - w).sum() < tol:
            break
        w = new
    return torch.from_numpy(w)


def instances(kind: str, K: int, count: int) -> list[Tensor]:
    """``count`` seeded Gram matrices of K gradients."""
    grams = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(1000 * K + seed)
        P = {"random": 1000, "conflict": 2 * K, "one tiny": 2 * K}[kind]
        g = torch.randn(K, P, generator=generator, dtype=torch.float64)
        if kind == "one tiny":
            g = g / g.norm(dim=1, keepdim=True)
            g[0] *= 1e-6
        grams.append(g @ g.T)
    return grams


def measure(solve: Solver, grams: list[Tensor], repeats: int) -> tuple[float, list[Tensor | None]]:
    """Median seconds of one solve over all instances and repeats, and the solutions."""
    seconds, solutions = [], []
    for G in grams:
        try:
            w: Tensor | None = solve(G)
        except (ValueError, RuntimeError):
            w = None
        for _ in range(repeats):
            start = time.perf_counter()
            try:
                solve(G)
            except (ValueError, RuntimeError):
                continue
            seconds.append(time.perf_counter() - start)
        solutions.append(w)
    return statistics.median(seconds) if seconds else float("nan"), solutions


def quality(grams: list[Tensor], solutions: list[Tensor | None], exact: list[Tensor]) -> tuple[float, int, int]:
    """Median relative gap, instances whose direction conflicts needlessly, and instances without a solution."""
    gaps, lost, failed = [], 0, 0
    for G, w, best in zip(grams, solutions, exact, strict=True):
        if w is None:
            failed += 1
            continue
        gaps.append(float(marble_core.min_norm_gap(G, w) / (w @ G @ w)))
        lost += bool((G @ w).min() < 0 < (G @ best).min())
    return statistics.median(gaps) if gaps else float("nan"), lost, failed


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer instances and sizes (about 20 s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    solvers: dict[str, Solver] = {
        "marble_core": marble_core.min_norm_weights,
        "TorchJD": MGDAWeighting(),
        "quadprog": quadprog_weights,
        "nnls": nnls_weights,
        "Frank-Wolfe": frank_wolfe_weights,
    }
    count, repeats = (10, 3) if options.quick else (40, 5)
    versions = {"torch": torch.__version__, "torchjd": torchjd.__version__} if hasattr(torchjd, "__version__") else {}
    where = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
        **versions,
    }
    print(f"{where}\n{count} instances a row; time: median microseconds a solve (and times marble_core's)\n")
    rows = []
    print(f"{'kind':9} {'K':>4} " + " ".join(f"{name:>22}" for name in solvers))
    for kind in ("conflict", "random", "one tiny"):
        for K in (3, 5, 16, 64) if options.quick else (2, 3, 4, 5, 8, 12, 16, 32, 64, 128):
            grams = instances(kind, K, count)
            exact = [marble_core.min_norm_weights(G) for G in grams]
            row: dict[str, object] = {"kind": kind, "K": K}
            cells, ours = [], float("nan")
            for name, solve in solvers.items():
                seconds, solutions = measure(solve, grams, repeats)
                ours = seconds if name == "marble_core" else ours
                gap, lost, failed = quality(grams, solutions, exact)
                row[name] = {"us": 1e6 * seconds, "ratio": seconds / ours, "gap": gap, "lost": lost, "failed": failed}
                cells.append(f"{1e6 * seconds:8.0f} ({seconds / ours:6.1f}x)" if failed < count else "-")
            print(f"{kind:9} {K:4d} " + " ".join(f"{cell:>22}" for cell in cells), flush=True)
            quality_cells = [f"gap {row[n]['gap']:.0e}, lost {row[n]['lost']}, - {row[n]['failed']}" for n in solvers]  # type: ignore[index]
            print(f"{'':14} " + " ".join(f"{cell:>22}" for cell in quality_cells), flush=True)
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps({"where": where, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
