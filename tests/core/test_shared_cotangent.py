"""Both routes to K gradients against K plain ``autograd.grad`` calls, and what they leave behind: nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from marble_core import combine_rows, flatten_rows, gradient_rows, shared_cotangent_rows, unflatten_like

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def k_passes(forward: Callable[[], Any], module: nn.Module, weights: Tensor) -> dict[str, Tensor]:
    """The reference: K plain backward passes through the unpatched model."""
    out = forward()
    signal = out[0] if isinstance(out, tuple) else out
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(signal, list(params.values()), w.to(signal), retain_graph=True, allow_unused=True)
        for w in weights.unbind(1)
    ]
    columns = zip(*rows, strict=True)
    return {
        name: torch.stack([torch.zeros_like(p) if g is None else g for g in column])
        for (name, p), column in zip(params.items(), columns, strict=True)
    }


def assert_rows(rows: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal names, shapes and dtypes, and a difference small beside the largest entry of the whole gradient."""
    assert rows.keys() == expected.keys()
    scale = max(float(x.abs().max()) for x in expected.values())
    assert scale > 0
    for name, x in expected.items():
        assert rows[name].shape == x.shape
        assert rows[name].dtype == x.dtype
        assert float((rows[name] - x).abs().max()) <= tolerance * scale, name


class Block(nn.Module):
    """Attention and MLP as in a transformer, linear layers and norms without scale."""

    def __init__(self, width: int = 8, rank: int = 0, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.use_reentrant = use_reentrant

    def body(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.mT / 3, -1) @ v)
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


def transformer(dtype: torch.dtype, use_reentrant: bool | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(use_reentrant=use_reentrant) for _ in range(3))).to(dtype)


def signal_of(module: Any, x: Tensor) -> Callable[[], Tensor]:
    return lambda: module(x).square().flatten(1).mean(1)


