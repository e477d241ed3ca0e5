"""Cost of K gradients: one shared backward, K passes, and vectorized backwards, beside one ordinary training step.

    python -m benchmarks.gradients [--quick] [--device cuda] [--json PATH]

The model is a small SD3 transformer (4 blocks, width 256, 64 image and 77 text tokens) with LoRA of rank 16 on
attention, 8 rows. ``vmap`` is ``gradient_rows`` (``torch.func``), ``is_grads_batched`` the same idea inside
``torch.autograd``; both hold K gradients of every activation and run at K = 5 alone. Times are the median of repeats
taken in turns, relative to one forward and one ordinary backward of the same model in the same run. A harmonization
needs the K rows and the gradient of the shared loss (prox and KL): the shared route takes both from one forward and two
backwards; the others take one forward and K + 1 backwards. ``error`` is the largest difference of the rows from those
of K passes, relative to the largest entry.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import marble_core
from benchmarks.timing import timed

Rows = dict[str, Tensor]
ROWS, TARGETS = 8, ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def build(device: torch.device) -> tuple[nn.Module, Callable[..., tuple[Tensor, Tensor]]]:
    """The model, and its forward (on other parameters, if given): a signal for each row and a shared loss."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations at import
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
        from peft import LoraConfig
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=256,
        caption_projection_dim=256,
        pooled_projection_dim=256,
        out_channels=16,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
    )
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=16, lora_alpha=32, init_lora_weights="gaussian", target_modules=TARGETS))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    model.to(device)
    inputs = {
        "hidden_states": torch.randn(ROWS, 16, 16, 16, device=device),
        "encoder_hidden_states": torch.randn(ROWS, 77, 256, device=device),
        "pooled_projections": torch.randn(ROWS, 256, device=device),
        "timestep": torch.linspace(100, 900, ROWS, device=device),
        "return_dict": False,
    }

    def forward(params: Rows | None = None) -> tuple[Tensor, Tensor]:
        v = (model(**inputs) if params is None else torch.func.functional_call(model, params, (), inputs))[0]
        return v.square().flatten(1).mean(1), (v - 0.1).square().mean()

    return model, forward


def ways(
    model: nn.Module, forward: Callable[..., tuple[Tensor, Tensor]], weights: Tensor
) -> dict[str, Callable[[], Rows]]:
    """Every way to the K rows (and the shared gradient, which each of them computes as well)."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    leaves = list(params.values())

    def passes() -> Rows:
        signal, shared = forward()
        torch.autograd.grad(shared, leaves, retain_graph=True)
        rows = [torch.autograd.grad(signal, leaves, w, retain_graph=True) for w in weights.unbind(1)]
        return {name: torch.stack(column) for name, column in zip(params, zip(*rows, strict=True), strict=True)}

    def batched() -> Rows:
        signal, shared = forward()
        torch.autograd.grad(shared, leaves, retain_graph=True)
        rows = torch.autograd.grad(signal, leaves, weights.mT.contiguous(), is_grads_batched=True)
        return dict(zip(params, rows, strict=True))

    detached = {name: p.detach() for name, p in params.items()}

    def losses(given: Rows) -> Tensor:
        signal, shared = forward(given)
        return torch.cat([signal @ weights, shared.reshape(1)])

    def vmap() -> Rows:
        rows = marble_core.gradient_rows(losses, detached)
        return {name: row[:-1] for name, row in rows.items()}

    def shared_cotangent() -> Rows:
        return marble_core.shared_cotangent_rows(forward, model, weights).rows

    return {"K + 1 passes": passes, "is_grads_batched": batched, "vmap": vmap, "shared": shared_cotangent}


def measure(
    calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median time of each call, the device's work included, taken in turns, so that a busy machine hits all alike;
    and the results of a first round that warms up."""
    results = {name: call() for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(timed(call, device)[0])
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="K = 5 alone, 3 repeats")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    where = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    model, forward = build(device)
    warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap's fallback for attention, on CPU
    leaves = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        signal, shared = forward()
        torch.autograd.grad(signal.mean() + shared, leaves)

    print(f"{where}\n")
    print(f"{'K':>3}  {'way':17} {'ms':>8} {'relative':>9} {'error':>9}")
    rows: list[dict[str, object]] = []
    for K, repeats in ((5, 3),) if options.quick else ((5, 5), (20, 3), (64, 3)):
        weights = torch.randn(ROWS, K, device=device) / ROWS
        calls: dict[str, Callable[[], Any]] = {"ordinary step": step, **ways(model, forward, weights)}
        if K > 5:
            del calls["is_grads_batched"], calls["vmap"]
        seconds, found = measure(calls, repeats, device)
        reference = found["K + 1 passes"]
        scale = max(float(x.abs().max()) for x in reference.values())
        for name, result in found.items():
            relative = seconds[name] / seconds["ordinary step"]
            row: dict[str, object] = {"K": K, "way": name, "repeats": repeats, "seconds": seconds[name]}
            row |= {"relative": relative, "error": None}
            if result is not None:
                row["error"] = max(float((result[n] - x).abs().max()) for n, x in reference.items()) / scale
            error = "" if row["error"] is None else f"{row['error']:9.0e}"
            print(f"{K:3d}  {name:17} {1e3 * seconds[name]:8.0f} {relative:9.2f} {error}", flush=True)
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps({"where": where, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
