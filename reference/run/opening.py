"""A run before its first step: everything loaded, its folder open, its state fresh or from a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from marble_core import init_gains
from reference.config.settings import Config, is_world
from reference.policy.adapters import Policy, adapter_state, parameters
from reference.policy.base import Base
from reference.policy.load import load_model
from reference.processes.alive import first_on_machine, meet
from reference.processes.peers import Peers, require_enough
from reference.prompts.pool import all_prompts
from reference.rewards.scorer import try_rewards
from reference.run.inputs import Inputs, prepare
from reference.run.live import Live, check_trackers
from reference.run.state import Run, State, check_folder, restore_state, usable, write_config
from reference.run.watch import init_health
from reference.step.balance import init_balance
from reference.step.method import Method, method_of


@contextlib.contextmanager
def opened(config: Config, resume: bool, peers: Peers) -> Iterator[tuple[Run, State, dict[str, Any] | None]]:
    """A run, its state, and the generators' state where it was saved within an epoch.

    Raises:
        ConfigError: something cannot be used; the run folder is as it was.
    """
    main = peers.rank == 0
    if main:
        check_trackers(config.log.trackers)
    meet(peers)
    method = method_of(config)
    base, policy, inputs, optimizer = _loaded(config, peers)
    if not resume and not is_world(config.model.base):  # there the first evaluation is seconds away, and says the same
        picture = base.decode(torch.zeros(1, *base.latent_shape, device=base.device))
        try_rewards(inputs.watched, [*all_prompts(inputs.pool), *inputs.held_out], picture.shape[1:])
    if main:
        check_folder(config, resume)
    fresh = _fresh(config, method, policy)
    saved = usable(config, inputs.given, fresh) if resume else None
    meet(peers)
    if main:
        write_config(config)
    meet(peers)
    live = Live(config.run, config.log.trackers, config.epochs, main=main)
    try:
        shown = dataclasses.replace(peers, on_pass=live.tick)
        run = Run(config, method, base, policy, optimizer, inputs, shown, live)
        state = fresh if saved is None else restore_state(run, saved, fresh)
        live.start(state.epoch)
        yield run, state, None if saved is None or state.part == 0 else saved["rng"]
    finally:
        live.close()


def _loaded(config: Config, peers: Peers) -> tuple[Base, Policy, Inputs, torch.optim.Optimizer]:
    """Load everything that a run needs, before its folder is touched."""
    with first_on_machine(peers):
        inputs = prepare(config)
    base, policy = load_model(config, [p.text for p in [*all_prompts(inputs.pool), *inputs.held_out]], peers)
    images = config.rollout.prompts_per_epoch * config.rollout.images_per_prompt
    seen = len(inputs.held_out) * config.log.eval_images
    require_enough({"images of an epoch": images, "images of an evaluation": seen}, peers)
    o = config.optim
    optimizer = torch.optim.AdamW(
        parameters(policy).values(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, eps=o.eps
    )
    return base, policy, inputs, optimizer


def _fresh(config: Config, method: Method, policy: Policy) -> State:
    """The state before the first epoch."""
    K = len(config.rewards)
    balance = init_balance(K, method, parameters(policy))
    return State(0, 0, 0, -1, 0, adapter_state(policy, "default"), balance, None, init_gains(K), init_health())