def with_shared(module: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def forward() -> tuple[Tensor, Tensor]:
        y = module(x)
        return y.square().flatten(1).mean(1), (y - 1).square().mean()

    return forward


def lora_transformer(dtype: torch.dtype, use_reentrant: bool | None = None) -> nn.Module:
    """peft LoRA on every linear layer, with a B matrix that is not zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["qkv", "out", "up", "down"], lora_dropout=0.0)
    model = peft.get_peft_model(transformer(dtype, use_reentrant), config).to(dtype)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [(), (1,), (5,), (2, 3)])
def test_mlp_with_and_without_token_dimensions(dtype: torch.dtype, tokens: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 9, bias=False), nn.Tanh(), nn.Linear(9, 1)).to(
        dtype
    )
    x, weights = rand(7, *tokens, 6, seed=2, dtype=dtype), rand(7, 3, seed=3, dtype=dtype)
    forward = signal_of(module, x)
    result = shared_cotangent_rows(forward, module, weights)
    assert_rows(result.rows, k_passes(forward, module, weights), TOLERANCE[dtype])
    torch.testing.assert_close(result.signal, forward().detach())
    assert result.shared == {}
    assert result.shared_loss is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("use_reentrant", [None, False])
@pytest.mark.parametrize("build", [transformer, lora_transformer])
def test_transformers(dtype: torch.dtype, use_reentrant: bool | None, build: Callable[..., nn.Module]) -> None:
    module = build(dtype, use_reentrant)
    x, weights = rand(4, 5, 8, seed=4, dtype=dtype), rand(4, 6, seed=5, dtype=dtype)
    forward = with_shared(module, x)
    result = shared_cotangent_rows(forward, module, weights)
    assert_rows(result.rows, k_passes(forward, module, weights), TOLERANCE[dtype])
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    shared = torch.autograd.grad(forward()[1], list(params.values()))
    assert_rows(result.shared, dict(zip(params, shared, strict=True)), TOLERANCE[dtype])
    torch.testing.assert_close(result.shared_loss, forward()[1].detach())


@pytest.mark.parametrize(
    ("dtype", "qk_norm"),
    # diffusers' RMSNorm computes in float32 whatever the model's dtype, so exactness to 1e-12 is asked without it
    [(torch.float32, "rms_norm"), (torch.float64, None)],
)
def test_sd3_transformer_with_lora(dtype: torch.dtype, qk_norm: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # import-time deprecations of the model libraries are not ours
        peft = pytest.importorskip("peft")
        sd3 = pytest.importorskip("diffusers.models.transformers.transformer_sd3")
    torch.manual_seed(0)
    model = sd3.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm=qk_norm,
    )
    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    model.to(dtype)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    inputs = {
        "hidden_states": rand(3, 4, 8, 8, seed=1, dtype=dtype),
        "encoder_hidden_states": rand(3, 5, 16, seed=2, dtype=dtype),
        "pooled_projections": rand(3, 16, seed=3, dtype=dtype),
        "timestep": torch.tensor([100.0, 500.0, 900.0], dtype=dtype),
    }

    def forward() -> Tensor:
        return model(**inputs, return_dict=False)[0].square().flatten(1).mean(1)

    weights = rand(3, 5, seed=6, dtype=dtype)
    result = shared_cotangent_rows(forward, model, weights)
    assert all("lora" in name for name in result.rows)
    assert_rows(result.rows, k_passes(forward, model, weights), TOLERANCE[dtype])


def test_bf16_autocast() -> None:
    module = lora_transformer(torch.float32)
    x, weights = rand(4, 5, 8, seed=4, dtype=torch.float32), rand(4, 6, seed=5, dtype=torch.float32)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        return y.float().square().flatten(1).mean(1)

    bound = 0.03 if torch.__version__.startswith("2.6.") else 0.02  # PyTorch 2.6 rounds otherwise, 0.021 here
    expected = k_passes(forward, module, weights)
    assert_rows(shared_cotangent_rows(forward, module, weights).rows, expected, bound)
    with torch.autocast("cpu", torch.bfloat16):  # around everything, the backward included
        inside = shared_cotangent_rows(lambda: module(x).float().square().flatten(1).mean(1), module, weights)
    assert_rows(inside.rows, expected, bound)
    exact = k_passes(signal_of(module, x), module, weights)
    with pytest.raises(AssertionError):  # autocast was at work: this is not the float32 gradient
        assert_rows(inside.rows, exact, 1e-5)


@pytest.mark.parametrize("form", ["eager", "compiled", "compiled before"])
@pytest.mark.filterwarnings("ignore")
def test_autocast_around_a_call_rounds_nothing_on_the_way_back(form: str) -> None:
    """The forward says in which dtypes it computes; sums over rows are in float32 or more, and so is the check."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    x, weights = rand(8, 16, seed=1, dtype=torch.float32), rand(8, 3, seed=2, dtype=torch.float32)
    expected = k_passes(signal_of(module, x), module, weights)
    run: Any = module if form == "eager" else torch.compile(module, backend="aot_eager")

    def forward() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            signal = run(x).square().mean(1)
        return signal, signal.mean()

    if form == "compiled before":
        shared_cotangent_rows(forward, module, weights)
    with torch.autocast("cpu", torch.bfloat16):
        result = shared_cotangent_rows(forward, module, weights, verify=True)
        assert torch.is_autocast_enabled("cpu")
    assert_rows(result.rows, expected, 1e-5)
    shared = k_passes(signal_of(module, x), module, torch.full((8, 1), 1 / 8))
    assert_rows(result.shared, {name: g[0] for name, g in shared.items()}, 1e-5)
    torch._dynamo.reset()


def test_micro_batches_add_up() -> None:
    module = lora_transformer(torch.float64)
    x, weights = rand(6, 5, 8, seed=4), rand(6, 4, seed=5)
    whole = shared_cotangent_rows(signal_of(module, x), module, weights).rows
    parts = [
        shared_cotangent_rows(signal_of(module, x[i]), module, weights[i]).rows
        for i in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert_rows({name: torch.stack([part[name] for part in parts]).sum(0) for name in whole}, whole, 1e-12)


def test_a_layer_used_twice_and_tied_parameters() -> None:
    torch.manual_seed(0)
    first, second, third = (nn.Linear(4, 4).double() for _ in range(3))
    second.weight = first.weight
    module = nn.ModuleList([first, second, third])
    x, weights = rand(5, 3, 4, seed=1), rand(5, 2, seed=2)

    def forward() -> Tensor:
        y = third(torch.tanh(second(torch.tanh(first(x)))))
        return third(torch.tanh(y)).square().flatten(1).sum(1)

    result = shared_cotangent_rows(forward, module, weights)
    assert "1.weight" not in result.rows
    assert_rows(result.rows, k_passes(forward, module, weights), 1e-12)


def test_one_backward_serves_all_rewards() -> None:
    module = transformer(torch.float64)
    x, passes = rand(4, 5, 8, seed=4), []

    def forward() -> Tensor:
        y = module(x)
        y.register_hook(lambda grad: passes.append(1))
        return y.square().flatten(1).mean(1)

    shared_cotangent_rows(forward, module, rand(4, 50, seed=5))
    assert len(passes) == 1

    def forward_shared() -> tuple[Tensor, Tensor]:
        y = module(x)
        y.register_hook(lambda grad: passes.append(1))
        return y.square().flatten(1).mean(1), y.mean()

    shared_cotangent_rows(forward_shared, module, rand(4, 50, seed=5))
    assert len(passes) == 3


class Mixed(nn.Module):
    """Trainable parameters of every kind: served, a norm's, a convolution's, one used outside its layer, one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.conv = nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(3, 3, 1)
        self.tied, self.unused = nn.Linear(4, 4, bias=False), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.conv(self.norm(torch.tanh(self.linear(x)))))
        return F.linear(torch.tanh(x), self.tied.weight.mT)


def test_what_cannot_be_served_is_named_or_taken_by_k_passes() -> None:
    torch.manual_seed(0)
    module = Mixed().double()
    x, weights = rand(5, 3, 4, seed=1), rand(5, 3, seed=2)
    forward = with_shared(module, x)
    message = r"module: .* got norm.weight, norm.bias, conv.weight, conv.bias, tied.weight. Freeze them, or"
    with pytest.raises(ValueError, match=message):
        shared_cotangent_rows(forward, module, weights)
    expected = k_passes(forward, module, weights)
    plain = torch.autograd.grad(forward()[1], list(module.parameters()), allow_unused=True)
    for fallback in ("unsupported", "all"):
        result = shared_cotangent_rows(forward, module, weights, fallback=fallback)
        assert_rows(result.rows, expected, 1e-12)
        assert not result.rows["unused.weight"].any()
        for (name, p), g in zip(module.named_parameters(), plain, strict=True):
            torch.testing.assert_close(result.shared[name], torch.zeros_like(p) if g is None else g)


def test_rows_must_lead() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).double()
    x, weights = rand(5, 3, 4, seed=1), rand(5, 2, seed=2)

    def forward() -> Tensor:  # the second layer sees rows and tokens in one dimension
        return module[1](torch.tanh(module[0](x)).flatten(0, 1)).reshape(5, 3).sum(1)

    with pytest.raises(ValueError, match=r"1: expected an input \[B, ..., in\] with B = 5 rows, got float64\[15, 4\]"):
        shared_cotangent_rows(forward, module, weights)
    result = shared_cotangent_rows(forward, module, weights, fallback="unsupported")
    assert_rows(result.rows, k_passes(forward, module, weights), 1e-12)


def test_reentrant_checkpointing_is_an_error_never_zeros() -> None:
    module, weights = transformer(torch.float64, use_reentrant=True), rand(4, 2, seed=5)
    x = rand(4, 5, 8, seed=4)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        shared_cotangent_rows(signal_of(module, x.requires_grad_()), module, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no input requires a gradient
        with pytest.raises(ValueError, match="use_reentrant=False"):  # no input requires a gradient
            shared_cotangent_rows(signal_of(module, x.detach()), module, weights)
        head = nn.Linear(8, 8).double()  # a part of the model outside: the signal does depend on something

        def forward() -> Tensor:
            return head(module(x.detach())).square().flatten(1).mean(1)

        with pytest.raises(ValueError, match=r"0\.0\.qkv.* without.*use_reentrant=False"):
            shared_cotangent_rows(forward, nn.ModuleList([module, head]), weights)

    inner = Block(use_reentrant=None).double()

    def twice() -> Tensor:  # once inside reentrant checkpointing, once outside
        y = checkpoint(inner, x.detach().requires_grad_(), use_reentrant=True)
        return inner(y).square().flatten(1).mean(1)

    with pytest.raises(ValueError, match="no reentrant checkpointing"):
        shared_cotangent_rows(twice, inner, weights)


@pytest.mark.parametrize("fallback", ["error", "unsupported", "all"])
@pytest.mark.parametrize("input_requires_grad", [False, True])
@pytest.mark.parametrize("inside", [nn.Conv1d(3, 3, 1), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh()], ids=str)
def test_reentrant_checkpointing_of_anything(inside: nn.Module, input_requires_grad: bool, fallback: Any) -> None:
    inside, first, head = (copy.deepcopy(m).double() for m in (inside, nn.Linear(4, 4), nn.Linear(4, 1)))
    module, weights = nn.ModuleList([first, inside, head]), rand(5, 2, seed=2)
    x = rand(5, 3, 4, seed=1)
    if isinstance(inside, nn.Tanh) and not input_requires_grad:
        return  # nothing trainable inside, nothing lost

    def forward() -> Tensor:
        z = first(x) if input_requires_grad else x
        return (head(checkpoint(inside, z, use_reentrant=True)) + first(x).sum(-1, keepdim=True)).flatten(1).sum(1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no input requires a gradient
        with pytest.raises(ValueError, match="use_reentrant=False"):
            shared_cotangent_rows(forward, module, weights, fallback=fallback)
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_dropout_runs_once_and_so_alike_for_all_rows() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x, weights = rand(6, 4, seed=1), rand(6, 3, seed=2)
    torch.manual_seed(0)
    expected = k_passes(signal_of(module, x), module, weights)
    torch.manual_seed(0)
    assert_rows(shared_cotangent_rows(signal_of(module, x), module, weights).rows, expected, 1e-12)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"bias": "all"}], ids=str)
def test_options_of_peft_and_another_adapter_in_between(options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "up"], init_lora_weights=False, **options)
    module = peft.get_peft_model(transformer(torch.float64), config)
    old = peft.LoraConfig(r=2, target_modules=["qkv", "up"], init_lora_weights=False)
    module.add_adapter("old", old)
    module.to(torch.float64)
    module.set_adapter("default")
    x, weights = rand(4, 5, 8, seed=4), rand(4, 3, seed=5)

    def forward() -> Tensor:
        torch.manual_seed(1)
        module.set_adapter("old")  # switches requires_grad of both
        y_old = module(x).detach()
        module.set_adapter("default")
        return (module(x) * y_old).flatten(1).mean(1)

    rows = shared_cotangent_rows(forward, module, weights).rows
    assert not any(".old." in name for name in rows)
    assert_rows(rows, k_passes(forward, module, weights), 1e-12)


def test_lora_injected_into_a_plain_module() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "up"], init_lora_weights=False)
    module = peft.inject_adapter_in_model(config, transformer(torch.float64)).to(torch.float64)
    x, weights = rand(4, 5, 8, seed=4), rand(4, 3, seed=5)
    rows = shared_cotangent_rows(signal_of(module, x), module, weights).rows
    assert len(rows) == 3 * 2 * 2
    assert_rows(rows, k_passes(signal_of(module, x), module, weights), 1e-12)


@pytest.mark.parametrize("tokens", [(), (6,)])
def test_bf16_parameters(tokens: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    module = copy.deepcopy(exact).bfloat16()
    x, weights = rand(64, *tokens, 16, seed=1, dtype=torch.bfloat16), rand(64, 3, seed=2, dtype=torch.float32)
    rows = shared_cotangent_rows(signal_of(module, x), module, weights).rows
    assert {row.dtype for row in rows.values()} == {torch.bfloat16}
    exact.load_state_dict(module.state_dict())
    expected = k_passes(signal_of(exact, x.float()), exact, weights)
    assert_rows({name: row.float() for name, row in rows.items()}, expected, 0.02)


@pytest.mark.parametrize("tokens", [(), (4,)])
def test_weights_are_not_rounded_to_the_dtype_of_the_activations(tokens: tuple[int, ...]) -> None:
    module = nn.Linear(3, 2)
    x, weights = torch.ones(64, *tokens, 3), rand(64, 5, seed=2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        forward = lambda: module(x).float().flatten(1).sum(1)  # noqa: E731
        rows = shared_cotangent_rows(forward, module, weights).rows
    expected = weights.sum(0) * (tokens or (1,))[0]  # every factor but the weights is exact in bfloat16
    torch.testing.assert_close(rows["weight"], expected[:, None, None].expand(5, 2, 3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows["bias"], expected[:, None].expand(5, 2), rtol=1e-5, atol=1e-5)


def test_a_sequence_of_no_tokens_adds_nothing() -> None:
    module = nn.Linear(4, 2).double()
    x, weights = rand(5, 4, seed=1), rand(5, 3, seed=2)

    def forward() -> Tensor:
        return module(x).square().sum(1) + module(x.new_zeros(5, 0, 4)).flatten(1).sum(1)

    assert_rows(shared_cotangent_rows(forward, module, weights).rows, k_passes(forward, module, weights), 1e-12)


def test_compiled_modules() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, weights = rand(5, 3, 4, seed=1), rand(5, 2, seed=2)
    expected = k_passes(signal_of(module, x), module, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled: Any = torch.compile(module, backend="eager")
        for _ in range(2):  # the second call does not run graphs of the first
            assert_rows(shared_cotangent_rows(signal_of(compiled, x), module, weights).rows, expected, 1e-12)
            torch.testing.assert_close(compiled(x), module(x))


def test_a_no_grad_forward_of_the_same_layers_is_fine() -> None:
    module = transformer(torch.float64)
    x, weights = rand(4, 5, 8, seed=4), rand(4, 2, seed=5)

    def forward() -> Tensor:
        with torch.no_grad():
            reference = module(x)
        return (module(x) - 0.5 * reference).square().flatten(1).mean(1)

    assert_rows(shared_cotangent_rows(forward, module, weights).rows, k_passes(forward, module, weights), 1e-12)


def snapshot(module: nn.Module) -> list[Any]:
    """Everything a call could leave behind."""
    return [
        [
            (
                n,
                m.training,
                sorted(m.__dict__),
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
            )
            for n, m in module.named_modules()
        ],
        [
            (n, p.requires_grad, p._version, None if p.grad is None else p.grad.clone())
            for n, p in module.named_parameters()
        ],
    ]


def test_nothing_is_left_behind() -> None:
    module = lora_transformer(torch.float64)
    module.eval()
    x, weights = rand(4, 5, 8, seed=4), rand(4, 2, seed=5)
    first = next(p for p in module.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    before = snapshot(module)
    shared_cotangent_rows(signal_of(module, x), module, weights)

    def fails_late() -> Tensor:
        module(x)
        raise RuntimeError("the forward failed")

    with pytest.raises(RuntimeError, match="the forward failed"):
        shared_cotangent_rows(fails_late, module, weights)

    def fails_on_the_way_back() -> Tensor:
        y = module(x)
        y.register_hook(lambda grad: 1 / 0)
        return y.square().flatten(1).mean(1)

    with pytest.raises(ZeroDivisionError):
        shared_cotangent_rows(fails_on_the_way_back, module, weights)
    after = snapshot(module)
    assert str(before) == str(after)
    assert_rows(
        shared_cotangent_rows(signal_of(module, x), module, weights).rows,
        k_passes(signal_of(module, x), module, weights),
        1e-12,
    )


def test_a_graph_the_caller_keeps_gives_ordinary_gradients_afterwards() -> None:
    module, x, weights = transformer(torch.float64), rand(4, 5, 8, seed=4), rand(4, 2, seed=5)
    kept: list[Tensor] = []

    def forward() -> Tensor:
        y = module(x)
        kept.append(y.sin().mean())  # made by patched layers; an error on the way back leaves it whole
        y.register_hook(lambda grad: 1 / 0 if len(kept) == 1 else None)
        return y.square().flatten(1).mean(1)

    with pytest.raises(ZeroDivisionError):
        shared_cotangent_rows(forward, module, weights)
    kept.append(module(x).sin().mean())
    found, expected = (torch.autograd.grad(loss, list(module.parameters())) for loss in kept)
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_what_forward_does_beside_running_the_module_is_its_own_business() -> None:
    """Swapped parameters, gradients and even rows taken inside ``forward`` neither disturb the rows nor enter them."""
    torch.manual_seed(0)
    module: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, weights = rand(5, 4, seed=1), rand(5, 3, seed=2)

    def other_parameters() -> Tensor:
        old = {name: p.detach() * 3 for name, p in module.named_parameters()}
        return (module(x) - torch.func.functional_call(module, old, (x,))).square().sum(1)

    def parameters_put_in_their_place() -> Tensor:
        weight = module[0].weight
        module[0].weight = nn.Parameter(2 * weight.detach())  # trainable too, but not one of the rows' parameters
        y_old = module(x)
        module[0].weight = weight
        return (module(x) * y_old).sum(1)

    def frozen_for_a_while() -> Tensor:
        module[0].requires_grad_(False)
        y_half = module(x)
        module[0].requires_grad_(True)
        return (module(x) * y_half).sum(1)

    def ordinary_gradients() -> Tensor:
        z = x.clone().requires_grad_()
        of_x, of_W = torch.autograd.grad(module(z).sum(), [z, module[0].weight])
        return (module(x) * of_x).sum(1) * of_W.sum()

    def rows_of_its_own() -> Tensor:
        inner = shared_cotangent_rows(signal_of(module, x), module, weights).rows
        return module(x).squeeze(1) * inner["0.weight"].sum()

    for forward in (
        other_parameters,
        parameters_put_in_their_place,
        frozen_for_a_while,
        ordinary_gradients,
        rows_of_its_own,
    ):
        result = shared_cotangent_rows(forward, module, weights)
        assert_rows(result.rows, k_passes(forward, module, weights), 1e-12)
    assert not any("forward" in m.__dict__ for m in module.modules())


def derived(module: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(module, {name: 2 * p for name, p in module.named_parameters()}, (x,))


def gradient_of_the_input(module: nn.Module, x: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(torch.tanh(module(z)).sum(), z, create_graph=True)
    return g


class Twice(nn.Module):
    def forward(self, p: Tensor) -> Tensor:
        return 2 * p


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("parametrized weight", r"0\.bias, 0\.parametrizations\.weight\.original"),
        ("parametrized bias", r"0\.parametrizations\.bias\.original"),
        ("functional call", r"0\.weight, 0\.bias, 2\.weight, 2\.bias"),
        ("gradient of the input", r"0\.weight, 2\.weight"),
        ("subclass", r"2\.weight, 2\.bias"),
        ("attention", r"in_proj_weight, in_proj_bias, out_proj\.weight, out_proj\.bias"),
    ],
)
def test_a_parameter_that_gets_its_gradient_another_way_is_found_out(case: str, named: str) -> None:
    torch.manual_seed(0)
    module: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x, weights = rand(5, 3, 4, seed=1), rand(5, 2, seed=2)
    call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)  # noqa: E731
    if case.startswith("parametrized"):
        nn.utils.parametrize.register_parametrization(module[0], case.split()[1], Twice())  # type: ignore[index]
    elif case == "functional call":
        call = derived
    elif case == "gradient of the input":
        call = gradient_of_the_input
    elif case == "subclass":
        module[2] = Scaled(4, 4).double()  # type: ignore[operator]
    else:
        module = nn.MultiheadAttention(4, 2, batch_first=True).double()
        call = lambda module, x: module(x, x, x)[0]  # noqa: E731

    def forward() -> Tensor:
        return call(module, x).square().flatten(1).sum(1)

    with pytest.raises(ValueError, match=rf"module: .* got {named}\. Freeze them, or"):
        shared_cotangent_rows(forward, module, weights)
    result = shared_cotangent_rows(forward, module, weights, fallback="unsupported")
    assert_rows(result.rows, k_passes(forward, module, weights), 1e-12)


def test_an_instance_forward_of_someone_else_is_left_alone() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).double()
    original = module[0].forward
    module[0].forward = lambda input: 2 * original(input)
    x, weights = rand(5, 4, seed=1), rand(5, 2, seed=2)
    forward = signal_of(module, x)
    with pytest.raises(ValueError, match=r"got 0\.weight, 0\.bias"):
        shared_cotangent_rows(forward, module, weights)
    result = shared_cotangent_rows(forward, module, weights, fallback="unsupported")
    assert_rows(result.rows, k_passes(forward, module, weights), 1e-12)
    assert "forward" in module[0].__dict__


def test_bad_input_is_named() -> None:
    module, x = nn.Linear(4, 1), torch.ones(5, 4)
    good = torch.ones(5, 2)
    with pytest.raises(ValueError, match=r"weights: expected a floating-point tensor of shape \[B, K\]"):
        shared_cotangent_rows(lambda: module(x).squeeze(-1), module, torch.ones(5))
    with pytest.raises(ValueError, match=r"signal of shape \[B\] = \[5\], as weights has rows, got float32\[5, 1\]"):
        shared_cotangent_rows(lambda: module(x), module, good)
    not_scalars: list[Any] = [module(x), 0.0, torch.tensor(1)]
    for shared in not_scalars:
        with pytest.raises(ValueError, match="a scalar shared loss"):
            shared_cotangent_rows(partial(lambda s: (module(x).squeeze(-1), s), shared), module, good)
    with pytest.raises(ValueError, match="a shared loss that depends on a trainable parameter"):
        shared_cotangent_rows(lambda: (module(x).squeeze(-1), torch.tensor(1.0)), module, good)
    with pytest.raises(ValueError, match=r"signal or \(signal, shared\), got a tuple of 3"):
        shared_cotangent_rows(lambda: (module(x).squeeze(-1), x, x), module, good)  # type: ignore[arg-type,return-value]
    for empty in (torch.ones(0, 2), torch.ones(5, 0)):
        with pytest.raises(ValueError, match="at least one row and one reward"):
            shared_cotangent_rows(lambda: module(x).squeeze(-1), module, empty)
    with pytest.raises(ValueError, match="fallback"):
        shared_cotangent_rows(lambda: module(x).squeeze(-1), module, good, fallback="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="depends on a trainable parameter"):
        shared_cotangent_rows(lambda: x.sum(1), module, good)
    with pytest.raises(ValueError, match="at least one parameter with requires_grad"):
        shared_cotangent_rows(lambda: module(x).squeeze(-1), copy.deepcopy(module).requires_grad_(False), good)
    not_vectors: list[tuple[Any, str]] = [
        (torch.sum, r"float32\[\]"),
        (torch.diag, r"float32\[3, 3\]"),
        (torch.Tensor.long, r"int64\[3\]"),
        (len, "int 3"),
    ]
    for losses, got in not_vectors:
        with pytest.raises(ValueError, match=rf"losses_fn\(params, \*args\): expected .* \[K\], got {got}"):
            gradient_rows(losses, torch.ones(3))
    with pytest.raises(ValueError, match="chunk_size"):
        gradient_rows(lambda p: p, torch.ones(3), chunk_size=0)
    with pytest.raises(ValueError, match="weights: expected a floating-point tensor of shape"):
        combine_rows({"w": torch.ones(2, 3)}, torch.ones(3))
    with pytest.raises(ValueError, match="same leading K"):
        flatten_rows([torch.ones(2, 3), torch.ones(3, 3)])
    with pytest.raises(ValueError, match="flat: expected P = 4 entries"):
        unflatten_like(torch.ones(3), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_gradient_rows(dtype: torch.dtype, chunk_size: int | None) -> None:
    module = transformer(dtype)
    x, weights = rand(4, 5, 8, seed=4, dtype=dtype), rand(4, 3, seed=5, dtype=dtype)
    params = dict(module.named_parameters())

    def losses(params: dict[str, Tensor], x: Tensor) -> Tensor:
        y = torch.func.functional_call(module, params, (x,))
        return y.square().flatten(1).mean(1) @ weights

    rows = gradient_rows(losses, {name: p.detach() for name, p in params.items()}, x, chunk_size=chunk_size)
    assert_rows(rows, k_passes(signal_of(module, x), module, weights), TOLERANCE[dtype])
    assert_rows(rows, shared_cotangent_rows(signal_of(module, x), module, weights).rows, TOLERANCE[dtype])


def compiled_blocks(module: nn.Module) -> nn.Module:
    """Each block compiled in place, forward and backward, without kernels of its own: those take minutes."""
    torch._dynamo.reset()
    for block in (m for m in module.modules() if isinstance(m, Block)):
        block.compile(backend="aot_eager", dynamic=False)
    return module


def counted(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """The result of a call, the graphs compiled during it, and the breaks between graphs."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    result = call()
    return result, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler warns about while it traces is not ours
def test_compiled_layers_collect_rows_without_leaving_their_graph() -> None:
    """The rows are those of the eager route, and no later call compiles anything anew, whatever K and the weights."""
    module, x = lora_transformer(torch.float64), rand(4, 5, 8, seed=4)
    forward = with_shared(module, x)
    weights = [rand(4, K, seed=K) for K in (6, 6, 3)]
    eager = [shared_cotangent_rows(forward, module, w) for w in weights]
    compiled_blocks(module)
    for again, (w, expected) in enumerate(zip(weights, eager, strict=True)):
        result, graphs, breaks = counted(partial(shared_cotangent_rows, forward, module, w))
        assert graphs == (0 if again else 2)  # one for the first block, whose input needs no gradient
        assert breaks == 0
        assert_rows(result.rows, expected.rows, 1e-12)
        assert_rows(result.shared, expected.shared, 1e-12)
        torch.testing.assert_close(result.signal, expected.signal)
    signal, shared = forward()  # outside a call the layers are ordinary ones again
    params = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(signal.sum() + shared, params)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    ones = shared_cotangent_rows(lambda: signal_of(module, x)(), module, torch.ones(4, 1, dtype=torch.float64))
    for name, g in zip(names, found, strict=True):
        torch.testing.assert_close(g, ones.rows[name][0] + eager[0].shared[name])
    for again, w in enumerate(weights):
        _, graphs, breaks = counted(partial(shared_cotangent_rows, forward, module, w, fallback="all"))
        assert (graphs > 0) == (again == 0)
        assert breaks == 0
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler warns about while it traces is not ours
def test_compiled_layers_keep_every_promise_of_the_eager_ones() -> None:
    """Autocast, other trainable parameters, tied weights, gradients taken in ``forward``, and graphs that are kept."""

    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixed, self.one, self.two = Mixed(), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(self.mixed(x))))

    torch._dynamo.reset()
    torch.manual_seed(0)
    module, x, weights = Compiled().double(), rand(5, 3, 4, seed=1), rand(5, 3, seed=2)
    forward = with_shared(module, x)
    expected = k_passes(forward, module, weights)
    module.compile(backend="aot_eager")
    with pytest.raises(ValueError, match=r"got mixed\.norm\.weight, .*mixed\.tied\.weight\. Freeze them, or"):
        shared_cotangent_rows(forward, module, weights)
    for fallback in ("unsupported", "all"):
        assert_rows(shared_cotangent_rows(forward, module, weights, fallback=fallback).rows, expected, 1e-12)

    layers: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = rand(5, 4, seed=1)
    run: Any = layers
    kept: list[Tensor] = []

    def ordinary_gradients() -> Tensor:
        z = x.clone().requires_grad_()
        of_x, of_W = torch.autograd.grad(run(z).sum(), [z, layers[0].weight])
        kept.append(run(x).sin().mean())
        return (run(x) * of_x).sum(1) * of_W.sum()

    expected = k_passes(ordinary_gradients, layers, weights)
    run = torch.compile(layers, backend="aot_eager")
    result, graphs, _ = counted(lambda: shared_cotangent_rows(ordinary_gradients, layers, weights))
    assert graphs > 0
    assert_rows(result.rows, expected, 1e-12)
    before, after = (torch.autograd.grad(loss, list(layers.parameters())) for loss in kept)
    torch.testing.assert_close(before, after)

    def rows_elsewhere() -> Tensor:
        return run(x.reshape(1, 5, 4)).reshape(5)

    with pytest.raises(ValueError, match=r"0: expected an input \[B, ..., in\] with B = 5 rows, got .*1, 5, 4"):
        shared_cotangent_rows(rows_elsewhere, layers, weights)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # what the compiler warns about while it traces is not ours
