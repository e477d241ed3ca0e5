"""Two losses of one model under accelerate, on one process or on several.

    accelerate launch examples/with_accelerate.py

The gradients of all losses are averaged over the processes at every tenth step, so that the rule sees the same on all.
In between a step costs what it always costs.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from marble_core import gram_matrix
from marble_core.rules import Evidence, marble


def main(steps: int = 60, every: int = 10) -> tuple[list[float], list[float]]:
    """Train; both losses on all data before and after."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    data = TensorDataset(x, x @ torch.randn(8, 2) * torch.tensor([1.0, 10.0]))  # two targets on different scales
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    model, optimizer, batches = accelerator.prepare(
        model, torch.optim.Adam(model.parameters(), lr=3e-2), DataLoader(data, batch_size=32, shuffle=True)
    )
    rule = marble(2)
    state = rule.init()

    def losses(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (model(inputs) - targets).square().mean(0)
        return found

    def on_all() -> list[float]:
        with torch.no_grad():
            found: list[float] = losses(*data.tensors).tolist()
        return found

    def endless() -> object:
        while True:
            yield from batches

    before, stream = on_all(), iter(endless())  # type: ignore[call-overload]
    for step in range(steps):
        inputs, targets = next(stream)
        gram = None
        if step % every == 0:
            parameters = list(model.parameters())
            rows = [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
                for loss in losses(inputs, targets)
            ]
            gram = gram_matrix(accelerator.reduce(torch.stack(rows), "mean"))
        state, c = rule.update(state, Evidence(gram=gram))
        accelerator.backward(losses(inputs, targets) @ c.float())
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print("losses before:", [round(v, 3) for v in before])
    accelerator.print("losses after: ", [round(v, 3) for v in on_all()])
    return before, on_all()


if __name__ == "__main__":
    main()
