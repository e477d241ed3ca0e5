"""Several processes that train as one: who they are, and the share of each."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from reference.errors import ConfigError
from reference.processes.devices import device_of

_COLLECTIVE = datetime.timedelta(minutes=5)  # they begin when all are there, so they take no longer than the network


def _nothing() -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Peers:
    """The processes of a run, and which of them this is.

    Attributes:
        rank: of this process; 0 writes files.
        size: how many there are.
        local_rank: rank among those of this machine.
        device: where this process adds up with the others.
        store: what all can read and write without waiting for each other; None where there is but one.
        sharded: whether they share the base model's weights, and so need each other in every pass.
        on_pass: called before every pass of the model, for progress.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    store: Store | None = None
    sharded: bool = False
    on_pass: Callable[[], None] = _nothing


ALONE = Peers()


def connect(device: str, *, sharded: bool = False) -> Peers:
    """Find the other processes of a launcher (``torchrun``, ``accelerate launch``); without one there are none.

    They communicate by NCCL between GPUs and by Gloo between CPUs.

    Args:
        device: of the configuration.
        sharded: whether the processes share the base model's weights.

    Raises:
        ConfigError: the launcher has not said who this process is, or all would share one GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Peers(device=device_of(device))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set. Start with torchrun or accelerate launch, or "
            "unset WORLD_SIZE for a single process."
        )
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda with {size} processes, a GPU each, got {device!r}.")
    state = PartialState(cpu=device_of(device).type == "cpu", timeout=_COLLECTIVE)
    # a second connection to the store that the launcher, or process 0, has opened
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = TCPStore(address, port, is_master=False, wait_for_workers=False)
    attempt = f"marble/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    run = server.add(f"{attempt}/connected/{state.process_index}", 1)  # each run of a process has keys of its own
    store = PrefixStore(f"{attempt}/{run}", server)
    return Peers(state.process_index, size, state.local_process_index, state.device, store, sharded)


def share_of(total: int, peers: Peers) -> range:
    """The part of ``total`` numbered things that is this process's: contiguous, as even as possible.

    Example:
        >>> [share_of(8, Peers(rank, 3)) for rank in range(3)]
        [range(0, 2), range(2, 5), range(5, 8)]
    """
    return range(total * peers.rank // peers.size, total * (peers.rank + 1) // peers.size)


def require_enough(counts: Mapping[str, int], peers: Peers) -> None:
    """Every process must have a share.

    Raises:
        ConfigError: there are fewer of something than processes.
    """
    for what, count in counts.items():
        if count < peers.size:
            raise ConfigError(f"expected at least as many {what} as processes, got {count} for {peers.size}.")
