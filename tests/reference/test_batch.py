"""From prompts to rows: which images make up a step, and that its halves are independent."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from reference.config.presets import preset
from reference.config.settings import Config, OptimConfig, RolloutConfig, training_times
from reference.interfaces import Scores, plain_prompts
from reference.policy.base import load_base
from reference.processes.peers import Peers, share_of
from reference.prompts.pool import world_prompts
from reference.step.batch import Weighed, advantages, group_of, images_of_steps, step_rows, whole_step
from reference.step.gradients import PER_ROW, micro_batches
from reference.step.halves import halves
from reference.step.rollout import Rollout, times

ROLLOUT = RolloutConfig(prompts_per_epoch=5, images_per_prompt=4, steps=6)
CONFIG = dataclasses.replace(preset("tiny"), rollout=ROLLOUT, rewards=("text", "jpeg"))
N = 20


def rollout(N: int = N) -> Rollout:
    g = torch.Generator().manual_seed(0)
    prompts = [p for p in plain_prompts(world_prompts(N // 4, 0, held_out=False)) for _ in range(4)]
    values, on = torch.randn(N, 2, generator=g).double(), torch.ones(N, 2).bool()
    on[4:8, 0] = False
    return Rollout(prompts, torch.randn(N, 12, 16, 16, generator=g), Scores(torch.where(on, values, 0.0), on))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_image_is_in_one_step_and_even_prompts_come_first(steps: int) -> None:
    config = dataclasses.replace(CONFIG, optim=OptimConfig(steps_per_epoch=steps))
    parts = images_of_steps(N, config, epoch=3)
    assert len(parts) == steps
    assert sorted(torch.cat(parts).tolist()) == list(range(N))
    for part in parts:
        half = group_of(N, config)[part] % 2
        assert torch.equal(half, half.sort().values)
    assert not torch.equal(torch.cat(parts), torch.cat(images_of_steps(N, config, epoch=4)))


@pytest.mark.parametrize(
    ("prompts", "images", "steps"), [(12, 24, 2), (5, 4, 3), (3, 2, 6), (2, 2, 4), (1, 3, 3), (2, 5, 3), (7, 3, 5)]
)
def test_halves_have_the_same_sizes_in_every_epoch_and_no_step_is_empty(prompts: int, images: int, steps: int) -> None:
    rollout = dataclasses.replace(ROLLOUT, prompts_per_epoch=prompts, images_per_prompt=images)
    config = dataclasses.replace(CONFIG, rollout=rollout, optim=OptimConfig(steps_per_epoch=steps))
    group = group_of(prompts * images, config)

    def sizes(epoch: int) -> list[tuple[int, int]]:
        parts = images_of_steps(prompts * images, config, epoch)
        return [(int((group[part] % 2 == 0).sum()), len(part)) for part in parts]

    assert all(sizes(epoch) == sizes(0) for epoch in range(1, 5))
    assert all(total > 0 for _, total in sizes(0))
    assert max(total for _, total in sizes(0)) - min(total for _, total in sizes(0)) <= 1


def test_processes_that_share_a_base_all_run_the_passes_of_the_busiest() -> None:
    model = dataclasses.replace(CONFIG.model, shard=True)
    config = dataclasses.replace(CONFIG, model=model, optim=OptimConfig(steps_per_epoch=3))
    drawn, J, size = rollout(), config.loss.timesteps_per_image, 4
    A, A_sum = advantages(drawn.scores, config)
    base, uneven = load_base("world"), 0
    for part, index in enumerate(images_of_steps(N, config, epoch=0)):
        whole, passes = whole_step(index, config, Peers(0, 3)), []
        for rank in range(3):
            own = share_of(N, Peers(rank, 3))
            mine = drawn._replace(x0=drawn.x0[own.start : own.stop], first=own.start)
            peers = Peers(rank, 3, sharded=True)
            rows = step_rows(base, Weighed(mine, A, A_sum, 0), index, config, part, peers)
            plain = step_rows(base, Weighed(mine, A, A_sum, 0), index, config, part, Peers(rank, 3))
            counted = rows.weight == 1
            for name in PER_ROW:
                assert torch.equal(getattr(rows, name)[counted], getattr(plain, name))
            parts = [rows, *(half for half, _ in halves(rows, whole))]
            passes.append([len(list(micro_batches(part, size, peers))) for part in parts])
            uneven += int((~counted).sum())
        assert passes[0] == passes[1] == passes[2]
        assert whole.total == len(index) * J
    assert uneven > 0


def test_rows_of_a_step() -> None:
    base, drawn = load_base("world"), rollout()
    A, A_sum = advantages(drawn.scores, CONFIG)
    index = images_of_steps(N, CONFIG, epoch=0)[0]
    rows = step_rows(base, Weighed(drawn, A, A_sum, 0), index, CONFIG, 0)
    J = CONFIG.loss.timesteps_per_image
    image = index.repeat_interleave(J)
    assert rows.x0.shape[0] == len(index) * J == rows.t.shape[0]
    assert torch.equal(rows.x0, drawn.x0[image])
    assert torch.equal(rows.A, A[image])
    assert torch.equal(rows.half, group_of(N, CONFIG)[image] % 2)
    groups = group_of(N, CONFIG)[image]
    assert not set(groups[rows.half == 0].tolist()) & set(groups[rows.half == 1].tolist())
    schedule = times(base.scheduler, CONFIG.rollout.steps)[: training_times(CONFIG)]
    assert torch.isin(rows.t, schedule).all()
    assert all(len(set(t.tolist())) == J for t in rows.t.reshape(-1, J))  # an image's timesteps differ
    again = step_rows(base, Weighed(drawn, A, A_sum, 0), index, CONFIG, 0)
    assert all(torch.equal(x, y) for x, y in zip(rows, again, strict=True))
    other = step_rows(base, Weighed(drawn, A, A_sum, 0), index, CONFIG, 1)
    assert not torch.equal(rows.noise, other.noise)


def test_one_prompt_is_halved_by_position() -> None:
    base, drawn = load_base("world"), rollout()
    A, A_sum = advantages(drawn.scores, CONFIG)
    rows = step_rows(base, Weighed(drawn, A, A_sum, 0), torch.arange(4), CONFIG, 0)
    assert rows.half.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_advantages_are_by_prompt_and_silent_where_a_reward_does_not_apply() -> None:
    drawn = rollout()
    A, A_sum = advantages(drawn.scores, CONFIG)
    assert A.dtype == A_sum.dtype == torch.float32
    torch.testing.assert_close(A.reshape(5, 4, 2).mean(1), torch.zeros(5, 2), rtol=0, atol=1e-6)
    assert not A[4:8, 0].any()
    config = Config(rewards=("text", "jpeg"), reward_weights=(0.0, 2.0), balance="weighted-sum", rollout=ROLLOUT)
    alone, summed = advantages(drawn.scores, config)
    torch.testing.assert_close(summed, alone[:, 1], rtol=1e-3, atol=0)  # std has an epsilon in units of the reward
