"""Advantages over hard batches: invariances, isolation, and running statistics that do not see how they were cut."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from marble_core.advantages import (
    GroupStats,
    advantages_from_stats,
    group_advantages,
    init_group_stats,
    merge_group_stats,
    update_group_stats,
)

CLASSES = ("normal", "constant", "singletons", "binary", "offset", "scales", "sparse", "undefined")
GROUPS = 5


def draw_batch(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, group indices below ``GROUPS`` (or one an image) and applicability of one class."""
    gen = torch.Generator().manual_seed(seed)
    N, K = int(torch.randint(2, 25, (), generator=gen)), int(torch.randint(1, 5, (), generator=gen))
    R = torch.randn(N, K, dtype=torch.float64, generator=gen)
    groups = torch.randint(0, GROUPS, (N,), generator=gen)
    applicable = torch.rand(N, K, generator=gen) < (0.15 if kind == "sparse" else 0.8)
    if kind == "constant":
        R = torch.randn(GROUPS, K, dtype=torch.float64, generator=gen)[groups]
    elif kind == "singletons":
        groups = torch.randperm(N, generator=gen)
    elif kind == "binary":
        R = (R > 0.5).double()
    elif kind == "offset":
        R = R + 1e6
    elif kind == "scales":
        R = R * 10.0 ** torch.randint(-6, 7, (K,), generator=gen)
    elif kind == "undefined":
        applicable[:, 0] = False
    return R, groups, applicable


batches = st.builds(draw_batch, st.sampled_from(CLASSES), st.integers(0, 10**6))
stds = st.sampled_from(("global", "group"))


def close(x: Tensor, y: Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8, equal_nan=True)


def test_every_class_is_drawn_and_is_what_it_says() -> None:
    met: set[str] = set()

    @given(st.sampled_from(CLASSES), st.integers(0, 10**6))
    def collect(kind: str, seed: int) -> None:
        R, groups, applicable = draw_batch(kind, seed)
        A = group_advantages(R, groups, applicable=applicable, std="group")
        truth = {
            "constant": (A == 0).all(),
            "singletons": (A == 0).all() and len(groups.unique()) == len(groups),
            "binary": ((R == 0) | (R == 1)).all(),
            "offset": R.mean() > 1e5,
            "undefined": not applicable[:, 0].any(),
        }
        assert truth.get(kind, True)
        met.add(kind)

    collect()
    assert met == set(CLASSES)


