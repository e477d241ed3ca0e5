"""Random numbers that depend on the seed and on what they are for, and on nothing that happened before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reference.processes.peers import Peers

_ROWS = 256  # of noise drawn at a time


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator that depends on the seed and on what it is for, and on nothing that happened before."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def noise_of(own: Tensor | range, total: int, shape: Sequence[int], draws: torch.Generator) -> Tensor:
    """Some rows, in ascending order, of ``torch.randn(total, *shape, generator=draws)``, in memory for those alone.

    Args:
        own: their numbers.
        total: of rows.
        shape: of a row.
        draws: is left as if all had been drawn.
    """
    if len(own) == total:
        return torch.randn(total, *shape, generator=draws)
    numbers, found = torch.as_tensor(own, dtype=torch.int64), torch.empty(len(own), *shape)
    # torch draws normals in blocks of 16, so that chunks of multiples of 16 rows give the same numbers as one draw
    for start in range(0, total, _ROWS):
        chunk = torch.randn(min(_ROWS, total - start), *shape, generator=draws)
        here = (numbers >= start) & (numbers < start + _ROWS)
        found[here] = chunk[numbers[here] - start]
    return found


def seed_everything(seed: int, what: int | str, peers: Peers) -> None:
    """Seed the global generators for an epoch or for ``"evaluation"``, for rewards that use them, differently on each
    process."""
    purpose = ("global", what, peers.rank)[: 3 if peers.rank else 2]
    value = int(torch.randint(2**31, (), generator=generator(seed, *purpose)))
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
