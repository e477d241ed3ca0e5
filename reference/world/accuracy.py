"""How well the eight rewards judge rendered scenes, where the truth is known."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from reference.config.checks import at_least
from reference.interfaces import plain_prompts, score
from reference.world.model import token_ids
from reference.world.render import render
from reference.world.rewards import REWARDS, dual_encoder
from reference.world.scenes import KINDS, prompt_of, random_scene


def accuracy(count: int = 1000, seed: int = 1) -> str:
    """A table in Markdown: each reward on rendered scenes of held-out and other prompts, on wrong prompts, on noise.

    ``right``: the scene's own prompt; ``other``: the prompt of another scene; ``noise``: uniform noise, own prompt.

    Raises:
        ConfigError: there are not two scenes of each kind.
    """
    at_least(2 * len(KINDS), {"--count": count})
    rng = random.Random(seed)
    scenes = [random_scene(rng, KINDS[i % len(KINDS)]) for i in range(count)]
    prompts = [prompt_of(scene) for scene in scenes]
    other = [prompts[i - len(KINDS)] for i in range(count)]  # of the same kind
    images = render(scenes, seed=seed)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    cases = [score(REWARDS, x, plain_prompts(p)) for x, p in ((images, prompts), (images, other), (noise, prompts))]
    lines = ["| reward | right prompt | other prompt of its kind | noise |", "|---|---|---|---|"]
    for k, name in enumerate(REWARDS):
        cells = [float(case.values[case.applicable[:, k], k].mean()) for case in cases]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    right, names = cases[0], list(REWARDS)
    for what in ("objects", "text"):
        k = names.index(what)
        values = right.values[right.applicable[:, k], k]
        perfect = 100 * float((values == 1).double().mean())
        lines.append(f"\n{what}: exactly 1 on {perfect:.1f} % of {len(values)} scenes.")
    lines.append(f"\nsimilarity: {_retrieval(images, prompts)}")
    return "\n".join(lines)


@torch.no_grad()
def _retrieval(images: Tensor, prompts: list[str]) -> str:
    """Share of images whose own prompt is the nearest of all distinct prompts."""
    encoder = dual_encoder()
    distinct = list(dict.fromkeys(prompts))
    logits = encoder.image(images) @ encoder.text(token_ids(distinct)).mT
    nearest = logits.argmax(1)
    right = torch.tensor([distinct[int(i)] == prompt for i, prompt in zip(nearest, prompts, strict=True)])
    return f"{100 * float(right.double().mean()):.1f} % of images find their own prompt among {len(distinct)}."
