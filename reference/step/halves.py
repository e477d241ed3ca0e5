"""A step's rows in two halves that share no prompt, and their gradients put together: what noise is told from."""

from __future__ import annotations

from typing import NamedTuple

from reference.step.estimate import Tree
from reference.step.gradients import Part, Rows, Whole, part_of


def halves(rows: Rows, whole: Whole) -> list[tuple[Rows, int]]:
    """This process's rows of either half, and how many all processes have; undivided where one half is empty."""
    if whole.first in (0, whole.total):  # a single image: nothing to compare it with
        return [(rows, whole.total)]
    own = int((rows.half == 0).sum())
    first, second = part_of(rows, slice(own)), part_of(rows, slice(own, None))
    return [(first, whole.first), (second, whole.total - whole.first)]


class Joined(NamedTuple):
    """The gradients of a whole step.

    Attributes:
        a: ``[K, *shape]``, of the reward part, as means over the first half of the rows.
        b: over the second half.
        own: ``[*shape]``, what ``weigh`` made of them; where it was not asked for, the last reward's.
        shared: of the shared part, over all rows.
        pull: of the pull to the base, where it is not in the shared part; else empty.
        metrics: means over all rows, to log.
    """

    a: Tree
    b: Tree
    own: Tree
    shared: Tree
    pull: Tree
    metrics: dict[str, float]


def joined(parts: list[Part], whole: Whole, K: int) -> Joined:
    """The parts of a step put together: both halves, or all rows where there is but one."""
    B, first = whole.total, whole.first
    if len(parts) == 1:
        h, shared, pull, sums = parts[0]
        rows, own = {name: x[:K] for name, x in h.items()}, {name: x[-1] for name, x in h.items()}
        return Joined(rows, rows, own, shared, pull, {name: float(x) / B for name, x in sums.items()})
    (h_a, shared_a, pull_a, sums_a), (h_b, shared_b, pull_b, sums_b) = parts
    p, q = first / B, 1 - first / B
    a, b = ({name: 2 * share * x[:K] for name, x in h.items()} for share, h in ((p, h_a), (q, h_b)))
    own = {name: p * x[-1] + q * h_b[name][-1] for name, x in h_a.items()}
    shared, pull = (
        {name: p * x + q * other[name] for name, x in tree.items()}
        for tree, other in ((shared_a, shared_b), (pull_a, pull_b))
    )
    means = {name: p * (float(x) / first) + q * (float(sums_b[name]) / (B - first)) for name, x in sums_a.items()}
    return Joined(a, b, own, shared, pull, means)
