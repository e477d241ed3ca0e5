"""UnifiedReward against a server in a thread: what is asked, marks, faults that pass and faults that stay."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reference.errors import ConfigError, RewardError
from reference.rewards import unifiedreward
from reference.rewards.unifiedreward import load

CPU = torch.device("cpu")
IMAGES = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2) / 255  # their pixels are their numbers

# From the body of a request to status and text of the response
Answer = Callable[[dict], tuple[int, str]]


def completion(text: Any) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


class Fake:
    """A server that answers as it is told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.answer: Answer = lambda body: completion("Final Score: 3")
        self.models: tuple[int, str] = 200, json.dumps({"data": [{"id": "first"}, {"id": "second"}]})
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.keys.append(self.headers["Authorization"])
                self.reply(*(fake.models if self.path == "/v1/models" else (404, "no such page")))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.bodies.append(body)
                self.reply(*(fake.answer(body) if self.path == "/v1/chat/completions" else (404, "")))

            def reply(self, status: int, text: str) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client has hung up

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(unifiedreward, "_WAITS", (0.01, 0.01))
    monkeypatch.delenv(unifiedreward.URL, raising=False)
    monkeypatch.delenv(unifiedreward.KEY, raising=False)
    fake = Fake()
    thread = threading.Thread(target=fake.server.serve_forever, args=(0.01,))
    thread.start()
    yield fake
    fake.server.shutdown()
    thread.join()
    fake.server.server_close()


def number_of(body: dict) -> int:
    """Which of IMAGES a request is about."""
    data = body["messages"][0]["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert pixels.shape == (2, 2, 3)
    return int(pixels[0, 0, 0])


def test_each_image_gets_its_own_mark(fake: Fake) -> None:
    def answer(body: dict) -> tuple[int, str]:
        i = number_of(body)
        time.sleep(0.01 * (4 - i))  # the last is the first to answer
        return completion(f"Looks fine.\nFinal Score: {i + 1.5 if i < 3 else 5}")

    fake.answer = answer
    scores = load(CPU, fake.url + "/")(IMAGES, [f"prompt {{{i}}}" for i in range(4)], [None] * 4)
    assert isinstance(scores, torch.Tensor)
    assert scores.tolist() == pytest.approx([1.5 / 5, 2.5 / 5, 3.5 / 5, 1.0])
    for body in fake.bodies:
        text = body["messages"][0]["content"][1]["text"]
        assert text.endswith(f"Text Caption: [prompt {{{number_of(body)}}}]")
        assert text.startswith("<image>\nYou are given a text caption")
        assert (body["model"], body["temperature"]) == ("first", 0)


@pytest.mark.parametrize(
    ("text", "mark"),
    [("Final Score: 4", 4), ("**Final Score:** 3.5", 3.5), ("Final Score: 1\nFinal Score: 2", 2), ("Final Score:5", 5)],
)
def test_ways_to_write_a_mark(fake: Fake, text: str, mark: float) -> None:
    fake.answer = lambda body: completion(text)
    scores = load(CPU, fake.url)(IMAGES[:1], [""], [None])
    assert isinstance(scores, torch.Tensor)
    assert scores.tolist() == [mark / 5]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((500, "out of memory"), "HTTP 500: out of memory"),
        ((429, "slow down"), "HTTP 429: slow down"),
        ((200, "<html>"), "JSONDecodeError"),
        ((200, json.dumps({"choices": []})), "expected a chat completion"),
        ((200, json.dumps([1])), "expected a chat completion"),
        (completion(None), "expected a chat completion"),
        (completion("A fine image."), "expected 'Final Score:' and a number from 1 to 5, got 'A fine image.'"),
        (completion("Final Score: 7"), "a number from 1 to 5"),
    ],
)
def test_a_fault_is_tried_again(fake: Fake, fault: tuple[int, str], message: str) -> None:
    reward = load(CPU, fake.url)
    fake.answer = lambda body: fault if len(fake.bodies) < 3 else completion("Final Score: 4")
    scores = reward(IMAGES[:1], [""], [None])
    assert isinstance(scores, torch.Tensor)
    assert scores.tolist() == [0.8]
    assert len(fake.bodies) == 3
    fake.answer = lambda body: fault
    with pytest.raises(RewardError, match=r"3 tries") as error:
        reward(IMAGES[:1], [""], [None])
    assert message in str(error.value)
    assert fake.url in str(error.value)
    assert len(fake.bodies) == 6


def test_a_server_that_takes_too_long(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unifiedreward, "_TIMEOUT", 0.1)
    reward = load(CPU, fake.url)
    done = threading.Event()

    def answer(body: dict) -> tuple[int, str]:
        if len(fake.bodies) == 1:
            done.wait(5)
        return completion("Final Score: 2")

    fake.answer = answer
    scores = reward(IMAGES[:1], [""], [None])
    assert isinstance(scores, torch.Tensor)
    assert scores.tolist() == [0.4]
    assert len(fake.bodies) == 2
    fake.bodies.clear()
    fake.answer = lambda body: (done.wait(5), completion("Final Score: 2"))[1]
    with pytest.raises(RewardError, match=r"timed out.*3 tries"):
        reward(IMAGES[:1], [""], [None])
    done.set()


def test_a_fault_that_stays_is_not_tried_again(fake: Fake) -> None:
    reward = load(CPU, fake.url)
    fake.answer = lambda body: (400, "image too large")
    with pytest.raises(RewardError, match="HTTP 400: image too large"):
        reward(IMAGES[:1], [""], [None])
    assert len(fake.bodies) == 1


def test_the_server_and_its_model(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(unifiedreward.URL, f"{fake.url}#second")
    monkeypatch.setenv(unifiedreward.KEY, "secret")
    load(CPU)(IMAGES[:1], [""], [None])
    assert fake.bodies[0]["model"] == "second"
    assert fake.keys == ["Bearer secret"]
    with pytest.raises(ConfigError, match=r"to serve third, got \['first', 'second'\]"):
        load(CPU, f"{fake.url}#third")
    fake.models = 200, json.dumps({"data": []})
    with pytest.raises(ConfigError, match="to serve a model"):
        load(CPU, fake.url)
    fake.models = 401, "a key, please"
    with pytest.raises(ConfigError, match=r"cannot list the models.*HTTP 401: a key, please"):
        load(CPU, fake.url)
    fake.models = 200, "[]"
    with pytest.raises(ConfigError, match="cannot list the models"):
        load(CPU, fake.url)


def test_no_server(fake: Fake) -> None:
    for source in (None, "localhost:8080", "CodeGoat24/UnifiedReward-qwen-7b"):
        with pytest.raises(ConfigError, match="expected the URL of a server"):
            load(CPU, source)
    fake.server.shutdown()
    fake.server.server_close()
    with pytest.raises(ConfigError, match=r"cannot list the models of .*3 tries"):
        load(CPU, fake.url)
