"""Sums over all processes, and what is made of them: rows of all, a flag of any, a check that all have the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from reference.errors import TrainingError
from reference.processes.alive import meet
from reference.processes.peers import Peers

T = TypeVar("T")


def all_reduce(tree: T, peers: Peers) -> T:
    """Sums over all processes of every tensor of a tree, in one all-reduce a dtype; the same bits everywhere.

    Args:
        tree: nested lists, tuples and dicts of tensors, of the same shapes in the same order on all.

    Raises:
        PeerError: another process has failed.
    """
    if peers.size == 1:
        return tree
    leaves, spec = pytree.tree_flatten(tree)
    sums: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in leaves):
        own = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        flat = torch.cat([leaves[i].detach().to(peers.device).flatten() for i in own])
        meet(peers)
        torch.distributed.all_reduce(flat)
        for i, part in zip(own, torch.split(flat, [leaves[i].numel() for i in own]), strict=True):
            sums[i] = part.view(leaves[i].shape).to(leaves[i].device)
    return pytree.tree_unflatten([sums[i] for i in range(len(leaves))], spec)  # type: ignore[no-any-return]


def gather_rows(tree: T, own: range, total: int, peers: Peers) -> T:
    """All rows ``[total, ...]`` of every tensor of a tree, from this process's rows ``[len(own), ...]``: exact, as the
    other processes' rows are zeros in the sum.

    Args:
        own: numbers of this process's rows.
        total: rows of all.

    Raises:
        PeerError: another process has failed.
    """
    if peers.size == 1:
        return tree

    def placed(x: Tensor) -> Tensor:
        whole = x.new_zeros(total, *x.shape[1:])
        whole[own.start : own.stop] = x
        return whole

    return all_reduce(pytree.tree_map(placed, tree), peers)  # type: ignore[no-any-return]


def any_of(flag: bool, peers: Peers) -> bool:
    """Whether the flag is set on any process."""
    if peers.size == 1:
        return flag
    return bool(all_reduce(torch.tensor(int(flag)), peers))


def check_equal(things: Mapping[str, Tensor], peers: Peers) -> None:
    """Tensors that must be the same bits on all processes are, by their hashes.

    Raises:
        TrainingError: they are not; says which, and where.
        PeerError: another process has failed.
    """
    if peers.size == 1:
        return
    hashes = torch.tensor([[_hash(x) for x in things.values()]])
    every = gather_rows(hashes, range(peers.rank, peers.rank + 1), peers.size, peers)
    for name, column in zip(things, every.unbind(1), strict=True):
        odd = (column != column[0]).nonzero().flatten().tolist()
        if odd:
            raise TrainingError(
                f"{name} must be the same on all processes, but differ from process 0's on {odd}. Processes need the "
                "same code, files, versions and kind of device; the last checkpoint is from before."
            )


def _hash(x: Tensor) -> int:
    """A hash of the bits, for an int64."""
    digest = hashlib.sha256(x.detach().cpu().contiguous().numpy().tobytes()).digest()
    return int.from_bytes(digest[:7], "big")
