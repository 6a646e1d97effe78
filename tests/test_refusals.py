"""A file that is sound and of a kind that is not read is called what it is, never damaged."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import bases
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.files import load_adapter, read_adapter_file

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DAMAGED = ("damaged", "download it again", "download or", "save it again")


def ones(*shapes: tuple[int, ...], keys: tuple[str, ...]) -> dict[str, Tensor]:
    return {key: torch.ones(shape) for key, shape in zip(keys, shapes)}


LORA = ones((4, 32), (32, 4), keys=(f"{Q}.lora_down.weight", f"{Q}.lora_up.weight"))
# One module as each program writes it, and what it is called.
FILES = {
    "T-LoRA": (
        {f"lycoris_conv_in.{p}": torch.ones(4) for p in ("q_layer.weight", "p_layer.weight", "lambda_layer")},
        "LyCORIS T-LoRA",
    ),
    "PEFT's BOFT": ({"base_model.model.x.boft_R": torch.ones(1, 4, 4, 4)}, "PEFT's BOFT"),
    "PEFT's IA3": ({"base_model.model.x.ia3_l": torch.ones(4, 1)}, "PEFT's IA3"),
    "norms": ({"diffusion_model.out.0.diff": torch.ones(32)}, "a change of normalisation weights or biases"),
    "biases": ({"diffusion_model.out.2.diff_b": torch.ones(4)}, "a change of biases"),
    "3-D convolutions": (
        ones(
            (4, 8, 3, 3, 3),
            (8, 4, 1, 1, 1),
            keys=("diffusion_model.x.lora_down.weight", "diffusion_model.x.lora_up.weight"),
        ),
        "as models for sound and video have them",
    ),
    "XLabs": (
        {f"double_blocks.0.processor.qkv_lora1.{p}.weight": torch.ones(4, 4) for p in ("down", "up")},
        "a FLUX LoRA of XLabs",
    ),
    "DiffSynth": (
        {f"transformer_blocks.0.attn.to_q.lora_{p}.default.weight": torch.ones(4, 4) for p in "AB"},
        "a LoRA as DiffSynth names it",
    ),
    "OneTrainer's embedding": ({"bundle_emb.my_token.clip_l": torch.ones(4, 40)}, "an embedding (textual inversion)"),
}


@pytest.mark.parametrize("tensors, said", FILES.values(), ids=FILES)
@pytest.mark.parametrize("beside_a_lora", [False, True])
def test_a_sound_file_of_another_kind_is_called_what_it_is(tmp_path: Path, tensors, said, beside_a_lora) -> None:
    path = tmp_path / "a.safetensors"
    save_file({**tensors, **(LORA if beside_a_lora else {})}, path)
    with pytest.raises(AdapterFileError) as raised:
        load_adapter(bases.unet(), path)
    message = str(raised.value)
    assert str(path) in message and f"{said}" in message and "which is not read here" in message
    assert not any(word in message for word in DAMAGED), message
    if beside_a_lora:
        assert "partial=True" in message
        with pytest.warns(UserWarning, match="not read here"):
            file = read_adapter_file(path, partial=True)
        assert len(file.layers) == 1 and set(file.left_out) >= set(tensors)


def test_eight_bit_floats_are_named_and_not_called_damaged(tmp_path: Path) -> None:
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in LORA.items()}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"not read here: .*F8_E4M3.*save it again in one of these"):
        read_adapter_file(tmp_path / "a.safetensors")


def zipped(names: list[str]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return memory.getvalue()


CONTENT = {
    "zip": (zipped(["style.safetensors", "readme.txt"]), "is a zip archive. It holds style.safetensors. Unpack it"),
    "zip of pictures": (zipped(["1.png"]), "is a zip archive. Unpack it"),
    "torch.save": (zipped(["archive/data.pkl", "archive/data/0"]), "is a pickle"),
    "half a zip": (zipped(["style.safetensors"])[:40], "which is cut short"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), "is a GGUF file"),
    "page": (b"<!DOCTYPE html><html><body>Log in</body></html>", "is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
    "answer": (b'{"error": "not found", "status": 404}', "is a JSON text"),
    "gzip": (b"\x1f\x8b" + bytes(50), "is a gzip archive"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "is a picture"),
}


@pytest.mark.parametrize("content, said", CONTENT.values(), ids=CONTENT)
def test_what_is_no_safetensors_is_named_by_how_it_begins(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterFileError) as raised:
        read_adapter_file(path)
    assert said in str(raised.value) and str(path) in str(raised.value)
