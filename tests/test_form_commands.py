"""Files of other forms through the commands, training on, and a whole pipeline with its text encoder."""

from __future__ import annotations

from pathlib import Path

import bases
import pytest
import torch
from lycoris_files import write
from safetensors.torch import load_file, save_file

from dora_diffusion.errors import AdapterFileError, AdapterMismatchError, ConfigError
from dora_diffusion.formats.files import attach_trainable, load_adapter, read_adapter_file
from dora_diffusion.formats.writing import file_of
from dora_diffusion.inspection.parity import compare_programs
from dora_diffusion.inspection.programs import program_named
from dora_diffusion.inspection.repair import repair
from dora_diffusion.inspection.summary import summarise
from dora_diffusion.models.loading import Base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.start import read_starts

LABELS = {
    "loha": "LoHa",
    "loha dora": "DoHa",
    "lokr": "LoKr",
    "lokr dora by input": "DoKR",
    "glora": "GLoRA",
    "oft": "OFT",
    "boft": "BOFT",
    "ia3": "IA3",
}


@pytest.mark.parametrize("algorithm, label", LABELS.items())
def test_inspect_names_the_form_and_looks_inside(run, sd_base: Base, sd_folder: Path, tmp_path: Path, algorithm, label):
    path = write(sd_base.denoiser, algorithm, tmp_path / "a.safetensors").path
    said = run("inspect", path, "--base", sd_folder, "--plot", tmp_path / "plot.png")
    assert label in said.out and (tmp_path / "plot.png").exists()
    assert summarise(path).kind == label


@pytest.mark.parametrize("algorithm", ["lokr dora", "ia3"])
def test_parity_knows_forms_and_repair_makes_a_file_that_is_right(sd_base: Base, tmp_path: Path, algorithm):
    written = write(sd_base.denoiser, algorithm, tmp_path / "a.safetensors")
    before = {parity.program.name: parity for parity in compare_programs(written.path, sd_base)}
    assert before["lycoris"].right and not before["comfyui"].right
    made = repair(written.path, sd_base, program_named("comfyui"), tmp_path / "b.safetensors")
    after = {parity.program.name: parity for parity in compare_programs(made.path, sd_base)}
    assert after["comfyui"].right
    adapter = load_adapter(sd_base.pipe, made.path)
    with torch.no_grad():
        for layer, update in adapter.updates().items():
            wanted = written.deltas[layer]
            assert (update.delta_weight() - wanted).norm() <= 1e-5 * (1 + wanted.norm())


def test_training_does_not_go_on_from_a_form_and_says_the_way_out(tmp_path: Path):
    model = bases.unet().eval()
    path = write(model, "glora", tmp_path / "a.safetensors").path
    with pytest.raises(AdapterMismatchError, match=r"it is GLoRA, which is not trained here.*--to lora"):
        attach_trainable(model, read_adapter_file(path), "dora")
    settings = TrainConfig(images=str(tmp_path), out=str(tmp_path / "out"), kind="dora", start_from=str(path))
    with pytest.raises(ConfigError, match=r"is a GLoRA, which is not trained here.*--to lora"):
        read_starts(settings)


def test_a_pipelines_text_encoder_has_its_lokr_too(tmp_path: Path):
    pipe = bases.stable_diffusion()
    tensors, deltas = {}, {}
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        written = write(getattr(pipe, part), "lokr dora", tmp_path / f"{part}.safetensors")
        tensors |= {key.replace("lycoris_", prefix): tensor for key, tensor in load_file(written.path).items()}
        deltas |= {(f"text_encoder.{la}" if part != "unet" else la): d for la, d in written.deltas.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(pipe, tmp_path / "a.safetensors")
    with torch.no_grad():
        for layer, update in adapter.updates().items():
            assert (update.delta_weight() - deltas[layer]).norm() <= 1e-5 * (1 + deltas[layer].norm()), layer
    assert {layer.partition(".")[0] for layer in adapter.updates()} > {"text_encoder"}
    assert file_of(adapter, tmp_path / "b.safetensors").config.parametrisation == "lokr"


def test_two_forms_in_one_file_are_each_their_own(tmp_path: Path):
    """As a preset of LyCORIS gives each kind of layer its own algorithm."""
    model = bases.unet().eval()
    lokr = write(model, "lokr", tmp_path / "a.safetensors")
    glora = write(model, "glora", tmp_path / "b.safetensors")
    tensors = {key: t for key, t in load_file(lokr.path).items() if "attn1" in key}
    tensors |= {key: t for key, t in load_file(glora.path).items() if "attn1" not in key}
    save_file(tensors, tmp_path / "c.safetensors")
    assert read_adapter_file(tmp_path / "c.safetensors").config.kind_label == "several forms"
    with torch.no_grad():
        for layer, update in load_adapter(model, tmp_path / "c.safetensors").updates().items():
            wanted = (lokr if "attn1" in layer else glora).deltas[layer]
            assert (update.delta_weight() - wanted).norm() <= 1e-5 * (1 + wanted.norm()), layer
    both = load_file(lokr.path) | {k: t for k, t in load_file(glora.path).items() if not k.endswith(".alpha")}
    save_file(both, tmp_path / "d.safetensors")
    with pytest.raises(AdapterFileError, match="two forms of update, LoKr and GLoRA, of one layer"):
        load_adapter(model, tmp_path / "d.safetensors")