@given(batches, stds, st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_a_positive_affine_map_of_a_reward_changes_nothing_once_eps_is_scaled(batch, std, a, b) -> None:
    R, groups, applicable = batch
    A = group_advantages(R, groups, applicable=applicable, std=std, eps=1e-2)
    mapped = R.clone()
    mapped[:, 0] = a * R[:, 0] + b
    after = group_advantages(mapped, groups, applicable=applicable, std=std, eps=1e-2 * a)
    torch.testing.assert_close(after[:, 0], A[:, 0], rtol=1e-6, atol=1e-6)
    other = group_advantages(mapped, groups, applicable=applicable, std=std, eps=1e-2)
    assert torch.equal(other[:, 1:], A[:, 1:])  # with eps unchanged, the other rewards do not notice


@given(batches, stds, st.integers(-20, 20))
def test_a_power_of_two_scales_bit_for_bit(batch, std, power) -> None:
    R, groups, applicable = batch
    A = group_advantages(R, groups, applicable=applicable, std=std, eps=2.0**-12)
    scaled = group_advantages(R * 2.0**power, groups, applicable=applicable, std=std, eps=2.0 ** (power - 12))
    assert torch.equal(scaled, A)


@given(batches, stds)
def test_the_negative_reward_has_the_negative_advantage(batch, std) -> None:
    R, groups, applicable = batch
    A = group_advantages(R, groups, applicable=applicable, std=std)
    close(group_advantages(-R, groups, applicable=applicable, std=std), -A)


@given(batches, stds, st.integers(0, 10**6), st.sampled_from((math.nan, math.inf, -1e300, 3.0)))
def test_an_inapplicable_image_changes_no_other_entry(batch, std, pick, value) -> None:
    R, groups, applicable = batch
    n = pick % len(R)
    applicable = applicable.clone()
    applicable[n] = False
    A = group_advantages(R, groups, applicable=applicable, std=std)
    changed = R.clone()
    changed[n] = value
    assert torch.equal(group_advantages(changed, groups, applicable=applicable, std=std), A)
    keep = torch.arange(len(R)) != n
    close(group_advantages(R[keep], groups[keep], applicable=applicable[keep], std=std), A[keep])
    assert (A[n] == 0).all()


@given(batches, stds, st.integers(0, 10**6), st.sampled_from((math.nan, math.inf, -math.inf)))
def test_a_bad_reward_stays_in_its_column_and_with_group_std_in_its_group(batch, std, pick, bad) -> None:
    R, groups, applicable = batch
    n, k = pick % len(R), pick % R.shape[1]
    hurt = R.clone()
    hurt[n, k] = bad
    A, after = (group_advantages(x, groups, applicable=applicable, std=std) for x in (R, hurt))
    reach = torch.zeros_like(applicable)
    reach[:, k] = applicable[:, k] & ((groups == groups[n]) | (std == "global")) & applicable[n, k]
    assert torch.equal(after[~reach], A[~reach])
    assert after[reach].isnan().all()


@given(batches, stds, st.randoms(use_true_random=False))
def test_permuting_rows_and_relabelling_groups(batch, std, random) -> None:
    R, groups, applicable = batch
    A = group_advantages(R, groups, applicable=applicable, std=std)
    order = torch.tensor(random.sample(range(len(R)), len(R)))
    close(group_advantages(R[order], groups[order], applicable=applicable[order], std=std), A[order])
    labels = 2**50 * torch.tensor(random.sample(range(-1000, 1000), int(groups.max()) + 1))
    close(group_advantages(R, labels[groups], applicable=applicable, std=std), A)


@given(batches)
def test_groups_are_centred_and_have_unit_spread(batch) -> None:
    R, groups, applicable = batch
    A = group_advantages(R, groups, applicable=applicable, std="group", eps=1e-300)
    for g in groups.unique():
        for k in range(R.shape[1]):
            a = A[(groups == g) & applicable[:, k], k]
            if len(a):
                assert abs(a.mean()) < 1e-7
                assert (a == 0).all() or abs(a.std(unbiased=False) - 1) < 1e-7


@given(batches, stds, st.integers(1, 6), st.randoms(use_true_random=False))
def test_statistics_do_not_see_how_they_were_cut_ordered_or_merged(batch, std, ranks, random) -> None:
    R, groups, applicable = batch
    num_groups = int(groups.max()) + 1
    empty = init_group_stats(num_groups, R.shape[1])
    order = torch.tensor(random.sample(range(len(R)), len(R)))
    parts: list[GroupStats] = [empty] * ranks
    for chunk in order.split(random.randint(1, len(R))):
        rank = random.randrange(ranks)
        parts[rank] = update_group_stats(parts[rank], R[chunk], groups[chunk], applicable[chunk])
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_group_stats(merged, part)
    whole = update_group_stats(empty, R, groups, applicable)
    assert torch.equal(merged.count, whole.count)
    torch.testing.assert_close(tuple(merged), tuple(whole), rtol=1e-8, atol=1e-8)
    A = advantages_from_stats(merged, R, groups, applicable=applicable, std=std)
    close(A, group_advantages(R, groups, applicable=applicable, std=std))


@given(st.floats(-1e6, 1e6), st.lists(st.integers(1, 30), min_size=1, max_size=6), stds)
def test_copies_of_one_value_give_exactly_zero_however_they_arrive(value, sizes, std) -> None:
    stats = init_group_stats(2, 1)
    other = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    x = torch.full((1, 1), value, dtype=torch.float64)
    for i, n in enumerate(sizes):
        part = stats if i % 2 else init_group_stats(2, 1)
        part = update_group_stats(part, torch.cat([x.expand(n, 1), other]), torch.tensor([0] * n + [1, 1]))
        stats = part if i % 2 else merge_group_stats(part, stats)
    assert stats.count[0].item() == sum(sizes)
    assert (stats.mean[0].item(), stats.m2[0].item()) == (value, 0)
    assert advantages_from_stats(stats, x, torch.tensor([0]), std=std, eps=1e-300).item() == 0
