"""Advantages: hand values, exact zeros, isolation, and running statistics that agree with the batch."""

import io
import math

import pytest
import torch
from torch import Tensor

from marble_core.advantages import (
    GroupStats,
    advantages_from_stats,
    group_advantages,
    init_group_stats,
    merge_group_stats,
    update_group_stats,
)

STDS = ("global", "group")


def transcription(R: Tensor, groups: Tensor, applicable: Tensor, std: str, eps: float) -> Tensor:
    """Equation 3, one reward and one group at a time."""
    A = torch.zeros_like(R)
    for k in range(R.shape[1]):
        column = R[applicable[:, k], k]
        for label in groups.unique():
            rows = (groups == label) & applicable[:, k]
            if rows.any():
                x = R[rows, k]
                spread = (x if std == "group" else column).std(unbiased=False)
                A[rows, k] = (x - x.mean()) / (spread + eps)
    return A


def batch(N: int = 30, K: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    R = torch.randn(N, K, dtype=torch.float64, generator=gen) * torch.tensor([1.0, 1e-3, 1e3, 5.0])[:K]
    return R, torch.randint(-3, 4, (N,), generator=gen), torch.rand(N, K, generator=gen) < 0.7


def test_hand_values() -> None:
    R = torch.tensor([[1.0], [3.0], [10.0], [14.0]], dtype=torch.float64)
    groups = torch.tensor([5, 5, -2, -2])
    per_group = group_advantages(R, groups, std="group", eps=0.5)
    torch.testing.assert_close(per_group, torch.tensor([[-1 / 1.5], [1 / 1.5], [-2 / 2.5], [2 / 2.5]]).double())
    std = math.sqrt((36 + 16 + 9 + 49) / 4)  # about the mean of all four, 7
    expected = torch.tensor([[-1.0], [1.0], [-2.0], [2.0]], dtype=torch.float64) / (std + 1e-4)
    torch.testing.assert_close(group_advantages(R, groups), expected)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_transcription(std: str, seed: int) -> None:
    R, groups, applicable = batch(seed=seed)
    A = group_advantages(R, groups, applicable=applicable, std=std, eps=1e-4)  # type: ignore[arg-type]
    torch.testing.assert_close(A, transcription(R, groups, applicable, std, 1e-4), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e-30, 3e4])
