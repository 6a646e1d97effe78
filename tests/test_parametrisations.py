"""LoKr, DoKR, LoHa and DoHa in training: beside LyCORIS's own modules step by step, and in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from oracles import decomposed_weight, form_difference, formula_weight, relative_error
from test_base_layers import BASES, example
from torch import Tensor, nn

from dora_diffusion.adapters.injection import Adapter, AdapterConfig, inject_adapter
from dora_diffusion.adapters.layers import LoRAUpdate
from dora_diffusion.adapters.lokr import factorise
from dora_diffusion.errors import ConfigError

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 16),
    "square": lambda: nn.Linear(16, 16, bias=False),
    "convolution": lambda: nn.Conv2d(24, 16, 3, padding=1),
    "groups": lambda: nn.Conv2d(24, 16, 3, padding=1, groups=2),
    "pointwise": lambda: nn.Conv2d(24, 16, 1, bias=False),
}
# The options of AdapterConfig, and the same in LyCORIS's words.
FORMS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "lokr": ({"parametrisation": "lokr", "rank": 1}, {"lora_dim": 1}),
    "lokr factor": ({"parametrisation": "lokr", "rank": 2, "factor": 2}, {"lora_dim": 2, "factor": 2}),
    "lokr whole": (
        {"parametrisation": "lokr", "rank": 2, "full_matrix": True},
        {"lora_dim": 2, "full_matrix": True},
    ),
    "lokr full dimension": ({"parametrisation": "lokr", "rank": 10_000}, {"lora_dim": 10_000}),
    "loha": ({"parametrisation": "loha", "rank": 3}, {"lora_dim": 3}),
}
NORMS = {"plain": {"kind": "lora"}, "output": {"kind": "dora"}, "input": {"kind": "dora", "norm_axis": "input"}}


def config_of(form: str, norm: str, **more: object) -> AdapterConfig:
    return AdapterConfig(**{"alpha": 3.0, "target_modules": ("0",), **FORMS[form][0], **NORMS[norm], **more})  # type: ignore[arg-type]


def adapted(layer: nn.Module, form: str, norm: str, **more: object) -> tuple[nn.Module, Adapter, LoRAUpdate]:
    model = nn.Sequential(layer)
    adapter = inject_adapter(model, config_of(form, norm, **more), seed=1)
    return model, adapter, adapter.updates()["0"]


def perturb(update: LoRAUpdate) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in update.named_parameters():
            if "magnitude" in name:
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def batch(layer: nn.Module, seed: int = 9) -> Tensor:
    wide = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    shape = (3, 5, wide) if isinstance(layer, nn.Linear) else (2, wide, 6, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(layer: nn.Module, x: Tensor, W: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.detach().to(W.dtype)
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, W, bias)
    return layer._conv_forward(x, W, bias)  # type: ignore[operator, no-any-return]


CASES = [(form, norm, kind) for form in FORMS for norm in NORMS for kind in LAYERS]


@pytest.mark.parametrize("form, norm, kind", CASES)
def test_at_the_start_the_output_is_the_bases_to_the_bit(form, norm, kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    x = batch(layer)
    before = layer(x)
    model, adapter, update = adapted(layer, form, norm)
    assert torch.equal(model(x), before) and torch.equal(model.eval()(x), before)
    assert update.delta_weight().abs().max() < 1e-6
    adapter.eject()
    assert model[0] is layer


@pytest.mark.parametrize("form, norm, kind", CASES)
def test_gradients_are_those_of_the_plain_formula_in_float64(form, norm, kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model, _, update = adapted(layer, form, norm)
    perturb(update)
    x = batch(layer).requires_grad_()
    y = model(x)
    dy = torch.randn(y.shape)
    (y * dy).sum().backward()
    held = {name: p.detach().double().requires_grad_() for name, p in update.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    y64 = run(layer, x64, formula_weight(layer.weight.detach(), held, 3.0 / update_rank(form)))
    (y64 * dy.double()).sum().backward()
    assert relative_error(y.detach(), y64.detach()) < 1e-5
    assert relative_error(x.grad, x64.grad) < 1e-5
    for name, parameter in update.named_parameters():
        assert relative_error(parameter.grad, held[name].grad) < 1e-4, name
    W = formula_weight(layer.weight.detach(), held, 3.0 / update_rank(form)).detach()
    assert relative_error(update.delta_weight(), W - layer.weight.detach().double()) < 1e-5


def update_rank(form: str) -> int:
    return int(FORMS[form][0]["rank"])  # type: ignore[call-overload]


def theirs(form: str, norm: str, layer: nn.Module, held: Mapping[str, Tensor]) -> nn.Module:
    """LyCORIS's own module on the layer, with our start in it."""
    modules = pytest.importorskip("lycoris.modules")
    kind = modules.LohaModule if form == "loha" else modules.LokrModule
    decomposed = {"weight_decompose": norm != "plain", "wd_on_out": norm == "output"}
    module = kind("x", layer, alpha=3.0, **FORMS[form][1], **decomposed)
    with torch.no_grad():
        for name, value in held.items():
            mine = module.dora_scale if "magnitude" in name else module.get_parameter(name)
            mine.copy_(value.reshape(mine.shape))
    return module


