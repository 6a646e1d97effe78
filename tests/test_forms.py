"""Updates of other forms than B A: each beside LyCORIS's own module, which is called and not copied, and in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dora_diffusion.adapters.injection import AdapterConfig, adaptable_layers, inject_into
from dora_diffusion.adapters.layers import LoRAUpdate
from dora_diffusion.adapters.lokr import factorise
from dora_diffusion.adapters.variants import decomposed, update_of
from tests.oracles import relative_error

lycoris = pytest.importorskip("lycoris.modules")
general = pytest.importorskip("lycoris.functional.general")

LAYERS = {
    "linear": lambda: nn.Linear(24, 16),
    "convolution": lambda: nn.Conv2d(24, 16, 3, padding=1),
    "pointwise": lambda: nn.Conv2d(24, 16, 1, bias=False),
}
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "loha": ("LohaModule", {}),
    "loha tucker": ("LohaModule", {"use_tucker": True}),
    "lokr": ("LokrModule", {"lora_dim": 2}),
    "lokr factor": ("LokrModule", {"lora_dim": 2, "factor": 2}),
    "lokr both": ("LokrModule", {"lora_dim": 1, "decompose_both": True}),
    "lokr whole": ("LokrModule", {"full_matrix": True, "factor": 4}),
    "lokr tucker": ("LokrModule", {"lora_dim": 2, "use_tucker": True, "factor": 2}),
    "glora": ("GLoRAModule", {}),
    "oft": ("DiagOFTModule", {"alpha": None}),
    "oft rescaled": ("DiagOFTModule", {"alpha": None, "rescaled": True, "constraint": 0.05}),
    "boft": ("ButterflyOFTModule", {"alpha": None, "rescaled": True}),
    "ia3 outputs": ("IA3Module", {}),
    "ia3 inputs": ("IA3Module", {"train_on_input": True}),
}
WITH_MAGNITUDE = [name for name in FORMS if name.startswith(("loha", "lokr"))]


def theirs(name: str, layer: nn.Module, seed: int = 0, **more: object) -> nn.Module:
    """LyCORIS's module of this form on the layer, with random values everywhere."""
    module_class, options = FORMS[name]
    module = getattr(lycoris, module_class)("x", layer, **{"lora_dim": 4, "alpha": 3.0, **options, **more})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            if parameter_name == "dora_scale":
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
            elif not parameter_name.startswith("org_module"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def written(module: nn.Module) -> dict[str, Tensor]:
    """What LyCORIS saves of a module."""
    saved = module.custom_state_dict() or {**dict(module.named_parameters()), "alpha": module.alpha}
    return {k: torch.as_tensor(v).detach().clone() for k, v in saved.items()}


def ours(name: str, module: nn.Module, layer: nn.Module) -> LoRAUpdate:
    """The same update here, from what LyCORIS saves."""
    if name.startswith("ia3"):
        held = {"input_factor" if module.train_input else "output_factor": module.weight.detach().flatten()}
        scale = 1.0
    else:
        held = {k.removesuffix(".weight"): v for k, v in written(module).items()}
        alpha = held.pop("alpha")
        scale = float(alpha) / module.lora_dim if hasattr(module, "lora_dim") else 1.0
        if "oft_blocks" in held:
            held["constraint"] = alpha
            held |= {"rescale": held["rescale"].flatten()} if "rescale" in held else {}
        if "dora_scale" in held:
            m = held.pop("dora_scale")
            held["magnitude" if m.shape[0] == 16 else "input_magnitude"] = m.flatten()
    frozen = adaptable_layers(nn.Sequential(layer))["0"]
    return update_of(held)(frozen, module.__dict__.get("lora_dim", 1), scale, tensors=held).eval()


def inputs_of(layer: nn.Module) -> Tensor:
    shape = (5, 24) if isinstance(layer, nn.Linear) else (2, 24, 6, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def merged_output(layer: nn.Module, update: LoRAUpdate, x: Tensor, strength: float = 1.0) -> Tensor:
    """The layer with W0 + w (W' - W0) in its weight, in float64."""
    W = (layer.weight.detach().double() + strength * update.delta_weight().double()).to(torch.float64)
    bias = None if layer.bias is None else layer.bias.detach().double()
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x.double(), W, bias)
    return layer._conv_forward(x.double(), W, bias)


def run_theirs(module: nn.Module, x: Tensor) -> Tensor:
    module.apply_to()
    try:
        with torch.no_grad():
            return module.org_module[0](x)
    finally:
        module.restore()


CASES = [(name, kind) for name in FORMS for kind in LAYERS if not ("tucker" in name and kind != "convolution")]


def assert_as_lycoris(name: str, kind: str, **options: object) -> None:
    """The layer's output with the update is that of the merged weight, and LyCORIS's own."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    module, x = theirs(name, layer, **options), inputs_of(layer)
    update = ours(name, module, layer)
    with torch.no_grad():
        y0 = layer(x)
        found = y0 + update(x, update.frozen.without_bias(y0))
        assert relative_error(found, y0) > 0.01
        assert relative_error(found, merged_output(layer, update, x)) < 1e-5
    assert relative_error(found, run_theirs(module, x)) < 1e-5


@pytest.mark.parametrize("name, kind", CASES)
def test_a_form_gives_what_lycoris_gives(name, kind):
    assert_as_lycoris(name, kind)


@pytest.mark.parametrize("by_output", [True, False])
@pytest.mark.parametrize("name, kind", [(n, k) for n, k in CASES if n in WITH_MAGNITUDE])
def test_a_magnitude_goes_with_any_form(name, kind, by_output):
    assert_as_lycoris(name, kind, weight_decompose=True, wd_on_out=by_output)


@pytest.mark.parametrize("magnitude", ["magnitude", "input_magnitude"])
@pytest.mark.parametrize("name", ["loha", "lokr", "lokr whole", "lokr both"])
def test_gradients_are_those_of_the_plain_formula_in_float64(name, magnitude):
    torch.manual_seed(0)
    layer = nn.Linear(24, 16)
    module = theirs(name, layer, weight_decompose=True, wd_on_out=magnitude == "magnitude")
    update, x = ours(name, module, layer).train(), inputs_of(layer)
    dy = torch.randn(5, 16)
    (update(x, update.frozen.unbiased(x)) * dy).sum().backward()
    held = {k: p.detach().double().requires_grad_() for k, p in update.named_parameters()}
    W0, axis = layer.weight.detach().double(), 1 if magnitude == "magnitude" else 0
    if name == "loha":
        dW = (held["hada_w1_a"] @ held["hada_w1_b"]) * (held["hada_w2_a"] @ held["hada_w2_b"])
    else:
        w1 = held["lokr_w1"] if "lokr_w1" in held else held["lokr_w1_a"] @ held["lokr_w1_b"]
        w2 = held["lokr_w2"] if "lokr_w2" in held else held["lokr_w2_a"] @ held["lokr_w2_b"]
        dW = torch.kron(w1, w2)
    V = W0 + update.scale * dW
    W = V * (held[magnitude] / V.detach().norm(dim=axis)).unsqueeze(axis)  # the norm is a constant: section 4.3
    (x.double() @ (W - W0).T * dy.double()).sum().backward()
    for parameter_name, parameter in update.named_parameters():
        assert relative_error(parameter.grad, held[parameter_name].grad) < 1e-4, parameter_name


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_put_in_scaled_stacked_fused_and_taken_out_like_any_other(name):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS["convolution" if "tucker" in name else "linear"]()).eval()
    layer, x = model[0], inputs_of(model[0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    base = model(x)
    updates = [ours(name, theirs(name, layer, seed), layer) for seed in (1, 2)]
    held = [{k: p.detach() for k, p in update.named_parameters()} for update in updates]
    views = adaptable_layers(model)
    config = AdapterConfig(kind="lora", rank=1, alpha=updates[0].scale)
    first, second = (inject_into(model, config, views, name=n, tensors={"0": h}) for n, h in zip("ab", held))
    with torch.no_grad():
        first.strength, second.strength = 0.7, -0.4
        wanted = base.double() + sum(
            w * (merged_output(layer, update, x) - merged_output(layer, update, x, 0.0))
            for w, update in zip((0.7, -0.4), updates)
        )
        assert relative_error(model(x), wanted) < 1e-5
        first.fuse()
        second.fuse()
        assert relative_error(model(x), wanted) < 1e-5
        first.unfuse()
        second.unfuse()
        first.strength = second.strength = 0.0
        assert torch.equal(model(x), base)
    first.eject()
    second.eject()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("magnitude", [None, "magnitude", "input_magnitude"])
@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_a_form_that_is_trained_starts_as_the_base(name, magnitude):
    torch.manual_seed(0)
    for make in LAYERS.values():
        layer = make()
        frozen = adaptable_layers(nn.Sequential(layer))["0"]
        form = type(ours(name, theirs(name, LAYERS["linear"]()), LAYERS["linear"]()))
        update = decomposed(form, magnitude)(frozen, 2, 1.0, generator=torch.Generator().manual_seed(1))
        assert update.rank == 2
        x = inputs_of(layer)
        assert update(x, frozen.unbiased(x)).abs().max() < 1e-6
        update(x, frozen.unbiased(x)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in update.parameters())


@pytest.mark.parametrize("size", [1, 7, 127, 128, 250, 360, 512, 1024, 1280, 3072])
@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 5, 8, 16, 1000])
def test_sizes_fall_into_factors_as_lycoris_has_them(size, factor):
    assert factorise(size, factor) == general.factorization(size, factor)
