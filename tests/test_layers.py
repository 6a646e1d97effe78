"""The layers against float64 arithmetic of the plain formula, and against PEFT's layers, in output and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lycoris.modules.locon import LoConModule
from oracles import (
    BY_INPUT,
    adapted_weight,
    formula_weight,
    largest_difference,
    lora_weight,
    perturb_update,
    relative_error,
)
from peft.tuners.lora import Conv2d as PeftConv2d
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dora_diffusion.adapters.frozen import freeze_view
from dora_diffusion.adapters.kernels import row_norms
from dora_diffusion.adapters.layers import AdaptedLayer, DoRAUpdate, InputAxisDoRAUpdate, LoRAUpdate
from dora_diffusion.errors import AdapterStateError

UPDATES = {"dora": DoRAUpdate, BY_INPUT: InputAxisDoRAUpdate, "lora": LoRAUpdate}
kinds = pytest.mark.parametrize("kind", UPDATES)


def linear(n_in: int = 24, n_out: int = 40, bias: bool = True) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=bias).requires_grad_(False)


def conv(**options: int) -> nn.Conv2d:
    return nn.Conv2d(8, 12, 3, padding=1, **options).requires_grad_(False)


def adapt(
    base: nn.Module,
    *kinds: str,
    rank: int = 4,
    alpha: float = 6.0,
    dropout: float = 0.0,
    perturbed: bool = True,
    seed: int = 0,
) -> AdaptedLayer:
    """The layer with one update of each kind, named "0", "1" and so on."""
    frozen = freeze_view(base)
    assert frozen is not None
    layer = AdaptedLayer(base, frozen)
    g = torch.Generator().manual_seed(seed)
    for i, kind in enumerate(kinds):
        update = UPDATES[kind](frozen, rank, alpha / rank, dropout, g)
        if perturbed:
            perturb_update(update, g)
        layer.updates[str(i)] = update
    return layer


def update_of(layer: AdaptedLayer, name: str = "0") -> LoRAUpdate:
    return layer.updates[name]  # type: ignore[return-value]


def apply_weight(base: nn.Module, x: Tensor, W: Tensor) -> Tensor:
    """The base's own map in float64, with W in its weight's place."""
    x, bias = x.double(), None if base.bias is None else base.bias.double()
    if isinstance(base, nn.Conv2d):
        return F.conv2d(x, W, bias, base.stride, base.padding, base.dilation, base.groups)
    return F.linear(x, W, bias)


def example(base: nn.Module, batch: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(9)
    shape = (batch, base.in_channels, 9, 7) if isinstance(base, nn.Conv2d) else (batch, 5, base.in_features)
    return torch.randn(shape, generator=g)


BASES = {
    "linear": linear,
    "linear without bias": lambda: linear(bias=False),
    "conv 3x3": conv,
    "conv of stride 2": lambda: conv(stride=2),
    "conv dilated": lambda: conv(dilation=2),
    "conv of 4 groups": lambda: conv(groups=4),
}
all_bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())


# The formula, forward.


@kinds
@all_bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_the_output_is_the_bases_bit_for_bit(kind, base, dtype):
    module = base().to(dtype)
    x = example(module).to(dtype)
    assert torch.equal(adapt(module, kind, perturbed=False)(x), module(x))


@kinds
@pytest.mark.parametrize("rank", [1, 7, 16, 64])
@pytest.mark.parametrize("shape", [(24, 40), (64, 16), (3, 9), (320, 320)], ids=str)
def test_a_linear_layers_forward_is_the_plain_formula(kind, rank, shape):
    base = linear(*shape)
    layer = adapt(base, kind, rank=rank, alpha=1.5 * rank)
    x = example(base)
    W = adapted_weight(base.weight, update_of(layer))
    assert relative_error(W, base.weight) > 0.05, "the adapter must change something for this test to mean anything"
    assert relative_error(layer(x), apply_weight(base, x, W)) < 2e-6


@kinds
@all_bases
def test_every_kind_of_layers_forward_is_the_plain_formula(kind, base):
    module = base()
    layer = adapt(module, kind)
    x = example(module)
    expected = apply_weight(module, x, adapted_weight(module.weight, update_of(layer)))
    assert relative_error(layer(x), expected) < 2e-6


@kinds
@all_bases
def test_forward_is_the_merged_weights_forward_bias_included(kind, base):
    module = base()
    layer = adapt(module, kind)
    x = example(module)
    merged = copy.deepcopy(module)
    merged.weight.copy_(layer.merged_weight())
    assert relative_error(layer(x), merged(x)) < 2e-6
    assert relative_error(layer.merged_weight(), adapted_weight(module.weight, update_of(layer))) < 1e-6


@kinds
@pytest.mark.parametrize("base", [linear, conv], ids=["linear", "conv"])
def test_the_bias_is_never_scaled(kind, base):
    module = base()
    layer = adapt(module, kind)
    y = layer(torch.zeros_like(example(module)))
    bias = module.bias if isinstance(module, nn.Linear) else module.bias[:, None, None]
    assert torch.equal(y, bias.expand_as(y))


def test_a_huge_bias_costs_no_more_than_rounding():
    base = linear()
    base.bias.fill_(1000.0)
    layer = adapt(base, "dora")
    x = example(base)
    expected = apply_weight(base, x, adapted_weight(base.weight, update_of(layer)))
    assert relative_error(layer(x), expected) < 1e-6


@pytest.mark.parametrize("base", [linear, conv], ids=["linear", "conv"])
def test_zero_rows_give_zero_rows_and_finite_gradients(base):
    module = base()
    module.weight[1] = 0.0  # an untouched zero row, as pruned and zero-initialised layers have them
    module.weight[2] = 0.0
    layer = adapt(module, "dora")
    update = update_of(layer)
    with torch.no_grad():
        update.lora_B[1] = 0.0  # n is zero there; row 2 has n > 0 and m = 0
        update.magnitude[3] = 0.0
    x = example(module).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    rows = y.movedim(1, -1) if isinstance(module, nn.Conv2d) else y
    assert largest_difference(rows[..., 1:4], module.bias[1:4].expand_as(rows[..., 1:4])) < 1e-6
    for gradient in (x.grad, update.lora_A.grad, update.lora_B.grad, update.magnitude.grad):
        assert torch.isfinite(gradient).all()
    assert torch.isfinite(layer.merged_weight()).all()
    assert not layer.merged_weight()[1:4].abs().max() > 1e-6


def test_a_zero_row_is_the_bases_at_the_start():
    base = linear()
    base.weight[1] = 0.0
    x = example(base)
    assert torch.equal(adapt(base, "dora", perturbed=False)(x), base(x))


# The norm.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [lambda: linear(320, 64), conv], ids=["linear", "conv"])
def test_the_norm_has_float32_accuracy_whatever_the_weights_dtype(base, dtype):
    module = base().to(dtype)
    update = update_of(adapt(module, "dora", rank=8))
    V = lora_weight(module.weight, update.lora_A.detach(), update.lora_B.detach(), update.scale)
    assert update.norm().dtype == torch.float32
    assert relative_error(update.norm(), torch.linalg.vector_norm(V.flatten(1), dim=1)) < 1e-6
    start = update_of(adapt(module, "dora", perturbed=False)).magnitude
    assert relative_error(start, torch.linalg.vector_norm(module.weight.double().flatten(1), dim=1)) < 1e-6


@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 30.0])
def test_row_norms_is_the_norm_of_the_sum_for_updates_of_any_size(size):
    W0, A, B = torch.randn(50, 33), torch.randn(6, 33), size * torch.randn(50, 6)
    found = row_norms(W0.square().sum(1), W0 @ A.T, A, B, 0.7)
    expected = torch.linalg.norm(W0.double() + 0.7 * B.double() @ A.double(), dim=1)
    assert ((found - expected).abs() / expected).max() < 1e-5


def test_the_norm_follows_an_optimizer_step():
    base = linear()
    layer = adapt(base, "dora")
    x = example(base)
    optimizer = torch.optim.AdamW(update_of(layer).parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        expected = apply_weight(base, x, adapted_weight(base.weight, update_of(layer)))
        assert relative_error(layer(x).detach(), expected) < 2e-6


class WritesThroughData(torch.optim.SGD):
    """As Prodigy, 8-bit Adam and an EMA's copy_to write: autograd's version counter does not see it."""

    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


def test_the_norm_follows_an_optimizer_that_autograd_does_not_see():
    base = linear()
    layer = adapt(base, "dora").train()
    x = example(base)
    optimizer = WritesThroughData(update_of(layer).parameters(), lr=0.05)
    layer(x).square().mean().backward()
    optimizer.step()
    expected = apply_weight(base, x, adapted_weight(base.weight, update_of(layer)))
    assert relative_error(layer(x).detach(), expected) < 2e-6


def test_a_norm_kept_while_drawing_is_made_anew_after_such_an_optimizers_steps():
    base = linear()
    layer = adapt(base, "dora").eval()
    x = example(base)
    layer(x)
    layer.train()
    optimizer = WritesThroughData(update_of(layer).parameters(), lr=0.05)
    layer(x).square().mean().backward()
    optimizer.step()
    layer.eval()
    expected = apply_weight(base, x, adapted_weight(base.weight, update_of(layer)))
    assert relative_error(layer(x).detach(), expected) < 2e-6


def test_with_the_norm_kept_there_is_one_base_product_and_never_two():
    base = Packed(linear())
    layer = adapt(base, "dora").eval()
    x = example(base)
    layer(x)
    calls = base.calls
    layer(x)
    assert base.calls == calls + 1


def test_training_goes_on_after_a_look_in_inference_mode():
    base = linear()
    layer = adapt(base, "dora").eval()  # the norm is kept, and was made in inference mode
    x = example(base)
    with torch.inference_mode():
        before = layer(x)
    y = layer(x)
    y.square().sum().backward()
    assert relative_error(y, before) < 1e-6  # drawing and training take different functions
    assert torch.isfinite(update_of(layer).magnitude.grad).all()


def test_a_layer_can_be_adapted_in_inference_mode():
    base = linear()
    x = example(base)
    with torch.inference_mode():
        layer = adapt(base, "dora").eval()
        found = layer(x)
    with torch.no_grad():
        assert torch.equal(found, adapt(base, "dora").eval()(x))


# Gradients.


@kinds
@pytest.mark.parametrize("rank", [1, 4, 64])
@all_bases
def test_gradients_are_the_plain_formulas_in_float64(kind, base, rank):
    module = base()
    layer = adapt(module, kind, rank=rank)
    update = update_of(layer)
    x = example(module).requires_grad_()
    y = layer(x)
    upstream = torch.randn(y.shape)
    y.backward(upstream)

    exact_x = x.detach().double().requires_grad_()
    exact = {name: p.detach().double().requires_grad_() for name, p in update.named_parameters()}
    apply_weight(module, exact_x, formula_weight(module.weight, exact, update.scale)).backward(upstream.double())

    assert relative_error(x.grad, exact_x.grad) < 1e-5
    for name, parameter in update.named_parameters():
        assert relative_error(parameter.grad, exact[name].grad) < 1e-5, name


@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, None], ids=["conv 3x3", "conv of stride 2", "linear"])
def test_output_and_gradients_are_those_of_pefts_layers(kind, options):
    base = linear() if options is None else conv(**options)
    layer = adapt(base, kind)
    update = update_of(layer)
    config = LoraConfig(r=4, lora_alpha=6, use_dora=kind == "dora", lora_dropout=0.0)
    peft_class = PeftLinear if options is None else PeftConv2d
    peft = peft_class(copy.deepcopy(base), "a", config, r=4, lora_alpha=6)
    theirs = {"lora_A": peft.lora_A["a"].weight, "lora_B": peft.lora_B["a"].weight}
    if kind == "dora":
        theirs["magnitude"] = peft.lora_magnitude_vector["a"].weight
    with torch.no_grad():
        for name, parameter in update.named_parameters():
            theirs[name].copy_(parameter.reshape(theirs[name].shape))

    x, peft_x = (example(base).requires_grad_() for _ in range(2))
    y, peft_y = layer(x), peft(peft_x)
    upstream = torch.randn(y.shape)
    y.backward(upstream)
    peft_y.backward(upstream)
    assert relative_error(y, peft_y) < 1e-5
    assert relative_error(x.grad, peft_x.grad) < 1e-5
    for name, parameter in update.named_parameters():
        assert relative_error(parameter.grad.flatten(), theirs[name].grad.flatten()) < 1e-5, name


@pytest.mark.parametrize("options", [{}, {"stride": 2}, None], ids=["conv 3x3", "conv of stride 2", "linear"])
def test_the_output_by_input_is_that_of_lycoris(options):
    """LyCORIS differentiates the norm too, which the paper and this project hold constant: outputs alone are alike."""
    base = linear() if options is None else conv(**options)
    layer = adapt(base, BY_INPUT)
    update = update_of(layer)
    lycoris = LoConModule(
        "x", copy.deepcopy(base), lora_dim=4, alpha=6, weight_decompose=True, wd_on_out=False, bypass_mode=False
    )
    with torch.no_grad():
        lycoris.lora_down.weight.copy_(update.lora_A)
        lycoris.lora_up.weight.copy_(update.lora_B)
        lycoris.dora_scale.copy_(update.input_magnitude.reshape(lycoris.dora_scale.shape))
    x = example(base)
    assert relative_error(layer(x), lycoris(x)) < 1e-5
    assert relative_error(layer(x), base(x)) > 0.05


@kinds
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(kind, use_reentrant):
    base = linear()
    gradients = []
    for call in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        layer = adapt(base, kind)
        x = example(base).requires_grad_()
        call(layer, x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in update_of(layer).parameters())])
    for plain, checkpointed in zip(*gradients):
        # The reentrant kind runs forward without gradients first, where the numbers come by another function.
        assert torch.equal(plain, checkpointed) or (use_reentrant and relative_error(checkpointed, plain) < 1e-6)


@kinds
def test_with_strength_the_gradients_shrink_with_it(kind):
    base = linear()
    gradients = []
    for strength in (1.0, 0.25):
        layer = adapt(base, kind)
        update_of(layer).strength = strength
        layer(example(base)).sum().backward()
        gradients.append([p.grad for p in update_of(layer).parameters()])
    for full, quarter in zip(*gradients):
        assert relative_error(4 * quarter, full) < 1e-6


# Strength, and several adapters.


@kinds
@all_bases
def test_strength_is_linear_between_the_base_and_the_adapted_weight(kind, base):
    module = base()
    layer = adapt(module, kind)
    update = update_of(layer)
    x = example(module)
    W0, W1 = module.weight.double(), adapted_weight(module.weight, update)
    for w in (-0.5, 0.3, 0.8, 1.7):
        update.strength = w
        W = W0 + w * (W1 - W0)
        assert relative_error(layer(x), apply_weight(module, x, W)) < 3e-6
        assert relative_error(layer.merged_weight(), W) < 1e-6


@kinds
@all_bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_is_the_base_bit_for_bit(kind, base, dtype):
    module = base().to(dtype)
    layer = adapt(module, kind)
    update_of(layer).strength = 0.0
    x = example(module).to(dtype)
    assert torch.equal(layer(x), module(x))
    assert torch.equal(layer.merged_weight(), module.weight)


@kinds
def test_at_strength_zero_even_an_adapter_that_overflowed_leaves_the_base_alone(kind):
    base = linear()
    layer = adapt(base, kind)
    with torch.no_grad():
        update_of(layer).lora_B.fill_(torch.inf)
    update_of(layer).strength = 0.0
    x = example(base)
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.merged_weight(), base.weight)


def test_the_norm_does_not_depend_on_the_strength():
    update = update_of(adapt(linear(), "dora"))
    norm = update.norm().clone()
    update.strength = 0.3
    assert torch.equal(update.norm(), norm)


@pytest.mark.parametrize("pair", [("dora", "lora"), ("dora", "dora"), ("lora", "lora")], ids="+".join)
@pytest.mark.parametrize("base", [linear, conv], ids=["linear", "conv"])
def test_adapters_add_their_differences_whatever_their_order(base, pair):
    module = base()
    layer = adapt(module, *pair)
    update_of(layer, "0").strength, update_of(layer, "1").strength = 0.6, 0.9
    swapped = AdaptedLayer(module, layer.frozen)
    swapped.updates["1"], swapped.updates["0"] = layer.updates["1"], layer.updates["0"]
    x = example(module)
    W0 = module.weight.double()
    W = W0 + sum(w * (adapted_weight(W0, update_of(layer, name)) - W0) for name, w in (("0", 0.6), ("1", 0.9)))
    expected = apply_weight(module, x, W)
    assert relative_error(layer(x), expected) < 3e-6
    assert relative_error(swapped(x), expected) < 3e-6
    assert relative_error(layer.merged_weight(), W) < 1e-6


# Low precision.


@kinds
def test_a_bfloat16_base_takes_a_float32_adapter(kind):
    base = linear(64, 48).to(torch.bfloat16)
    layer = adapt(base, kind)
    x = example(base).to(torch.bfloat16).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    expected = apply_weight(base, x.detach(), adapted_weight(base.weight, update_of(layer)))
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 0.02
    assert {p.grad.dtype for p in update_of(layer).parameters()} == {torch.float32}


@kinds
@pytest.mark.parametrize("base", [linear, conv], ids=["linear", "conv"])
def test_autocast_runs_the_layer_in_bfloat16_and_the_norm_in_float32(kind, base):
    module = base()
    layer = adapt(module, kind)
    x = example(module)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        merged = layer.merged_weight()
    expected = apply_weight(module, x, adapted_weight(module.weight, update_of(layer)))
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 0.02
    assert relative_error(merged, adapted_weight(module.weight, update_of(layer))) < 1e-6
    if kind == "dora":
        kept = update_of(layer).norm()  # made under autocast
        assert torch.equal(kept, update_of(adapt(module, kind)).norm())


# Dropout.


def dropped_formula(base: nn.Module, update: LoRAUpdate, x: Tensor, p: float) -> Tensor:
    """base(x) + drop(x) (W' - W0)^T with one mask, in float64: the authors' code."""
    dropped = F.dropout(x, p).double()
    W0 = base.weight.double()
    change = adapted_weight(base.weight, update) - W0
    if isinstance(base, nn.Conv2d):
        return apply_weight(base, x, W0) + F.conv2d(dropped, change, None, base.stride, base.padding)
    return apply_weight(base, x, W0) + F.linear(dropped, change)


@kinds
@pytest.mark.parametrize("base", [linear, conv], ids=["linear", "conv"])
def test_in_training_one_dropout_mask_falls_on_all_that_the_adapter_adds(kind, base):
    module = base()
    layer = adapt(module, kind, dropout=0.4).train()
    x = example(module)
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    expected = dropped_formula(module, update_of(layer), x, 0.4)
    assert relative_error(found, expected) < 2e-6
    assert relative_error(found, apply_weight(module, x, adapted_weight(module.weight, update_of(layer)))) > 0.01


@kinds
def test_in_eval_mode_nothing_is_dropped(kind):
    base = linear()
    layer = adapt(base, kind, dropout=0.4).eval()
    x = example(base)
    expected = apply_weight(base, x, adapted_weight(base.weight, update_of(layer)))
    assert relative_error(layer(x), expected) < 2e-6


# A layer whose weight is packed.


class Packed(nn.Module):
    """A linear layer that keeps eight-bit codes in one flat tensor, as quantised layers do."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.steps = nn.Parameter(dense.weight.abs().amax(1, keepdim=True) / 127, requires_grad=False)
        codes = (dense.weight / self.steps).round().to(torch.int8)
        self.weight = nn.Parameter(codes.flatten().view(torch.uint8), requires_grad=False)
        self.bias = dense.bias
        self.calls = 0

    def unpacked(self) -> Tensor:
        return self.weight.view(torch.int8).reshape(self.out_features, self.in_features) * self.steps

    def dense_twin(self) -> nn.Linear:
        layer = linear(self.in_features, self.out_features)
        layer.weight.copy_(self.unpacked())
        layer.bias.copy_(self.bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.linear(x, self.unpacked().to(x.dtype), self.bias.to(x.dtype))


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_packed_layer_gives_what_its_dense_twin_gives(kind, dropout):
    base = Packed(linear(300, 40))  # more columns than one block of rows that is sent through it
    results = []
    for module in (base, base.dense_twin()):
        layer = adapt(module, kind, dropout=dropout).train()
        x = example(module).requires_grad_()
        torch.manual_seed(3)
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in update_of(layer).parameters())])
    for packed, dense in zip(*results):
        assert relative_error(packed, dense) < 1e-5