def test_compiled_layers_under_autocast_and_checkpointing() -> None:
    torch.manual_seed(0)
    x, weights = rand(4, 5, 8, seed=4, dtype=torch.float32), rand(4, 6, seed=5, dtype=torch.float32)
    module = nn.ModuleList([Block(), Block(use_reentrant=False)])
    module[1].load_state_dict(module[0].state_dict())
    block, within = module

    def autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(x).float().square().flatten(1).mean(1)

    expected, exact = (shared_cotangent_rows(f, block, weights).rows for f in (autocast, signal_of(block, x)))
    compiled_blocks(module)
    assert_rows(shared_cotangent_rows(autocast, block, weights).rows, expected, 0.01)

    def around() -> Tensor:  # as diffusers does it
        return checkpoint(block, x, use_reentrant=False).square().flatten(1).mean(1)

    assert_rows(shared_cotangent_rows(around, block, weights).rows, exact, 1e-5)
    assert_rows(shared_cotangent_rows(signal_of(within, x), within, weights).rows, exact, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no input requires a gradient
        with pytest.raises(ValueError, match="use_reentrant=False"):
            shared_cotangent_rows(lambda: checkpoint(block, x, use_reentrant=True).sum((1, 2)), block, weights)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_graph_compiled_to_be_walked_once_is_never_walked_twice() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 1)).double().requires_grad_(False)
    head: Any = torch.compile(frozen, backend="aot_eager")
    module, x, weights = nn.Linear(4, 4).double(), rand(5, 4, seed=1), rand(5, 2, seed=2)
    expected = k_passes(lambda: frozen(module(x)).squeeze(1), module, weights)
    head(module(x)).sum().backward()  # compiled outside of a call, by PyTorch's default

    def forward() -> tuple[Tensor, Tensor]:
        y = head(module(x)).squeeze(1)
        return y, y.mean()

    assert_rows(shared_cotangent_rows(lambda: forward()[0], module, weights).rows, expected, 1e-12)
    with pytest.raises(ValueError, match=r"no compiled code without trainable layers.*donated_buffer = False"):
        shared_cotangent_rows(forward, module, weights)
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        head(module(x)).sum().backward()
    assert_rows(shared_cotangent_rows(forward, module, weights).rows, expected, 1e-12)
    torch._dynamo.reset()


