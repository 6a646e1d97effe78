"""Changes of biases and of normalisation layers in the engine: each beside a layer or a model whose parameters were
changed by hand, beside LyCORIS's own module, and beside PEFT."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import bases
import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from oracles import inputs_of, output_of, relative_error
from torch import Tensor, nn

from dora_diffusion.adapters.injection import (
    Adapter,
    AdapterConfig,
    adaptable_layers,
    changeable_layers,
    inject_adapter,
    inject_into,
)
from dora_diffusion.errors import AdapterStateError

norms = pytest.importorskip("lycoris.modules.norms")


def sd35() -> nn.Module:
    """Stable Diffusion 3.5's kind: norms of queries and keys, and two attentions in a block."""
    model = bases.sd3_transformer()
    torch.manual_seed(0)
    options = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return type(model)(**{**options, "qk_norm": "rms_norm", "dual_attention_layers": (0,)})


@dataclass(frozen=True)
class Run:
    """A model, and what it is called with."""

    model: nn.Module
    inputs: Mapping[str, object]

    @torch.no_grad()
    def output(self, model: nn.Module | None = None) -> Tensor:
        found = (model or self.model)(**self.inputs, return_dict=False)[0]
        return found if isinstance(found, Tensor) else found[0]


def of_pipeline(pipe: DiffusionPipeline) -> Run:
    """A pipeline's transformer, with what the pipeline itself calls it with in its first step."""
    seen: list[dict[str, object]] = []

    def record(module: nn.Module, values: tuple[object, ...], options: dict[str, object]) -> None:
        names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
        seen.append({**dict(zip(names, values)), **options, "return_dict": False})

    hook = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt="disc", height=16, width=16, num_inference_steps=1, output_type="latent")
    hook.remove()
    del seen[0]["return_dict"]
    return Run(pipe.transformer.eval(), seen[0])


def of_model(model: nn.Module) -> Run:
    return Run(model.eval(), inputs_of(model))


RUNS: dict[str, Callable[[], Run]] = {
    "unet": lambda: of_model(bases.unet()),
    "sd3": lambda: of_model(sd35()),
    "flux": lambda: of_model(bases.flux_transformer()),
    "chroma": lambda: of_pipeline(bases.chroma()),
    "flux2": lambda: of_pipeline(bases.flux2_klein()),
    "qwen": lambda: of_pipeline(bases.qwen_image()),
    "z-image": lambda: of_pipeline(bases.z_image()),
    "t5": lambda: Run(bases.t5(32).eval(), {"input_ids": torch.arange(12).reshape(2, 6)}),
    "clip": lambda: Run(bases.stable_diffusion().text_encoder.eval(), {"input_ids": torch.arange(12).reshape(2, 6)}),
}


def draw(shape: object, seed: int, size: float = 0.1) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def differences(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """A change of everything that a file may change of each layer: of every norm's weight and bias, of every bias,
    and of linear layers' and convolutions' weights."""
    held: dict[str, dict[str, Tensor]] = {}
    for i, (path, view) in enumerate(changeable_layers(model).items()):
        held[path] = {"difference": draw((view.out_features, *view.in_shape), i, 0.02 if view.in_shape else 0.1)}
        if getattr(view.module, "bias", None) is not None:
            held[path]["bias_difference"] = draw((view.out_features,), 1000 + i)
            if i % 3 == 0 and view.in_shape:
                del held[path]["difference"]
    return held


def attach(model: nn.Module, held: dict[str, dict[str, Tensor]], name: str | None = None) -> Adapter:
    views = changeable_layers(model)
    config = AdapterConfig(kind="full", rank=1, alpha=1.0)
    return inject_into(model, config, {path: views[path] for path in held}, name=name, tensors=held)


def by_hand(model: nn.Module, changes: list[tuple[float, dict[str, dict[str, Tensor]]]]) -> nn.Module:
    """A copy of the model with W0 + strength * difference in its parameters, in float64 arithmetic."""
    changed = copy.deepcopy(model)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for strength, held in changes:
            for path, tensors in held.items():
                for held_name, name in (("difference", "weight"), ("bias_difference", "bias")):
                    if held_name in tensors:
                        parameter = parameters[f"{path}.{name}"]
                        total = parameter.double() + strength * tensors[held_name].double()
                        parameter.copy_(total.to(parameter.dtype))
    return changed


@pytest.mark.parametrize("family", RUNS)
def test_a_model_with_everything_changed_is_the_model_with_its_parameters_changed_by_hand(family):
    run = RUNS[family]()
    model, base = run.model, copy.deepcopy(run.model)
    before, bits = run.output(), {name: p.clone() for name, p in model.named_parameters()}
    held, other = differences(model), {p: {k: -t.flip(0) for k, t in h.items()} for p, h in differences(model).items()}
    assert any(not view.in_shape for view in changeable_layers(model).values()), "it has norms with weights"

    def expected(*changes: tuple[float, dict[str, dict[str, Tensor]]]) -> Tensor:
        return run.output(by_hand(base, list(changes)))

    first = attach(model, held, "first")
    assert relative_error(run.output(), expected((1.0, held))) < 2e-5
    first.strength = 0
    assert torch.equal(run.output(), before)
    first.strength = 0.6
    second = attach(model, other, "second")
    second.strength = -0.3
    both = expected((0.6, held), (-0.3, other))
    assert relative_error(both, before) > 1e-3
    assert relative_error(run.output(), both) < 2e-5
    first.fuse()
    assert relative_error(run.output(), both) < 2e-5
    second.fuse()
    assert relative_error(run.output(), both) < 2e-5
    first.strength = 0.1
    assert relative_error(run.output(), expected((0.1, held), (-0.3, other))) < 2e-5
    first.unfuse()
    second.unfuse()
    first.eject()
    assert relative_error(run.output(), expected((-0.3, other))) < 2e-5
    second.eject()
    assert torch.equal(run.output(), before)
    assert [name for name, _ in model.named_parameters()] == list(bits)
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters())


