"""TorchJD and marble_core together: a rule of ours as its Weighting, and a weighting of its as our solver."""

import torch
from torch import Tensor
from torchjd.aggregation import GramianWeightedAggregator, UPGradWeighting, Weighting
from torchjd.autojac import backward, jac_to_grad

from marble_core import harmonize
from marble_core.rules import Evidence, Rule, marble


class RuleWeighting(Weighting[Tensor]):
    """A rule of ``marble_core.rules`` where TorchJD expects weights of a Gramian; it keeps the rule's state."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule, self.state = rule, rule.init()

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights ``[K]`` of the rows, in their dtype."""
        self.state, coefficients = self.rule.update(self.state, Evidence(gram=gramian))
        return coefficients.to(gramian)


def ours_in_theirs(steps: int = 200) -> tuple[Tensor, Tensor]:
    """TorchJD's training loop with ``marble`` as its aggregator; two losses of a model before and after."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 2), torch.randn(8, 3)
    target = torch.randn(8, 2) * torch.tensor([1.0, 10.0])  # two losses of very different size
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    aggregator = GramianWeightedAggregator(RuleWeighting(marble(2)))
    found = []
    for _ in range(steps):
        losses = (model(x) - target).square().mean(0)
        found.append(losses.detach())
        backward(list(losses))
        jac_to_grad(model.parameters(), aggregator)
        optimizer.step()
        optimizer.zero_grad()
    return found[0], found[-1]


def theirs_in_ours(gram: Tensor) -> Tensor:
    """Coefficients by TorchJD's UPGrad on unit gradients, put on the simplex, with our norms and certificate."""

    def solver(unit: Tensor) -> Tensor:
        weights = UPGradWeighting()(unit)
        return weights / weights.sum()

    return harmonize(gram, solver=solver).coefficients


if __name__ == "__main__":
    print("losses before and after:", *(x.tolist() for x in ours_in_theirs()))
    print("coefficients:", theirs_in_ours(torch.tensor([[100.0, -6.0], [-6.0, 1.0]], dtype=torch.float64)))