def test_identical_rewards_give_exactly_zero(std, dtype, value) -> None:
    R = torch.full((24, 1), value, dtype=dtype)
    other = torch.randn(24, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    A = group_advantages(torch.cat([R, other]), torch.arange(48) // 24, std=std, eps=1e-12)
    assert A.dtype == dtype
    assert (A[:24] == 0).all()
    assert (A[24:] != 0).all()


def test_identical_rewards_through_many_updates_give_exactly_zero() -> None:
    x = torch.full((1, 1), 0.1, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.long)
    stats = init_group_stats(1, 1)
    for n in (1, 2, 3, 5, 13):
        stats = update_group_stats(stats, x.expand(n, 1), zero.expand(n))
    stats = merge_group_stats(stats, stats)
    assert stats.count.item() == 48
    assert stats.mean.item() == 0.1
    assert stats.m2.item() == 0
    for std in STDS:
        assert advantages_from_stats(stats, x, zero, std=std, eps=1e-300).item() == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("std", STDS)
def test_a_group_of_one_and_inapplicable_entries_give_exactly_zero(std) -> None:
    R, _, applicable = batch()
    assert (group_advantages(R, torch.arange(30), std=std) == 0).all()
    groups = torch.arange(30) % 3
    assert (group_advantages(R, groups, applicable=applicable, std=std)[~applicable] == 0).all()
    nothing = torch.zeros_like(applicable)
    assert (group_advantages(R, groups, applicable=nothing, std=std) == 0).all()
    single = nothing.clone()
    single[4, 2] = True
    assert (group_advantages(R, groups, applicable=single, std=std) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_stay_in_their_column_and_group(bad) -> None:
    R, groups, applicable = batch()
    groups, applicable[3, 1] = torch.arange(30) % 5, True
    hurt = R.clone()
    hurt[3, 1] = bad
    for std in STDS:
        clean = group_advantages(R, groups, applicable=applicable, std=std)  # type: ignore[arg-type]
        A = group_advantages(hurt, groups, applicable=applicable, std=std)  # type: ignore[arg-type]
        touched = torch.zeros_like(applicable)
        touched[:, 1] = applicable[:, 1] if std == "global" else applicable[:, 1] & (groups == groups[3])
        assert A[touched].isnan().all()
        assert torch.equal(A[~touched], clean[~touched])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("std", STDS)
def test_an_inapplicable_entry_is_never_read(std, bad) -> None:
    R, groups, applicable = batch()
    hurt = torch.where(applicable, R, bad)
    clean = group_advantages(R, groups, applicable=applicable, std=std)
    assert torch.equal(group_advantages(hurt, groups, applicable=applicable, std=std), clean)
    stats = update_group_stats(init_group_stats(7, 4), R, groups + 3, applicable)
    for x, y in zip(stats, update_group_stats(init_group_stats(7, 4), hurt, groups + 3, applicable), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(advantages_from_stats(stats, hurt, groups + 3, applicable=applicable, std=std), clean)


def test_statistics_are_those_of_the_formulas() -> None:
    R, groups, applicable = batch()
    stats = update_group_stats(init_group_stats(8, 4), R, groups + 3, applicable)  # group 7 stays empty
    for g in range(8):
        for k in range(4):
            x = R[(groups + 3 == g) & applicable[:, k], k]
            assert stats.count[g, k] == len(x)
            torch.testing.assert_close(stats.mean[g, k], x.mean() if len(x) else R.new_zeros(()))
            torch.testing.assert_close(stats.m2[g, k], (x - x.mean()).square().sum() if len(x) else R.new_zeros(()))


@pytest.mark.parametrize("std", STDS)
def test_statistics_of_the_batch_give_the_batch_advantages(std) -> None:
    R, groups, applicable = batch()
    stats = update_group_stats(init_group_stats(9, 4), R, groups + 3, applicable)
    A = advantages_from_stats(stats, R, groups + 3, applicable=applicable, std=std)
    expected = group_advantages(R, groups, applicable=applicable, std=std)
    torch.testing.assert_close(A, expected, rtol=1e-13, atol=1e-13)


def test_running_statistics_carry_over() -> None:
    first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])
    groups = torch.zeros(2, dtype=torch.long)
    stats = update_group_stats(update_group_stats(init_group_stats(1, 1), first, groups), second, groups)
    A = advantages_from_stats(stats, second, groups, std="group")
    expected = torch.tensor([[1.0], [3.0]]) / (math.sqrt(5) + 1e-4)  # mean 3, population variance 5
    torch.testing.assert_close(A, expected)


def test_an_unseen_group_gives_zero() -> None:
    stats = update_group_stats(init_group_stats(3, 1), torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([0, 0, 1]))
    for std in STDS:
        A = advantages_from_stats(stats, torch.tensor([[7.0], [7.0]]), torch.tensor([1, 2]), std=std)  # type: ignore[arg-type]
        assert (A == 0).all()


def test_empty_statistics_are_neutral_in_a_merge_even_where_squares_overflow() -> None:
    R = torch.full((2, 1), 1e25)
    stats = update_group_stats(init_group_stats(1, 1, dtype=torch.float32), R, torch.zeros(2, dtype=torch.long))
    for merged in (merge_group_stats(stats, init_group_stats(1, 1)), merge_group_stats(init_group_stats(1, 1), stats)):
        assert (merged.count.item(), merged.m2.item()) == (2, 0)
        assert merged.mean.item() == R[0].item()


def test_arguments_are_not_modified() -> None:
    R, groups, applicable = batch()
    stats = update_group_stats(init_group_stats(7, 4), R, groups + 3, applicable)
    before = [x.clone() for x in (R, groups, applicable, *stats)]
    update_group_stats(stats, R, groups + 3, applicable)
    advantages_from_stats(stats, R, groups + 3, applicable=applicable)
    group_advantages(R, groups, applicable=applicable)
    for x, y in zip(before, (R, groups, applicable, *stats), strict=True):
        assert torch.equal(x, y)


def test_save_and_load_round_trip() -> None:
    R, groups, _ = batch()
    stats = update_group_stats(init_group_stats(7, 4), R, groups + 3)
    file = io.BytesIO()
    torch.save(tuple(stats), file)
    file.seek(0)
    loaded = GroupStats(*torch.load(file, weights_only=True))
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(stats, loaded, strict=True))
    file = io.BytesIO()
    torch.save(stats, file)
    file.seek(0)
    assert isinstance(torch.load(file, weights_only=False), GroupStats)


@pytest.mark.parametrize("std", STDS)
def test_no_gradient_flows_back_to_the_rewards(std) -> None:
    """Equal rewards would make it NaN, and running statistics would keep the graph of every batch."""
    R, groups = torch.tensor([[1.0, 2.0], [3.0, 2.0]], requires_grad=True), torch.tensor([0, 0])
    stats = update_group_stats(init_group_stats(1, 2), R, groups)
    assert not any(x.requires_grad for x in stats)
    assert not group_advantages(R, groups, std=std).requires_grad
    assert not advantages_from_stats(stats, R, groups, std=std).requires_grad


@pytest.mark.parametrize("std", STDS)
def test_vmap_equals_a_loop(std) -> None:
    items = [batch(N=12, seed=s) for s in range(3)]
    R, groups, applicable = (torch.stack(x) for x in zip(*items, strict=True))
    A = torch.func.vmap(lambda R, g, a: group_advantages(R, g, applicable=a, std=std))(R, groups, applicable)
    for i, (r, g, a) in enumerate(items):
        assert torch.equal(A[i], group_advantages(r, g, applicable=a, std=std))


def test_compiles_into_one_graph() -> None:
    R, groups, applicable = batch()

    def both(R: Tensor, groups: Tensor, applicable: Tensor) -> tuple[Tensor, Tensor]:
        stats = update_group_stats(init_group_stats(7, 4), R, groups + 3, applicable)
        A = advantages_from_stats(stats, R, groups + 3, applicable=applicable, std="group")
        return group_advantages(R, groups, applicable=applicable), A

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    for x, y in zip(compiled(R, groups, applicable), both(R, groups, applicable), strict=True):
        assert torch.equal(x, y)


def test_runs_on_meta_tensors_hence_without_a_host_sync() -> None:
    R, groups = torch.empty(6, 2, device="meta"), torch.empty(6, dtype=torch.int32, device="meta")
    stats = update_group_stats(init_group_stats(3, 2, device="meta"), R, groups)
    assert advantages_from_stats(stats, R, groups).shape == group_advantages(R, groups).shape == (6, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float64(dtype) -> None:
    R = (1000 + torch.arange(32.0).reshape(16, 2)).to(dtype)
    groups = torch.arange(16) % 4
    A = group_advantages(R, groups)
    assert A.dtype == dtype
    assert torch.equal(A, group_advantages(R.double(), groups).to(dtype))


def test_an_empty_batch() -> None:
    none = torch.empty(0, dtype=torch.long)
    assert group_advantages(torch.empty(0, 3), none).shape == (0, 3)
    assert update_group_stats(init_group_stats(2, 3), torch.empty(0, 3), none).count.sum() == 0


def test_an_index_out_of_range_is_an_error_on_the_cpu() -> None:
    for index in (-1, 2):
        with pytest.raises(RuntimeError, match="out of bounds"):
            update_group_stats(init_group_stats(2, 1), torch.ones(1, 1), torch.tensor([index]))


R22, G2 = torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("rewards: expected", lambda: group_advantages(torch.zeros(2), G2)),
        ("rewards: expected", lambda: group_advantages(R22.long(), G2)),
        ("groups: expected", lambda: group_advantages(R22, G2.float())),
        ("groups: expected", lambda: group_advantages(R22, G2.bool())),
        ("groups: expected", lambda: group_advantages(R22, torch.zeros(3, dtype=torch.long))),
        ("applicable: expected", lambda: group_advantages(R22, G2, applicable=R22)),
        ("applicable: expected", lambda: group_advantages(R22, G2, applicable=torch.ones(2, 1, dtype=torch.bool))),
        ("std: expected", lambda: group_advantages(R22, G2, std="batch")),  # type: ignore[arg-type]
        ("eps: expected", lambda: group_advantages(R22, G2, eps=0.0)),
        ("num_groups: expected", lambda: init_group_stats(0, 1)),
        ("num_rewards: expected", lambda: init_group_stats(1, 0)),
        ("dtype: expected", lambda: init_group_stats(1, 1, dtype=torch.bfloat16)),
        ("stats: expected", lambda: update_group_stats(init_group_stats(1, 3), R22, G2)),
        ("stats: expected", lambda: advantages_from_stats(init_group_stats(1, 3), R22, G2)),
        ("b: expected", lambda: merge_group_stats(init_group_stats(1, 3), init_group_stats(2, 3))),
        ("b: expected", lambda: merge_group_stats(init_group_stats(1, 3), init_group_stats(1, 2))),
    ],
)
def test_static_errors_name_the_argument(match, call) -> None:
    with pytest.raises(ValueError, match=match):
        call()
