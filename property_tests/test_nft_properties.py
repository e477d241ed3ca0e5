"""The NFT loss over hard rows: the affine identity, proposition 1 with clamping, symmetries and scaling."""

import torch
from hypothesis import given
from hypothesis import strategies as st
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

ROWS = ("far", "near", "on_policy", "perfect_old", "perfect_new", "early", "late")
ADVANTAGES = ("unclamped", "clamped", "boundary", "zero", "huge")
WEIGHTS = ("inner", "corner", "uniform")
A_MAX = 5.0


class Rows:
    """One batch of branch inputs, in float64."""

    def __init__(self, kind: str, seed: int, beta: float) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.kind, self.beta, self.B = kind, beta, int(torch.randint(1, 6, (), generator=gen))
        v, self.v_old, self.x0, self.noise = torch.randn(4, self.B, 2, 3, dtype=torch.float64, generator=gen).unbind()
        self.t = 0.1 + 0.9 * torch.rand(self.B, dtype=torch.float64, generator=gen)
        if kind == "near":
            v = self.v_old + 1e-6 * v
        elif kind == "on_policy":
            v = self.v_old.clone()
        elif kind == "perfect_old":
            self.v_old = self.noise - self.x0
        elif kind == "perfect_new":
            v = self.noise - self.x0
        elif kind == "early":
            self.t = torch.ones_like(self.t)
        elif kind == "late":
            self.t = torch.zeros_like(self.t)
        self.v = v

    def losses(self, form: str, v: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        v, v_old, x0, noise = (scale * x for x in (self.v if v is None else v, self.v_old, self.x0, self.noise))
        return branch_losses(v, v_old, x0=x0, noise=noise, t=self.t, beta=self.beta, form=form)  # type: ignore[arg-type]

    def gradient(self, r: Tensor, form: str) -> Tensor:
        v = self.v.clone().requires_grad_()
        (g,) = torch.autograd.grad(nft_loss(r, *self.losses(form, v)).sum(), v)
        return g


def draw_advantages(kind: str, seed: int, B: int = 5) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    A = torch.randn(B, int(torch.randint(1, 6, (), generator=gen)), dtype=torch.float64, generator=gen)
    scale = {"unclamped": 1.0, "clamped": 2 * A_MAX, "zero": 0.0, "huge": 1e30, "boundary": 1.0}[kind]
    if kind == "unclamped":
        return A.clamp(-A_MAX, A_MAX)
    return A_MAX * A.sign() if kind == "boundary" else scale * A


def draw_weights(kind: str, seed: int, K: int) -> Tensor:
    w = torch.rand(K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1e-3
    if kind == "corner":
        w = (torch.arange(K) == seed % K).double()
    elif kind == "uniform":
        w = torch.ones(K, dtype=torch.float64)
    return w / w.sum()


seeds = st.integers(0, 10**6)
rows = st.builds(Rows, st.sampled_from(ROWS), seeds, st.sampled_from((0.1, 0.5, 1.0, 3.0)))
forms = st.sampled_from(("x0", "velocity"))
advantages = st.builds(draw_advantages, st.sampled_from(ADVANTAGES), seeds)
weight_kinds = st.sampled_from(WEIGHTS)


def close(x: Tensor, y: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(x, y, rtol=tol, atol=tol)


def test_every_class_is_drawn_and_is_what_it_says() -> None:
    met: set[str] = set()

    @given(rows, st.sampled_from(ADVANTAGES), weight_kinds, seeds)
    def collect(x: Rows, kind: str, weights: str, seed: int) -> None:
        A = draw_advantages(kind, seed)
        size, clamped = A.abs().max(), clamped_fraction(A, a_max=A_MAX)
        truth: dict[str, Tensor] = {
            "on_policy": (x.v == x.v_old).all(),
            "late": (x.t == 0).all(),
            "unclamped": (clamped == 0).all(),
            "zero": size == 0,
            "boundary": (A.abs() == A_MAX).all(),
            "huge": (clamped == 1).all(),
            "corner": draw_weights(weights, seed, 3).max() == 1,
        }
        assert all(truth[name] for name in (x.kind, kind, weights) if name in truth)
        met.update((x.kind, kind, weights))

    collect()
    assert met == {*ROWS, *ADVANTAGES, *WEIGHTS}


@given(rows, forms, st.integers(1, 4), seeds)
def test_the_loss_is_prox_plus_signal(x: Rows, form: str, K: int, seed: int) -> None:
    r = torch.rand(x.B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    l_pos, l_neg = x.losses(form)
    prox, signal = affine_terms(l_pos, l_neg)
    close(nft_loss(r, l_pos, l_neg), prox[:, None] + (r - 0.5) * signal[:, None])
    assert torch.equal(nft_loss(torch.ones(x.B), l_pos, l_neg), l_pos)
    assert torch.equal(nft_loss(torch.zeros(x.B), l_pos, l_neg), l_neg)


@given(rows)
def test_the_velocity_form_in_terms_of_e_and_delta(x: Rows) -> None:
    e, delta = x.v_old - (x.noise - x.x0), x.v - x.v_old
    prox, signal = affine_terms(*x.losses("velocity"))
    close(prox, (e * e).mean((1, 2)) + x.beta**2 * (delta * delta).mean((1, 2)))
    close(signal, 4 * x.beta * (e * delta).mean((1, 2)))


@given(rows, forms)
def test_at_the_old_policy_the_shared_part_has_no_gradient(x: Rows, form: str) -> None:
    x.v = x.v_old.clone()
    shared = x.gradient(torch.full((x.B, 1), 0.5, dtype=torch.float64), form)
    assert shared.abs().max() <= 1e-12
    assert x.kind in ("late", "perfect_old") or bool((x.gradient(torch.ones(x.B, 1), form) != 0).any())


@given(rows)
def test_the_x0_form_is_the_velocity_form_over_the_mean_absolute_residual(x: Rows) -> None:
    e, delta = x.v_old - (x.noise - x.x0), x.v - x.v_old
    for s, adaptive, plain in zip((1, -1), x.losses("x0"), x.losses("velocity"), strict=True):
        size = x.t * (e + s * x.beta * delta).abs().mean((1, 2))
        close(adaptive, x.t**2 * plain / size.clamp(min=1e-5))


@given(rows, forms)
def test_reflecting_v_about_the_old_policy_swaps_the_branches(x: Rows, form: str) -> None:
    l_pos, l_neg = x.losses(form)
    swapped = x.losses(form, 2 * x.v_old - x.v)
    close(swapped[0], l_neg)
    close(swapped[1], l_pos)


@given(rows, st.integers(-6, 6))
def test_the_velocity_form_scales_with_the_square(x: Rows, power: int) -> None:
    for scaled, plain in zip(x.losses("velocity", scale=2.0**power), x.losses("velocity"), strict=True):
        assert torch.equal(scaled, 4.0**power * plain)


@given(rows, forms)
def test_rows_do_not_see_each_other(x: Rows, form: str) -> None:
    l_pos, l_neg = x.losses(form)
    one = Rows(x.kind, 0, x.beta)
    for b in range(x.B):
        one.v, one.v_old, one.x0, one.noise, one.t = (y[b : b + 1] for y in (x.v, x.v_old, x.x0, x.noise, x.t))
        pair = one.losses(form)
        close(torch.cat(pair), torch.stack([l_pos[b], l_neg[b]]))


@given(rows, forms, st.sampled_from(ADVANTAGES), weight_kinds, seeds)
def test_proposition_1_in_r_space_with_clamping(x: Rows, form: str, kind: str, weights: str, seed: int) -> None:
    r = interpolation(draw_advantages(kind, seed, x.B), a_max=A_MAX)
    w = draw_weights(weights, seed, r.shape[1])
    r_bar = combine_interpolation(w, r)
    assert (r_bar >= 0).all()
    assert (r_bar <= 1 + 1e-15).all()
    losses = x.losses(form)
    close(nft_loss(r_bar, *losses), nft_loss(r, *losses) @ w)
    many = torch.stack([x.gradient(r_k, form) for r_k in r.unbind(1)])
    assert many.isfinite().all()
    close(x.gradient(r_bar, form), torch.einsum("k,k...->...", w, many))


@given(st.sampled_from(("unclamped", "boundary", "zero")), weight_kinds, seeds)
def test_advantages_combine_exactly_where_nothing_is_clamped(kind: str, weights: str, seed: int) -> None:
    A = draw_advantages(kind, seed)
    w = draw_weights(weights, seed, A.shape[1])
    assert clamped_fraction(A, a_max=A_MAX).max() == 0
    close(interpolation(combine_advantages(w, A), a_max=A_MAX), combine_interpolation(w, interpolation(A, a_max=A_MAX)))


def test_where_advantages_are_clamped_the_two_ways_to_combine_differ() -> None:
    A, w = torch.tensor([[10.0, -5.0]]), torch.tensor([0.5, 0.5])
    assert interpolation(combine_advantages(w, A)).tolist() == [0.75]
    assert combine_interpolation(w, interpolation(A)).tolist() == [0.5]


@given(advantages, seeds, st.floats(-3, 3))
def test_combinations_are_linear(A: Tensor, seed: int, c: float) -> None:
    w, u = torch.randn(2, A.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()
    scale = 1 + A.abs().max()
    close(combine_advantages(w + c * u, A) / scale, (combine_advantages(w, A) + c * combine_advantages(u, A)) / scale)


@given(advantages, st.floats(0.1, 100))
def test_interpolation_is_odd_about_one_half_monotone_and_counts_its_clamps(A: Tensor, a_max: float) -> None:
    r = interpolation(A, a_max=a_max)
    assert ((r >= 0) & (r <= 1)).all()
    close(interpolation(-A, a_max=a_max), 1 - r)
    assert (interpolation(A.flatten().sort().values, a_max=a_max).diff() >= 0).all()
    unclamped = A.abs() < a_max * (1 - 1e-9)
    close(r[unclamped], 0.5 + A[unclamped] / (2 * a_max))
    clamped = A.abs() > a_max * (1 + 1e-9)
    assert torch.equal(r[clamped], (A[clamped] > 0).double())
    beyond = clamped_fraction(A, a_max=a_max) * len(A)
    assert (beyond >= clamped.sum(0) - 1e-9).all()
    assert (beyond <= (~unclamped).sum(0) + 1e-9).all()


@given(st.integers(1, 8), seeds, st.floats(1e-3, 1e3))
def test_affine_residual_measures_a_known_bend(n: int, seed: int, bend: float) -> None:
    gen = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, dtype=torch.float64, generator=gen)
    b, r0, r1 = torch.randn(3, n, dtype=torch.float64, generator=gen).unbind()
    assert affine_residual(lambda r: M @ r + b, r0, r1) < 1e-13
    zero, one = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    bent = affine_residual(lambda r: 1 + bend * r * (1 - r), zero, one, points=(0.5,))
    close(bent, torch.tensor(bend / 4 / (1 + bend / 4), dtype=torch.float64))
