"""On any tree of modules ``shared_cotangent_rows(verify=True)`` equals K autograd passes, or says which parameter."""

from __future__ import annotations

import threading
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from marble_core import shared_cotangent_rows
from property_tests.modules import FINE, KINDS, WIDTH, Case, Node, Tree, case_of, cases, chain, chains, traces, trees


def assert_k_passes_or_a_named_parameter(case: Case, fallback: Any) -> None:
    before = traces(case.module)
    names = [name for name, _ in case.module.named_parameters()]
    try:
        found = shared_cotangent_rows(case.forward, case.module, case.weights, fallback=fallback, verify=True)
    except ValueError as error:
        message = str(error)
        assert any(name.rpartition(".")[0] in message for name in names)
    else:
        assert case.agrees(found.rows, 1e-10)
        expected = case.passes()
        assert all(not expected[name].any() for name in found.unreached)
    assert traces(case.module) == before


@given(cases(chains()), st.sampled_from(["error", "unsupported"]))
def test_k_passes_or_an_error_that_names_a_parameter(case: Case, fallback: Any) -> None:
    assert_k_passes_or_a_named_parameter(case, fallback)


@given(cases(trees()), st.sampled_from(["error", "unsupported"]))
def test_k_passes_or_an_error_that_names_a_parameter_in_trees(case: Case, fallback: Any) -> None:
    assert_k_passes_or_a_named_parameter(case, fallback)


@given(
    st.one_of(cases(chains((*FINE, "nested in itself"))), cases(trees(FINE))),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_is_served_is_never_refused(case: Case, dtype: torch.dtype) -> None:
    case = case._replace(module=case.module.to(dtype), x=case.x.detach().to(dtype))
    found = shared_cotangent_rows(case.forward, case.module, case.weights, verify=True)
    assert set(found.rows) == {name for name, p in case.module.named_parameters() if p.requires_grad}


@given(cases(trees((*FINE, "autocast"))))
def test_parts_under_autocast_agree_within_its_rounding(case: Case) -> None:
    case = case._replace(module=case.module.float(), x=case.x.detach().float(), weights=case.weights.float())
    found = shared_cotangent_rows(case.forward, case.module, case.weights, verify=True)
    assert case.agrees(found.rows, 0.1)


@given(cases(trees(FINE)), st.integers(0, 20))
def test_an_exception_inside_passes_through_and_leaves_nothing(case: Case, place: int) -> None:
    before = traces(case.module)
    inner = list(case.module.modules())
    victim = inner[place % len(inner)]

    def fail(m: nn.Module, args: Any) -> None:
        raise KeyError("inside")

    handle = victim.register_forward_pre_hook(fail)
    with suppress(KeyError):  # an unused layer does not run
        shared_cotangent_rows(case.forward, case.module, case.weights)
    handle.remove()
    assert traces(case.module) == before
    found = shared_cotangent_rows(case.forward, case.module, case.weights, verify=True)
    assert case.agrees(found.rows, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["chain", "sum", "loop", "again"])
def test_every_kind_in_every_place(how: str, kind: str) -> None:
    for B in (WIDTH, 4):
        node = Node(kind)
        case = case_of(nn.Sequential(Tree(how, [node, Node("plain"), node]), Node("plain")), False, B, 2, seed=B)
        assert_k_passes_or_a_named_parameter(case, "unsupported")
        assert_k_passes_or_a_named_parameter(case, "error")


@pytest.mark.parametrize("kind", ["sequence first", "rolled", "sorted", "mixed", "batch norm", "experts"])
def test_rows_that_move_are_found(kind: str) -> None:
    wrong = 0
    for seed in range(20):
        case = case_of(chain(["plain", kind]), False, WIDTH, 2, seed)
        found = shared_cotangent_rows(case.forward, case.module, case.weights, fallback="unsupported").rows
        agrees = case.agrees(found, 1e-10)
        wrong += not agrees
        refused = pytest.raises(ValueError, match=r"module: expected rows that agree .* [01]\.(layer|other)")
        with nullcontext() if agrees else refused:
            shared_cotangent_rows(case.forward, case.module, case.weights, fallback="unsupported", verify=True)
    assert wrong > 0  # the difficulty is there


@pytest.mark.parametrize("kind", ["linear hook", "hook that is not linear"])
def test_gradient_hooks_take_k_passes(kind: str) -> None:
    case = case_of(chain([kind]), False, 4, 3, seed=1)
    with pytest.raises(ValueError, match=r"hooks of 0\.layer\.weight"):
        shared_cotangent_rows(case.forward, case.module, case.weights)
    found = shared_cotangent_rows(case.forward, case.module, case.weights, fallback="unsupported").rows
    assert case.agrees(found, 1e-12)


def test_threads_get_what_one_gets() -> None:
    case = case_of(chain(["plain", "twice", "checkpoint"]), True, 4, 3, seed=2)
    expected = case.passes()
    errors: list[BaseException] = []

    def forward() -> Tensor:
        return case.module(case.x).sin().flatten(1).sum(1)

    def collect() -> None:
        try:
            for _ in range(20):
                found = shared_cotangent_rows(forward, case.module, case.weights, verify=True).rows
                assert all(torch.allclose(found[name], x, rtol=1e-10) for name, x in expected.items())
        except BaseException as error:
            errors.append(error)

    def train() -> None:
        try:
            plain = torch.autograd.grad(forward().sum(), list(case.module.parameters()))
            for _ in range(40):
                again = torch.autograd.grad(forward().sum(), list(case.module.parameters()))
                assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(plain, again, strict=True))
        except BaseException as error:
            errors.append(error)

    before = traces(case.module)
    threads = [threading.Thread(target=work, daemon=True) for work in (collect, collect, collect, train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not errors
    assert traces(case.module) == before
