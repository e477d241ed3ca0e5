"""The NFT loss: the formulas transcribed, the affine identity, proposition 1, hand values, degenerate rows."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from marble_core.nft import (
    affine_residual,
    affine_terms,
    branch_losses,
    clamped_fraction,
    combine_advantages,
    combine_interpolation,
    interpolation,
    nft_loss,
)

FORMS = ("x0", "velocity")


def rows(B: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, dict[str, Any]]:
    gen = torch.Generator().manual_seed(seed)
    v, v_old, x0, noise = torch.randn(4, B, 3, 4, 5, dtype=torch.float64, generator=gen).to(dtype).unbind()
    t = (0.05 + 0.95 * torch.rand(B, dtype=torch.float64, generator=gen)).to(dtype)
    return v, v_old, {"x0": x0, "noise": noise, "t": t}


def transcription(v, v_old, *, x0, noise, t, beta, form) -> tuple[Tensor, Tensor]:
    """The definitions, letter by letter."""
    v_old = v_old.detach()
    v_pos = (1 - beta) * v_old + beta * v
    v_neg = (1 + beta) * v_old - beta * v
    t = t.view(-1, 1, 1, 1)
    x_t = (1 - t) * x0 + t * noise
    losses = []
    for v_pm in (v_pos, v_neg):
        if form == "velocity":
            losses.append(((v_pm - (noise - x0)) ** 2).mean((1, 2, 3)))
        else:
            x0_pm = x_t - t * v_pm
            size = (x0_pm - x0).abs().mean((1, 2, 3)).clamp(min=1e-5).detach()
            losses.append(((x0_pm - x0) ** 2).mean((1, 2, 3)) / size)
    return losses[0], losses[1]


def grad(f, v: Tensor) -> Tensor:
    """Gradient of the sum of ``f`` in ``v``."""
    v = v.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(v).sum(), v)
    return g


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_loss_and_gradient_equal_the_transcription(form, beta) -> None:
    v, v_old, data = rows()
    r = torch.linspace(0, 1, 6, dtype=torch.float64)

    def loss(branches, v: Tensor) -> Tensor:
        return nft_loss(r, *branches(v, v_old, **data, beta=beta, form=form))

    torch.testing.assert_close(loss(branch_losses, v), loss(transcription, v), rtol=1e-12, atol=1e-12)
    ours, theirs = (grad(lambda v, b=b: loss(b, v), v) for b in (branch_losses, transcription))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert ours.abs().max() > 1e-3


def test_gradient_holds_the_denominator_constant() -> None:
    v, v_old, data = rows()
    t, target = data["t"].view(-1, 1, 1, 1), data["noise"] - data["x0"]
    for i, s in enumerate((0.7, -0.7)):
        residual = t * (v_old + s * (v - v_old) - target)
        by_hand = 2 * s * t * residual / (60 * residual.abs().mean((1, 2, 3), keepdim=True))
        ours = grad(lambda v, i=i: branch_losses(v, v_old, **data, beta=0.7)[i], v)
        torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=1e-12)


def test_hand_values() -> None:
    v, v_old = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    x0, noise, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])
    # target = (0, 2); beta = 1/2: v_pos = (2, 1), v_neg = (0, 1); residuals (2, -1) and (0, -1)
    l_pos, l_neg = branch_losses(v, v_old, x0=x0, noise=noise, t=t, beta=0.5, form="velocity")
    assert (l_pos.item(), l_neg.item()) == (2.5, 0.5)
    # x0 form: residuals halved, (1, -1/2) and (0, -1/2): 0.625 / 0.75 and 0.125 / 0.25
    l_pos, l_neg = branch_losses(v, v_old, x0=x0, noise=noise, t=t, beta=0.5)
    torch.testing.assert_close((l_pos, l_neg), (torch.tensor([5 / 6]), torch.tensor([0.5])))
    assert nft_loss(torch.tensor([0.25]), torch.tensor([8.0]), torch.tensor([4.0])).item() == 5.0
    prox, signal = affine_terms(torch.tensor([8.0]), torch.tensor([4.0]))
    assert (prox.item(), signal.item()) == (6.0, 4.0)


def test_interpolation_by_hand() -> None:
    A = torch.tensor([-math.inf, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, math.inf, math.nan])
    expected = torch.tensor([0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, math.nan])
    torch.testing.assert_close(interpolation(A, a_max=2.0), expected, rtol=0, atol=0, equal_nan=True)
    assert interpolation(torch.tensor(2.5)).item() == 0.75  # a_max is 5


@pytest.mark.parametrize("form", FORMS)
def test_affine_identity(form) -> None:
    v, v_old, data = rows()
    l_pos, l_neg = branch_losses(v, v_old, **data, beta=0.3, form=form)
    prox, signal = affine_terms(l_pos, l_neg)
    r = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        nft_loss(r, l_pos, l_neg), prox[:, None] + (r - 0.5) * signal[:, None], rtol=1e-13, atol=0
    )
    for k in range(4):
        assert torch.equal(nft_loss(r, l_pos, l_neg)[:, k], nft_loss(r[:, k], l_pos, l_neg))


def test_velocity_form_is_a_policy_gradient_and_a_pull() -> None:
    v, v_old, data = rows()
    beta = 0.3
    e, delta = v_old - (data["noise"] - data["x0"]), v - v_old
    prox, signal = affine_terms(*branch_losses(v, v_old, **data, beta=beta, form="velocity"))
    dims = (1, 2, 3)
    torch.testing.assert_close(prox, (e**2).mean(dims) + beta**2 * (delta**2).mean(dims), rtol=1e-13, atol=0)
    torch.testing.assert_close(signal, 4 * beta * (e * delta).mean(dims), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_proposition_1_holds_with_clamped_entries_in_r_space(form) -> None:
    v, v_old, data = rows()
    gen = torch.Generator().manual_seed(2)
    A = 8 * torch.randn(6, 4, dtype=torch.float64, generator=gen)
    assert 0 < clamped_fraction(A).sum() < 4
    r = interpolation(A)
    w = torch.rand(4, dtype=torch.float64, generator=gen)
    w = w / w.sum()

    def gradient(r: Tensor) -> Tensor:
        return grad(lambda v: nft_loss(r, *branch_losses(v, v_old, **data, beta=0.3, form=form)), v)

    many = sum(w[k] * gradient(r[:, k]) for k in range(4))
    once = gradient(combine_interpolation(w, r))
    torch.testing.assert_close(once, many, rtol=1e-12, atol=1e-14)
    paper = gradient(interpolation(combine_advantages(w, A)))
    assert (paper - many).abs().max() > 1e-3  # in A-space it fails on clamped entries
    small = A.clamp(-5, 5)
    in_A = interpolation(combine_advantages(w, small))
    torch.testing.assert_close(in_A, combine_interpolation(w, interpolation(small)), rtol=1e-14, atol=1e-15)


def test_combining_advantages_serves_the_signal_for_any_coefficients() -> None:
    A = torch.tensor([[1.0, -2.0], [4.0, 5.0]], dtype=torch.float64)
    c = torch.tensor([7.0, 0.5], dtype=torch.float64)
    each = (interpolation(A) - 0.5) @ c
    torch.testing.assert_close(combine_advantages(c, A) / 10, each, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("form", FORMS)
def test_at_the_old_policy_there_is_no_signal_and_the_gradient_is_finite(form) -> None:
    _, v_old, data = rows()
    l_pos, l_neg = branch_losses(v_old, v_old, **data, beta=0.1, form=form)
    assert torch.equal(l_pos, l_neg)
    assert torch.equal(affine_terms(l_pos, l_neg).signal, torch.zeros_like(l_pos))
    assert grad(lambda v: branch_losses(v, v_old, **data, beta=0.1, form=form)[0], v_old).ne(0).all()
    target = data["noise"] - data["x0"]  # a perfect old policy: both residuals are 0
    l_pos, _ = branch_losses(target, target, **data, beta=0.1, form=form)
    assert (l_pos == 0).all()
    assert (grad(lambda v: branch_losses(v, target, **data, beta=0.1, form=form)[0], target) == 0).all()


def test_the_denominator_of_the_x0_form_has_a_floor() -> None:
    v, zero, t = torch.full((1, 2), 1e-6, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64), torch.ones(1)
    l_pos, _ = branch_losses(v, zero, x0=zero, noise=zero, t=t.double(), beta=1.0)
    torch.testing.assert_close(l_pos, torch.tensor([1e-12 / 1e-5], dtype=torch.float64))


def test_the_old_policy_is_a_constant() -> None:
    v, v_old, data = rows()
    v, v_old = v.requires_grad_(), v_old.requires_grad_()
    torch.cat(branch_losses(v, v_old, **data, beta=0.1)).sum().backward()
    assert v.grad is not None
    assert v_old.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_its_row(form) -> None:
    v, v_old, data = rows()
    clean = branch_losses(v, v_old, **data, beta=0.1, form=form)
    v[2, 0, 0, 0] = math.nan
    rest = torch.arange(6) != 2
    for x, y in zip(branch_losses(v, v_old, **data, beta=0.1, form=form), clean, strict=True):
        assert x[2].isnan()
        assert torch.equal(x[rest], y[rest])
    r = torch.tensor([[0.5, math.nan], [0.25, 0.75]])
    combined = combine_interpolation(torch.tensor([1.0, 0.0]), r)
    assert combined[0].isnan()
    assert combined[1] == 0.25


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_give_float32_losses(form, dtype) -> None:
    v, v_old, data = rows(dtype=dtype)
    l_pos, l_neg = branch_losses(v, v_old, **data, beta=0.1, form=form)
    assert l_pos.dtype == l_neg.dtype == torch.float32
    exact = branch_losses(v.double(), v_old.double(), **{k: x.double() for k, x in data.items()}, beta=0.1, form=form)
    torch.testing.assert_close((l_pos.double(), l_neg.double()), exact, rtol=1e-5, atol=1e-6)
    A = torch.tensor([[1.0, 2.0], [-9.0, 3.0]], dtype=dtype)
    w = torch.tensor([0.25, 0.75], dtype=torch.float64)
    for x in (interpolation(A), combine_advantages(w, A), combine_interpolation(w, A), clamped_fraction(A)):
        assert x.dtype == dtype
    assert torch.equal(combine_advantages(w, A), torch.tensor([1.75, 0.0], dtype=dtype))


def test_mixed_dtypes_follow_v() -> None:
    v, v_old, data = rows()
    l_pos, _ = branch_losses(v.float(), v_old.bfloat16(), **data, beta=0.1)
    assert l_pos.dtype == torch.float32


def test_clamped_fraction_by_hand() -> None:
    A = torch.tensor([[2.5, 1.0, math.nan], [-2.5, 2.0, 9.0], [0.0, -2.0, 0.0], [2.1, 0.0, 0.0]])
    expected = torch.tensor([0.75, 0.0, math.nan])
    torch.testing.assert_close(clamped_fraction(A, a_max=2.0), expected, equal_nan=True)
    assert clamped_fraction(A[:, 0], a_max=2.0).item() == 0.75


@pytest.mark.parametrize("form", FORMS)
def test_vmap_equals_a_loop(form) -> None:
    items = [rows(seed=s) for s in range(3)]
    v, v_old = (torch.stack(x) for x in zip(*[(a, b) for a, b, _ in items], strict=True))
    data = {k: torch.stack([d[k] for _, _, d in items]) for k in ("x0", "noise", "t")}
    gen = torch.Generator().manual_seed(3)
    A = 6 * torch.randn(3, 6, 4, dtype=torch.float64, generator=gen)
    w = torch.rand(3, 4, dtype=torch.float64, generator=gen)

    def everything(v, v_old, data, A, w) -> tuple[Tensor, ...]:
        branches = branch_losses(v, v_old, **data, beta=0.1, form=form)
        r = interpolation(A)
        bars = combine_interpolation(w, r), combine_advantages(w, A), clamped_fraction(A)
        return *branches, nft_loss(r, *branches), *affine_terms(*branches), *bars

    batched = torch.func.vmap(everything)(v, v_old, data, A, w)
    for i, (a, b, d) in enumerate(items):
        for x, y in zip(batched, everything(a, b, d, A[i], w[i]), strict=True):
            torch.testing.assert_close(x[i], y, rtol=1e-14, atol=1e-15)


def test_compiles_into_one_graph_and_differentiates_with_torch_func() -> None:
    v, v_old, data = rows()
    r = torch.rand(6, dtype=torch.float64)

    def loss(v: Tensor) -> Tensor:
        return nft_loss(r, *branch_losses(v, v_old, **data, beta=0.1)).sum()

    torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(v), loss(v))
    torch.testing.assert_close(torch.func.grad(loss)(v), grad(loss, v))


def affine_inputs() -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(4)
    A0, A1 = torch.randn(2, 50, dtype=torch.float64, generator=gen).unbind()
    return A0, A1, 0.5 + torch.rand(50, dtype=torch.float64, generator=gen)


def test_affine_residual_tells_grpo_from_ppo_clip() -> None:
    A0, A1, ratio = affine_inputs()

    def clipped(A: Tensor) -> Tensor:
        return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)

    assert affine_residual(lambda A: -(ratio * A), A0, A1) < 1e-15
    assert affine_residual(clipped, A0, A1) > 1e-2
    ratio = torch.ones(50, dtype=torch.float64)  # on policy nothing is clipped
    assert affine_residual(clipped, A0, A1) < 1e-15


@pytest.mark.parametrize("form", FORMS)
def test_affine_residual_of_the_nft_loss_and_of_its_gradient(form) -> None:
    v, v_old, data = rows()
    r0, r1 = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).unbind()

    def gradient(r: Tensor) -> Tensor:
        return grad(lambda v: nft_loss(r, *branch_losses(v, v_old, **data, beta=0.1, form=form)), v)

    assert affine_residual(gradient, r0, r1) < 1e-14
    assert affine_residual(lambda A: gradient(interpolation(A)), 20 * r0 - 10, 20 * r1 - 10) > 1e-3  # the clamp


def test_affine_residual_by_hand_and_at_its_edges() -> None:
    zero, one = torch.zeros(1), torch.ones(1)
    assert affine_residual(torch.square, zero, one, points=(0.25,)).item() == 0.1875
    odd = affine_residual(lambda r: (r - 0.5) ** 3 - 0.25 * (r - 0.5), zero, one)  # 0 at both ends and in the middle
    assert odd > 0.5
    assert affine_residual(torch.zeros_like, zero, one).item() == 0
    assert affine_residual(lambda r: r * math.nan, zero, one).isnan()
    assert affine_residual(lambda r: (2 * r).sum(), zero, one) == 0
    assert not affine_residual(lambda r: 2 * r, zero.requires_grad_(), one).requires_grad


def test_affine_residual_takes_what_autograd_returns() -> None:
    """A tuple or a tree of gradients is as one long one."""
    w, zero, one = torch.tensor([2.0, -1.0], requires_grad=True), torch.zeros(2), torch.ones(2)

    def gradient(bend: float) -> Callable[[Tensor], Any]:
        return lambda r: torch.autograd.grad(((r + bend * r.square()) * w).sum(), (w,))

    assert affine_residual(gradient(0.0), zero, one) < 1e-7
    assert affine_residual(gradient(1.0), zero, one, points=(0.5,)).item() == 0.125  # 0.75 for 1, of 2
    assert affine_residual(lambda r: {"a": r.square(), "b": [8 * r.sum()]}, zero, one, points=(0.5,)) == 0.25 / 16


def test_weights_may_be_on_another_device() -> None:
    """As for ``combine_rows``: K numbers follow the rows."""
    for combine in (combine_interpolation, combine_advantages):
        assert combine(torch.ones(2), torch.ones(3, 2, device="meta")).is_meta


def test_affine_residual_asks_for_each_point_once() -> None:
    asked: list[float] = []

    def f(r: Tensor) -> Tensor:
        asked.append(r.item())
        return r

    affine_residual(f, torch.zeros(()), torch.ones((), dtype=torch.float64), points=(0.25, 0.75))
    assert asked == [0.0, 1.0, 0.25, 0.75]


V, T = torch.zeros(2, 3), torch.zeros(2)
DATA: dict[str, Any] = {"x0": V, "noise": V, "t": T}


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("A: expected", lambda: interpolation(torch.zeros(2, dtype=torch.long))),
        ("a_max: expected", lambda: interpolation(V, a_max=0.0)),
        ("a_max: expected", lambda: clamped_fraction(V, a_max=math.inf)),
        ("A: expected", lambda: clamped_fraction(torch.zeros(()))),
        ("v: expected", lambda: branch_losses(T, T, **DATA, beta=1.0)),
        ("v_old: expected", lambda: branch_losses(V, V[:1], **DATA, beta=1.0)),
        ("x0: expected", lambda: branch_losses(V, V, **{**DATA, "x0": V.long()}, beta=1.0)),
        ("noise: expected", lambda: branch_losses(V, V, **{**DATA, "noise": V[:, :1]}, beta=1.0)),
        ("t: expected", lambda: branch_losses(V, V, **{**DATA, "t": V}, beta=1.0)),
        ("t: expected", lambda: branch_losses(V, V, **{**DATA, "t": torch.zeros(())}, beta=1.0)),
        ("beta: expected", lambda: branch_losses(V, V, **DATA, beta=0.0)),
        (r"beta: expected a number in \(0, inf\)", lambda: branch_losses(V, V, **DATA, beta=math.inf)),
        ("form: expected", lambda: branch_losses(V, V, **DATA, beta=1.0, form="eps")),  # type: ignore[arg-type]
        ("r: expected", lambda: nft_loss(torch.zeros(3), T, T)),
        ("r: expected", lambda: nft_loss(torch.zeros(4, 2), T, T)),
        ("l_neg: expected", lambda: nft_loss(T, T, V)),
        ("l_neg: expected", lambda: affine_terms(T, V)),
        ("weights: expected", lambda: combine_interpolation(T, V)),
        ("r: expected", lambda: combine_interpolation(T, T)),
        ("A: expected", lambda: combine_advantages(T, T)),
        ("r1: expected", lambda: affine_residual(torch.square, T, V)),
        ("points: expected", lambda: affine_residual(torch.square, T, T, points=())),
        ("points: expected", lambda: affine_residual(torch.square, T, T, points=0.3)),  # type: ignore[arg-type]
        (r"loss_of_r\(r\): expected a floating", lambda: affine_residual(lambda r: (r, None), T, T)),
        (r"loss_of_r\(r\): expected at least one number", lambda: affine_residual(lambda r: (), T, T)),
        (
            r"loss_of_r\(r\): expected the shape",
            lambda: affine_residual(lambda r: torch.ones(2 + int(r.sum())), T, T + 1),
        ),
        ("points: expected", lambda: affine_residual(torch.square, T, T, points=(0.5, 1.0))),
    ],
)
def test_static_errors_name_the_argument(match, call) -> None:
    with pytest.raises(ValueError, match=f"^{match}"):
        call()
