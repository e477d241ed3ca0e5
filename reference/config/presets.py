"""Configurations to start from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from reference.config.settings import (
    Config,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Preset,
    RolloutConfig,
    ScoringConfig,
)

_SD35M = ModelConfig(
    base="stabilityai/stable-diffusion-3.5-medium",
    lora_rank=32,
    lora_alpha=64.0,
    lora_targets="attention",
    precision="bf16",
    t5_tokens=256,
)
_PAPER_LOSS = LossConfig(
    form="x0",
    beta=0.1,
    a_max=5.0,
    kl_weight=1e-4,
    std="global",
    timesteps_per_image=0,
    timestep_fraction=0.99,
)
_PAPER_OPTIM = OptimConfig(
    lr=3e-4,
    betas=(0.9, 0.999),
    weight_decay=1e-4,
    eps=1e-8,
    clip=1.0,
    steps_per_epoch=1,
    micro_batch=9,
    old_decay="standard",
    ema_cap=0.9,
)
_UNSEEN = ("aesthetic", "imagereward", "unifiedreward")  # the last one needs a server


def preset(name: Preset) -> Config:
    """The configuration of a preset.

    ``world``: the small world for 20-30 minutes on two cores, with rewards that hardly conflict. ``world-conflict``:
    rewards of which one pulls against three others. ``demo``: a few minutes. ``tiny``: seconds, for tests. ``sd35m``:
    Stable Diffusion 3.5 Medium with the paper's constants. ``sd35m-single-gpu``: the same for one card of 80 GB;
    docs/trainer.md says what it trades.
    """
    if name in ("sd35m", "sd35m-single-gpu"):
        return _sd35m() if name == "sd35m" else _on_one_card(_sd35m())
    if name == "world":
        # with half this pull the weighted sum comes apart within 200 epochs: docs/evidence.md, "200 epochs"
        return Config(loss=LossConfig(kl_weight=0.4), optim=OptimConfig(lr=2.5e-4), log=LogConfig(measure_every=10))
    if name == "world-conflict":
        rewards = ("text", "colour", "jpeg", "sharpness", "contrast")
        log = LogConfig(watch=("objects", "similarity"), measure_every=10)
        return Config(run=Path("runs/world-conflict"), rewards=rewards, log=log)
    if name == "demo":
        # few images an epoch, much noise: four rewards, twice the pull; docs/evidence.md, "The demo in five seeds"
        return dataclasses.replace(
            preset("world-conflict"),
            run=Path("runs/demo"),
            rewards=("colour", "jpeg", "sharpness", "contrast"),
            epochs=20,
            rollout=RolloutConfig(pool=24, prompts_per_epoch=6),
            loss=LossConfig(kl_weight=0.2),
            log=LogConfig(eval_every=0, eval_prompts=120, save_every=0, watch=(), measure_every=10),
        )
    rollout = RolloutConfig(pool=4, prompts_per_epoch=2, images_per_prompt=4, steps=3, batch=8)
    loss = LossConfig(timesteps_per_image=2)
    optim = OptimConfig(micro_batch=8)
    log = LogConfig(eval_every=0, eval_prompts=3, eval_images=2, eval_steps=2, save_every=1, trackers=())
    return Config(run=Path("runs/tiny"), epochs=2, rollout=rollout, loss=loss, optim=optim, log=log)


def _sd35m() -> Config:
    """The paper's setting."""
    epoch = RolloutConfig(
        prompts=("text:prompts/general.txt", "ocr:prompts/ocr.txt", "geneval:prompts/geneval.jsonl"),
        held_out=("text:prompts/general-test.txt", "ocr:prompts/ocr-test.txt", "geneval:prompts/geneval-test.jsonl"),
        prompts_per_epoch=48,
        images_per_prompt=24,
        steps=10,  # 25 in the official configuration for several rewards
        sampler="dpm2",
        batch=24,
    )
    return Config(
        run=Path("runs/sd35m"),
        balance="marble-paper",
        rewards=("pickscore", "hpsv2", "clipscore", "ocr", "geneval"),
        epochs=900,  # a million images, as in the paper, with 48 prompts an epoch
        model=_SD35M,
        rollout=epoch,
        scoring=ScoringConfig(batch=24, background=True),
        loss=_PAPER_LOSS,
        optim=_PAPER_OPTIM,
        log=LogConfig(eval_every=25, eval_prompts=120, eval_images=2, eval_steps=40, save_every=10, watch=_UNSEEN),
    )


def _on_one_card(config: Config) -> Config:
    """A ninth of the rows, a smaller share of each epoch's images, and no held-out reward that needs a server."""
    return dataclasses.replace(
        config,
        run=Path("runs/sd35m-single-gpu"),
        model=dataclasses.replace(config.model, t5_tokens=128),
        rollout=dataclasses.replace(config.rollout, prompts_per_epoch=16),
        loss=dataclasses.replace(config.loss, timesteps_per_image=3),
        log=dataclasses.replace(config.log, watch=_UNSEEN[:2]),
    )
