"""What every public function promises, checked for all of them by one loop: see the list of cases."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import marble_core as mc


class Case(NamedTuple):
    """How to call one public function: ``call(*args(dtype, seed))``."""

    call: Callable[..., Any]
    args: Callable[[torch.dtype, int], tuple[Any, ...]]
    out: str = "input"  # dtype of floating-point outputs: that of the input, or always "float64"
    batched: bool = True  # works under torch.func.vmap over all arguments
    blind: bool = True  # never reads a value: runs on meta tensors
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)


HALF = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
GROUPS = torch.tensor([0, 0, 1, 1, 1, 2])
APPLICABLE = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [1, 1]]).bool()


def rand(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tree(dtype: torch.dtype, seed: int, *lead: int) -> dict[str, Tensor]:
    return {"a": rand(*lead, 4, 3, dtype=dtype, seed=seed), "b": rand(*lead, 5, dtype=dtype, seed=seed + 50)}


def psd(dtype: torch.dtype, seed: int) -> Tensor:
    g = rand(3, 8, dtype=torch.float64, seed=seed)
    return (g @ g.T).to(dtype)


def harmonized(dtype: torch.dtype, seed: int) -> mc.Harmonization:
    return mc.harmonize(psd(dtype, seed))


def stats(seed: int) -> mc.GroupStats:
    rewards = rand(6, 2, dtype=torch.float64, seed=seed)
    return mc.update_group_stats(mc.init_group_stats(3, 2), rewards, GROUPS)


def unit(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return rand(*shape, dtype=torch.float64, seed=seed).sigmoid().to(dtype)


def losses(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return (params["a"] @ x).square().sum() * torch.stack([params["b"].sum(), params["b"].square().sum()])


def branches(v: Tensor, v_old: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return mc.branch_losses(v, v_old, x0=x0, noise=noise, t=t, beta=0.5)


def shared_rows(x: Tensor, weights: Tensor) -> Any:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(x.dtype)
    return mc.shared_cotangent_rows(lambda: module(x).squeeze(-1), module, weights)


CASES: dict[str, Case] = {
    # advantages
    "group_advantages": Case(
        lambda R, groups, on: mc.group_advantages(R, groups, applicable=on),
        lambda d, s: (rand(6, 2, dtype=d, seed=s), GROUPS, APPLICABLE),
        dtypes=HALF,
    ),
    "init_group_stats": Case(lambda: mc.init_group_stats(3, 2), lambda d, s: (), "float64", batched=False),
    "update_group_stats": Case(
        mc.update_group_stats,
        lambda d, s: (stats(s), rand(6, 2, dtype=d, seed=s), GROUPS, APPLICABLE),
        "float64",
        dtypes=HALF,
    ),
    "merge_group_stats": Case(mc.merge_group_stats, lambda d, s: (stats(s), stats(s + 1)), "float64"),
    "advantages_from_stats": Case(
        mc.advantages_from_stats, lambda d, s: (stats(s), rand(6, 2, dtype=d, seed=s), GROUPS), dtypes=HALF
    ),
    # nft
    "interpolation": Case(mc.interpolation, lambda d, s: (rand(6, 2, dtype=d, seed=s),), dtypes=HALF),
    "branch_losses": Case(
        branches,
        lambda d, s: (*(rand(6, 2, 4, dtype=d, seed=s + i) for i in range(4)), unit(6, dtype=d, seed=s)),
    ),
    "nft_loss": Case(mc.nft_loss, lambda d, s: tuple(unit(6, dtype=d, seed=s + i) for i in range(3)), dtypes=HALF),
    "affine_terms": Case(
        mc.affine_terms, lambda d, s: tuple(unit(6, dtype=d, seed=s + i) for i in range(2)), dtypes=HALF
    ),
    "combine_interpolation": Case(
        mc.combine_interpolation,
        lambda d, s: (rand(2, dtype=d, seed=s).softmax(0), unit(6, 2, dtype=d, seed=s)),
        dtypes=HALF,
    ),
    "combine_advantages": Case(
        mc.combine_advantages, lambda d, s: (rand(2, dtype=d, seed=s), rand(6, 2, dtype=d, seed=s)), dtypes=HALF
    ),
    "clamped_fraction": Case(mc.clamped_fraction, lambda d, s: (9 * rand(6, 2, dtype=d, seed=s),), dtypes=HALF),
    "affine_residual": Case(
        lambda r0, r1: mc.affine_residual(lambda r: r.square().mean(), r0, r1),
        lambda d, s: (unit(6, dtype=d, seed=s), unit(6, dtype=d, seed=s + 1)),
    ),
    # gradients
    "gradient_rows": Case(
        lambda params, x: mc.gradient_rows(losses, params, x), lambda d, s: (tree(d, s), rand(3, dtype=d, seed=s))
    ),
    "shared_cotangent_rows": Case(
        shared_rows, lambda d, s: (rand(6, 3, dtype=d, seed=s), rand(6, 2, dtype=d, seed=s)), batched=False, blind=False
    ),
    "combine_rows": Case(mc.combine_rows, lambda d, s: (tree(d, s, 3), rand(3, dtype=d, seed=s)), dtypes=HALF),
    "flatten_rows": Case(mc.flatten_rows, lambda d, s: (tree(d, s, 3),), dtypes=HALF),
    "unflatten_like": Case(mc.unflatten_like, lambda d, s: (rand(17, dtype=d, seed=s), tree(d, s)), dtypes=HALF),
    # gram
    "gram_matrix": Case(mc.gram_matrix, lambda d, s: (tree(d, s, 3),), "float64", dtypes=HALF),
    "cross_gram": Case(mc.cross_gram, lambda d, s: (tree(d, s, 3), tree(d, s + 1, 3)), "float64", dtypes=HALF),
    "normalize_gram": Case(mc.normalize_gram, lambda d, s: (psd(d, s),), dtypes=HALF),
    "psd_part": Case(mc.psd_part, lambda d, s: (rand(3, 3, dtype=d, seed=s),), dtypes=HALF),
    # noise
    "init_gains": Case(lambda: mc.init_gains(3), lambda d, s: (), "float64", batched=False),
    "update_gains": Case(
        lambda state, R: mc.update_gains(state, R, GROUPS, learning=False),
        lambda d, s: (mc.init_gains(2), rand(len(GROUPS), 2, dtype=d, seed=s)),
        "float64",
        batched=False,
        blind=False,
        dtypes=HALF,
    ),
    "gains_since_start": Case(
        lambda R: mc.gains_since_start(mc.update_gains(mc.init_gains(2), R, GROUPS)),
        lambda d, s: (rand(len(GROUPS), 2, dtype=d, seed=s),),
        "float64",
        batched=False,
        blind=False,
        dtypes=HALF,
    ),
    "init_gram_ema": Case(lambda: mc.init_gram_ema(3), lambda d, s: (), "float64", batched=False),
    "update_gram_ema": Case(
        lambda state, G: mc.update_gram_ema(state, G, decay=0.9),
        lambda d, s: (mc.init_gram_ema(3), psd(d, s)),
        "float64",
    ),
    "init_moments": Case(lambda rows: mc.init_moments(rows).mean, lambda d, s: (tree(d, s, 3),)),
    "update_moments": Case(
        lambda state, rows: mc.update_moments(state, rows, decay=0.9)[1],
        lambda d, s: (mc.init_moments(tree(d, s, 3)), tree(d, s, 3)),
    ),
    "signal_share": Case(mc.signal_share, lambda d, s: (psd(d, s), psd(d, s + 1)), dtypes=HALF),
    "gradient_snr": Case(
        mc.gradient_snr, lambda d, s: (psd(d, s), *(9 + unit(3, dtype=d, seed=s + i) for i in range(2))), dtypes=HALF
    ),
    # noise_aware
    "signal_gram": Case(mc.signal_gram, lambda d, s: (rand(3, 3, dtype=d, seed=s),), "float64", dtypes=HALF),
    "shrink_gram": Case(
        lambda gram, variance: mc.shrink_gram(mc.SignalGram(gram, variance)),
        lambda d, s: (psd(d, s), unit(dtype=d, seed=s)),
        "float64",
        dtypes=HALF,
    ),
    "noise_aware_weights": Case(
        mc.noise_aware_weights,
        lambda d, s: (psd(d, s), psd(d, s) + psd(d, s + 1), unit(3, dtype=d, seed=s)),
        "float64",
    ),
    # simplex
    "project_simplex": Case(mc.project_simplex, lambda d, s: (rand(5, dtype=d, seed=s),), dtypes=HALF),
    "min_norm_weights": Case(mc.min_norm_weights, lambda d, s: (psd(d, s),), dtypes=HALF),
    "min_norm_gap": Case(mc.min_norm_gap, lambda d, s: (psd(d, s), rand(3, dtype=d, seed=s).softmax(0)), dtypes=HALF),
    # cone
    "cone_weights": Case(mc.cone_weights, lambda d, s: (psd(d, s), unit(3, dtype=d, seed=s)), dtypes=HALF),
    # upgrad
    "upgrad_weights": Case(mc.upgrad_weights, lambda d, s: (psd(d, s), unit(3, dtype=d, seed=s)), dtypes=HALF),
    # prior
    "soft_min_weights": Case(
        lambda gain, prior: mc.soft_min_weights(gain, prior, 2.0),
        lambda d, s: (rand(3, dtype=d, seed=s), unit(3, dtype=d, seed=s)),
        dtypes=HALF,
    ),
    "lag_weights": Case(
        lambda gain, prior: mc.lag_weights(gain, prior, 0.5),
        lambda d, s: (rand(3, dtype=d, seed=s), unit(3, dtype=d, seed=s)),
        dtypes=HALF,
    ),
    "restore_spread": Case(
        mc.restore_spread, lambda d, s: (unit(3, dtype=d, seed=s), rand(6, 3, dtype=d, seed=s)), dtypes=HALF
    ),
    "shrink_to_prior": Case(
        mc.shrink_to_prior,
        lambda d, s: (
            *(unit(3, dtype=d, seed=s + i) for i in range(2)),
            rand(3, dtype=d, seed=s),
            unit(3, dtype=d, seed=s + 2),
        ),
        dtypes=HALF,
    ),
    # harmonize
    "harmonize": Case(mc.harmonize, lambda d, s: (psd(d, s),), dtypes=HALF),
    "rescale": Case(
        mc.rescale,
        lambda d, s: (
            rand(3, dtype=d, seed=s).abs(),
            rand(3, dtype=d, seed=s + 1).abs(),
            torch.tensor([True, False, True]),
        ),
        dtypes=HALF,
    ),
    # ema
    "init_coefficients": Case(lambda: mc.init_coefficients(3), lambda d, s: (), "float64", batched=False),
    "update_coefficients": Case(
        lambda state, h, G: mc.update_coefficients(state, h, guard=mc.Guard(G)),
        lambda d, s: (mc.init_coefficients(3), harmonized(d, s), psd(d, s)),
        "float64",
    ),
    "ema_tree": Case(
        lambda old, new: mc.ema_tree(old, new, 0.9), lambda d, s: (tree(d, s), tree(d, s + 1)), dtypes=HALF
    ),
    "old_policy_decay": Case(lambda: mc.old_policy_decay(100), lambda d, s: (), batched=False),
    "eval_ema_decay": Case(lambda: mc.eval_ema_decay(100), lambda d, s: (), batched=False),
    "refresh_due": Case(lambda: mc.refresh_due(100, 10), lambda d, s: (), batched=False),
    # diagnostics
    "alignment": Case(mc.alignment, lambda d, s: (psd(d, s), rand(3, dtype=d, seed=s)), dtypes=HALF),
    "cross_alignment": Case(mc.cross_alignment, lambda d, s: (tree(d, s), tree(d, s, 3)), "float64", dtypes=HALF),
    "null_alignment": Case(lambda: mc.null_alignment(5), lambda d, s: (), batched=False),
}

FUNCTIONS = {name for name in mc.__all__ if inspect.isfunction(getattr(mc, name))}
WITH_TENSORS = [name for name, case in CASES.items() if case.args(torch.float64, 0)]
PAIRS = [(name, dtype) for name in WITH_TENSORS for dtype in CASES[name].dtypes]


def tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", sorted(name for name in CASES if name != "shared_cotangent_rows"))
def test_the_default_device_does_not_matter(name: str) -> None:
    case = CASES[name]
    args = case.args(torch.float64, 0)
    if not args:  # what is made of nothing is on the default device
        return
    expected = case.call(*args)
    with torch.device("meta"):
        found = case.call(*args)
    for x, y in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num()) if isinstance(x, Tensor) else x == y


@pytest.mark.parametrize("solve", [mc.min_norm_weights, lambda G: mc.cone_weights(G, G.new_full((20,), 0.05))])
def test_the_default_device_does_not_matter_to_a_large_solve(solve: Callable[[Tensor], Any]) -> None:
    rows = rand(20, 12, dtype=torch.float64, seed=0)  # more rows than dimensions: not the easy case
    expected = solve(rows @ rows.T)
    torch.set_default_device("meta")
    try:
        found = solve(rows @ rows.T)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found[0], expected[0])


def test_every_public_function_has_a_case() -> None:
    assert set(CASES) == FUNCTIONS


@pytest.mark.parametrize("name", sorted(mc.__all__))
def test_docstrings(name: str) -> None:
    public = getattr(mc, name)
    if not callable(public):
        return
    doc = inspect.getdoc(public) or ""
    assert len(doc) > 40
    if name in FUNCTIONS:
        parameters = inspect.signature(public).parameters
        sections = ["Returns:", "Raises:", "Example:", "Reference:"] + (["Args:"] if parameters else [])
        assert [section for section in sections if section not in doc] == []
        assert ">>>" in doc
        assert [p for p in parameters if f"{p}:" not in doc and p not in ("dtype", "device", "args")] == []
        assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize(("name", "dtype"), PAIRS, ids=lambda p: str(p).removeprefix("torch."))
def test_inputs_are_unmutated_and_unaliased_and_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    args = case.args(dtype, 0)
    before = [(x, x.clone(), x._version) for x in tensors(args)]
    rng = torch.get_rng_state()
    out = case.call(*args)
    if name != "shared_cotangent_rows":  # its case seeds the generator to build a module
        assert torch.equal(torch.get_rng_state(), rng)
    expected = torch.float64 if case.out == "float64" else dtype
    storages = {x.untyped_storage().data_ptr() for x, _, _ in before}
    for y in tensors(out):
        assert not y.is_floating_point() or y.dtype == expected
        assert y.device == torch.device("cpu")
        assert not y.requires_grad
        if name != "unflatten_like":  # documented: views of the flat tensor
            assert y.untyped_storage().data_ptr() not in storages
    for x, copy, version in before:
        assert x._version == version
        assert torch.equal(x, copy)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.batched])
def test_vmap_is_a_loop(name: str) -> None:
    case = CASES[name]
    items = [case.args(torch.float64, seed) for seed in (0, 10, 20)]
    stacked = pytree.tree_map(lambda *x: torch.stack(x), *items)
    batch = torch.func.vmap(case.call)(*stacked)
    loop = pytree.tree_map(lambda *x: torch.stack(x), *(case.call(*item) for item in items))
    for x, y in zip(tensors(batch), tensors(loop), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in WITH_TENSORS if CASES[name].blind])
def test_no_value_is_read(name: str) -> None:
    """Tensors without values go through: no host sync on any device, no branch on data."""
    case = CASES[name]
    args = case.args(torch.float64, 0)
    out = case.call(*pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, args))
    for x, y in zip(tensors(out), tensors(case.call(*args)), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert x.is_meta


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_same_input_same_output(name: str) -> None:
    case = CASES[name]
    first, second = (tensors(case.call(*case.args(torch.float64, 3))) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_a_tensor_of_the_wrong_dtype_is_an_error_or_kept_apart(name: str) -> None:
    """Integers where floats belong raise ``ValueError``; they are never silently computed with."""
    case = CASES[name]
    args = case.args(torch.float64, 0)
    if any(isinstance(a, tuple) for a in args) or name in (
        "shared_cotangent_rows",
        "ema_tree",
        "gradient_rows",
        "unflatten_like",
    ):
        return  # states and models, and trees that may hold integers
    wrong = pytree.tree_map(lambda x: x.long() if isinstance(x, Tensor) and x.is_floating_point() else x, args)
    with pytest.raises(ValueError, match="expected"):
        case.call(*wrong)


# What a loss may contain, or pieces of formulas; everything else gives constants.
DIFFERENTIABLE = {
    *("interpolation", "branch_losses", "nft_loss", "affine_terms", "clamped_fraction"),
    *("combine_interpolation", "combine_advantages", "combine_rows", "flatten_rows", "unflatten_like"),
    *("gradient_rows", "normalize_gram", "psd_part", "project_simplex", "min_norm_gap", "signal_share", "gradient_snr"),
}


@pytest.mark.parametrize("name", [name for name in WITH_TENSORS if name not in DIFFERENTIABLE])
def test_constants_carry_no_graph(name: str) -> None:
    """Not one that would end in NaN, nor one that a state would hold for ever."""

    def tracked(x: Tensor) -> Tensor:
        return x.clone().requires_grad_() if x.is_floating_point() else x

    args = CASES[name].args(torch.float64, 0)
    args = tuple(a if isinstance(a, tuple) else pytree.tree_map_only(Tensor, tracked, a) for a in args)
    assert not any(x.requires_grad for x in tensors(CASES[name].call(*args)))


@pytest.mark.parametrize(
    "state",
    [
        stats(0),
        mc.init_coefficients(3),
        mc.init_gram_ema(3),
        mc.init_moments(tree(torch.float32, 0, 3)),
        mc.update_gains(mc.init_gains(2), rand(6, 2, dtype=torch.float64, seed=0), GROUPS),
        harmonized(torch.float32, 0),
    ],
    ids=lambda state: type(state).__name__,
)
def test_states_survive_torch_save(state: Any) -> None:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    with torch.serialization.safe_globals([type(state)]):
        loaded = torch.load(file, weights_only=True)
    assert type(loaded) is type(state)
    for x, y in zip(tensors(loaded), tensors(state), strict=True):
        assert torch.equal(x, y)
        assert x.dtype == y.dtype
