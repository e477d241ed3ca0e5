"""Rewards by name, and scoring of images that arrive batch by batch."""

from __future__ import annotations

import dataclasses
import threading
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from email.message import Message
from typing import Any

import pytest
import torch
from torch import Tensor

from reference import interfaces as scoring
from reference.config.settings import Config, ScoringConfig
from reference.errors import ConfigError, RewardError
from reference.interfaces import Prompt, Reward, Scores, plain_prompts, score
from reference.rewards import scorer as scorer_module
from reference.rewards.scorer import Scorer, load_rewards, score_images, scorer_of, sources_of, try_rewards

CPU = torch.device("cpu")


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    return images.mean((1, 2, 3))


def random_draw(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    return torch.rand(len(images))


def batches(sizes: Sequence[int]) -> list[Tensor]:
    return list(torch.rand(sum(sizes), 3, 2, 2, generator=torch.Generator().manual_seed(0)).split(list(sizes)))


@pytest.mark.parametrize("batch", [0, 1, 3, 4, 7, 20])
@pytest.mark.parametrize("sizes", [(7,), (3, 3, 1), (1,) * 7])
def test_scores_do_not_depend_on_batches_chunks_or_threads(batch: int, sizes: tuple[int, ...]) -> None:
    seen: list[tuple[int, str]] = []

    def spy(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        seen.append((len(images), threading.current_thread().name))
        return images.mean((1, 2, 3)) + torch.tensor([float(p) for p in prompts])

    prompts = plain_prompts(str(i) for i in range(7))
    whole = torch.cat(batches(sizes))
    expected = score({"spy": spy, "random": random_draw}, whole, prompts)
    found: list[Scores] = []
    for background in (False, True):
        seen.clear()
        torch.manual_seed(3)
        many = Scorer({"spy": spy, "random": random_draw}, CPU, batch, background)
        found.append(score_images(many, batches(sizes), prompts))
        size = batch or 7
        assert [n for n, _ in seen] == [min(size, 7 - at) for at in range(0, 7, size)]
        assert all(name.startswith("rewards") == background for _, name in seen)
    torch.testing.assert_close(found[0].values[:, 0], expected.values[:, 0], rtol=0, atol=1e-7)
    assert torch.equal(found[0].values, found[1].values)
    assert torch.equal(found[0].applicable, found[1].applicable)


def test_images_are_made_while_others_are_scored() -> None:
    made = threading.Event()

    def waits(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        assert made.wait(10)  # for the second batch, which a synchronous scorer would make afterwards
        return images.mean((1, 2, 3))

    def two() -> Iterator[Tensor]:
        first, second = batches((2, 2))
        yield first
        made.set()
        yield second

    scores = score_images(Scorer({"waits": waits}, CPU, 2, True), two(), plain_prompts("abcd"))
    assert scores.values.shape == (4, 1)


@pytest.mark.parametrize("background", [False, True])
def test_an_error_stops_the_images_and_names_the_one_at_fault(background: bool) -> None:
    made = []

    def broken(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        return torch.tensor([float("nan") if p == "3" else 0.0 for p in prompts])

    def endless() -> Iterator[Tensor]:
        for x in batches((2,) * 50):
            made.append(len(x))
            yield x

    prompts = plain_prompts(str(i) for i in range(100))
    with pytest.raises(RewardError, match=r"got nan for image 3 \('3'\) and 0 more"):
        score_images(Scorer({"broken": broken}, CPU, 2, background), endless(), prompts)
    assert len(made) < 10
    assert not [t for t in threading.enumerate() if t.name.startswith("rewards")]


def test_a_reward_sees_only_the_prompts_it_applies_to_with_their_metadata() -> None:
    seen: list[Any] = []

    def ocr(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Scores:
        seen.append((images[:, 0, 0, 0].tolist(), list(prompts), [m["ocr"] for m in metadata]))
        return Scores(torch.tensor([0.5, float("nan")]), torch.tensor([True, False]))

    def never(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        raise AssertionError

    prompts = [
        Prompt("a", {"ocr": "A"}, ("ocr",)),
        Prompt("b", {}, ("brightness",)),
        Prompt("c", {"ocr": "C"}, ("brightness", "ocr")),
    ]
    images = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    found = score({"ocr": ocr, "brightness": brightness, "never": never}, images, prompts)
    assert seen == [([0.0, 2.0], ["a", "c"], ["A", "C"])]
    assert found.values.tolist() == [[0.5, 0, 0], [0, 1, 0], [0, 2, 0]]
    assert found.applicable.tolist() == [[True, False, False], [False, True, False], [False, True, False]]
    with pytest.raises(RewardError, match=r"got inf for image 12 \('c'\)"):
        score({"ocr": lambda *_: torch.tensor([0.0, torch.inf])}, images, prompts, first=10)


def test_rewards_of_models_are_loaded_with_their_device_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def found(path: str, argument: str) -> Any:
        def load(device: torch.device, source: str | None) -> Any:
            asked.append((path, device, source))
            return brightness

        return load if path.startswith("reference.rewards.") else brightness

    monkeypatch.setattr(scorer_module, "load_callable", found)
    config = Config(scoring=ScoringConfig(device="cpu", batch=5, models=("pickscore=some/folder",)))
    trained = scorer_of(config, ("jpeg", "pickscore", "my.file:reward"))
    assert asked == [("reference.rewards.pickscore:load", CPU, "some/folder")]
    assert (list(trained.rewards), trained.batch) == (["jpeg", "pickscore", "my.file:reward"], 5)
    watched = scorer_of(config, ("pickscore", "aesthetic"), trained.rewards)
    assert asked[1:] == [("reference.rewards.aesthetic:load", CPU, None)]
    assert watched.rewards["pickscore"] is trained.rewards["pickscore"]


def test_the_world_s_rewards_get_their_images_on_the_cpu() -> None:
    images = torch.rand(2, 3, 32, 32)
    plain, moved = (load_rewards(("jpeg",), torch.device(d))["jpeg"] for d in ("cpu", "meta"))
    assert torch.equal(moved(images, ["", ""], [{}, {}]), plain(images, ["", ""], [{}, {}]))  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", ["pickscore", "pickscore=", "pikscore=folder", "=folder"])
def test_a_source_that_is_no_pair_is_named(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"scoring\.models: expected name=source with a name of aesthetic, "):
        sources_of(dataclasses.replace(Config(), scoring=ScoringConfig(models=(entry,))))
    assert sources_of(Config(scoring=ScoringConfig(models=("unifiedreward=http://host:1/v1?a=b",)))) == {
        "unifiedreward": "http://host:1/v1?a=b"
    }


def test_a_connection_that_fails_is_tried_again_a_few_times(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)

    def fails(times: int, error: Exception) -> Callable[..., Tensor]:
        left = [error] * times

        def reward(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
            if left:
                raise left.pop()
            return images.mean((1, 2, 3))

        return reward

    images, prompts = torch.rand(2, 3, 4, 4), plain_prompts(["a", "b"])
    passing = (ConnectionResetError("gone"), TimeoutError("late"), urllib.error.URLError("refused"),
               type("ReadTimeout", (Exception,), {"__module__": "httpx"})("late"))  # fmt: skip
    for error in passing:
        waited.clear()
        found = scoring.score({"server": fails(3, error)}, images, prompts)
        assert torch.equal(found.values[:, 0], images.mean((1, 2, 3)).double())
        assert waited == [1.0, 2.0, 4.0]
        assert "reward 'server'" in capsys.readouterr().err
        with pytest.raises(RewardError, match="reward 'server' raised"):
            scoring.score({"server": fails(4, error)}, images, prompts)
    waited.clear()
    for error in (ValueError("no"), urllib.error.HTTPError("http://x", 404, "no", Message(), None)):
        with pytest.raises(RewardError, match="reward 'server' raised"):
            scoring.score({"server": fails(1, error)}, images, prompts)
    assert not waited


def test_every_reward_is_tried_on_a_prompt_of_its_own() -> None:
    seen: dict[str, list[str]] = {}

    def spy(name: str) -> Reward:
        def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
            assert images.shape == (len(prompts), 3, 8, 8)
            seen[name] = list(prompts)
            return torch.zeros(len(prompts))

        return reward

    prompts = [Prompt("all", {}), Prompt("a", {}, ("a",)), Prompt("b", {}, ("b",))]
    before = torch.get_rng_state()
    try_rewards(Scorer({name: spy(name) for name in "abc"}, CPU), prompts, (3, 8, 8))
    assert seen == {"a": ["all", "a"], "b": ["all", "b"], "c": ["all"]}
    assert torch.equal(torch.get_rng_state(), before)
    try_rewards(Scorer({"z": spy("z")}, CPU), prompts[1:], (3, 8, 8))
    assert "z" not in seen  # it applies to nothing, which the loop says

    def broken(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        raise KeyError("size")

    with pytest.raises(RewardError, match=r"reward 'own' raised KeyError: 'size' \(test_scorer\.py, line \d+\)"):
        try_rewards(Scorer({"own": broken}, CPU), prompts, (3, 8, 8))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda x: x.to("meta"), "torch.float32, torch.strided, on meta"),
        (lambda x: x.to_sparse(), "torch.float32, torch.sparse_coo, on cpu"),
        (lambda x: x.to(torch.complex64), "torch.complex64, torch.strided, on cpu"),
        (lambda x: (x, x.to_sparse()), "torch.float32, torch.sparse_coo, on cpu"),
        (lambda x: (x, torch.ones(3)), r"\[3\]"),
        (lambda x: x[:, None], r"\[2, 1\]"),
        (lambda x: x.mean(), r"\[\]"),
        (lambda x: None, "NoneType"),
        (lambda x: (y for y in x), "generator"),
        (lambda x: ["0.1", "0.2"], "list"),
    ],
)
def test_a_reward_returns_a_real_number_an_image_or_is_refused(change: Callable[[Tensor], Any], got: str) -> None:
    own: dict[str, Reward] = {"own": lambda images, prompts, metadata: change(images.mean((1, 2, 3)))}
    with pytest.raises(RewardError, match=rf"reward 'own': expected \w+ of shape \[2\].* got (a tensor of )?{got}\.$"):
        score(own, torch.rand(2, 3, 4, 4), plain_prompts(["a", "b"]))


def test_a_reward_that_ends_the_process_is_named_instead() -> None:
    def ends(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        raise SystemExit(3)

    with pytest.raises(RewardError, match=r"reward 'own' raised SystemExit: 3 \(test_scorer\.py, line \d+\)"):
        score({"own": ends}, torch.rand(2, 3, 4, 4), plain_prompts(["a", "b"]))


def test_a_reward_is_tried_until_it_applies() -> None:
    """Of the presets' prompts the first ones are plain: neither a text to read nor objects to find."""
    prompts = [Prompt(f"plain {i}") for i in range(9)]
    prompts += [Prompt(f"sign {i}", {"ocr": "A"}) for i in range(9)] + [Prompt("dog", {"geneval": {}}, ("geneval",))]
    seen: dict[str, list[str]] = {"ocr": [], "geneval": [], "seventh": [], "never": []}

    def only(name: str, applies: Callable[[str, Any], bool]) -> Reward:
        def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Scores:
            seen[name] += prompts
            applicable = torch.tensor([applies(*pair) for pair in zip(prompts, metadata, strict=True)])
            return Scores(torch.zeros(len(prompts)), applicable)

        return reward

    rewards = {
        "ocr": only("ocr", lambda prompt, m: "ocr" in m),
        "geneval": only("geneval", lambda prompt, m: "geneval" in m),
        "seventh": only("seventh", lambda prompt, m: prompt == "plain 7"),
        "never": only("never", lambda prompt, m: False),
    }
    try_rewards(Scorer(rewards, CPU), prompts, (3, 2, 2))
    assert seen["ocr"] == ["plain 0", "plain 1", "sign 0", "sign 1"]
    assert seen["geneval"] == ["plain 0", "plain 1", "sign 0", "sign 1", "dog"]
    assert "plain 7" in seen["seventh"]
    assert len(seen["never"]) == 18
