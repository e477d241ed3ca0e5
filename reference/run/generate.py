"""Images of a run on a grid: any prompts, with the averaged weights of its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from reference.config.flags import Generate
from reference.policy.adapters import Adapter, weights_of
from reference.policy.load import load_model
from reference.processes.devices import tf32
from reference.prompts.pool import held_out_prompts
from reference.run.live import save_grid
from reference.run.state import load_run
from reference.step.chance import generator
from reference.step.rollout import Sampling, generate_batches


def generate_grid(asked: Generate) -> Path:
    """Sample images of each prompt, a row each, and write them as one PNG; the file's path.

    Raises:
        ConfigError: the run has no checkpoint, or its model or prompts cannot be used.
    """
    config, state = load_run(asked.run, asked.device)
    texts = list(asked.prompts) or [prompt.text for prompt in held_out_prompts(config)[: asked.count]]
    repeated = [text for text in texts for _ in range(asked.images)]
    base, policy = load_model(config, texts)
    noise = torch.randn(len(repeated), *base.latent_shape, generator=generator(asked.seed, "generate"))
    adapter: Adapter = "base" if asked.untrained else "default"
    how = Sampling(config.rollout.sampler, asked.steps or config.log.eval_steps, config.rollout.batch)
    with weights_of(policy, state["ema"]), tf32(base.device):
        pictures = torch.cat([made for _, made in generate_batches(policy, base, repeated, noise, adapter, how)])
    out = asked.out or asked.run / "grids" / "generated.png"
    save_grid(pictures, out, columns=asked.images, scale=max(1, 96 // pictures.shape[-1]))
    return out
