"""Where a file says its alpha: beside its tensors, in PEFT's configuration, in the header; and what wins."""

from __future__ import annotations

import json
from pathlib import Path

import bases
import pytest
import torch
from dialect_files import dotted, flat, kohya, lora_delta, make, peft
from oracles import relative_error
from safetensors import safe_open
from torch import nn

from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, read_adapter_file

PATHS = ["conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]
RANK = 4
KEYS = ("alpha", "lora_alpha", "network_alpha", "ss_network_alpha", "unet.lora_alpha")


@pytest.fixture
def unet() -> nn.Module:
    return bases.unet()


def without_alpha(unet: nn.Module, tmp_path: Path, named: str, alpha: float, /, **header: str) -> tuple[Path, dict]:
    leaves = {"kohya": lambda v: {k: t for k, t in kohya(v).items() if k != "alpha"}, "peft": peft}[named]
    name = {"kohya": flat("lora_unet_"), "peft": dotted("unet.")}[named]
    made = make(unet, PATHS, name, leaves, lora_delta, s=alpha / RANK)
    return made.save(tmp_path / "a.safetensors", header), made.deltas


def assert_means(unet: nn.Module, path: Path, deltas: dict, **options: float) -> None:
    adapter = load_adapter(unet, path, **options)
    for layer, update in adapter.updates().items():
        assert relative_error(update.delta_weight(), deltas[layer]) < 1e-5
    adapter.eject()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("named", ["kohya", "peft"])
def test_an_alpha_of_the_header_is_what_the_file_means(tmp_path, unet, key, named):
    path, deltas = without_alpha(unet, tmp_path, named, 8.0, **{key: "8.0"})
    assert_means(unet, path, deltas)
    (note,) = read_adapter_file(path).notes
    assert f"alpha 8 is taken from the header ({key})" in note and "ComfyUI" in note
    conversion = convert_adapter(path, tmp_path / "k.safetensors", "kohya")
    assert_means(unet, conversion.path, deltas)
    assert note in conversion.notes


def test_none_in_the_header_is_no_alpha(tmp_path, unet):
    path, deltas = without_alpha(unet, tmp_path, "kohya", RANK, ss_network_alpha="None")
    assert_means(unet, path, deltas)
    assert read_adapter_file(path).notes == ()


def test_two_alphas_in_the_header_have_to_be_settled(tmp_path, unet):
    path, deltas = without_alpha(unet, tmp_path, "kohya", 8.0, alpha="8", ss_network_alpha="4")
    with pytest.raises(AdapterFileError, match=r"two alphas .*alpha = 8 and ss_network_alpha = 4.*--alpha 8"):
        load_adapter(unet, path)
    assert_means(unet, path, deltas, alpha=8.0)


@pytest.mark.parametrize("text", ["eight", "0", "-1", "nan", "inf", "1e308", "True"])
def test_what_is_no_alpha_in_the_header_is_named(tmp_path, unet, text):
    path, _ = without_alpha(unet, tmp_path, "kohya", 8.0, network_alpha=text)
    with pytest.raises(AdapterFileError, match=f"network_alpha = '{text}' in its header, which is no alpha"):
        load_adapter(unet, path)


def test_a_modules_own_alpha_and_pefts_configuration_come_before_the_header(tmp_path, unet):
    made = make(unet, PATHS, flat("lora_unet_"), kohya, lora_delta, s=2.0)
    path = made.save(tmp_path / "k.safetensors", {"ss_network_alpha": "1", "alpha": "8"})
    assert_means(unet, path, made.deltas)
    (note,) = read_adapter_file(path).notes
    assert note == "the header says ss_network_alpha = 1, the layers have another alpha: theirs counts"
    made = make(unet, PATHS, dotted("unet."), peft, lora_delta, s=2.0)
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8}), "ss_network_alpha": "1"}
    assert_means(unet, made.save(tmp_path / "p.safetensors", header), made.deltas)


def test_an_alpha_that_was_given_in_vain_is_said(tmp_path, unet):
    made = make(unet, PATHS, flat("lora_unet_"), kohya, lora_delta, s=2.0)
    path = made.save(tmp_path / "k.safetensors")
    assert any("5, is not used" in note for note in read_adapter_file(path, alpha=5).notes)
    assert_means(unet, path, made.deltas, alpha=5)


def test_a_converted_file_keeps_no_alpha_that_is_no_longer_true(tmp_path, unet):
    made = make(unet, PATHS, flat("lora_unet_"), kohya, lora_delta, s=2.0)
    path = made.save(tmp_path / "k.safetensors", {"ss_network_alpha": "1", "ss_network_dim": "99", "author": "me"})
    for to, options in (("diffusers", {}), ("lora", {"base": unet, "rank": 2})):
        convert_adapter(path, tmp_path / "out.safetensors", to, **options)
        with safe_open(tmp_path / "out.safetensors", "pt") as file:
            header = file.metadata()
        assert header["author"] == "me" and header.get("ss_network_alpha") != "1"
        assert header.get("ss_network_dim") != "99"


@pytest.mark.parametrize("value", [1e308, 1e7, float("inf"), float("nan"), 0.0, -2.0])
def test_an_alpha_beside_the_tensors_that_no_training_has_is_named(tmp_path, unet, value):
    made = make(unet, PATHS, flat("lora_unet_"), kohya, lora_delta)
    alphas = {key: torch.tensor(value, dtype=torch.float64) for key in made.tensors if key.endswith(".alpha")}
    made.tensors.update(alphas)
    with pytest.raises(AdapterFileError, match=r"lora_unet_conv_in"):
        load_adapter(unet, made.save(tmp_path / "a.safetensors"))
