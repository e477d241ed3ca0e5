"""TRL's GRPOTrainer with several reward functions, balanced instead of added up.

    trainer = BalancedGRPOTrainer(model, reward_funcs=[helpful, short], rule=marble(2), args=GRPOConfig(...), ...)
    trainer.train()

TRL adds the rewards up and takes the advantage of the sum. Here every reward keeps its own advantage. At every
``every``-th optimiser step K backward passes give the gradients of the K rewards, and a rule of ``marble_core.rules``
says how much of each to take. In between the advantages are combined by its coefficients, which costs nothing.

Tried with TRL 1.16 and ``beta=0``, TRL's default; a pull to the reference model would be part of every gradient.
Not for DeepSpeed or FSDP.
"""

from typing import Any

import torch
from trl import GRPOTrainer

from marble_core import gram_matrix, group_advantages
from marble_core.rules import Evidence, Rule


class BalancedGRPOTrainer(GRPOTrainer):
    def __init__(self, *args: Any, rule: Rule, every: int = 10, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rule, self.rule_state, self.every = rule, rule.init(), every
        self.coefficients = rule.update(self.rule_state, Evidence())[1]
        self.solved = -1  # the optimiser step of the last solve

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.rewards: torch.Tensor = super()._calculate_rewards(*args, **kwargs)  # [all images, K]
        return self.rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        N = self.num_generations if self.model.training else self.num_generations_eval
        groups = torch.arange(len(self.rewards), device=self.rewards.device) // N
        known = ~self.rewards.isnan()  # TRL's mark of a reward that does not apply
        A = group_advantages(self.rewards.nan_to_num(0.0), groups, applicable=known)
        own = len(batch["advantages"])
        batch["A"] = A[self.accelerator.process_index * own :][:own]
        return batch

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        A, step = inputs["A"], self.state.global_step
        if model.training and step % self.every == 0 and step != self.solved:
            gram = gram_matrix(self.accelerator.reduce(self._rows(model, inputs), "mean"))
            self.rule_state, self.coefficients = self.rule.update(self.rule_state, Evidence(gram=gram))
            self.solved = step
            for name, c in zip(self.reward_func_names, self.coefficients.tolist(), strict=True):
                self._metrics["train"][f"coefficients/{name}"].append(c)
        return super()._compute_loss(model, inputs | {"advantages": A @ self.coefficients.to(A)})

    def _rows(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The gradients of all rewards, ``[K, P]``, one backward pass each."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        rows, logged = [], {name: list(values) for name, values in self._metrics["train"].items()}
        for advantages in inputs["A"].unbind(1):
            loss = super()._compute_loss(model, inputs | {"advantages": advantages})
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in found]))
        self._metrics["train"].clear()  # TRL logs inside of its loss: these passes are not steps
        self._metrics["train"].update(logged)
        return torch.stack(rows)
