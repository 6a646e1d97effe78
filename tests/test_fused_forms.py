"""Updates of layers that are one in the original checkpoint and several in diffusers: exact, whatever their form.

Each is measured against the fused matrix itself: the parts' weights one above the other, in float64, or in a module of
LyCORIS.
"""

from __future__ import annotations

from pathlib import Path

import bases
import pytest
import torch
from oracles import output_of, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_diffusion.errors import AdapterFileError, AdapterMismatchError
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, save_adapter
from tests.lycoris_files import delta_of, lycoris

# Models with a module of the original checkpoint that is several layers, in order: FLUX.1's first single layer is seven
# widths high, which no factor of LoKr falls together with.
FUSED = {
    "flux double": (
        bases.flux_transformer,
        "lora_unet_double_blocks_0_img_attn_qkv",
        [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    ),
    "flux single": (
        bases.flux_transformer,
        "lora_unet_single_blocks_0_linear1",
        [
            *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
            "single_transformer_blocks.0.proj_mlp",
        ],
    ),
    "sd3": (
        bases.sd3_transformer,
        "lora_unet_joint_blocks_0_context_block_attn_qkv",
        [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
    ),
    "z-image": (
        bases.z_image_transformer,
        "lora_unet_layers_0_attention_qkv",
        [f"layers.0.attention.to_{x}" for x in "qkv"],
    ),
}
FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "lora by input": ("LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "lora by output": ("LoConModule", {"weight_decompose": True, "wd_on_out": True}),
    "loha": ("LohaModule", {}),
    "loha by input": ("LohaModule", {"weight_decompose": True, "wd_on_out": False}),
    "loha by output": ("LohaModule", {"weight_decompose": True, "wd_on_out": True}),
    "lokr": ("LokrModule", {"lora_dim": 2}),
    "lokr by 4": ("LokrModule", {"lora_dim": 2, "factor": 4}),
    "lokr by 3": ("LokrModule", {"lora_dim": 2, "factor": 3}),
    "lokr both": ("LokrModule", {"lora_dim": 1, "decompose_both": True}),
    "lokr whole": ("LokrModule", {"full_matrix": True, "factor": 4}),
    "lokr by input": ("LokrModule", {"lora_dim": 2, "weight_decompose": True, "wd_on_out": False}),
    "lokr by 4 by input": ("LokrModule", {"lora_dim": 2, "factor": 4, "weight_decompose": True, "wd_on_out": False}),
    "lokr by 4 by output": ("LokrModule", {"lora_dim": 2, "factor": 4, "weight_decompose": True, "wd_on_out": True}),
    "glora": ("GLoRAModule", {}),
    "oft": ("DiagOFTModule", {"alpha": None}),
    "oft rescaled": ("DiagOFTModule", {"alpha": None, "rescaled": True, "constraint": 0.001}),
    "ia3 outputs": ("IA3Module", {}),
    "ia3 inputs": ("IA3Module", {"train_on_input": True}),
}
CASES = [(form, fused) for form in FORMS for fused in FUSED]


def written(model: nn.Module, form: str, fused: str, path: Path, seed: int = 0) -> tuple[nn.Module, list[str]]:
    """LyCORIS's module on the fused matrix, saved under the original checkpoint's name, and the layers it is here."""
    module_class, options = FORMS[form]
    _, name, layers = FUSED[fused]
    weights = torch.cat([model.get_submodule(layer).weight.detach() for layer in layers])
    whole = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    whole.weight = nn.Parameter(weights, requires_grad=False)
    module = getattr(lycoris.modules, module_class)("x", whole, **{"lora_dim": 4, "alpha": 3.0, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            if parameter_name == "dora_scale":
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    saved = module.custom_state_dict() or dict(module.state_dict())
    saved = {key: torch.as_tensor(t).detach() for key, t in saved.items() if not key.startswith("org_")}
    save_file({f"{name}.{key}": tensor.contiguous().clone() for key, tensor in saved.items()}, path)
    return module.eval(), layers


@torch.no_grad()
def theirs_of(module: nn.Module) -> Tensor:
    module.apply_to()
    return delta_of(module)


@torch.no_grad()
def assert_parts(adapter: object, layers: list[str], delta: Tensor) -> None:
    updates = adapter.updates()
    assert sorted(updates) == sorted(layers)
    found = torch.cat([updates[layer].delta_weight() for layer in layers])
    assert found.shape == delta.shape and delta.norm() > 0.01
    assert (found - delta).norm() < 1e-5 * (delta.norm() + module_norm(updates, layers))


def module_norm(updates: object, layers: list[str]) -> Tensor:
    return torch.cat([updates[layer].frozen.weight for layer in layers]).norm()


@pytest.mark.parametrize("form, fused", CASES)
def test_a_fused_layers_update_is_exact_in_its_parts(tmp_path, form, fused):
    model = FUSED[fused][0]().eval()
    try:
        module, layers = written(model, form, fused, tmp_path / "a.safetensors")
        adapter = load_adapter(model, tmp_path / "a.safetensors")
    except AdapterFileError as error:
        assert form.startswith("oft") and "blocks that reach from one part into another" in str(error)
        return
    assert_parts(adapter, layers, theirs_of(module))


@pytest.mark.parametrize("form, fused", CASES)
def test_its_parts_are_written_as_the_fused_layer_again(tmp_path, form, fused):
    if form.startswith("oft") and fused == "flux single":
        pytest.skip("its blocks reach from one part into another")
    model = FUSED[fused][0]().eval()
    module, layers = written(model, form, fused, tmp_path / "a.safetensors")
    again = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", base=model).path
    theirs, ours = load_file(tmp_path / "a.safetensors"), load_file(again)
    assert ours.keys() == theirs.keys()
    if form != "oft rescaled":  # whose constraint is done with
        assert all(torch.equal(ours[key].double(), theirs[key].double()) for key in theirs)
    adapter = load_adapter(model, again)
    assert_parts(adapter, layers, theirs_of(module))
    if form != "lora by output":  # which is saved in diffusers' layout, part by part
        saved = load_file(save_adapter(adapter, tmp_path / "c.safetensors"))
        for key in ours.keys() - {key for key in ours if key.endswith(".alpha")}:
            assert torch.equal(saved[key], ours[key].float()), key


@pytest.mark.parametrize("form", ["lora by input", "loha by input", "lokr by 4 by input", "lokr by 3"])
def test_a_shared_norm_goes_through_a_models_whole_life(tmp_path, form):
    """Output, strength, two at once, fused and out again, all as the float64 weights have it."""
    model = bases.flux_transformer().eval()
    module, layers = written(model, form, "flux double", tmp_path / "a.safetensors")
    other, _ = written(model, form, "flux double", tmp_path / "b.safetensors", seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = output_of(model)
    deltas = [theirs_of(each).double() for each in (module, other)]
    first = load_adapter(model, tmp_path / "a.safetensors", strength=0.7)
    second = load_adapter(model, tmp_path / "b.safetensors", strength=-0.4)

    def merged_output(*strengths: float) -> Tensor:
        reference = bases.flux_transformer().eval()
        change = sum(w * delta for w, delta in zip(strengths, deltas))
        height = 0
        for layer in layers:
            weight = reference.get_submodule(layer).weight
            weight.data += change[height : height + len(weight)].float()
            height += len(weight)
        return output_of(reference)

    wanted = merged_output(0.7, -0.4)
    assert relative_error(wanted, base) > 0.01
    assert relative_error(output_of(model), wanted) < 1e-4
    second.fuse()
    assert relative_error(output_of(model), wanted) < 1e-4
    first.fuse()
    assert relative_error(output_of(model), wanted) < 1e-4
    second.unfuse()
    second.eject()
    assert relative_error(output_of(model), merged_output(0.7, 0.0)) < 1e-4
    first.unfuse()
    first.strength = 0.0
    assert torch.equal(output_of(model), base)
    first.eject()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", ["lokr by 3", "lokr by 4 by input", "lora by input", "oft"])
def test_rounding_leaves_the_parts_together(tmp_path, form, dtype):
    model = bases.flux_transformer().eval()
    fused = "flux double" if form == "oft" else "flux single"
    written(model, form, fused, tmp_path / "a.safetensors")
    again = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", base=model, dtype=dtype)
    ours, theirs = load_file(again.path), load_file(tmp_path / "a.safetensors")
    assert ours.keys() == theirs.keys()
    rounded = [key for key in theirs if not key.endswith("alpha")]
    assert all(torch.equal(ours[key], theirs[key].to(ours[key].dtype)) for key in rounded)
    assert {str(ours[key].dtype) for key in rounded} == {f"torch.{dtype}"}


def test_a_part_without_its_fellows_is_not_loaded(tmp_path):
    """A model that lacks one of the layers that the norm runs over."""
    model = bases.flux_transformer().eval()
    written(model, "lora by input", "flux double", tmp_path / "a.safetensors")
    model.transformer_blocks[0].attn.to_v = nn.Identity()
    with pytest.raises(AdapterMismatchError, match=r"img_attn.qkv.*not in this model"):
        load_adapter(model, tmp_path / "a.safetensors")


def test_what_shares_a_norm_is_written_as_a_difference_of_each_part(tmp_path):
    model = bases.flux_transformer().eval()
    module, layers = written(model, "lora by input", "flux double", tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"a norm by input over the rows of a fused layer.*--to diff"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", base=model)
    delta = theirs_of(module)
    for to in ("diff", "lora"):
        path = convert_adapter(
            tmp_path / "a.safetensors",
            tmp_path / f"{to}.safetensors",
            to,
            base=model,
            rank=64 if to == "lora" else None,
        ).path
        adapter = load_adapter(model, path)
        assert_parts(adapter, layers, delta)
        adapter.eject()