def constant_norm(weight: Tensor, m: Tensor, multiplier: float = 1, wd_on_out: bool = True) -> Tensor:
    """LyCORIS's own decomposition, with the norm that it takes held constant in the backward pass."""
    general = pytest.importorskip("lycoris.functional.general")
    with torch.no_grad():
        ratio = general.weight_decompose(torch.ones_like(weight) * weight, m, multiplier, wd_on_out) / weight / m
    return weight * (ratio * m)


@pytest.mark.parametrize("form, norm, kind", CASES)
def test_after_the_same_steps_the_parameters_are_those_of_lycoris(form, norm, kind, monkeypatch):
    for name in ("loha", "lokr"):
        monkeypatch.setattr(f"lycoris.modules.{name}.weight_decompose", constant_norm)
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model, _, update = adapted(layer, form, norm)
    names = [name for name, _ in update.named_parameters()]
    module = theirs(form, norm, LAYERS[kind]().requires_grad_(False), dict(update.named_parameters()))
    module.org_module[0].load_state_dict(layer.state_dict())
    if norm != "plain":
        with torch.no_grad():  # their magnitudes are those of the weight that the module was made on
            module.dora_scale.copy_(update.get_parameter(names[-1]).reshape(module.dora_scale.shape))
    mine = list(update.parameters())
    his = [module.dora_scale if "magnitude" in name else module.get_parameter(name) for name in names]
    ours_optimizer, their_optimizer = (torch.optim.AdamW(p, lr=1e-2, weight_decay=0.01) for p in (mine, his))
    module.apply_to()
    for step in range(5):
        x = batch(layer, step)
        for call, optimizer in ((model, ours_optimizer), (module.org_module[0], their_optimizer)):
            optimizer.zero_grad()
            y = call(x)
            (y - torch.sin(3 * x.mean())).square().mean().backward()
            optimizer.step()
    module.restore()
    for name, a, b in zip(names, mine, his, strict=True):
        assert (a - b.reshape(a.shape)).abs().max() < 1e-5, name
    moved = [
        float((p - q).detach().abs().max())
        for p, q in zip(mine, adapted(LAYERS[kind](), form, "plain")[2].parameters())
    ]
    assert max(moved) > 1e-2  # the steps have moved something


