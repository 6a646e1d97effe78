"""The fused functions against float64 arithmetic of the plain formula: both ways, every dtype, compiled."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from oracles import adapted_weight, config_of, formula_weight, perturb, relative_error
from test_layers import adapt, kinds, linear, update_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_diffusion.adapters import kernels
from dora_diffusion.adapters.injection import inject_adapter
from dora_diffusion.adapters.layers import AdaptedLayer

# (tokens, in, out): the first three are merged in float32, the others are not.
SHAPES = [(200, 24, 40), (300, 64, 16), (600, 320, 320), (5, 24, 40), (1, 3, 9), (77, 320, 640)]
# Half precision: one unit in the last place, root mean square over the tensor.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def test_the_shapes_go_both_ways():
    tensors = [(torch.empty(t, n_in), torch.empty(n_out, n_in)) for t, n_in, n_out in SHAPES]
    assert [kernels.pays_to_merge(x, W0) for x, W0 in tensors] == [True, True, True, False, False, False]
    assert not any(kernels.pays_to_merge(x.bfloat16(), W0.bfloat16()) for x, W0 in tensors)


def exact(layer: AdaptedLayer, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output and gradients by the plain formula in float64, n a constant."""
    update = update_of(layer)
    x = x.detach().double().requires_grad_()
    p = {name: v.detach().double().requires_grad_() for name, v in update.named_parameters()}
    W0, bias = layer.base.weight.double(), layer.base.bias
    y = F.linear(x, formula_weight(W0, p, update.scale), None if bias is None else bias.double())
    y.backward(upstream.double())
    return {"y": y.detach(), "x": x.grad, **{name: v.grad for name, v in p.items()}}


def found(layer: AdaptedLayer, x: Tensor, upstream: Tensor, call=lambda layer, x: layer(x)) -> dict[str, Tensor]:
    x = x.detach().requires_grad_(x.requires_grad)
    y = call(layer, x)
    y.backward(upstream.to(y.dtype))
    gradients = {name: p.grad for name, p in update_of(layer).named_parameters()}
    return {"y": y.detach(), **({"x": x.grad} if x.requires_grad else {}), **gradients}


def rms_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).square().mean() / b.double().square().mean()).sqrt().item()


def quick_adapt(monkeypatch: pytest.MonkeyPatch, base: nn.Linear, kind: str, **options: float) -> AdaptedLayer:
    """An adapted layer that fails if it takes the plain way."""
    layer = adapt(base, kind, **options).train()
    monkeypatch.setattr(layer.frozen, "output", lambda x: pytest.fail("the plain formula was used"))
    return layer


@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 8, 128])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients_are_the_plain_formulas(monkeypatch, kind, shape, rank, bias, dtype):
    tokens, n_in, n_out = shape
    torch.manual_seed(0)
    layer = quick_adapt(monkeypatch, linear(n_in, n_out, bias).to(dtype), kind, rank=rank, alpha=1.5 * rank**0.5)
    x = torch.randn(tokens, n_in).to(dtype).requires_grad_()
    upstream = torch.randn(tokens, n_out).to(dtype)
    expected = exact(layer, x, upstream)
    result = found(layer, x, upstream)
    assert result.keys() == expected.keys()
    for name, value in result.items():
        assert value.dtype == (dtype if name in "xy" else torch.float32)
        assert rms_error(value, expected[name]) < ALLOWED[dtype], name