def test_merging_writes_norms_and_biases_for_good(tmp_path):
    model = bases.unet()
    held = differences(model)
    attach(model, held).merge()
    assert relative_error(output_of(model), output_of(by_hand(bases.unet(), [(1.0, held)]))) < 2e-5
    model.save_pretrained(tmp_path)
    assert relative_error(output_of(type(model).from_pretrained(tmp_path).eval()), output_of(model)) < 1e-6


def test_norms_are_changed_by_files_alone_and_are_no_targets():
    model = bases.unet()
    norm_layers = changeable_layers(model).keys() - adaptable_layers(model).keys()
    assert "conv_norm_out" in norm_layers and len(norm_layers) > 20
    attach(model, differences(model))
    assert changeable_layers(model).keys() - adaptable_layers(model).keys() == norm_layers
    adapter = inject_adapter(model, AdapterConfig(target_modules=(".*",), rank=2))
    assert not norm_layers & adapter.layers.keys()


def lycoris_layers() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    made = {"layer norm": nn.LayerNorm(24), "group norm": nn.GroupNorm(4, 24)}
    for layer in made.values():
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return made


@pytest.mark.parametrize("kind", lycoris_layers())
@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_a_norm_gives_what_lycoris_gives(kind, strength):
    layer, x = lycoris_layers()[kind], draw((2, 24, 3, 24), 1, 1.0)
    module = norms.NormModule("x", layer, multiplier=strength)
    with torch.no_grad():
        module.w_norm.copy_(draw((24,), 2))
        module.b_norm.copy_(draw((24,), 3))
        module.apply_to()
        expected = layer(x)
        module.restore()
        model = nn.Sequential(layer)
        adapter = attach(model, {"0": {"difference": module.w_norm.data, "bias_difference": module.b_norm.data}})
        adapter.strength = strength
        assert relative_error(model(x), expected) < 1e-6
        assert relative_error(expected, layer(x)) > 1e-2


@pytest.mark.parametrize("alpha", [4.0, 7.0])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_bias_beside_b_a_gives_what_peft_gives(alpha, has_bias, kind):
    torch.manual_seed(0)
    base = nn.Linear(24, 16, bias=has_bias) if kind == "linear" else nn.Conv2d(24, 16, 3, padding=1, bias=has_bias)
    x = draw((5, 24) if kind == "linear" else (2, 24, 6, 6), 4, 1.0)
    model = nn.Sequential(copy.deepcopy(base))
    config = peft.LoraConfig(r=4, lora_alpha=alpha, lora_bias=True, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config)
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].bias.copy_(draw((16,), 5))
        expected = theirs(x)
        held = {
            "lora_A": layer.lora_A["default"].weight.data,
            "lora_B": layer.lora_B["default"].weight.data,
            "bias_difference": alpha / 4 * layer.lora_B["default"].bias.data,
        }
    model = nn.Sequential(base)
    views = changeable_layers(model)
    adapter = inject_into(model, AdapterConfig(kind="lora", rank=4, alpha=alpha), views, tensors={"0": held})
    with torch.no_grad():
        assert relative_error(model(x), expected) < 1e-6
    model.train()
    assert relative_error(model(x).detach(), expected) < 1e-6, "with gradients too"
    if has_bias:
        adapter.fuse()
        with torch.no_grad():
            assert relative_error(model(x), expected) < 1e-6
    else:
        with pytest.raises(AdapterStateError, match="without a bias"):
            adapter.fuse()