@pytest.mark.parametrize("form", ["lokr", "loha"])
def test_lycoris_differentiates_the_norm_which_is_a_constant_here(form):
    """What docs/engine.md says of the difference; the first gradient of the magnitudes is the same."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 16).requires_grad_(False)
    model, _, update = adapted(layer, form, "output")
    perturb(update)
    module = theirs(form, "output", layer, dict(update.named_parameters()))
    x = batch(layer)
    model(x).square().mean().backward()
    module.apply_to()
    module.org_module[0](x).square().mean().backward()
    module.restore()
    assert relative_error(update.magnitude.grad, module.dora_scale.grad.flatten()) < 1e-4
    held = {name: p.detach().double().requires_grad_() for name, p in update.named_parameters()}
    W0, name = layer.weight.double(), "hada_w1_b" if form == "loha" else "lokr_w1"
    V = W0 + form_difference(W0, held, 3.0 / update_rank(form))
    W = decomposed_weight(V, held, constant=False)
    run(layer, x.double(), W).square().mean().backward()
    assert relative_error(module.get_parameter(name).grad, held[name].grad) < 1e-4
    assert relative_error(update.get_parameter(name).grad, held[name].grad) > 0.01


@pytest.mark.parametrize("factor", [-1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 4, 100])
def test_a_new_lokr_has_the_shapes_and_the_spread_of_lycoris(factor, rank):
    modules = pytest.importorskip("lycoris.modules")
    for make in LAYERS.values():
        layer = make()
        _, _, update = adapted(layer, "lokr", "plain", factor=factor, rank=rank)
        module = modules.LokrModule("x", make(), lora_dim=rank, alpha=3.0, factor=factor)
        own = {n: p for n, p in module.named_parameters() if not n.startswith("org_module")}
        assert {n: p.shape for n, p in update.named_parameters()} == {n: p.shape for n, p in own.items()}
        assert update.scale == pytest.approx(module.scale)
        for name, parameter in update.named_parameters():
            assert bool(parameter.any()) == bool(own[name].any())
            if parameter.any():
                bound = 1 / factors_of(parameter) ** 0.5
                assert parameter.abs().max() <= bound and own[name].abs().max() <= bound


def factors_of(parameter: Tensor) -> int:
    return parameter[0].numel()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"parametrisation": "locr"}, "parametrisation is 'locr'; it must be 'lora', 'lokr' or 'loha'. Did you mean"),
        ({"parametrisation": "lokr", "factor": 0}, "factor is 0; it must be a whole number of at least 1"),
        ({"parametrisation": "lokr", "factor": -2}, "factor is -2"),
        ({"parametrisation": "lokr", "factor": 2.5}, "factor is 2.5"),
        ({"parametrisation": "loha", "factor": 4}, "factor is LoKr's, and parametrisation is 'loha'"),
        ({"full_matrix": True}, "full_matrix is LoKr's, and parametrisation is 'lora'"),
    ],
)
def test_what_is_no_parametrisation_is_said(options, says):
    with pytest.raises(ConfigError, match=says):
        AdapterConfig(**options)


@pytest.mark.parametrize("parametrisation", ["lora", "loha"])
def test_a_rank_that_no_layer_has_is_refused(parametrisation):
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(8, 8))
    config = AdapterConfig(parametrisation=parametrisation, rank=17, target_modules=("0", "1"))
    with pytest.raises(ConfigError, match=r"rank is 17, and no layer that is adapted has one above 16"):
        inject_adapter(model, config)
    inject_adapter(model, AdapterConfig(parametrisation=parametrisation, rank=16, target_modules=("0", "1")))


def test_the_factors_are_lycoriss():
    general = pytest.importorskip("lycoris.functional.general")
    assert all(factorise(n, f) == general.factorization(n, f) for n in range(1, 200) for f in (-1, 1, 2, 3, 8, 16, 500))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bfloat16", "NF4", "LLM.int8", "torchao int8", "torchao dynamic int8"])
def test_on_a_base_in_less_memory_it_starts_as_the_base_and_computes_the_formula(name, form, norm):
    base = BASES[name]
    layer = base.make()
    W0, x = base.weight(layer), example(base.x_dtype)
    before = layer(x).detach()
    model, _, update = adapted(layer, form, norm)
    assert torch.equal(model(x), before)
    perturb(update)
    held = {k: p.detach().double() for k, p in update.named_parameters()}
    W = formula_weight(W0, held, 3.0 / update_rank(form))
    assert relative_error(update.delta_weight(), W - W0) < 1e-4
    wanted = nn.functional.linear(x.double(), W, layer.bias.detach().double())
    y = model(x.clone().requires_grad_())
    assert relative_error(y.detach(), wanted) < 5 * base.rounding
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in update.parameters())
