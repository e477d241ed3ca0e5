"""The paper's Table 1, and its composite: how far a model is above the table's models, in standard deviations."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Array = np.ndarray[Any, np.dtype[np.float64]]


class Table(NamedTuple):
    """``M`` models and ``C`` rewards.

    Attributes:
        source: where it was printed.
        rewards: our names of the columns.
        titles: the paper's.
        scales: ``[C]``; our scores times these are in the table's units.
        models: names of the rows.
        scores: ``[M, C]``, in the table's units.
        composites: ``[M]``, as printed.
    """

    source: str
    rewards: tuple[str, ...]
    titles: tuple[str, ...]
    scales: Array
    models: tuple[str, ...]
    scores: Array
    composites: Array


def paper_table() -> Table:
    """Table 1 of arXiv:2605.06507v1; where each number was read is in paper_table1.toml."""
    data = tomllib.loads(Path(__file__).with_name("paper_table1.toml").read_text(encoding="utf-8"))
    columns, rows = data["columns"], data["rows"]
    return Table(
        data["source"],
        tuple(c["reward"] for c in columns),
        tuple(c["title"] for c in columns),
        np.array([c["scale"] for c in columns]),
        tuple(rows),
        np.array([row[:-1] for row in rows.values()]),
        np.array([row[-1] for row in rows.values()]),
    )


def composite(table: Table, rewards: Sequence[str], scores: Array) -> Array:
    """Mean over some of the table's columns of ``(score - mean) / std``, of one model or many.

    Mean and standard deviation are those of the table's own models, and stay so for a model that is not among them. The
    standard deviation is that of a population (divided by M): with it the printed composites come out to half a unit of
    their last digit, with the sample's they do not.

    Args:
        rewards: our names of the columns to use; any part of ``table.rewards``, in any order.
        scores: ``[..., len(rewards)]`` in our units.

    Returns:
        ``[...]``.

    Raises:
        ValueError: the table has no such column, or ``rewards`` is empty.

    Example:
        >>> table = paper_table()
        >>> ours = table.scores[-1] / table.scales
        >>> float(composite(table, table.rewards, ours).round(3))
        1.116

    Reference: arXiv:2605.06507v1, caption of Table 1.
    """
    unknown = [name for name in rewards if name not in table.rewards]
    if unknown or not len(rewards):
        raise ValueError(f"rewards: expected some of {list(table.rewards)}, got {list(rewards)}.")
    place = [table.rewards.index(name) for name in rewards]
    known = table.scores[:, place]
    z: Array = (scores * table.scales[place] - known.mean(0)) / known.std(0)
    mean: Array = z.mean(-1)
    return mean
