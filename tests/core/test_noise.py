"""Running Grams and moments, signal shares: hand values, bias correction, silent rewards."""

from __future__ import annotations

import math

import pytest
import torch

from marble_core import (
    SignalShare,
    cross_gram,
    gradient_snr,
    init_gram_ema,
    init_moments,
    signal_share,
    update_gram_ema,
    update_moments,
)


def test_gram_ema_by_hand() -> None:
    state = init_gram_ema(1)
    state, first = update_gram_ema(state, torch.tensor([[4.0]]), decay=0.75)
    assert first.item() == 4.0  # the empty start does not count
    state, second = update_gram_ema(state, torch.tensor([[8.0]]), decay=0.75)
    assert second.item() == pytest.approx((0.75 * 0.25 * 4 + 0.25 * 8) / (1 - 0.75**2))
    assert state.weight.item() == pytest.approx(1 - 0.75**2)


def test_moments_by_hand_and_for_a_silent_reward() -> None:
    state = init_moments({"w": torch.zeros(2, 1)})
    state, corrected = update_moments(state, {"w": torch.tensor([[1.0], [5.0]])}, decay=0.5)
    assert corrected["w"].tolist() == [[1.0], [5.0]]
    active = torch.tensor([True, False])
    state, corrected = update_moments(state, {"w": torch.tensor([[4.0], [math.nan]])}, decay=0.5, active=active)
    assert corrected["w"].tolist() == [[3.0], [5.0]]  # (1/4 + 4/2) / (3/4), and what was before
    assert state.weight.tolist() == [0.75, 0.5]


def test_a_moment_kept_for_bf16_rows_does_not_stall() -> None:
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    state = init_moments(ones)
    for _ in range(2000):
        state, corrected = update_moments(state, ones, decay=0.999)
    assert state.mean.dtype == torch.float32
    assert state.mean.item() == pytest.approx(1 - 0.999**2000, rel=1e-3)  # a bf16 mean stalls far below
    assert corrected.item() == pytest.approx(1, rel=1e-3)


def test_signal_share_by_hand() -> None:
    cross = torch.tensor([[[1.0, 9.0], [9.0, -1.0]], [[3.0, 9.0], [9.0, 1.0]]])
    gram = torch.tensor([[[4.0, 9.0], [9.0, 2.0]], [[4.0, 9.0], [9.0, 2.0]]])
    result = signal_share(cross, gram)
    assert isinstance(result, SignalShare)
    assert result.share.tolist() == [0.5, 0.0]
    # residuals -1, 1 and -1, 1: variance 2, of the mean 1, over the mean square 4 and 2
    assert result.standard_error.tolist() == pytest.approx([0.25, 0.5])
    one = signal_share(cross[:1], gram[:1])
    assert isinstance(one, SignalShare)
    assert one.standard_error.isnan().all()
    single = signal_share(cross[0], gram[0])
    assert isinstance(single, torch.Tensor)
    assert single.tolist() == [0.25, -0.5]
    silent = signal_share(torch.zeros(2, 2), torch.diag(torch.tensor([1.0, 0.0])))
    assert isinstance(silent, torch.Tensor)
    assert silent.tolist() == [0.0, 0.0]
    broken = torch.diag(torch.tensor([math.nan, 2.0]))
    for found in (signal_share(torch.eye(2), broken), signal_share(torch.eye(2)[None], broken[None])[0]):
        torch.testing.assert_close(found, torch.tensor([math.nan, 0.5]), equal_nan=True)


def test_snr_by_hand() -> None:
    cross = torch.diag(torch.tensor([3.0, -1.0, 0.0, 4.0]))  # of 6, 1, 0 and 4
    a, b = torch.tensor([2.0, 1.0, 0.0, 2.0]), torch.tensor([3.0, 1.0, 1.0, 2.0])
    assert gradient_snr(cross, a, b).tolist() == [1.0, -0.5, 0.0, math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_snr_of_a_batch_with_itself_is_infinite_whatever_the_rounding(dtype: torch.dtype) -> None:
    for seed in range(50):
        x = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        norms = x.norm(dim=1).to(dtype)
        assert (gradient_snr((x @ x.T).to(dtype), norms, norms) == math.inf).all()
    a, b = x.float(), x.float() + 0.01 * torch.randn(4, 50, generator=torch.Generator().manual_seed(99))
    snr = gradient_snr(cross_gram(a, b), a.norm(dim=1), b.norm(dim=1))  # of batches that nearly agree
    assert ((snr > 5e3) & (snr < 1e5)).all()


def test_nan_is_not_hidden_in_an_snr() -> None:
    cross, ones = torch.eye(4), torch.full((4,), 2.0)
    cross[1, 1] = math.nan
    a, b = ones.clone(), ones.clone()
    a[2], b[3] = math.nan, 0.0
    cross[3, 3] = 0.0
    found = gradient_snr(cross, a, b)
    torch.testing.assert_close(found, torch.tensor([1 / 3, math.nan, math.nan, 0.0]), equal_nan=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init_gram_ema(0), "K: expected a positive integer, got int 0"),
        (lambda: update_gram_ema(init_gram_ema(2), torch.eye(3), decay=0.5), "gram: expected the shape of state.value"),
        (
            lambda: update_gram_ema(init_gram_ema(2), torch.eye(2), decay=1.0),
            r"decay: expected a number in \[0, 1\), got",
        ),
        (lambda: init_moments({}), "rows: expected at least one leaf"),
        (lambda: init_moments([torch.ones(2, 1), torch.ones(3, 1)]), "same leading K"),
        (lambda: update_moments(init_moments(torch.ones(2, 3)), torch.ones(2, 4), decay=0.5), "rows: expected a leaf"),
        (lambda: update_moments(init_moments(torch.ones(2, 3)), [torch.ones(2, 3)], decay=0.5), "the structure of"),
        (
            lambda: update_moments(init_moments(torch.ones(2, 3)), torch.ones(2, 3), decay=0.5, active=torch.ones(2)),
            r"active: expected a bool tensor of shape \[K\] = \[2\], got float32\[2\]",
        ),
        (
            lambda: update_moments(init_moments(torch.ones(2, 3)), torch.ones(2, 3), decay=0.5, active=[True, False]),  # type: ignore[arg-type]
            r"active: expected a bool tensor of shape \[K\] = \[2\], got list \[True, False\]",
        ),
        (
            lambda: init_moments([torch.ones(4), torch.ones(4)]),
            r"rows: .* got a list of 2 vectors.*torch\.stack\(rows\)",
        ),
        (lambda: signal_share(torch.eye(2), torch.eye(3)), "cross: expected the shape of gram"),
        (
            lambda: signal_share(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)),
            r"gram: expected \[K, K\] or \[M, K, K\]",
        ),
        (lambda: gradient_snr(torch.eye(2), torch.ones(3), torch.ones(2)), "norms_a"),
        (lambda: gradient_snr(torch.eye(2), torch.ones(2), [1.0, 1.0]), "norms_b: expected a floating"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
