"""Several processes that train as one: a share of the images each, one sum a step, and the end of one ends all."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree

from reference.errors import ConfigError, PeerError, TrainingError
from reference.processes.devices import device_of

T = TypeVar("T")

_PATIENCE = 40.0  # seconds that a process that failed waits for the others to save and stop
_COLLECTIVE = datetime.timedelta(minutes=5)  # they begin when all are there, so they take no longer than the network
_SLOWEST_POLL = 0.05  # seconds
_BEAT = 5.0  # seconds from one sign of life to the next
_SILENCE = 60.0  # seconds without one, after which a process is taken for dead


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


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[list[bool]]:
    """Turn the first Ctrl-C into a flag that the loop reads between steps; the second one interrupts at once."""
    stop = [False]

    def handle(number: int, frame: FrameType | None) -> None:
        stop[0] = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.warn("stopping after this step; press Ctrl-C again to stop at once", stacklevel=1)

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: nothing to catch
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def first_on_machine(peers: Peers) -> Iterator[None]:
    """One process of each machine first, then its others: for what is downloaded or computed once and then found.

    Raises:
        PeerError: another process has failed.
    """
    if peers.local_rank > 0:
        meet(peers)
    yield
    if peers.local_rank == 0:
        meet(peers)


@contextlib.contextmanager
def together(peers: Peers) -> Iterator[None]:
    """Stop all processes when one fails, and let none leave before all are done.

    The others see it where they wait for each other, or ask with ``check_peers``, and raise a ``PeerError`` with its
    message. No process exits before all have seen it (or half a minute has passed), since a launcher kills the others
    when one exits, and process 0 may be saving. A process that was killed is missed after a minute.
    """
    if peers.store is None:
        yield
        return
    done = threading.Event()
    threading.Thread(target=_beat, args=(peers, done), name="alive", daemon=True).start()
    try:
        yield
        meet(peers)
        _leave(peers, wait=peers.rank == 0)  # which may be the store's host
    except BaseException as error:  # whatever it is, the others must not wait for this process
        with contextlib.suppress(RuntimeError):  # the store may be gone with its host
            # only the first one counts: a failure that this one follows from is there already
            peers.store.compare_set("failure", "", f"process {peers.rank} stopped: {type(error).__name__}: {error}")
            _leave(peers, wait=True)
        raise
    finally:
        done.set()


def _beat(peers: Peers, done: threading.Event) -> None:
    """Give a sign of life again and again."""
    assert peers.store is not None
    with contextlib.suppress(RuntimeError):  # the others notice themselves that the store is gone
        while not done.wait(_BEAT):
            peers.store.add(f"alive/{peers.rank}", 1)


def _leave(peers: Peers, *, wait: bool) -> None:
    """Say that this process is about to exit, and wait until all have said so."""
    assert peers.store is not None
    peers.store.add("left", 1)
    deadline = time.monotonic() + _PATIENCE
    while wait and peers.store.add("left", 0) < peers.size and time.monotonic() < deadline:
        time.sleep(_SLOWEST_POLL)


def check_peers(peers: Peers) -> None:
    """Go on, unless another process has failed.

    Raises:
        PeerError: it has, with its message.
    """
    if peers.store is None:
        return
    try:
        if peers.store.check(["failure"]):
            raise PeerError(peers.store.get("failure").decode())
    except DistError as error:
        raise PeerError("the process that connects the others is gone; see its output.") from error


def begin_pass(peers: Peers) -> None:
    """Go on to a pass of the model, unless another process has failed; processes that need each other in it meet.

    Raises:
        PeerError: one has failed.
    """
    peers.on_pass()
    if peers.sharded:
        meet(peers)
    else:
        check_peers(peers)


def meet(peers: Peers) -> None:
    """Wait until all processes are here. Unlike a collective, this ends when one of them has failed.

    Raises:
        PeerError: one has.
    """
    if peers.store is None:
        return
    try:
        # nobody is here for the n-th time before all have been here n - 1 times
        wanted = peers.size * peers.store.add(f"met/{peers.rank}", 1)
        here, pause = peers.store.add("met", 1), 1e-4
        heard: dict[int, tuple[int, float]] = {}
        while here < wanted:
            check_peers(peers)
            heard = _listen(peers, heard)
            time.sleep(pause)
            pause = min(2 * pause, _SLOWEST_POLL)
            here = peers.store.add("met", 0)
    except DistError as error:
        raise PeerError("the process that connects the others is gone; see its output.") from error


def _listen(peers: Peers, heard: dict[int, tuple[int, float]]) -> dict[int, tuple[int, float]]:
    """Signs of life of each process so far, and when the last one was noticed; looked up every few seconds.

    Raises:
        PeerError: one has been silent for too long.
    """
    assert peers.store is not None
    now = time.monotonic()
    if heard and now - max(at for _, at in heard.values()) < _BEAT:
        return heard
    counts = [peers.store.add(f"alive/{rank}", 0) for rank in range(peers.size)]
    heard = {r: heard[r] if r in heard and heard[r][0] == count else (count, now) for r, count in enumerate(counts)}
    silent = [rank for rank, (_, at) in heard.items() if now - at > _SILENCE]
    if silent:
        raise PeerError(f"nothing was heard of processes {silent} for {_SILENCE:.0f} s; see their output.")
    return heard
