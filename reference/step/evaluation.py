"""Held-out evaluation: the same prompts and noise every time, means over prompts with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reference.interfaces import Prompt, Scores
from reference.policy.adapters import Policy, weights_of
from reference.policy.base import Base
from reference.processes.peers import Peers, share_of
from reference.processes.sums import gather_rows
from reference.rewards.scorer import Scorer, score_images
from reference.step.chance import generator, noise_of, seed_everything
from reference.step.rollout import Sampling, gather_scores, generate_batches


class Judging(NamedTuple):
    """What held-out images are drawn with.

    Attributes:
        images: of each prompt.
        seed: of the noise, and of rewards that use random numbers.
        how: the sampling.
    """

    images: int
    seed: int
    how: Sampling


def evaluate(
    policy: Policy,
    base: Base,
    weights: Mapping[str, Tensor],
    prompts: Sequence[Prompt],
    scorer: Scorer,
    judging: Judging,
) -> tuple[Scores, Tensor]:
    """Score images of each prompt, drawn with other adapter weights than the trained ones.

    Seeds the global generators, so that rewards that use them say the same at every evaluation of the same images. Of
    several processes, each draws its ``share_of`` the images; all get all scores.

    Returns:
        ``(Scores [P * images, K], images)``, the images of a prompt side by side, on the CPU; this process's share of
        them.
    """
    peers, repeated = judging.how.peers, [prompt for prompt in prompts for _ in range(judging.images)]
    total, own = len(repeated), share_of(len(repeated), peers)
    noise = noise_of(own, total, base.latent_shape, generator(judging.seed, "evaluation"))
    mine, pictures = repeated[own.start : own.stop], []

    def drawn() -> Iterator[Tensor]:
        texts = [prompt.text for prompt in mine]
        for _, made in generate_batches(policy, base, texts, noise, "default", judging.how, total):
            pictures.append(made.cpu())
            yield made

    seed_everything(judging.seed, "evaluation", peers)
    with weights_of(policy, weights):
        scores = score_images(scorer, drawn(), mine)
    return gather_scores(scores, own, total, peers), torch.cat(pictures)


def first_images(own: Tensor, prompts: int, images: int, count: int, peers: Peers) -> Tensor:
    """The first image of each of the first ``count`` prompts, from this process's share of all prompts' images."""
    share, wanted = share_of(prompts * images, peers), range(0, min(prompts, count) * images, images)
    here = [place for place, number in enumerate(wanted) if number in share]
    first = here[0] if here else 0
    rows = own[[wanted[place] - share.start for place in here]]
    return gather_rows(rows, range(first, first + len(here)), len(wanted), peers)


def prompt_means(scores: Scores, images: int) -> Tensor:
    """Mean score of each prompt and reward, ``[P, K]``; NaN where the reward does not apply."""
    values = torch.where(scores.applicable, scores.values, torch.nan)
    return values.reshape(-1, images, values.shape[1]).nanmean(1)


def within_std(scores: Scores, images: int) -> Tensor:
    """Standard deviation of each reward ``[K]`` over the images of one prompt, pooled over prompts: the unit in which
    advantages are measured. NaN with one image a prompt, or where the reward never applies.
    """
    x = torch.where(scores.applicable, scores.values, torch.nan).reshape(-1, images, scores.values.shape[1])
    count = (~x.isnan()).sum(1)
    squares = (x - x.nanmean(1, keepdim=True)).square().nansum((0, 1))
    return (squares / (count - 1).clamp(min=0).sum(0)).sqrt()