def small(seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(), rand(5, 3, seed=seed)


def test_verify_is_one_more_backward_and_changes_nothing() -> None:
    module, x = small()
    passes: list[int] = []

    def forward() -> tuple[Tensor, Tensor]:
        y = module(x)
        y.register_hook(lambda _: passes.append(1))
        return y.sin().squeeze(-1), y.square().mean()

    found = []
    for verify in (False, True):
        passes.clear()
        found.append(shared_cotangent_rows(forward, module, rand(5, 2, seed=3), verify=verify))
        assert len(passes) == 2 + verify
    assert all(torch.equal(found[0].rows[name], found[1].rows[name]) for name in found[0].rows)
    assert all(torch.equal(found[0].shared[name], found[1].shared[name]) for name in found[0].shared)


def test_verify_names_a_sequence_first_layer() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x.transpose(0, 1)).transpose(0, 1)))

    torch.manual_seed(0)
    module, x = SequenceFirst().double(), rand(4, 4, 3, seed=1)  # the sequence is as long as the batch
    with pytest.raises(
        ValueError, match=r"expected rows that agree with autograd, got others for first\.weight"
    ) as info:
        shared_cotangent_rows(signal_of(module, x), module, rand(4, 2, seed=2), verify=True)
    assert "second" not in str(info.value)
    shared_cotangent_rows(signal_of(module, x), module, rand(4, 2, seed=2), fallback="all", verify=True)


