"""Files of other forms than B A, as LyCORIS writes them over real models: read, computed as there, written again."""

from __future__ import annotations

from pathlib import Path

import bases
import pytest
import torch
from lycoris_files import ALGORITHMS, wrapped, write
from oracles import output_of, relative_error
from safetensors.torch import load_file
from torch import nn

from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, read_adapter_file

MODELS = {
    "unet": bases.unet,
    "sd3": bases.sd3_transformer,
    "flux": bases.flux_transformer,
    "chroma": bases.chroma_transformer,
    "flux2": bases.flux2_transformer,
    "qwen": bases.qwen_transformer,
    "z-image": bases.z_image_transformer,
}


def assert_as_written(model: nn.Module, algorithm: str, path: Path) -> None:
    """Every layer's W' - W0 is its writer's, within 1e-5 of it."""
    written = write(model, algorithm, path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = load_adapter(model, path)
    assert adapter.updates().keys() == written.deltas.keys() and len(written.deltas) > 5
    with torch.no_grad():
        for layer, update in adapter.updates().items():
            W0 = update.frozen.weight
            wanted = written.deltas[layer]
            assert (update.delta_weight() - wanted).norm() < 1e-5 * (W0.norm() + wanted.norm()), layer
    adapter.eject()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_unets_file_of_lycoris_means_what_lycoris_computes(tmp_path, algorithm):
    assert_as_written(bases.unet().eval(), algorithm, tmp_path / "a.safetensors")


@pytest.mark.parametrize("algorithm", ["loha dora", "lokr", "lokr dora by input", "glora", "oft", "ia3"])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "unet"])
def test_a_transformers_file_of_lycoris_means_what_lycoris_computes(tmp_path, model, algorithm):
    assert_as_written(MODELS[model]().eval(), algorithm, tmp_path / "a.safetensors")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_file_of_lycoris_is_written_again_with_its_tensors_bits(tmp_path, algorithm):
    model = bases.unet().eval()
    path = write(model, algorithm, tmp_path / "a.safetensors").path
    again = convert_adapter(path, tmp_path / "b.safetensors", "kohya", base=model).path
    alone = convert_adapter(path, tmp_path / "c.safetensors", "kohya").path
    theirs = {key.replace("lycoris_", "lora_unet_"): tensor for key, tensor in load_file(path).items()}
    for ours in (load_file(again), load_file(alone)):
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].shape == tensor.shape and torch.equal(ours[key].double(), tensor.double()), key
    assert read_adapter_file(again).config.kind_label == read_adapter_file(path).config.kind_label


@pytest.mark.parametrize("algorithm", ["loha dora by input", "lokr", "lokr dora", "boft", "ia3 by input"])
def test_the_model_gives_what_it_gives_inside_lycoris(tmp_path, algorithm):
    model = bases.unet().eval()
    base = output_of(model)
    network = wrapped(model, algorithm)
    network.apply_to()
    theirs = output_of(model)
    network.restore()
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    adapter = load_adapter(model, tmp_path / "a.safetensors")
    assert relative_error(output_of(model) - base, theirs - base) < 1e-4  # float32, through some thirty layers
    adapter.strength = 0.0
    assert torch.equal(output_of(model), base)