@pytest.mark.parametrize("magnitude", ["magnitude", "input_magnitude", "unscaled_magnitude"])
def test_a_magnitude_never_touches_the_change_of_the_bias(magnitude):
    torch.manual_seed(0)
    layer, x, b = nn.Linear(16, 16), draw((5, 16), 1, 1.0), draw((16,), 2)
    held = {"lora_A": draw((2, 16), 3), "lora_B": draw((16, 2), 4), magnitude: draw((16,), 5).abs() + 0.5}
    model, views = nn.Sequential(layer), changeable_layers(nn.Sequential(layer))
    config = AdapterConfig(kind="dora", rank=2, alpha=3.0)
    for strength in (1.0, 0.5):
        for grad in (True, False):
            found = []
            for more in ({}, {"bias_difference": b}):
                adapter = inject_into(model, config, views, tensors={"0": held | more})
                adapter.strength = strength
                with torch.set_grad_enabled(grad):
                    found.append(model(x).detach())
                adapter.eject()
            assert (found[1] - found[0] - strength * b).abs().max() < 1e-6


def test_a_weight_that_stands_in_the_place_of_the_bases_does_so_at_strength_one():
    layers = nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 16))
    nn.init.normal_(layers[0].weight)
    x, held = draw((5, 16), 1, 1.0), {"0": {"replacement": draw((16,), 2)}, "1": {"replacement": draw((16, 16), 3)}}
    expected = nn.functional.linear(
        nn.functional.rms_norm(x, (16,), held["0"]["replacement"]), held["1"]["replacement"], layers[1].bias
    )
    with torch.no_grad():
        before = layers(x)
        adapter = attach(layers, held)
        assert relative_error(layers(x), expected) < 1e-5
        adapter.strength = 0
        assert torch.equal(layers(x), before)
        adapter.strength = 0.5
        adapter.fuse()
        for i, W in enumerate(h["replacement"] for h in held.values()):
            W0 = adapter.layers[str(i)].frozen.original
            assert relative_error(layers[i].base.weight, 0.5 * W0 + 0.5 * W) < 1e-6


def test_compiled_code_heeds_norms_biases_and_strengths():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.RMSNorm(16))
    x, held = draw((5, 16), 1, 1.0), differences(model)
    changed = by_hand(model, [(0.5, held)])
    with torch.no_grad():
        before, expected = model(x), changed(x)
        adapter = attach(model, held)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for strength, wanted in ((0.5, expected), (0.0, before), (0.5, expected)):
            adapter.strength = strength
            assert relative_error(compiled(x), wanted) < 1e-6


def test_gradients_pass_a_changed_norm_as_they_do_one_changed_by_hand():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
    held = differences(model)
    changed, x = by_hand(model, [(1.0, held)]), draw((2, 8, 3, 3), 1, 1.0)
    gradients = []
    attach(model, held)
    for made in (model, changed):
        leaf = x.clone().requires_grad_()
        made(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert relative_error(*gradients) < 1e-5


def test_what_models_look_at_in_a_norm_is_there_with_its_changed_weight():
    layer = nn.GroupNorm(4, 16)
    model = nn.Sequential(layer)
    adapter = attach(model, {"0": {"difference": torch.ones(16)}})
    adapted = model[0]
    assert (adapted.num_groups, adapted.eps, adapted.weight.dtype) == (4, layer.eps, torch.float32)
    assert torch.equal(adapted.weight, layer.weight + 1)
    with pytest.raises(AttributeError, match="no_such"):
        adapted.no_such  # noqa: B018
    assert torch.equal(copy.deepcopy(model)[0].weight, layer.weight + 1)
    adapter.eject()
    assert model[0] is layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_norm_is_the_layer_with_the_rounded_sum(dtype):
    layer = nn.LayerNorm(16).to(dtype)
    model, held = nn.Sequential(layer), {"0": {"difference": draw((16,), 1), "bias_difference": draw((16,), 2)}}
    x = draw((4, 16), 3, 1.0).to(dtype)
    changed = by_hand(model, [(0.7, held)])
    adapter = attach(model, held)
    adapter.strength = 0.7
    with torch.no_grad():
        assert model(x).dtype == dtype
        assert torch.equal(model(x), changed(x))


def test_an_offloaded_norm_is_changed_too():
    from accelerate import cpu_offload

    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.RMSNorm(16))
    x, held = draw((5, 16), 1, 1.0), differences(model)
    changed = by_hand(model, [(0.5, held)])
    with torch.no_grad():
        before, expected = model(x), changed(x)
        cpu_offload(model, execution_device="cpu")
        assert model[0].weight.is_meta
        adapter = attach(model, held)
        adapter.strength = 0.5
        assert relative_error(model(x), expected) < 1e-5
        adapter.strength = 0
        assert torch.equal(model(x), before)
