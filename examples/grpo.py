"""GRPO of a language model with several reward functions: one advantage and one gradient a reward, one backward pass.

On policy, the loss of a group-relative policy gradient is linear in the advantage: that of reward k is
``-mean_b A_bk log p(answer_b)``. So one backward pass of the log-probabilities gives the gradients of all K rewards,
and a rule of marble_core.rules says how much of each the step takes.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from marble_core import gram_matrix, group_advantages, refresh_due, shared_cotangent_rows
from marble_core.rules import Evidence, marble

PROMPTS, ANSWERS, LENGTH, VOCABULARY = 8, 8, 12, 32


def rewards_of(answers: torch.Tensor) -> torch.Tensor:
    """Three reward functions ``[B, K]``: even tokens, small tokens, no token twice in a row, on scales of 1 to 20."""
    even, small = (answers % 2 == 0).float().mean(1), (answers < VOCABULARY // 4).float().mean(1)
    fresh = (answers[:, 1:] != answers[:, :-1]).float().mean(1)
    return torch.stack([even, 20 * small, 5 * fresh], dim=1)


def make_model() -> torch.nn.Module:
    """A tiny causal language model from a configuration, with LoRA."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    model: torch.nn.Module = get_peft_model(LlamaForCausalLM(config), lora)
    return model


@torch.no_grad()
def sample(model: torch.nn.Module, prompts: torch.Tensor) -> torch.Tensor:
    """Answers ``[B, LENGTH]``, token by token."""
    text = prompts
    for _ in range(LENGTH):
        text = torch.cat([text, torch.multinomial(model(text).logits[:, -1].softmax(-1), 1)], dim=1)
    return text[:, prompts.shape[1] :]


def log_probability(model: torch.nn.Module, prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """``log p(answer | prompt)`` of each row, ``[B]``."""
    logits = model(torch.cat([prompts, answers], dim=1)).logits[:, prompts.shape[1] - 1 : -1]
    return torch.log_softmax(logits, -1).gather(-1, answers.unsqueeze(-1)).squeeze(-1).sum(1)


def main(steps: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Train; the mean rewards of the first and of the last batches."""
    model = make_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prompts = torch.randint(VOCABULARY, (PROMPTS, 4)).repeat_interleave(ANSWERS, dim=0)
    groups = torch.arange(PROMPTS).repeat_interleave(ANSWERS)
    rule = marble(3)
    state, means = rule.init(), []
    for step in range(steps):
        answers = sample(model, prompts)
        rewards = rewards_of(answers)
        means.append(rewards.mean(0))
        weights = -group_advantages(rewards, groups) / len(answers)  # of each log-probability in the K losses

        def forward(answers: torch.Tensor = answers) -> torch.Tensor:
            return log_probability(model, prompts, answers)

        gram = None
        if refresh_due(step, 5):
            gram = gram_matrix(shared_cotangent_rows(forward, model, weights, verify=step == 0).rows)
        state, c = rule.update(state, Evidence(gram=gram))
        loss = (weights @ c.to(weights)) @ forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(means[:5]).mean(0), torch.stack(means[-5:]).mean(0)


if __name__ == "__main__":
    before, after = main()
    print("rewards before:", [round(x, 2) for x in before.tolist()])
    print("rewards after: ", [round(x, 2) for x in after.tolist()])
