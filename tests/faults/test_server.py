"""A reward's server that misbehaves: whatever it does, an error that says so, in bounded time and memory.

``REQUESTS=1000 pytest tests/faults/test_server.py`` scores more images at once; ``make faults`` does.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from reference.__main__ import main
from reference.errors import ConfigError, RewardError
from reference.rewards import unifiedreward
from reference.rewards.unifiedreward import Server, load, mark

REQUESTS = int(os.environ.get("REQUESTS", "64"))
GOOD = json.dumps({"choices": [{"message": {"content": "Final Score: 4"}}]}).encode()
MODELS = json.dumps({"data": [{"id": "model"}]}).encode()


def answer(body: bytes, status: str = "200 OK", *, length: int | None = None, more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body) if length is None else length}\r\n{more}\r\n"
    return head.encode() + body


class Rude(socketserver.ThreadingTCPServer):
    """Reads a request, and then does what ``behave`` does with the connection."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave: Callable[[socket.socket], None] = lambda s: s.sendall(answer(GOOD))
        self.open = self.most = self.requests = 0
        self.heads: list[bytes] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client has hung up."""


class _Handler(socketserver.BaseRequestHandler):
    server: Rude

    def handle(self) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.request.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
        while len(body) < int(fields.get(b"Content-Length", b"0")):
            body += self.request.recv(65536)
        if head.startswith(b"GET") and b"/models" in head:
            self.request.sendall(answer(MODELS))
            return
        with self.server.lock:
            self.server.open += 1
            self.server.requests += 1
            self.server.most = max(self.server.most, self.server.open)
            self.server.heads.append(head)
        try:
            self.server.behave(self.request)
        finally:
            with self.server.lock:
                self.server.open -= 1


@pytest.fixture
def rude(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rude]:
    monkeypatch.setattr(unifiedreward, "_WAITS", (0.01,))
    monkeypatch.setattr(unifiedreward, "_TIMEOUT", 1.0)
    monkeypatch.delenv(unifiedreward.KEY, raising=False)
    with Rude() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def one(server: Rude) -> float:
    return mark(Server(server.url, "model"), Image.new("RGB", (2, 2)), "a cat")


def drip(data: bytes) -> Callable[[socket.socket], None]:
    """A byte now and then: no single wait is long."""

    def behave(s: socket.socket) -> None:
        for i in range(len(data)):
            s.sendall(data[i : i + 1])
            time.sleep(0.05)

    return behave


def endless(s: socket.socket) -> None:
    s.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        s.sendall(b" " * 65536)


def slow_body(s: socket.socket) -> None:
    s.sendall(answer(b"", length=1000))
    drip(b" " * 1000)(s)


def after_a_while(s: socket.socket) -> None:
    time.sleep(0.01)
    s.sendall(answer(GOOD))


FAULTS: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "an error of the server": (lambda s: s.sendall(answer(b"oh no", "500 Oops")), "HTTP 500: oh no"),
    "an overloaded one": (lambda s: s.sendall(answer(b"later", "503 Busy")), "HTTP 503: later"),
    "no HTTP": (lambda s: s.sendall(b"\x00\xff garbage \r\n\r\n"), "BadStatusLine"),
    "nothing": (lambda s: None, "RemoteDisconnected"),
    "half a body": (lambda s: s.sendall(answer(GOOD[:20], length=len(GOOD))), "JSONDecodeError"),
    "half a header": (lambda s: s.sendall(b"HTTP/1.1 200 OK\r\nContent-Le"), "Error"),
    "no JSON": (lambda s: s.sendall(answer(b"<html>")), "JSONDecodeError"),
    "no UTF-8": (lambda s: s.sendall(answer(b"\xff\xfe\xfa")), "UnicodeDecodeError"),
    "no mark": (lambda s: s.sendall(answer(GOOD.replace(b"4", b"four"))), "expected 'Final Score:'"),
    "a deep one": (lambda s: s.sendall(answer(b"[" * 100_000)), "ValueError: nested too deeply"),
    "a slow header": (drip(answer(GOOD)), "timed out: no whole answer within 1 s"),
    "a slow body": (slow_body, "timed out: no whole answer within 1 s"),
    "a long body": (lambda s: s.sendall(answer(b" " * 100_000_000)), "answer of at most 1000000 bytes"),
    "an endless body": (endless, "answer of at most 1000000 bytes"),
    "a redirection": (
        lambda s: s.sendall(answer(b"there", "302 Found", more="Location: http://127.0.0.1:1/\r\n")),
        "HTTP 302: there It leads elsewhere, which is not followed",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_server_s_fault_is_said_in_bounded_time(rude: Rude, name: str) -> None:
    rude.behave, message = FAULTS[name]
    began = time.monotonic()
    with pytest.raises(RewardError, match=message):
        one(rude)
    assert time.monotonic() - began < 10
    assert rude.requests <= 2


@pytest.mark.parametrize("name", sorted(set(FAULTS) - {"a long body", "an endless body", "a redirection"}))
def test_a_fault_that_passes_is_forgotten(rude: Rude, name: str) -> None:
    behave, _ = FAULTS[name]
    rude.behave = lambda s: behave(s) if rude.requests == 1 else s.sendall(answer(GOOD))
    assert one(rude) == 4.0


def test_a_redirection_does_not_carry_the_key(rude: Rude, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(unifiedreward.KEY, "secret")
    with Rude() as other:
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        rude.behave = lambda s: s.sendall(answer(b"", "307 There", more=f"Location: {other.url}/chat/completions\r\n"))
        with pytest.raises(RewardError, match="307"):
            one(rude)
        other.shutdown()
    assert b"Bearer secret" in rude.heads[0]
    assert other.requests == 0


def test_many_images_at_once_are_bounded(rude: Rude) -> None:
    """As many connections as the reward says, whatever the number of images; threads, files and memory come back."""
    rude.behave = after_a_while
    reward, images = load(torch.device("cpu"), rude.url), torch.rand(REQUESTS, 3, 8, 8)
    threads = threading.active_count()
    reward(images[:40], ["a"] * 40, [None] * 40)
    before, files = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, open_files()
    for _ in range(3):
        scores = reward(images, ["a cat"] * REQUESTS, [None] * REQUESTS)
        assert isinstance(scores, torch.Tensor)
        assert scores.tolist() == [0.8] * REQUESTS
    assert rude.most <= unifiedreward._AT_ONCE
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 200_000_000 / (1 if sys.platform == "darwin" else 1024)
    time.sleep(0.2)  # the server's threads end
    assert threading.active_count() <= threads + 5
    assert open_files() <= files + 5


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_one_failure_among_many_ends_the_others(rude: Rude) -> None:
    """Nothing is asked any more once the reward has failed."""
    rude.behave = lambda s: s.sendall(answer(b"no", "400 Bad"))
    reward = load(torch.device("cpu"), rude.url)
    with pytest.raises(RewardError, match="HTTP 400"):
        reward(torch.rand(REQUESTS, 3, 8, 8), ["a"] * REQUESTS, [None] * REQUESTS)
    time.sleep(0.1)
    asked = rude.requests
    time.sleep(0.3)
    assert rude.requests == asked


@pytest.mark.parametrize("url", ["http://me:s3cret@HOST", "HTTP?key=s3cret", "http://s3cret@HOST/v1#m"])
def test_secrets_in_a_url_are_refused_and_not_repeated(
    rude: Rude, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    source = url.replace("HOST", rude.url.removeprefix("http://")).replace("HTTP", rude.url)
    with pytest.raises(ConfigError, match="without user, password or query") as error:
        load(torch.device("cpu"), source)
    run = tmp_path / "run"
    flags = ["train", "--preset", "tiny", "--run", str(run), "--scoring.models", f"unifiedreward={source}"]
    assert main(flags) == 2
    assert main([*flags, "--dry-run"]) == 2
    said = "".join([str(error.value), *capsys.readouterr(), caplog.text])
    assert "docs/rewards.md" in said
    assert "s3cret" not in said
    assert not run.exists()


def test_a_key_is_in_no_message(rude: Rude, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(unifiedreward.KEY, "s3cret")
    for behave, _ in FAULTS.values():
        rude.behave = behave
        with pytest.raises(RewardError) as error:
            one(rude)
        assert "s3cret" not in str(error.value)
