"""Forms as others than today's LyCORIS write them: PEFT, OneTrainer, ai-toolkit, SimpleTuner, LyCORIS of old."""

from __future__ import annotations

import json
from pathlib import Path

import bases
import pytest
import torch
from lycoris_files import write
from oracles import relative_error
from peft import LoHaConfig, LoKrConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, read_adapter_file

TARGETS = ["to_q", "to_out.0", "conv1", "proj_in"]
PEFT: dict[str, tuple[type, dict[str, object]]] = {
    "loha": (LoHaConfig, {"r": 4, "alpha": 6}),
    "loha tucker": (LoHaConfig, {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "lokr": (LoKrConfig, {"r": 2, "alpha": 6}),
    "lokr both": (LoKrConfig, {"r": 1, "alpha": 3, "decompose_both": True}),
    "lokr tucker": (LoKrConfig, {"r": 2, "alpha": 6, "use_effective_conv2d": True, "decompose_factor": 2}),
    "lokr whole": (LoKrConfig, {"r": 64, "alpha": 16}),
    "lokr whole, patterns": (
        LoKrConfig,
        {"r": 64, "alpha": 16, "rank_pattern": {"to_q": 32}, "alpha_pattern": {"conv1": 3}},
    ),
}


def randomise(model: nn.Module, names: tuple[str, ...], size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def peft_deltas(model: nn.Module) -> dict[str, Tensor]:
    found = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    return {name.removeprefix("base_model.model."): m.get_delta_weight("default") for name, m in found.items()}


@torch.no_grad()
def assert_deltas(adapter: object, deltas: dict[str, Tensor]) -> None:
    updates = adapter.updates()
    assert updates.keys() == deltas.keys() and deltas
    for layer, update in updates.items():
        wanted = deltas[layer]
        assert wanted.norm() > 1e-3 and relative_error(update.delta_weight(), wanted) < 1e-4, layer


@torch.no_grad()
def assert_as(adapter: object, deltas: dict[str, Tensor]) -> None:
    updates = adapter.updates()
    assert updates.keys() == deltas.keys() and any(delta.norm() > 0.01 for delta in deltas.values())
    for layer, update in updates.items():
        assert (update.delta_weight() - deltas[layer]).norm() <= 1e-5 * (1 + deltas[layer].norm()), layer


@pytest.mark.parametrize("kind", PEFT)
def test_a_folder_of_peft_means_what_peft_computes(tmp_path, kind):
    config_class, options = PEFT[kind]
    theirs = get_peft_model(bases.unet().eval(), config_class(target_modules=TARGETS, **options))
    randomise(theirs, ("hada_", "lokr_"))
    theirs.save_pretrained(tmp_path)
    model = bases.unet().eval()
    adapter = load_adapter(model, tmp_path)
    deltas = peft_deltas(theirs)
    assert_deltas(adapter, deltas)
    again = convert_adapter(tmp_path, tmp_path / "k.safetensors", "kohya", base=model).path
    adapter.eject()
    assert_deltas(load_adapter(model, again), deltas)
    config = read_adapter_file(again).config
    assert config.parametrisation == kind.split()[0]


def onetrainer_oft(model: nn.Module, paths: list[str], size: int, shared: bool, scaled: bool) -> tuple[dict, dict]:
    """Random OFT of OneTrainer's, and W' - W0 in float64 (modules/module/oft_utils.py: five terms of the series)."""
    generator, tensors, deltas = torch.Generator().manual_seed(0), {}, {}
    for path in paths:
        W0 = model.get_submodule(path).weight.detach().double()
        columns = W0[0].numel()
        weight = 0.1 * torch.randn(1 if shared else columns // size, size * (size - 1) // 2, generator=generator)
        name = "lora_unet_" + path.replace(".", "_")
        tensors[f"{name}.oft_R.weight"] = weight
        if scaled:
            tensors[f"{name}.oft_R.scaled_oft"] = torch.tensor(True)
        Q = torch.zeros(len(weight), size, size, dtype=torch.float64)
        rows, columns_of = torch.triu_indices(size, size, 1)
        Q[:, rows, columns_of] = weight.double() / (2 * (size - 1) ** 0.5 if scaled else 1)
        Q = Q - Q.mT
        R = torch.eye(size) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
        R = torch.block_diag(*(R if not shared else R.repeat(columns // size, 1, 1)))
        turned = W0.flatten(1) @ (R if W0.dim() == 4 else R.T)
        deltas[path] = turned.reshape(W0.shape) - W0
    return tensors, deltas


OFT_LAYERS = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1", "conv_in"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_onetrainers_oft_turns_inputs(tmp_path, shared, scaled):
    model = bases.unet().eval()
    tensors, deltas = onetrainer_oft(model, OFT_LAYERS, 4, shared, scaled)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"ot_branch": "master"})
    adapter = load_adapter(model, tmp_path / "a.safetensors")
    assert_deltas(adapter, deltas)
    assert read_adapter_file(tmp_path / "a.safetensors").config.kind_label == "OFT"
    again = load_file(convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya").path)
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_onetrainers_oft_of_a_linear_layer_is_what_peft_computes_and_pefts_file_is_named(tmp_path):
    config = OFTConfig(target_modules=["attn1.to_q"], oft_block_size=4, r=0, bias="none")
    theirs = get_peft_model(bases.unet().eval(), config).eval()
    randomise(theirs, ("oft_R",), 0.1)
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "base_layer")}
    tensors = {f"lora_unet_{n.replace('.', '_')}.oft_R.weight": m.oft_R["default"].weight for n, m in layers.items()}
    save_file({key: t.detach().contiguous() for key, t in tensors.items()}, tmp_path / "a.safetensors")
    adapter = load_adapter(bases.unet().eval(), tmp_path / "a.safetensors")
    assert adapter.updates().keys() == layers.keys()
    with torch.no_grad():
        for layer, update in adapter.updates().items():
            x = torch.randn(3, update.frozen.in_shape[0], generator=torch.Generator().manual_seed(1))
            wanted = layers[layer](x) - layers[layer].base_layer(x)
            assert relative_error(x @ update.delta_weight().T, wanted) < 1e-4
    theirs.save_pretrained(tmp_path / "peft")
    with pytest.raises(AdapterFileError, match="PEFT's OFT, which is not read here"):
        load_adapter(bases.unet(), tmp_path / "peft")


def renamed(path: Path, out: Path, prefix: str, model: nn.Module) -> Path:
    """LyCORIS's file with dotted names behind a prefix, as ai-toolkit and SimpleTuner write LoKr."""
    names = {f"lycoris_{name.replace('.', '_')}": name for name, _ in model.named_modules()}
    tensors = {}
    for key, tensor in load_file(path).items():
        module, _, leaf = key.partition(".")
        tensors[f"{prefix}{names[module]}.{leaf}"] = tensor
    save_file(tensors, out)
    return out


@pytest.mark.parametrize("algorithm", ["lokr", "lokr dora", "loha", "oft", "glora", "ia3"])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "base_model.model.", "lora_unet_"])
def test_forms_are_found_under_dotted_names_too(tmp_path, algorithm, prefix):
    model = bases.flux_transformer().eval()
    written = write(model, algorithm, tmp_path / "a.safetensors")
    if prefix == "lora_unet_":
        tensors = load_file(written.path)
        save_file({k.replace("lycoris_", prefix): t for k, t in tensors.items()}, tmp_path / "b.safetensors")
    else:
        renamed(written.path, tmp_path / "b.safetensors", prefix, model)
    adapter = load_adapter(model, tmp_path / "b.safetensors")
    assert_as(adapter, written.deltas)


@pytest.mark.parametrize("alpha", [torch.tensor(9999999999), torch.tensor(9999999999.0).half()])
def test_the_alpha_of_two_whole_factors_says_nothing(tmp_path, alpha):
    """ai-toolkit's default is the full rank, which it writes as 9999999999; in float16 that is infinite."""
    model = bases.unet().eval()
    written = write(model, "lokr whole", tmp_path / "a.safetensors")
    tensors = {k: alpha.clone() if k.endswith(".alpha") else t for k, t in load_file(written.path).items()}
    save_file(tensors, tmp_path / "b.safetensors")
    adapter = load_adapter(model, tmp_path / "b.safetensors")
    assert_as(adapter, written.deltas)


@pytest.mark.parametrize("algorithm, first", [("loha", "hada_w1_a"), ("lokr", "lokr_w1"), ("glora", "a2.weight")])
def test_an_old_files_scalar_is_multiplied_in(tmp_path, algorithm, first):
    """LyCORIS before it multiplied a trained factor of the whole update into its first tensor."""
    model = bases.unet().eval()
    written = write(model, algorithm, tmp_path / "a.safetensors")
    tensors = load_file(written.path)
    for key in [key for key in tensors if key.endswith(first)]:
        tensors[key.removesuffix(first) + "scalar"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "b.safetensors")
    file = read_adapter_file(tmp_path / "b.safetensors")
    assert any("scalar" in note for note in file.notes)
    adapter = load_adapter(model, tmp_path / "b.safetensors")
    assert_as(adapter, {layer: 0.5 * delta for layer, delta in written.deltas.items()})


def test_lycoriss_first_glora_had_its_halves_the_other_way_round(tmp_path):
    model = bases.unet().eval()
    written = write(model, "glora", tmp_path / "a.safetensors")
    other = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    swapped = {}
    for key, tensor in load_file(written.path).items():
        module, leaf, *rest = key.split(".")
        swapped[".".join([module, other.get(leaf, leaf), *rest])] = tensor
    save_file(swapped, tmp_path / "b.safetensors")
    adapter = load_adapter(model, tmp_path / "b.safetensors")
    assert_as(adapter, written.deltas)


def test_onetrainers_loha_of_a_convolution_has_its_kernels_axes(tmp_path):
    model = bases.unet().eval()
    written = write(model, "loha", tmp_path / "a.safetensors")
    shapes = {
        f"lycoris_{name.replace('.', '_')}": getattr(m, "weight", torch.zeros(0)).shape[1:]
        for name, m in model.named_modules()
    }
    tensors = load_file(written.path)
    for key, tensor in tensors.items():
        shape = shapes[key.partition(".")[0]]
        if "hada_" in key and len(shape) == 3:
            tensors[key] = tensor.reshape(-1, *shape) if key.endswith("_b") else tensor[:, :, None, None]
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "b.safetensors")
    adapter = load_adapter(model, tmp_path / "b.safetensors")
    assert_as(adapter, written.deltas)


def test_what_is_written_says_its_form_and_diffusers_layout_refuses_it_with_the_way_out(tmp_path):
    model = bases.unet().eval()
    path = write(model, "lokr dora", tmp_path / "a.safetensors").path
    with pytest.raises(AdapterFileError, match=r"LoKr, which this layout does not hold.*--to diff"):
        convert_adapter(path, tmp_path / "d.safetensors", "diffusers", base=model)
    again = convert_adapter(path, tmp_path / "k.safetensors", "kohya").path
    file = read_adapter_file(again)
    assert file.description.parametrisation == "lokr" and file.config.kind_label.startswith("DoKR")
    header = json.loads(file.header["dora_diffusion"])
    assert header["kind"] == "dora" and header["norm_axis"] == "output"


@pytest.mark.parametrize("algorithm", ["loha dora by input", "lokr", "glora", "boft", "ia3"])
def test_a_form_is_converted_to_a_difference_and_to_a_lora(tmp_path, algorithm):
    model = bases.unet().eval()
    written = write(model, algorithm, tmp_path / "a.safetensors")
    for to, rank, bound in (("diff", None, 1e-5), ("lora", 4096, 1e-4)):
        made = convert_adapter(written.path, tmp_path / f"{to}.safetensors", to, base=model, rank=rank)
        adapter = load_adapter(model, made.path)
        for layer, update in adapter.updates().items():
            assert (update.delta_weight() - written.deltas[layer]).norm() <= bound * (1 + written.deltas[layer].norm())
        adapter.eject()
    assert made.file.config.kind_label == "LoRA" and max(made.residuals.values()) < 1e-4
