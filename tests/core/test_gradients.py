"""K gradients by ``torch.func``, and pytrees of rows: combined, flattened and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from marble_core import combine_rows, flatten_rows, gradient_rows, gram_matrix, unflatten_like


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_combining_flattening_and_back() -> None:
    rows: dict[str, Any] = {"a": rand(3, 2, 2, seed=1), "b": [rand(3, 5, seed=2)]}
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    flat = flatten_rows(rows)
    assert flat.shape == (3, 9)
    like = {"a": torch.zeros(2, 2), "b": [torch.zeros(5)]}
    direction = combine_rows(rows, weights)
    torch.testing.assert_close(unflatten_like(weights @ flat, like), direction)
    torch.testing.assert_close(unflatten_like(flat, like), rows)
    torch.testing.assert_close(direction["a"], 0.5 * rows["a"][0] - rows["a"][1] + 2 * rows["a"][2])
    assert combine_rows(rows["a"].bfloat16(), weights).dtype == torch.bfloat16
    halves = combine_rows(torch.tensor([[1024.0], [-1024.0]]).bfloat16(), torch.tensor([0.3333, 0.3330]))
    torch.testing.assert_close(halves.float(), torch.tensor([0.3072]), rtol=0.01, atol=0)  # in bfloat16: 0
    assert combine_rows(torch.tensor([[torch.nan], [1.0]]), torch.tensor([0.0, 1.0])).isnan().all()


def test_gradient_rows_and_their_pytrees_compose_with_torch_func() -> None:
    params = {"w": rand(3, seed=1)}
    weights = rand(2, seed=2)

    def losses(params: dict[str, Tensor], z: Tensor) -> Tensor:
        return torch.stack([z * params["w"].pow(3).sum(), params["w"].prod()])

    def direction(params: dict[str, Tensor], z: Tensor) -> Tensor:
        rows = gradient_rows(losses, params, z)
        assert flatten_rows(rows).shape == (2, 3)
        return combine_rows(unflatten_like(flatten_rows(rows), params), weights)["w"]

    def weighted(params: dict[str, Tensor]) -> Tensor:
        return losses(params, z[0]) @ weights

    z = torch.tensor([0.5, 2.0], dtype=torch.float64)
    batch = torch.func.vmap(direction, in_dims=(None, 0))(params, z)
    torch.testing.assert_close(batch, torch.stack([direction(params, item) for item in z]))
    # the Jacobian of a weighted gradient is the Hessian of the weighted loss
    jacobian = torch.func.jacrev(direction)(params, z[0])["w"]
    hessian = torch.func.jacrev(torch.func.grad(weighted))(params)["w"]["w"]
    torch.testing.assert_close(jacobian, hessian)
    rows = gradient_rows(losses, params, z[0])
    torch.testing.assert_close(torch.func.jacrev(lambda w: combine_rows(rows, w)["w"])(weights), rows["w"].mT)


def test_chunk_size_bounds_how_many_cotangents_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    vmap = torch.func.vmap

    def spy(f: Callable[..., Any], chunk_size: int | None) -> Any:
        asked.append(chunk_size)
        return vmap(f, chunk_size=chunk_size)

    monkeypatch.setattr(torch.func, "vmap", spy)
    gradient_rows(torch.square, torch.ones(3), chunk_size=2)
    gradient_rows(torch.square, torch.ones(3))
    assert asked == [2, None]


def test_gradient_rows_take_any_pytree_and_give_zeros_where_nothing_depends() -> None:
    params = ({"a": rand(2, 3, seed=1)}, [rand(4, seed=2), torch.tensor(2.0)])
    rows = gradient_rows(lambda p: torch.stack([p[0]["a"].sum(), 3 * p[1][1]]), params)
    torch.testing.assert_close(rows[0]["a"], torch.stack([torch.ones(2, 3), torch.zeros(2, 3)]).double())
    assert not rows[1][0].any()
    torch.testing.assert_close(rows[1][1], torch.tensor([0.0, 3.0]))
    assert rows[1][1].dtype == torch.float32


def test_one_cotangent_at_a_time_serves_what_cannot_be_vectorized() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), torch.randn(3, 4)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def losses(params: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.func.functional_call(module, params, (x,)).float().mean(0)

    with pytest.raises(ValueError, match=r"losses_fn: expected a backward pass that torch can vectorize.*chunk_size=1"):
        gradient_rows(losses, params)
    rows = gradient_rows(losses, params, chunk_size=1)
    for k in range(2):
        alone = torch.func.grad(lambda p, k=k: losses(p)[k])(params)
        assert all(torch.equal(rows[name][k], g) for name, g in alone.items())


class Doubled(torch.autograd.Function):
    """Its backward pass is one that vmap refuses: it reads a value, or fails by itself."""

    @staticmethod
    def forward(x: Tensor, own: bool) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.own = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if ctx.own:
            raise RuntimeError("my own")
        return (2 if g.sum().item() > 0 else -2) * g, None


def test_what_cannot_be_vectorized_is_said_and_the_callers_own_errors_are_left_alone() -> None:
    with pytest.raises(ValueError, match=r"losses_fn: expected a backward pass that torch can vectorize.*chunk_size=1"):
        gradient_rows(lambda p: Doubled.apply(p, False)[:2], torch.ones(3))
    rows = gradient_rows(lambda p: Doubled.apply(p, False)[:2], torch.ones(3), chunk_size=1)
    assert rows.tolist() == [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    with pytest.raises(RuntimeError, match="my own"):
        gradient_rows(lambda p: Doubled.apply(p, True)[:2], torch.ones(3))


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_no_loss_and_leaves_without_gradients_are_named(chunk_size: int | None) -> None:
    with pytest.raises(ValueError, match=r"losses_fn\(params, \*args\): expected at least one loss, K >= 1"):
        gradient_rows(lambda p: p[:0], torch.ones(3), chunk_size=chunk_size)
    for leaf in (torch.ones(3).long(), 3):
        with pytest.raises(ValueError, match="params: expected a floating-point tensor"):
            gradient_rows(lambda p: p["w"], {"w": torch.ones(3), "n": leaf}, chunk_size=chunk_size)
    with pytest.raises(ValueError, match="like: expected tensors as leaves, got int 3"):
        unflatten_like(torch.ones(3), {"n": 3})


@pytest.mark.parametrize("call", [flatten_rows, gram_matrix, lambda x: combine_rows(x, torch.zeros(0))])
def test_no_gradient_at_all_is_named(call: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"rows: expected at least one gradient, K >= 1, got float32\[0, 3\]"):
        call(torch.zeros(0, 3))