def test_rows_that_are_not_finite_are_passed_on() -> None:
    module, x = small()
    x[2] = torch.nan
    found = shared_cotangent_rows(signal_of(module, x), module, rand(5, 2, seed=3), verify=True)
    assert found.rows["0.weight"].isnan().all()


def test_parameters_that_are_not_reached_are_told() -> None:
    module, x = small()
    both = nn.ModuleDict({"used": module, "unused": nn.Linear(3, 1).double()})
    fallbacks: tuple[Any, ...] = ("error", "unsupported", "all")
    for fallback in fallbacks:
        found = shared_cotangent_rows(signal_of(module, x), both, rand(5, 2, seed=3), fallback=fallback)
        assert found.unreached == ("unused.weight", "unused.bias")
        assert not found.rows["unused.weight"].any()
        other, _ = small(1)
        with pytest.raises(
            ValueError, match=r"module: expected parameters that forward\(\) uses, got none of them used"
        ):
            shared_cotangent_rows(signal_of(module, x), other, rand(5, 2, seed=3), fallback=fallback)


def test_calls_without_gradients_say_so() -> None:
    module, x = small()
    for without in (torch.no_grad(), torch.inference_mode()):
        with without, pytest.raises(ValueError, match="shared_cotangent_rows: expected gradients enabled"):
            shared_cotangent_rows(signal_of(module, x), module, rand(5, 2, seed=3))

    def detached() -> Tensor:
        with torch.no_grad():
            return signal_of(module, x)()

    with pytest.raises(ValueError, match=r"forward\(\): expected a signal that depends .* detached, or computed under"):
        shared_cotangent_rows(detached, module, rand(5, 2, seed=3))


