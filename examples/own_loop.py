"""A rule of marble_core in a loop of one's own: policy gradients of three rewards, with scales from 0.1 to 5."""

import torch

from marble_core import gram_matrix, group_advantages, refresh_due, shared_cotangent_rows
from marble_core.rules import Evidence, marble

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 6))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
prompts, tables = torch.randn(16, 4), torch.randn(16, 6, 3) * torch.tensor([1.0, 5.0, 0.1])  # a reward for each action
rule = marble(3)
state = rule.init()


def expected_rewards() -> torch.Tensor:
    return torch.einsum("pa,pak->k", model(prompts).softmax(-1), tables) / 16


before = expected_rewards().detach()
for step in range(200):
    actions = torch.multinomial(model(prompts).softmax(-1), 8, replacement=True).reshape(-1)  # 8 for each prompt
    groups = torch.arange(16).repeat_interleave(8)
    advantages = group_advantages(tables[groups, actions], groups)  # [B, K], one column a reward
    weights = -advantages / len(actions)  # of each sample's log-probability in the K losses

    def log_probability(actions: torch.Tensor = actions, groups: torch.Tensor = groups) -> torch.Tensor:
        return torch.log_softmax(model(prompts[groups]), -1)[torch.arange(len(actions)), actions]  # [B]

    gram = None
    if refresh_due(step, 10):  # all K gradients from one backward pass
        gram = gram_matrix(shared_cotangent_rows(log_probability, model, weights, verify=step == 0).rows)
    state, c = rule.update(state, Evidence(gram=gram))
    (weights @ c.to(weights) * log_probability()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()

print("rewards before:", [round(x, 3) for x in before.tolist()])
print("rewards after: ", [round(x, 3) for x in expected_rewards().tolist()])
