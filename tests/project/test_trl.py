"""The example with TRL, against the real package: ``pip install --group trl``."""

from __future__ import annotations

import importlib.util
import string
from pathlib import Path
from typing import Any

import pytest
import torch

from marble_core.rules import Evidence, marble, weighted_sum

pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of TRL and what it imports, at each other

FILE = Path(__file__).resolve().parents[2] / "examples" / "with_trl.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("example_with_trl", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vowels(completions: list[str], **given: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def early(completions: list[str], **given: Any) -> list[float]:
    """Letters from the first half of the alphabet, on a scale of its own."""
    return [20 * sum(letter < "n" for letter in text) / max(len(text), 1) for text in completions]


def trainer(folder: Path, rule: Any, steps: int) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig

    letters = {token: i for i, token in enumerate(["<pad>", "<eos>", *string.ascii_lowercase])}
    words = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(letters),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    given = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=8,
        max_steps=steps,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    return example().BalancedGRPOTrainer(
        model,
        reward_funcs=[vowels, early],
        rule=rule,
        every=5,
        args=given,
        train_dataset=Dataset.from_list([{"prompt": text} for text in ("ab", "xy", "no", "we")]),
        processing_class=tokenizer,
    )


def test_both_rewards_rise_and_the_rule_is_asked_at_every_fifth_step(tmp_path: Path) -> None:
    asked: list[Evidence] = []
    rule = marble(2)

    def update(state: Any, evidence: Evidence) -> Any:
        asked.append(evidence)
        return rule.update(state, evidence)

    found = trainer(tmp_path, rule._replace(update=update), 40)
    found.train()
    assert [e.gram is not None for e in asked] == [False] + [True] * 8
    logged = [record for record in found.state.log_history if "rewards/vowels/mean" in record]
    for name in ("vowels", "early"):
        means = [record[f"rewards/{name}/mean"] for record in logged]
        assert sum(means[-8:]) > sum(means[:8])
        assert any(f"coefficients/{name}" in record for record in logged)


def test_a_row_is_the_gradient_of_trl_s_loss_with_one_reward_s_advantage(tmp_path: Path) -> None:
    found = trainer(tmp_path, weighted_sum(torch.tensor([1.0, 0.0])), 2)
    found.current_gradient_accumulation_steps = 1  # which train() sets
    batch = found._prepare_inputs([{"prompt": "ab"}] * 8 + [{"prompt": "no"}] * 8)
    assert batch["A"].shape == (16, 2)
    found._compute_loss(found.model, batch)
    for k in range(2):  # each reward's own advantage, in TRL's shuffled order, is centred over its group
        assert float(batch["A"][:, k].sum().abs()) < 1e-4
    rows = found._rows(found.model, batch)
    gradient = torch.autograd.grad(found._compute_loss(found.model, batch), list(found.model.parameters()))
    torch.testing.assert_close(rows[0], torch.cat([g.flatten() for g in gradient]), rtol=1e-4, atol=1e-6)