def test_what_is_no_plain_module_is_refused_by_name() -> None:
    module, x = small()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = nn.Sequential(torch.jit.script(module))
    with pytest.raises(ValueError, match="module: expected Python modules, got TorchScript 0"):
        shared_cotangent_rows(signal_of(scripted, x), scripted, rand(5, 2, seed=3))
    sharded = nn.Linear(3, 1).double()
    setattr(sharded.weight, "device_mesh", "as a DTensor has one")  # noqa: B010
    with pytest.raises(ValueError, match="expected trainable parameters that are plain tensors, got DTensor weight"):
        shared_cotangent_rows(signal_of(sharded, x), sharded, rand(5, 2, seed=3))


def test_a_layer_inside_vmap_is_named_or_takes_k_passes() -> None:
    module, x = small()
    forward: Callable[[], Tensor] = lambda: torch.func.vmap(module)(x).squeeze(-1)  # noqa: E731
    weights = rand(5, 2, seed=3)
    with pytest.raises(ValueError, match=r"0: expected an input .* got a call inside vmap"):
        shared_cotangent_rows(forward, module, weights)
    found = shared_cotangent_rows(forward, module, weights, fallback="unsupported", verify=True)
    assert_rows(found.rows, k_passes(forward, module, weights), 1e-12)
