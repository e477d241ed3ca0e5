"""Images of a run on a grid: any prompts, with the averaged weights of its newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from reference.policy.adapters import Adapter, weights_of
from reference.policy.load import load_model
from reference.processes.devices import tf32
from reference.prompts.pool import held_out_prompts
from reference.run.live import save_grid
from reference.run.state import load_run
from reference.step.generation import generate_batches, generator


def generate_grid(
    run: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    count: int,
    images: int,
    steps: int,
    seed: int,
    untrained: bool,
    device: str,
) -> Path:
    """Sample ``images`` images of each prompt, a row each, and write them as one PNG; the file's path.

    Args:
        run: folder of the run.
        prompts: texts; none for the first ``count`` held-out prompts of the run.
        out: the file; an existing one is replaced.
        count: rows without ``prompts``.
        images: columns.
        steps: of the run's sampler; 0 for those of its evaluations.
        seed: of the noise: the same with and without training.
        untrained: the base model's images instead.
        device: as in a configuration.

    Raises:
        ConfigError: the run has no checkpoint, or its model or prompts cannot be used.
    """
    config, state = load_run(run, device)
    texts = list(prompts) or [prompt.text for prompt in held_out_prompts(config)[:count]]
    repeated = [text for text in texts for _ in range(images)]
    base, policy = load_model(config, texts)
    noise = torch.randn(len(repeated), *base.latent_shape, generator=generator(seed, "generate"))
    adapter: Adapter = "base" if untrained else "default"
    with weights_of(policy, state["ema"]), tf32(base.device):
        batches = generate_batches(
            policy,
            base,
            repeated,
            noise,
            adapter=adapter,
            sampler=config.rollout.sampler,
            steps=steps or config.log.eval_steps,
            batch=config.rollout.batch,
        )
        pictures = torch.cat([made for _, made in batches])
    save_grid(pictures, out, columns=images, scale=max(1, 96 // pictures.shape[-1]))
    return out
