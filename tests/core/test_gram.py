"""Gram matrices: hand values, every form of input, degenerate rows, memory."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from marble_core import combine_rows, cross_gram, flatten_rows, gram_matrix, normalize_gram, psd_part


def test_hand_values() -> None:
    rows = {"a": torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "b": torch.tensor([[[2.0]], [[-1.0]]])}
    expected = torch.tensor([[9.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert torch.equal(gram_matrix(rows), expected)
    metric = {"a": torch.tensor([1.0, 0.25]), "b": torch.tensor([[4.0]])}
    # g_1: 1 + 4/4 + 4*4 = 18; g_2: 1/4 + 4 = 4.25; product: 2*1/4 - 2*4 = -7.5
    assert torch.equal(gram_matrix(rows, inv_metric=metric), torch.tensor([[18.0, -7.5], [-7.5, 4.25]]).double())
    other = {"a": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "b": torch.tensor([[[0.0]], [[3.0]]])}
    assert torch.equal(cross_gram(rows, other), torch.tensor([[1.0, 10.0], [0.0, -1.0]]).double())


@pytest.mark.slow
def test_a_stream_holds_one_block_at_a_time() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def blocks() -> Iterator[Tensor]:
        nonlocal most
        for i in range(6):
            block = torch.full((2, 1000), float(i))
            alive.append(weakref.ref(block))
            yield block
            del block
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))

    G = gram_matrix(blocks())
    assert most <= 1
    assert torch.equal(G, torch.full((2, 2), 1000.0 * sum(i * i for i in range(6)), dtype=torch.float64))


def test_chunks_of_a_long_leaf_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
    whole = gram_matrix(rows, inv_metric=rows[0].abs())
    monkeypatch.setattr("marble_core.gram.CHUNK", 30)
    torch.testing.assert_close(gram_matrix(rows, inv_metric=rows[0].abs()), whole, rtol=1e-12, atol=1e-12)


def test_half_rows_are_multiplied_exactly() -> None:
    """A product of bf16 numbers fits float32; a bf16 accumulator would be off by per cents."""
    rows = torch.full((2, 100_000), 1.0078125, dtype=torch.bfloat16)
    assert float(gram_matrix(rows)[0, 1]) == pytest.approx(100_000 * 1.0078125**2, rel=1e-12)


def test_nan_stays_in_its_row_and_column() -> None:
    rows = torch.tensor([[1.0, 0.0], [math.nan, 1.0], [2.0, 1.0]])
    G = gram_matrix(rows)
    assert G[1].isnan().all()
    assert G[:, 1].isnan().all()
    assert G[[0, 0, 2], [0, 2, 2]].tolist() == [1.0, 2.0, 5.0]


def test_normalize() -> None:
    G = torch.tensor([[4.0, -3.0, 0.0], [-3.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    G_hat, norms = normalize_gram(G.expand(2, 3, 3))
    assert norms[1].tolist() == [2.0, 3.0, 0.0]
    assert G_hat[1].tolist() == [[1.0, -0.5, 0.0], [-0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]
    tiny, huge = 1e-150, 1e150
    extreme = torch.tensor([[tiny**2, 0.5], [0.5, huge**2]], dtype=torch.float64)
    torch.testing.assert_close(normalize_gram(extreme)[0], torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double())
    assert not normalize_gram(torch.tensor([[-1.0]]))[0].any()  # as an estimate from two batches may be


def test_psd_part() -> None:
    swapped = torch.tensor([[0.0, 2.0], [2.0, 0.0]])  # eigenvalues 2 and -2, the positive one along (1, 1)
    torch.testing.assert_close(psd_part(swapped), torch.ones(2, 2))
    torch.testing.assert_close(psd_part(torch.tensor([[0.0, 4.0], [0.0, 0.0]])), torch.ones(2, 2))  # symmetrized
    assert not psd_part(-torch.eye(3)).any()
    mixed = psd_part(torch.stack([torch.eye(2), torch.full((2, 2), math.nan)]))
    assert torch.equal(mixed[0], torch.eye(2))
    assert mixed[1].isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gram_matrix([]), "rows: expected at least one leaf"),
        (lambda: gram_matrix(iter([])), "rows: expected at least one leaf"),
        (lambda: gram_matrix([torch.ones(2, 3), torch.ones(3, 3)]), "the same leading K in every leaf"),
        (lambda: gram_matrix(torch.ones(2, 3).long()), r"rows: expected a floating-point tensor .* got int64\[2, 3\]"),
        (
            lambda: gram_matrix(torch.ones(2, 3), inv_metric=torch.ones(4)),
            r"inv_metric: expected a leaf of shape \[3\]",
        ),
        (
            lambda: gram_matrix({"a": torch.ones(2, 3)}, inv_metric=[torch.ones(3)]),
            "inv_metric: expected the structure of rows",
        ),
        (lambda: gram_matrix(torch.ones(2, 3), inv_metric=2.0), "inv_metric: expected a floating-point tensor"),
        (lambda: gram_matrix(torch.ones(0, 3)), "rows: expected at least one gradient"),
        (
            lambda: gram_matrix(iter([torch.ones(2, 3)] * 2), inv_metric=iter([torch.ones(3)])),
            "inv_metric: .* as many blocks",
        ),
        (lambda: gram_matrix(iter([torch.ones(2, 3)]), inv_metric=torch.ones(3)), "inv_metric: expected an iterator"),
        (lambda: cross_gram(iter([torch.ones(2, 3)]), iter([torch.ones(2, 3)] * 2)), "rows_b: .*as rows_a, got more"),
        (
            lambda: cross_gram({"w": torch.ones(2, 3)}, {"v": torch.ones(2, 3)}),
            "rows_b: expected the structure of rows_a",
        ),
        (lambda: cross_gram({"w": torch.ones(2, 3)}, {"w": None}), "rows_b: expected a floating-point tensor"),
        (lambda: cross_gram(torch.ones(2, 3), torch.ones(2, 3).long()), "rows_b: expected a floating-point tensor"),
        (lambda: cross_gram(torch.ones(0, 3), torch.ones(0, 3)), "rows_a: expected at least one gradient"),
        (lambda: cross_gram(torch.ones(2, 3), torch.ones(2, 4)), r"rows_b: expected the shape of rows_a, \[2, 3\]"),
        (lambda: cross_gram([], []), "rows_a: expected at least one leaf"),
        (lambda: normalize_gram(torch.ones(3, 2)), "G: expected a floating-point Gram matrix"),
        (lambda: psd_part(torch.ones(3)), "gram: expected a floating-point Gram matrix"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_list_of_vectors_is_not_read_as_blocks() -> None:
    """Three gradients of 1,000 numbers would give a 1000 x 1000 matrix."""
    g = [torch.randn(1000) for _ in range(3)]
    message = r"expected \[K, P\].*got a {} of 3 vectors, the first float32\[1000\]\. For K gradients use torch\.stack"
    only_pytrees = r"expected \[K, P\], a pytree with leaves \[K, \.\.\.\], got a {}.*, dict\(enumerate\(rows\)\)\.$"
    for rows in (g, tuple(g)):
        kind = type(rows).__name__
        with pytest.raises(ValueError, match="rows: " + message.format(kind)):
            gram_matrix(rows)
        with pytest.raises(ValueError, match="rows_b: " + message.format(kind)):
            cross_gram(torch.stack(g), rows)
        with pytest.raises(ValueError, match="rows: " + only_pytrees.format(kind)):
            combine_rows(rows, torch.ones(3))
        with pytest.raises(ValueError, match="rows: " + only_pytrees.format(kind)):
            flatten_rows(rows)
    assert gram_matrix(torch.stack(g)).shape == (3, 3)
    blocks = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]  # two scalar parameters, K = 2
    assert gram_matrix(iter(blocks)).tolist() == [[10.0, 14.0], [14.0, 20.0]]
    assert gram_matrix(dict(enumerate(blocks))).tolist() == [[10.0, 14.0], [14.0, 20.0]]
    assert combine_rows(dict(enumerate(blocks)), torch.ones(2)) == {0: 3.0, 1: 7.0}
