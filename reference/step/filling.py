"""Rows of weight 0: processes that share the base model need each other in every pass, and so run equally many."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.config.settings import Config
from reference.processes.peers import Peers, share_of
from reference.step.gradients import PER_ROW, Rows, part_of


def busiest(index: Tensor, half: Tensor, config: Config, peers: Peers) -> tuple[int, int]:
    """The most rows that any process has in the first half of a step, and in the second."""
    N, J = config.rollout.prompts_per_epoch * config.rollout.images_per_prompt, len(half) // len(index)
    shares = [share_of(N, Peers(rank, peers.size)) for rank in range(peers.size)]
    image = index.repeat_interleave(J)
    owned = torch.stack([(image >= share.start) & (image < share.stop) for share in shares])
    return int(owned[:, half == 0].sum(1).max()), int(owned[:, half == 1].sum(1).max())


def filled_up(rows: Rows, first: int, second: int) -> Rows:
    """Rows of weight 0 behind either half, until there are ``first`` and ``second``."""
    own = int((rows.half == 0).sum())
    a, b = part_of(rows, slice(own)), part_of(rows, slice(own, None))
    parts = [a, _blank(rows, first - own, 0), b, _blank(rows, second - (len(rows.half) - own), 1)]
    return rows._replace(**{name: torch.cat([getattr(x, name) for x in parts]) for name in PER_ROW})


def _blank(rows: Rows, count: int, half: int) -> Rows:
    """Rows of nothing, of which all that is computed is finite."""
    blank = {name: (x := getattr(rows, name)).new_zeros(count, *x.shape[1:]) for name in PER_ROW}
    blank |= {"t": blank["t"] + 0.5, "noise": blank["noise"] + 1.0, "half": blank["half"] + half}
    return rows._replace(**blank)
