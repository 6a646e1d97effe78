"""PEFT's folders whose configuration says more than the tensors: beside PEFT, refused or read as PEFT computes them."""

from __future__ import annotations

import json
from pathlib import Path

import bases
import pytest
import torch
from oracles import output_of, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.files import load_adapter

TARGETS = ["to_q", "to_out.0"]
RELATIVE = {"pissa": "PiSSA", "pissa_niter_4": "PiSSA", "olora": "OLoRA"}


def trained(folder: Path, **options: object) -> nn.Module:
    """A small UNet with PEFT's adapter in it, as after training; `folder` has it, `folder`/first what it was before."""
    torch.manual_seed(0)
    theirs = get_peft_model(bases.unet().eval(), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **options))
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it for the initial adapter
    theirs.save_pretrained(folder / "first")
    theirs.peft_config["default"].init_lora_weights = options.get("init_lora_weights", True)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    theirs.save_pretrained(folder)
    return theirs.base_model.model.eval()


@pytest.mark.parametrize("start", RELATIVE)
def test_an_adapter_relative_to_a_base_that_peft_changes_is_refused(tmp_path, start):
    theirs = trained(tmp_path, init_lora_weights=start)
    with pytest.raises(AdapterFileError, match=RELATIVE[start]) as raised:
        load_adapter(bases.unet(), tmp_path, partial=True)
    assert "path_initial_model_for_weight_conversion" in str(raised.value)
    # What its tensors alone would have given is none of PEFT's models: the refusal is for a reason.
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": True}))
    model = bases.unet().eval()
    load_adapter(model, tmp_path)
    assert relative_error(output_of(model), output_of(theirs)) > 0.05


def test_the_way_out_that_is_named_leads_to_what_peft_computes(tmp_path):
    theirs = trained(tmp_path, init_lora_weights="olora")
    wanted = output_of(theirs)
    again = PeftModel.from_pretrained(bases.unet().eval(), tmp_path)
    again.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "first")
    model = bases.unet().eval()
    load_adapter(model, tmp_path / "lora")
    assert relative_error(output_of(model), wanted) < 1e-4


def test_a_header_of_diffusers_says_it_too(tmp_path):
    trained(tmp_path, init_lora_weights="pissa")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {name.replace("base_model.model.", "unet."): tensor for name, tensor in tensors.items()}
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    save_file(tensors, tmp_path / "pissa.safetensors", header)
    with pytest.raises(AdapterFileError, match="PiSSA"):
        load_adapter(bases.unet(), tmp_path / "pissa.safetensors")


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica"])
def test_another_start_alone_is_no_reason(tmp_path, start):
    theirs = trained(tmp_path, init_lora_weights=start)
    model = bases.unet().eval()
    load_adapter(model, tmp_path)
    assert relative_error(output_of(model), output_of(theirs)) < 1e-5


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("kasa_config", {"beta": 1e-4, "gamma": 1e-3}, "KaSA"),
        ("monteclora_config", {}, ""),  # as if it were not there
        ("use_bdlora", {"nblocks": 2, "target_modules_bd_a": ["to_q"], "target_modules_bd_b": []}, "BD-LoRA"),
        ("alora_invocation_tokens", [1, 2], "activated LoRA"),
        ("layer_replication", [[0, 4], [2, 5]], "whose layers PEFT repeats"),
    ],
)
def test_what_the_configuration_alone_says_is_heard(tmp_path, field, value, said):
    trained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    if not said:
        load_adapter(bases.unet(), tmp_path)
        return
    with pytest.raises(AdapterFileError, match=said):
        load_adapter(bases.unet(), tmp_path)
