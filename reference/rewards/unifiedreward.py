"""UnifiedReward: a vision-language model's mark for fit to the prompt and quality, from a server.

The server speaks OpenAI's protocol, as vLLM and SGLang do, and runs elsewhere or on another GPU:
`vllm serve CodeGoat24/UnifiedReward-qwen-7b --port 8080`, then `--scoring.models unifiedreward=http://localhost:8080/v1`.
Wang et al., "Unified Reward Model for Multimodal Understanding and Generation", 2025.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from reference.config.checks import NO_SECRETS, carries_secret
from reference.errors import ConfigError, RewardError
from reference.interfaces import Reward
from reference.text_files import parse_json

URL, KEY = "MARBLE_UNIFIEDREWARD_URL", "MARBLE_UNIFIEDREWARD_KEY"  # environment variables

_AT_ONCE = 32  # requests that the server may batch
_TIMEOUT = 120.0  # seconds for one request
_LONGEST = 1_000_000  # bytes of an answer
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between the tries
_BEST = 5.0
_MARK = re.compile(r"Final Score\W*?(\d+(?:\.\d+)?)")
# What the model was trained on, word for word: its marks mean nothing for another question.
_QUESTION = (
    "<image>\n"
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy "
    "of depicted objects, their relationships, and attributes as described in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color "
    "accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{}]"
)


class Server(NamedTuple):
    """Where the model is: the URL up to ``/v1``, and the name that the server has for it."""

    url: str
    model: str


class _Passing(Exception):
    """A fault that may be gone at the next try."""


def load(device: torch.device, source: str | None = None) -> Reward:
    """The mark from 1 to 5 that the model gives, divided by 5.

    Faults that may pass (no answer within two minutes, an error of the server, an answer without a mark) are tried
    again up to four times, after 1, 2, 4 and 8 seconds.

    Args:
        device: not used: the server has its own.
        source: ``URL`` or ``URL#MODEL``, such as ``http://localhost:8080/v1``; else the environment variable
            MARBLE_UNIFIEDREWARD_URL. Without a model, the first that the server lists. A key for the server, if it
            wants one, is in MARBLE_UNIFIEDREWARD_KEY.

    Raises:
        ConfigError: there is no URL, no server, or no such model.
    """
    server = find_server(source or os.environ.get(URL, ""))

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        pixels = (images.detach().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            tasks = [pool.submit(mark, server, Image.fromarray(x), p) for x, p in zip(pixels, prompts, strict=True)]
            try:
                return torch.tensor([task.result() / _BEST for task in tasks], dtype=torch.float64)
            except RewardError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    return score


def find_server(source: str) -> Server:
    """The server at ``URL`` or ``URL#MODEL``, which answers and has the model."""
    url, _, model = source.partition("#")
    url = url.rstrip("/")
    if carries_secret(url):
        raise ConfigError(f"reward unifiedreward: {NO_SECRETS}")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"reward unifiedreward: expected the URL of a server of OpenAI's protocol, such as "
            f"http://localhost:8080/v1, got {source!r}. Set {URL}, or --scoring.models unifiedreward=URL; "
            "docs/rewards.md says how to start one."
        )
    try:
        names = [entry["id"] for entry in _request(f"{url}/models", None)["data"]]
    except (RewardError, LookupError, TypeError) as error:
        raise ConfigError(f"reward unifiedreward: cannot list the models of {url}: {error}") from error
    if not names or (model and model not in names):
        raise ConfigError(f"reward unifiedreward: expected {url} to serve {model or 'a model'}, got {names}.")
    return Server(url, model or names[0])


def mark(server: Server, image: Image.Image, prompt: str) -> float:
    """The model's mark for an image, from 1 to 5.

    Raises:
        RewardError: no try gave one; it says what came instead.
    """
    file = io.BytesIO()
    image.save(file, format="PNG")
    data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    content = [
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "text", "text": _QUESTION.format(prompt)},
    ]
    body = {"model": server.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
    return float(_request(f"{server.url}/chat/completions", body, _mark_of))


def _mark_of(answer: Any) -> float:
    """The mark in a server's answer."""
    try:
        text = answer["choices"][0]["message"]["content"]
        found = _MARK.findall(text)
    except (LookupError, TypeError) as error:
        raise _Passing(f"expected a chat completion, got {json.dumps(answer)[:200]}") from error
    if not found or not 1 <= float(found[-1]) <= _BEST:
        raise _Passing(f"expected 'Final Score:' and a number from 1 to 5, got {text[-200:]!r}")
    return float(found[-1])


def _request(url: str, body: Any, read: Any = lambda answer: answer) -> Any:
    """What ``read`` finds in the JSON that a URL answers to GET or, with a body, to POST.

    Raises:
        RewardError: the fault of the last try, or one that cannot pass.
    """
    for wait in _WAITS:
        try:
            return read(_once(url, body))
        except _Passing:
            time.sleep(wait)
    try:
        return read(_once(url, body))
    except _Passing as error:
        raise RewardError(f"{url}: {error} ({len(_WAITS) + 1} tries)") from error


def _once(url: str, body: Any) -> Any:
    """One try: a whole answer within ``_TIMEOUT``, however slowly it comes, and no longer than ``_LONGEST``."""
    headers = {"Content-Type": "application/json"}
    if os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    data = None if body is None else json.dumps(body).encode()
    sockets: list[socket.socket] = []
    late = threading.Event()

    def stop() -> None:
        late.set()
        for opened in sockets:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_TIMEOUT, stop)
    timer.daemon = True
    timer.start()
    try:
        with _opener(sockets).open(urllib.request.Request(url, data, headers), timeout=_TIMEOUT) as response:
            answer = response.read(_LONGEST + 1)
        if len(answer) > _LONGEST:
            raise RewardError(f"{url}: expected an answer of at most {_LONGEST} bytes, got more.")
        return parse_json(answer)
    except urllib.error.HTTPError as error:
        with error:
            said = f"HTTP {error.code}: {error.read(200).decode('utf-8', 'replace')}"
        if 300 <= error.code < 400:
            raise RewardError(f"{url}: {said} It leads elsewhere, which is not followed: give that URL.") from error
        if error.code < 500 and error.code not in (408, 429):
            raise RewardError(f"{url}: {said}") from error
        raise _Passing(said) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, no time left, no JSON
        if late.is_set():
            raise _Passing(f"timed out: no whole answer within {_TIMEOUT:g} s") from error
        raise _Passing(f"{type(error).__name__}: {error}") from error
    finally:
        timer.cancel()


def _opener(sockets: list[socket.socket]) -> urllib.request.OpenerDirector:
    """What opens URLs, with the system's proxies, and puts its sockets into a list. A redirection is an error: the key
    must not go elsewhere."""

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Plain, req)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Secure, req)

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    return urllib.request.build_opener(PlainHandler, SecureHandler, Stay)
