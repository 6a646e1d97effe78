"""`--partial`: what fits of a file is taken, with the count, and nothing without being asked."""

from __future__ import annotations

import json
from pathlib import Path

import bases
import pytest
import torch
from dialect_files import flat, kohya, lora_delta, make
from oracles import relative_error
from safetensors.torch import load_file, save_file

from dora_diffusion.comparison.compare import Column, CompareRequest, columns_of, compare
from dora_diffusion.comparison.export import command_of, record_of
from dora_diffusion.comparison.report import write_report
from dora_diffusion.errors import AdapterFileError, AdapterMismatchError
from dora_diffusion.formats.files import load_adapter
from dora_diffusion.models.loading import Base

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
PATHS = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k"]
STRANGE = "lora_unet_up_blocks_9_attentions_0_proj_in"  # a layer that no base here has
UNREAD = "lora_unet_mid_block_attentions_0_proj_in.lora_embedding_A"


@pytest.fixture
def mixed(sd_base: Base, tmp_path: Path) -> Path:
    """Two layers that fit, one of another base, and a key of a method that is not read."""
    made = make(sd_base.denoiser, PATHS, flat("lora_unet_"), kohya, lora_delta)
    made.tensors |= {f"{STRANGE}.lora_down.weight": torch.ones(4, 8), f"{STRANGE}.lora_up.weight": torch.ones(8, 4)}
    made.tensors[UNREAD] = torch.ones(4, 8)
    return made.save(tmp_path / "mixed.safetensors")


def test_a_comparison_says_how_much_of_a_file_it_drew_with(sd_base, mixed):
    with pytest.raises(AdapterFileError, match="--partial"):
        columns_of([mixed])
    columns = columns_of([mixed], partial=True)
    request = CompareRequest(("a cat",), (1,), columns, num_inference_steps=2, partial=True)
    with pytest.warns(UserWarning, match="loaded in part: 2 of 3 layers"):
        base, drawn = compare(sd_base, request, tolerant=True)
    assert drawn.fits and drawn.difference > 0
    assert drawn.note == "loaded in part: 2 of 3 layers, 1 key of the file left out"
    assert "--partial" in command_of(request, "emoji") and record_of(request, "emoji").partial
    assert "(1 key left out)" in write_report("x", request, [base, drawn], base_name="x")


def test_nothing_is_taken_in_part_without_being_asked(sd_base, tmp_path):
    made = make(sd_base.denoiser, PATHS, flat("lora_unet_"), kohya, lora_delta)
    made.tensors |= {f"{STRANGE}.lora_down.weight": torch.ones(4, 8), f"{STRANGE}.lora_up.weight": torch.ones(8, 4)}
    path = made.save(tmp_path / "a.safetensors")
    request = CompareRequest(("a cat",), (1,), (Column("LoRA", path),), num_inference_steps=2)
    _, drawn = compare(sd_base, request, tolerant=True)
    assert not drawn.fits and drawn.difference == 0 and "made for another base" in drawn.note
    with pytest.raises(AdapterMismatchError, match=r"2 of 3 layers match.*(?s:.)*--partial"):
        list(compare(sd_base, request))


def test_the_commands_take_what_fits_when_they_are_asked(run, tmp_path, mixed, sd_folder, sd_base):
    out = tmp_path / "out"
    drawing = ("--prompt", "a cat", "--steps", 2, "--size", "16x16", "--base", sd_folder)
    commands = (
        ("generate", "--adapter", mixed, *drawing, "--out", out / "pictures"),
        ("compare", "--adapters", mixed, *drawing, "--out", out / "compare"),
        ("convert", mixed, "--to", "diffusers", "--base", sd_folder, "--out", out / "c.safetensors"),
        ("inspect", mixed, "--base", sd_folder),
    )
    for command in commands:
        refused = run(*command)
        assert refused.status == 1 and "--partial" in refused.err, command
        taken = run(*command, "--partial")
        assert taken.status == 0, (command, taken.err)
        assert "2 of 3 layers" in taken.err and "1 key" in taken.out + taken.err, (command, taken.err)
    assert {key.rpartition(".lora_")[0] for key in load_file(out / "c.safetensors")} == {
        f"unet.{path}" for path in PATHS
    }
    looked = run("inspect", mixed, "--partial", "--json")
    assert json.loads(looked.out)[0]["layers"] == 3  # without a base, every name may be a layer


def test_what_was_converted_in_part_means_what_it_meant(run, tmp_path, mixed, sd_folder, sd_base):
    path = tmp_path / "c.safetensors"
    assert run("convert", mixed, "--to", "kohya", "--base", sd_folder, "--out", path, "--partial").status == 0
    made = make(sd_base.denoiser, PATHS, flat("lora_unet_"), kohya, lora_delta)
    adapter = load_adapter(sd_base.pipe, path)
    for layer, update in adapter.updates().items():
        assert relative_error(update.delta_weight(), made.deltas[layer]) < 1e-5
    adapter.eject()


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
BROKEN = {
    "a half is missing": ({f"unet.{ATTENTION}.to_k.lora_A.weight": torch.ones(4, 32)}, "lora_B"),
    "a difference of a bias that is not there": (
        {
            f"unet.{ATTENTION}.to_k.lora_A.weight": torch.ones(4, 32),
            f"unet.{ATTENTION}.to_k.lora_B.weight": torch.ones(32, 4),
            f"unet.{ATTENTION}.to_k.diff_b": torch.ones(32),
        },
        "a difference of the bias, and this layer has none",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_left_out_counts_among_all_layers_of_the_file(tmp_path, case):
    broken, said = BROKEN[case]
    A, B = torch.randn(4, 32), torch.randn(32, 4)
    sound = {f"unet.{ATTENTION}.to_q.lora_A.weight": A, f"unet.{ATTENTION}.to_q.lora_B.weight": B}
    save_file(sound | broken, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=said):
        load_adapter(bases.unet(), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"loaded in part: 1 of 2 layers") as warned:
        adapter = load_adapter(bases.unet(), tmp_path / "a.safetensors", partial=True)
    assert any(said in str(warning.message) for warning in warned)
    [(layer, update)] = adapter.updates().items()
    assert layer == f"{ATTENTION}.to_q" and torch.allclose(update.delta_weight(), B @ A)
