"""A reward and a rule of one's own for the trainer, with prompts of one's own in ``mine.txt``:

    python -m reference train --preset tiny --rewards colour examples.mine:bright --balance examples.mine:lagging_only \
        --rollout.prompts examples/mine.txt
"""

from collections.abc import Sequence
from typing import Any

import torch

from marble_core.rules import Evidence, Rule


def bright(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> torch.Tensor:
    """A reward: images ``[N, 3, H, W]`` in [0, 1] and their prompts, to one score each."""
    return images.mean((1, 2, 3))


def lagging_only(num_rewards: int) -> Rule:
    """A rule: all the weight on the reward that has gained least so far."""

    def update(state: torch.Tensor, evidence: Evidence) -> tuple[torch.Tensor, torch.Tensor]:
        if evidence.gains is not None and not evidence.gains.isnan().all():
            least = evidence.gains.nan_to_num(torch.inf).argmin()
            state = torch.eye(num_rewards, dtype=torch.float64)[least]
        return state, state.clone()

    return Rule(lambda: torch.full((num_rewards,), 1 / num_rewards, dtype=torch.float64), update)
