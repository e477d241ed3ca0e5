"""Several processes that live and end together: whoever waits learns what another one died of."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.distributed import DistError

from reference.errors import PeerError
from reference.processes.peers import Peers

_PATIENCE = 40.0  # seconds that a process that failed waits for the others to save and stop
_SLOWEST_POLL = 0.05  # seconds
_BEAT = 5.0  # seconds from one sign of life to the next
_SILENCE = 60.0  # seconds without one, after which a process is taken for dead
_STUCK = 300.0  # seconds that a process may go on without noticing, in a pass that needs the dead one, before it ends


@contextlib.contextmanager
def together(peers: Peers) -> Iterator[None]:
    """Stop all processes when one fails, and let none leave before all are done.

    The others see it where they wait for each other, or ask with ``check_peers``, and raise a ``PeerError`` with its
    message. No process exits before all have seen it (or half a minute has passed), since a launcher kills the others
    when one exits, and process 0 may be saving. A process that was killed is missed after a minute. One that shares the
    base model's weights may wait for the dead one within a pass, where nothing can be raised: it ends after five
    minutes, with a line.
    """
    if peers.store is None:
        yield
        return
    done, noticed, answered = threading.Event(), threading.Event(), [time.monotonic()]
    threads = [
        threading.Thread(target=_beat, args=(peers, done, noticed, answered), name="alive", daemon=True),
        threading.Thread(target=_watch, args=(peers, done, answered), name="watch", daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
        meet(peers)
        noticed.set()
        _leave(peers, wait=peers.rank == 0)  # which may be the store's host
    except BaseException as error:  # whatever it is, the others must not wait for this process
        noticed.set()
        with contextlib.suppress(RuntimeError):  # the store may be gone with its host
            # only the first one counts: a failure that this one follows from is there already
            peers.store.compare_set("failure", "", f"process {peers.rank} stopped: {type(error).__name__}: {error}")
            _leave(peers, wait=True)
        raise
    finally:
        done.set()
        for thread in threads:  # one that is in the store's C++ when the interpreter ends would abort the process
            thread.join(_BEAT)


def _beat(peers: Peers, done: threading.Event, noticed: threading.Event, answered: list[float]) -> None:
    """Give a sign of life again and again, and end a process that is stuck in a pass with a dead one."""
    assert peers.store is not None
    heard = _NOTHING_HEARD
    since: float | None = None  # when a failure was seen
    with contextlib.suppress(RuntimeError):  # the others notice themselves that the store is gone
        while not done.wait(_BEAT):
            peers.store.add(f"alive/{peers.rank}", 1)
            answered[0] = time.monotonic()
            if not peers.sharded or noticed.is_set():
                continue
            try:
                check_peers(peers)
                heard = _listen(peers, heard)
            except PeerError as error:
                since = answered[0] if since is None else since
                if answered[0] - since > _STUCK:
                    _end(peers, f"it waits in a pass of the model. {error}")


def _watch(peers: Peers, done: threading.Event, answered: list[float]) -> None:
    """End a process whose store does not answer any more: that nobody can see who waits for the answer."""
    awake = time.monotonic()
    while not done.wait(_BEAT):
        before, awake = awake, time.monotonic()
        if awake - before > 2 * _BEAT:  # this process was asleep itself
            answered[0] = awake
        elif awake - answered[0] > _SILENCE + _STUCK:
            _end(peers, "the process that connects the others does not answer; see its output.")


def leave_if_one_of_several(status: int) -> None:
    """End a process of several that has said why: on the usual way out, collectives of which one process is gone may
    abort in C++, with another status and a line of their own."""
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end(peers: Peers, why: str) -> None:
    """End this process from any thread, with a line; what it trained is in its checkpoints."""
    print(f"process {peers.rank} ends: {why}", file=sys.stderr, flush=True)
    os._exit(1)


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
        heard = _NOTHING_HEARD
        while here < wanted:
            check_peers(peers)
            heard = _listen(peers, heard)
            time.sleep(pause)
            pause = min(2 * pause, _SLOWEST_POLL)
            here = peers.store.add("met", 0)
    except DistError as error:
        raise PeerError("the process that connects the others is gone; see its output.") from error


class _Heard(NamedTuple):
    """Signs of life of each process so far, and when the last one was noticed; when they were last looked up."""

    signs: dict[int, tuple[int, float]]
    at: float


_NOTHING_HEARD = _Heard({}, -math.inf)


def _listen(peers: Peers, heard: _Heard) -> _Heard:
    """Look up the signs of life every few seconds. After a pause of this process's own, such as Ctrl-Z or a laptop's
    sleep, which the others may have had as well, all of them count as alive.

    Raises:
        PeerError: one has been silent for too long.
    """
    assert peers.store is not None
    now = time.monotonic()
    if now - heard.at < _BEAT:
        return heard
    old = heard.signs if now - heard.at < 2 * _BEAT + 1 else {}
    counts = [peers.store.add(f"alive/{rank}", 0) for rank in range(peers.size)]
    signs = {r: old[r] if r in old and old[r][0] == count else (count, now) for r, count in enumerate(counts)}
    silent = [rank for rank, (_, at) in signs.items() if now - at > _SILENCE]
    if silent:
        raise PeerError(f"nothing was heard of processes {silent} for {_SILENCE:.0f} s; see their output.")
    return _Heard(signs, now)


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
def stop_on_interrupt() -> Iterator[list[bool]]:
    """Turn the first Ctrl-C, or SIGTERM of a cluster that wants its machine back, into a flag that the loop reads
    between steps; the second one interrupts at once."""
    stop, before = [False], dict[signal.Signals, Any]()

    def handle(number: int, frame: FrameType | None) -> None:
        stop[0] = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        warnings.warn("stopping after this step; press Ctrl-C again to stop at once", stacklevel=1)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: nothing to catch
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