def test_a_packed_layer_is_the_bases_at_the_start_bit_for_bit():
    base = Packed(linear())
    x = example(base)
    assert torch.equal(adapt(base, "dora", perturbed=False)(x), base(x))


def test_fusing_into_a_packed_layer_says_what_to_do():
    layer = adapt(Packed(linear()), "dora")
    with pytest.raises(AdapterStateError, match=r"Packed: its weight is packed.*Keep the adapter unfused"):
        layer.set_fused(("0",))


# What else calls a layer.


@kinds
def test_compiling_makes_one_graph_with_the_same_result(kind):
    base = linear()
    layer = adapt(base, kind)
    x = example(base)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert relative_error(compiled(x), layer(x)) < 1e-6
    with torch.no_grad():
        update_of(layer).lora_B.mul_(2)
    assert relative_error(compiled(x), layer(x)) < 1e-6, "the compiled layer must not keep an old norm"


def test_the_layer_shows_its_bases_weight_and_bias():
    base = linear()
    layer = adapt(base, "dora")
    assert layer.weight is base.weight
    assert layer.bias is base.bias


def test_a_layer_that_is_no_linear_map_cannot_be_adapted():
    assert freeze_view(nn.LayerNorm(4)) is None
    assert freeze_view(nn.Embedding(4, 4)) is None
