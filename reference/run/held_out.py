"""Evaluations within a run: the averaged weights on held-out prompts."""

from __future__ import annotations

import hashlib
from typing import Any

from reference.config.settings import Config
from reference.interfaces import Scores
from reference.run.intervals import interval
from reference.run.state import Run, State
from reference.run.tiles import save_tiles
from reference.step.evaluation import Judging, evaluate, first_images, prompt_means, within_std
from reference.step.rollout import Sampling

_SHOWN = 40  # prompts on the picture of an evaluation


def evaluation_due(config: Config, state: State) -> bool:
    """Whether this state is to be evaluated, and has not been."""
    every, epoch = config.log.eval_every, state.epoch
    wanted = epoch in (0, config.epochs) or (every > 0 and epoch % every == 0)
    return wanted and state.part == 0 and state.evaluated < epoch


def evaluate_held_out(run: Run, state: State) -> None:
    """Score held-out prompts with the averaged weights, record the means, and save a grid of the first images.

    Raises:
        RewardError: a reward failed.
        PeerError: another process failed.
    """
    log, inputs, live = run.config.log, run.inputs, run.live
    last = state.epoch == run.config.epochs
    name = "before" if state.epoch == 0 else "after" if last else f"epoch-{state.epoch:04d}"
    live.phase(state.epoch, "evaluating")
    r = run.config.rollout
    judging = Judging(log.eval_images, 0, Sampling(r.sampler, log.eval_steps, r.batch, run.peers))
    scores, images = evaluate(run.policy, run.base, state.ema, inputs.held_out, inputs.watched, judging)
    means, rewards = prompt_means(scores, log.eval_images), inputs.watched.rewards
    columns = dict(zip(rewards, means.T.tolist(), strict=True))
    record = {
        "rewards": {k: interval(column)._asdict() for k, column in columns.items()},
        "within_std": dict(zip(rewards, within_std(scores, log.eval_images).tolist(), strict=True)),
        "per_prompt": columns,
        "settings": settings_of(run),
    }
    live.log({"kind": "eval", "step": state.step, "epoch": state.epoch, **record})
    shown = first_images(images, len(inputs.held_out), log.eval_images, _SHOWN, run.peers)
    if live.main:
        path = run.config.run / "grids" / f"{name}.png"
        texts = [prompt.text for prompt in inputs.held_out[:_SHOWN]]
        theirs = Scores(*(x[:: log.eval_images][:_SHOWN] for x in scores))
        try:
            live.pictures(save_tiles(shown, texts, tuple(rewards), theirs, path), state.step)
        except OSError as error:
            live.say(f"warning: cannot write {path}: {error}. Training goes on without this picture.")


def settings_of(run: Run) -> dict[str, Any]:
    """What two evaluations need in common to be compared: prompts, images and sampler."""
    log = run.config.log
    texts = "\n".join(prompt.text for prompt in run.inputs.held_out)
    return {
        "prompts": hashlib.sha256(texts.encode()).hexdigest()[:16],
        "images": log.eval_images,
        "steps": log.eval_steps,
        "sampler": run.config.rollout.sampler,
    }