@kinds
@pytest.mark.parametrize("tokens", [5, 200])
def test_autocast_computes_in_bfloat16_and_hands_float32_gradients_back(monkeypatch, kind, tokens):
    layer = quick_adapt(monkeypatch, linear(), kind)
    x = torch.randn(tokens, 24, requires_grad=True)
    upstream = torch.randn(tokens, 40)

    def call(layer: AdaptedLayer, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    expected = exact(layer, x, upstream)
    for name, value in found(layer, x, upstream, call).items():
        assert value.dtype == (torch.bfloat16 if name == "y" else torch.float32)
        assert rms_error(value, expected[name]) < ALLOWED[torch.bfloat16], name


@kinds
@pytest.mark.parametrize("tokens", [5, 200])
def test_an_input_without_a_gradient_leaves_the_others_as_they_are(monkeypatch, kind, tokens):
    layer = quick_adapt(monkeypatch, linear(), kind)
    x, upstream = torch.randn(tokens, 24), torch.randn(tokens, 40)
    expected = exact(layer, x, upstream)
    for name, value in found(layer, x, upstream).items():
        assert relative_error(value, expected[name]) < 1e-5, name


@kinds
@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_numbers(monkeypatch, kind, tokens, use_reentrant):
    x, upstream = torch.randn(tokens, 24, requires_grad=True), torch.randn(tokens, 40)
    base = linear()
    plain = found(quick_adapt(monkeypatch, base, kind), x, upstream)
    again = found(
        quick_adapt(monkeypatch, base, kind),
        x,
        upstream,
        lambda layer, x: checkpoint(layer, x, use_reentrant=use_reentrant),
    )
    assert all(relative_error(again[name], plain[name]) < 1e-6 for name in plain)


@pytest.mark.parametrize("tokens", [5, 200])
def test_a_magnitude_of_exactly_zero_has_the_plain_formulas_gradient(tokens):
    base = linear()
    layer = adapt(base, "dora").train()
    with torch.no_grad():
        update_of(layer).magnitude[3] = 0.0
    x, upstream = torch.randn(tokens, 24, requires_grad=True), torch.randn(tokens, 40)
    expected = exact(layer, x, upstream)
    assert expected["magnitude"][3].abs() > 0.1
    for name, value in found(layer, x, upstream).items():
        assert relative_error(value, expected[name]) < 1e-5, name


@kinds
@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("trains", [True, False], ids=["training", "drawing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_the_start_the_output_has_the_bases_bits(kind, tokens, bias, trains, dtype):
    base = linear(320, 320, bias).to(dtype)
    layer = adapt(base, kind, perturbed=False).train(trains)
    x = torch.randn(tokens, 320).to(dtype)
    with torch.set_grad_enabled(trains):
        y, y0 = layer(x), base(x)
    if kind == "dora" and trains and not bias and tokens == 5 and dtype == torch.float32:
        # A's rows went through the base's product too, and how many rows it has may decide how processors round.
        assert relative_error(y, y0) < 1e-6
        y0 = base(torch.cat((x, update_of(layer).lora_A)))[:tokens]
    assert torch.equal(y, y0)


@pytest.mark.parametrize("names", [("dora",), ("lora",), ("dora", "lora", "dora")], ids="+".join)
@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_gradients_any_adapters_at_any_strengths_add_up(monkeypatch, names, tokens, bias, dtype):
    base = linear(bias=bias).to(dtype)
    layer = adapt(base, *names).eval()
    for i, update in enumerate(layer.updates.values()):
        update.strength = 0.4 + 0.5 * i
    expected = F.linear(
        (x := torch.randn(2, tokens, 24).to(dtype)).double(),
        layer.merged_weight().double() if dtype == torch.float32 else merged_in_float64(layer),
        None if base.bias is None else base.bias.double(),
    )
    monkeypatch.setattr(layer.frozen, "output", lambda x: pytest.fail("the plain formula was used"))
    with torch.no_grad():
        assert rms_error(layer(x), expected) < ALLOWED[dtype] / (5 if dtype == torch.float32 else 1)


def merged_in_float64(layer: AdaptedLayer) -> Tensor:
    W0 = layer.base.weight.double()
    return W0 + sum(u.strength * u.delta_weight().double() for u in layer.updates.values())  # type: ignore[operator]


def test_a_hooked_base_is_called_and_not_bypassed():
    base = linear()
    layer = adapt(base, "dora").train()
    seen = []
    handle = base.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    x = torch.randn(200, 24)
    hooked = layer(x)
    handle.remove()
    assert seen == [(200, 40)]
    assert relative_error(layer(x), hooked) < 1e-6


# Compiled.


def block() -> nn.Module:
    torch.manual_seed(0)
    return BasicTransformerBlock(32, 2, 16, cross_attention_dim=24)


def run_block(call, model: nn.Module, adapter) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 50, 32, generator=g).requires_grad_()
    words = torch.randn(2, 7, 24, generator=g)
    for p in adapter.parameters():
        p.grad = None
    y = call(x, encoder_hidden_states=words)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in adapter.parameters())]


@kinds
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
        ),
    ],
)
def test_an_adapted_block_compiles_as_one_graph_with_the_same_numbers(kind, backend):
    torch._dynamo.reset()
    model = block()
    adapter = perturb(inject_adapter(model, config_of(kind, rank=4, alpha=6), seed=0))
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for eager, traced in zip(run_block(model, model, adapter), run_block(compiled, model, adapter)):
        assert relative_error(traced, eager) < 1e-5


@kinds
def test_another_strength_does_not_compile_again(kind):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = block()
    adapter = perturb(inject_adapter(model, config_of(kind, rank=4, alpha=6), seed=0))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x, words = torch.randn(2, 50, 32), torch.randn(2, 7, 24)
    with torch.no_grad():
        for strength in (1.0, 0.5, 0.0, 1.3):
            adapter.strength = strength
            expected = model(x, encoder_hidden_states=words)
            assert relative_error(compiled(x, encoder_hidden_states=words), expected) < 1e-5
    assert counter.frame_count == 1


# Projections that one linear layer holds together.


@kinds
def test_a_fused_projection_is_adapted_as_one_layer(kind):
    model = block()
    model.attn1.fuse_projections()
    adapter = perturb(inject_adapter(model, config_of(kind, target_modules=("to_qkv",), rank=4), seed=0))
    layer = model.attn1.to_qkv
    assert isinstance(layer, AdaptedLayer)
    assert layer.base.weight.shape == (96, 32)
    (update,) = adapter.updates().values()
    x = torch.randn(2, 50, 32)
    W = adapted_weight(layer.base.weight, update)
    assert relative_error(layer(x), F.linear(x.double(), W)) < 1e-5
