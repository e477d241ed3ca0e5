"""Judge a run: its rewards, trained and held out, on any prompts, beside the base model and the paper's table."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from reference.config.checks import at_least
from reference.config.flags import Evaluate
from reference.config.settings import REWARDS, WORLD_REWARDS, WORLD_SOURCES, Config, is_world
from reference.errors import ConfigError, did_you_mean
from reference.experiments.paper import paper_table
from reference.experiments.summary import Evaluation, Judged, analyse, as_json, as_markdown, write_csv
from reference.interfaces import Prompt, Scores
from reference.policy.adapters import Adapter, Policy, weights_of
from reference.policy.base import Base
from reference.policy.load import load_model
from reference.processes.devices import tf32
from reference.prompts.pool import all_prompts, held_out_prompts, repeated_prompts, training_pool
from reference.rewards.scorer import Scorer, score_images, scorer_of
from reference.run.state import load_run
from reference.step.chance import generator, seed_everything
from reference.step.evaluation import Judging, prompt_means
from reference.step.rollout import Sampling, generate_batches
from reference.text_files import make_folder, whole

STRICT = "geneval_strict"  # GenEval's own 0 or 1: where the graded reward is 1


def evaluate_run(asked: Evaluate) -> str:
    """Sample, score, and write ``prompts.csv``, ``summary.json`` and ``summary.md``; returns the last one's text.

    Raises:
        ConfigError: the run, its prompts, its rewards or the folder cannot be used; nothing has been sampled.
    """
    at_least(1, {"--images": asked.images, "--steps": asked.steps})
    config, state = load_run(asked.run, asked.device, asked.models)
    names = reward_names(config, asked.rewards)
    chosen = prompts_of(config, asked.prompts, names)
    _warn_of_trained(config, chosen)
    scorer = scorer_of(config, names)
    scorer = scorer._replace(batch=scorer.batch or config.rollout.batch)  # else all images would wait for the last
    folder = asked.folder or asked.run / "evaluation"
    make_folder(folder)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    model, policy = load_model(config, [prompt.text for prompt in chosen])
    how = Sampling(config.rollout.sampler, asked.steps, config.rollout.batch)
    judging = Judging(asked.images, asked.seed, how)
    with weights_of(policy, state["ema"]), tf32(model.device):
        after = judge(policy, model, "default", chosen, scorer, judging)
        before = judge(policy, model, "base", chosen, scorer, judging) if asked.base else None
    where = {"run": str(asked.run), "epoch": state["epoch"], "step": state["step"], "sources": list(asked.prompts)}
    where |= {"images": asked.images, "steps": asked.steps, "sampler": how.sampler, "seed": asked.seed}
    columns = (*names, STRICT) if "geneval" in names else names
    trained = tuple(name in config.rewards or (name == STRICT and "geneval" in config.rewards) for name in columns)
    return write(folder, Evaluation(where, columns, trained, tuple(p.text for p in chosen), after, before))


def _warn_of_trained(config: Config, chosen: Sequence[Prompt]) -> None:
    """Say how many of the prompts the run was trained on, where its own are still there."""
    with contextlib.suppress(ConfigError):
        repeated = repeated_prompts(chosen, all_prompts(training_pool(config)))
        if repeated:
            print(f"warning: the run was trained on {repeated} of these {len(chosen)} prompts", file=sys.stderr)


def reward_names(config: Config, given: Sequence[str]) -> tuple[str, ...]:
    """The rewards to judge by: those given, or those trained and then those watched.

    Raises:
        ConfigError: one of those given is unknown.
    """
    known = WORLD_REWARDS if is_world(config.model.base) else REWARDS
    for name in given:
        if name not in known and ":" not in name and "." not in name:
            hint = did_you_mean(name, known)
            raise ConfigError(f"--rewards: expected one of {', '.join(known)} or module:callable, got {name!r}.{hint}")
    return tuple(dict.fromkeys(given or config.rewards + config.log.watch))


def prompts_of(config: Config, sources: Sequence[str], names: Sequence[str] = ()) -> list[Prompt]:
    """All prompts of the sources, which may apply to rewards of these names, or the run's own held-out prompts.

    Raises:
        ConfigError: a source cannot be used; every line at fault is named.
    """
    if not sources:
        return held_out_prompts(config)
    endless = set(sources) & set(WORLD_SOURCES)  # the world never runs out of prompts
    count = config.log.eval_prompts if endless else sys.maxsize
    rollout = dataclasses.replace(config.rollout, held_out=tuple(sources))
    log = dataclasses.replace(config.log, eval_prompts=count, watch=(*config.log.watch, *names))
    return held_out_prompts(dataclasses.replace(config, rollout=rollout, log=log))


def judge(
    policy: Policy, base: Base, adapter: Adapter, prompts: Sequence[Prompt], scorer: Scorer, judging: Judging
) -> Judged:
    """Score images of each prompt, batch by batch: none is kept.

    The noise is that of ``evaluate`` of the trainer, whatever the adapter.
    """
    images, repeated = judging.images, [prompt for prompt in prompts for _ in range(judging.images)]
    noise = torch.randn(len(repeated), *base.latent_shape, generator=generator(judging.seed, "evaluation"))
    texts = [prompt.text for prompt in repeated]

    def drawn() -> Iterator[Tensor]:
        with tqdm(total=len(texts), desc=f"images, {adapter}", unit="image", disable=None) as bar:
            for _, made in generate_batches(policy, base, texts, noise, adapter, judging.how):
                yield made
                bar.update(len(made))

    seed_everything(judging.seed, "evaluation", judging.how.peers)
    scores = with_strict(tuple(scorer.rewards), score_images(scorer, drawn(), repeated))
    counts = scores.applicable.reshape(len(prompts), images, -1).sum(1)
    return Judged(prompt_means(scores, images).double().numpy(), counts.double().numpy())


def with_strict(names: Sequence[str], scores: Scores) -> Scores:
    """The scores and, where GenEval's graded one is among them, its strict one as a further column."""
    if "geneval" not in names:
        return scores
    k = names.index("geneval")
    values, applicable = scores.values[:, k], scores.applicable[:, k]
    strict = ((values == 1) & applicable).to(values.dtype)
    return Scores(torch.column_stack([scores.values, strict]), torch.column_stack([scores.applicable, applicable]))


def write(folder: Path, found: Evaluation) -> str:
    """Write all files, in place of those of an earlier evaluation, and return the text of ``summary.md``."""
    table = paper_table()
    result = analyse(found, table)
    text = as_markdown(found, result, table)
    with contextlib.ExitStack() as files:  # none is replaced before all are written
        summary, prompts, data = (
            files.enter_context(whole(folder / name)) for name in ("summary.md", "prompts.csv", "summary.json")
        )
        write_csv(prompts, found.rewards, found.prompts, found.run)
        data.write_text(as_json(found, result, table), encoding="utf-8")
        summary.write_text(text, encoding="utf-8")
        if found.base is not None:
            write_csv(files.enter_context(whole(folder / "prompts-base.csv")), found.rewards, found.prompts, found.base)
    if found.base is None:
        (folder / "prompts-base.csv").unlink(missing_ok=True)
    return text
