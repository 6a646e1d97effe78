"""What `--repair` wrote, in the programs themselves, and the command."""

from __future__ import annotations

import json

import bases
import pytest
import torch
from oracles import perturb
from programs_run import (
    RUN,
    TRANSCRIBED,
    errors_of,
    in_comfyui,
    input_axis,
    true_deltas,
    weights_of,
)
from safetensors import safe_open

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.errors import AdapterFileError, ConfigError
from dora_diffusion.formats.files import save_adapter
from dora_diffusion.inspection.look import look_at
from dora_diffusion.inspection.parity import RIGHT, compare_programs
from dora_diffusion.inspection.programs import PROGRAMS, program_named
from dora_diffusion.inspection.repair import Unrepairable, repair
from dora_diffusion.models.loading import Base

# The form that a repaired file has, by the axis of the norm; ComfyUI's and Forge's otherwise.
REPAIRED = {
    "output": {
        "diffusers": "diffusers",
        "peft": "diffusers",
        "lycoris": "kohya",
        "a1111": "diff",
        "invokeai": "diff",
        "stable-diffusion.cpp": "diff",
        "sdnext": "kohya",
    },
    "input": {"diffusers": "full-rank", "peft": "full-rank", "lycoris": "diff", "stable-diffusion.cpp": "diff"},
}


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("program", [program.name for program in PROGRAMS])
def test_a_repaired_file_is_right_in_the_program(base, peft_file, kohya_file, tmp_path, program, axis):
    path = peft_file() if axis == "output" else input_axis(kohya_file(), base)
    true = true_deltas(path, base)
    before = {name: weight.clone() for name, weight in weights_of(base.denoiser).items()}
    made = repair(path, base, program_named(program), tmp_path / "repaired.safetensors")
    found = RUN[program](made.path, 1.0) if program in RUN else TRANSCRIBED[program](made.path, base, 1.0)
    assert max(errors_of(found, true, 1.0).values()) < RIGHT
    assert made.form.name == REPAIRED[axis].get(program, "compensated" if axis == "output" else "kohya")
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(base.denoiser).items())


@pytest.mark.parametrize("program, form", [("diffusers", "full-rank"), ("lycoris", "diff"), ("comfyui", "compensated")])
def test_a_file_repaired_for_a_strength_is_right_at_it(base, peft_file, tmp_path, program, form):
    path = peft_file()
    made = repair(path, base, program_named(program), tmp_path / "repaired.safetensors", strength=0.4)
    assert made.form.name == form
    for w in (1.0, 0.4):
        found = RUN[program](made.path, w) if program in RUN else in_comfyui(made.path, base, w)
        assert max(errors_of(found, true_deltas(path, base), w).values()) < RIGHT


def test_a_file_for_comfyui_alone_says_so_and_is_not_taken_for_another(base, peft_file, tmp_path):
    made = repair(peft_file(), base, program_named("comfyui"), tmp_path / "comfyui.safetensors")
    with safe_open(made.path, framework="pt") as file:
        mark = json.loads(file.metadata()["dora_diffusion_made_for"])
    assert mark["program"] == "ComfyUI" and "783545f" in mark["version"]
    with pytest.raises(AdapterFileError, match=r"was made for one program alone .*ComfyUI"):
        compare_programs(made.path, base)
    with pytest.raises(AdapterFileError, match="was made for one program alone"):
        repair(made.path, base, program_named("lycoris"), tmp_path / "again.safetensors")
    with pytest.raises(AdapterFileError, match="was made for one program alone"):
        look_at([made.path], base)
    assert "wrong in every other" in look_at([made.path])[0][0].notes[-1]


def test_the_form_can_be_chosen_and_a_wrong_one_is_refused_with_its_error(base, peft_file, tmp_path):
    path = peft_file()
    made = repair(path, base, program_named("comfyui"), tmp_path / "diff.safetensors", form="diff")
    assert max(errors_of(in_comfyui(made.path, base, 1.0), true_deltas(path, base), 1.0).values()) < RIGHT
    out = tmp_path / "never.safetensors"
    with pytest.raises(Unrepairable, match=r"ComfyUI .*kohya: relative error 0\.\d+ in .+, the worst layer"):
        repair(path, base, program_named("comfyui"), out, form="kohya")
    assert not out.exists()
    with pytest.raises(ConfigError, match=r"no form 'difference'.*the forms are diffusers, kohya, .*full-rank"):
        repair(path, base, program_named("comfyui"), out, form="difference")


def test_none_can_is_said_where_none_can(tmp_path):
    base = Base("flux", bases.flux())  # of which A1111 has no names
    config = AdapterConfig("dora", rank=2, alpha=2.0, target_modules=("norm1.linear",))
    adapter = perturb(inject_adapter(base.denoiser, config, seed=1))
    path = save_adapter(adapter, tmp_path / "dora.safetensors")
    adapter.eject()
    with pytest.raises(Unrepairable, match="no file of this adapter comes out right in A1111"):
        repair(path, base, program_named("a1111"), tmp_path / "x.safetensors")


def test_the_command_compares_repairs_and_refuses(run, tmp_path):
    from dora_diffusion.models.loading import load_base

    emoji = load_base("emoji", device="cpu")
    config = AdapterConfig("dora", rank=2, alpha=3.0, target_modules=(r"mid_block\..*to_[qkv]",))
    adapter = perturb(inject_adapter(emoji.denoiser, config, seed=0), size=0.02)
    count = len(adapter.layers)
    path = save_adapter(adapter, tmp_path / "dora.safetensors")
    adapter.eject()
    table = run("parity", path, "--base", "emoji", "--strength", "0.5")
    assert table.status == 0 and "ComfyUI" in table.out and "right at strength 1" in table.flat
    repaired = run("parity", path, "--repair", "lycoris", "--out", tmp_path / "lycoris.safetensors")
    assert repaired.status == 0 and "kohya" in repaired.flat
    found = json.loads(run("parity", tmp_path / "lycoris.safetensors", "--json").out)
    by_name = {entry["program"]: entry for entry in found}
    assert by_name["lycoris"]["right"] and not by_name["comfyui"]["right"]
    assert by_name["diffusers"]["dropped_keys"] == {"dora_scale": count}
    assert len(by_name["a1111"]["layers"]) == count and by_name["a1111"]["worst"] > 0.1
    assert run("parity", path, "--repair", "comfyui").status == 1
    unknown = run("parity", path, "--repair", "comfy", "--out", tmp_path / "x.safetensors")
    assert unknown.status == 1 and "Did you mean 'comfyui'" in unknown.flat
