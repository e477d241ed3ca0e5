"""How well the five rewards judge rendered scenes, where the truth is known."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from reference.scoring import Scores
from reference.world import rewards
from reference.world.model import token_ids
from reference.world.render import render
from reference.world.scenes import KINDS, prompt_of, random_scene


def accuracy(count: int = 1000, seed: int = 1) -> str:
    """A table in Markdown: each reward on rendered scenes of held-out and other prompts, on wrong prompts, on noise.

    ``right``: the scene's own prompt; ``other``: the prompt of another scene; ``noise``: uniform noise, own prompt.
    """
    rng = random.Random(seed)
    scenes = [random_scene(rng, KINDS[i % len(KINDS)]) for i in range(count)]
    prompts = [prompt_of(scene) for scene in scenes]
    other = [prompts[i - len(KINDS)] for i in range(count)]  # of the same kind
    images = render(scenes, seed=seed)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    lines = ["| reward | right prompt | other prompt of its kind | noise |", "|---|---|---|---|"]
    judges: dict[str, Callable[..., Tensor | Scores]] = {
        "objects": rewards.objects,
        "objects, strict": rewards.objects_strict,
        "text": rewards.text,
        "similarity": rewards.similarity,
        "colour": rewards.colourfulness,
        "jpeg": rewards.jpeg,
    }
    for name, reward in judges.items():
        cells = [_mean(reward(x, p)) for x, p in ((images, prompts), (images, other), (noise, prompts))]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    for what in ("objects", "text"):
        scores = _scores(judges[what], images, prompts)
        perfect = (scores.values[scores.applicable] == 1).double().mean()
        lines.append(f"\n{what}: exactly 1 on {100 * float(perfect):.1f} % of {int(scores.applicable.sum())} scenes.")
    lines.append(f"\nsimilarity: {_retrieval(images, prompts)}")
    return "\n".join(lines)


def _scores(reward: Callable[..., Tensor | Scores], images: Tensor, prompts: list[str]) -> Scores:
    """Scores with the images they apply to."""
    result = reward(images, prompts)
    return Scores(*result) if isinstance(result, tuple) else Scores(result, torch.ones(len(prompts), dtype=torch.bool))


def _mean(result: Tensor | Scores) -> float:
    """Mean over the images that a reward applies to."""
    return float(result.values[result.applicable].mean() if isinstance(result, tuple) else result.mean())


@torch.no_grad()
def _retrieval(images: Tensor, prompts: list[str]) -> str:
    """Share of images whose own prompt is the nearest of all distinct prompts."""
    encoder = rewards.dual_encoder()
    distinct = list(dict.fromkeys(prompts))
    logits = encoder.image(images) @ encoder.text(token_ids(distinct)).mT
    nearest = logits.argmax(1)
    right = torch.tensor([distinct[int(i)] == prompt for i, prompt in zip(nearest, prompts, strict=True)])
    return f"{100 * float(right.double().mean()):.1f} % of images find their own prompt among {len(distinct)}."
