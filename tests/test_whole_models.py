"""Every layer of a transformer at once, in LyCORIS's forms, through each layout: beside what LyCORIS computes."""

from __future__ import annotations

from pathlib import Path

import bases
import pytest
import torch
from lycoris_files import Written, write
from oracles import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter

# SD3's last block has the halves of its text modulation the other way round in the checkpoint; norm_out's are in all.
MODELS = {"sd3": bases.sd3_transformer, "flux": bases.flux_transformer, "z-image": bases.z_image_transformer}
# The first needs the order of rows, the second that q, k and v each have a constraint of their own.
FORMS = ("loha dora", "oft, constrained and rescaled", "lokr, both low-rank", "glora")
QKV = tuple(f"transformer_blocks.0.attn.to_{name}" for name in "qkv")


def assert_means(model: nn.Module, path: Path, deltas: dict[str, Tensor]) -> None:
    adapter = load_adapter(model, path)
    updates = adapter.updates()
    assert updates.keys() == deltas.keys() and deltas
    for layer, delta in deltas.items():
        assert relative_error(updates[layer].delta_weight(), delta) < 1e-5, layer
    adapter.eject()


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MODELS)
def test_all_layers_come_through_a_layout(tmp_path, family, form, layout):
    model = MODELS[family]().eval()
    theirs: Written = write(MODELS[family]().eval(), form, tmp_path / "a.safetensors")
    assert_means(model, theirs.path, theirs.deltas)
    for base in (model, None):
        out = convert_adapter(theirs.path, tmp_path / f"{base is None}.safetensors", layout, base=base).path
        assert_means(model, out, theirs.deltas)


def test_the_last_blocks_text_modulation_is_in_the_checkpoints_order_for_comfyui(tmp_path):
    """ComfyUI's own weights have (scale, shift) there and diffusers' (shift, scale): B's halves change places."""
    A, B = torch.randn(4, 32), torch.randn(64, 4)
    layer = "transformer_blocks.1.norm1_context.linear"
    path = tmp_path / "a.safetensors"
    save_file({f"transformer.{layer}.lora_A.weight": A, f"transformer.{layer}.lora_B.weight": B}, path)
    out = convert_adapter(path, tmp_path / "b.safetensors", "comfyui", base=bases.sd3_transformer()).path
    held = load_file(out)
    name = "diffusion_model.joint_blocks.1.context_block.adaLN_modulation.1"
    assert torch.equal(held[f"{name}.lora_B.weight"], torch.cat([B[32:], B[:32]]))
    assert torch.equal(held[f"{name}.lora_A.weight"], A)


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_butterflies_of_q_k_and_v_stay_apart(tmp_path, layout):
    """Three of them, one behind the other along any axis, are no butterfly of the fused layer."""
    tensors = {
        f"lycoris_{layer.replace('.', '_')}.oft_blocks": 0.2 * torch.randn(2, 4, 8, 8, generator=torch.manual_seed(i))
        for i, layer in enumerate(QKV)
    }
    save_file(tensors, tmp_path / "a.safetensors")
    model = bases.sd3_transformer()
    adapter = load_adapter(model, tmp_path / "a.safetensors")
    deltas = {layer: update.delta_weight() for layer, update in adapter.updates().items()}
    adapter.eject()
    out = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout, base=model).path
    assert not any("qkv" in key for key in load_file(out))
    assert_means(model, out, deltas)


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_rotations_of_q_k_and_v_keep_a_constraint_of_their_own(tmp_path, layout):
    """Fused they would share one, on all their blocks together: it is worked into each."""
    sizes = (0.02, 0.3, 1.0)  # one within the constraint
    tensors = {}
    for i, (layer, size) in enumerate(zip(QKV, sizes)):
        module = f"lycoris_{layer.replace('.', '_')}"
        tensors[f"{module}.oft_blocks"] = size * torch.randn(4, 8, 8, generator=torch.manual_seed(i))
        tensors[f"{module}.alpha"] = torch.tensor(0.05)
    save_file(tensors, tmp_path / "a.safetensors")
    model = bases.sd3_transformer()
    out = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", layout, base=model).path
    assert any("qkv" in key for key in load_file(out))
    adapter = load_adapter(model, out)
    for layer in QKV:
        update, P = adapter.updates()[layer], tensors[f"lycoris_{layer.replace('.', '_')}.oft_blocks"].double()
        Q = P - P.mT
        Q = Q * min(1.0, 0.05 * 32 / Q.norm().item())
        one = torch.eye(8, dtype=torch.float64)
        R = torch.block_diag(*((one + block) @ (one - block).inverse() for block in Q))
        W0 = update.frozen.dense_weight().double()
        assert relative_error(update.delta_weight(), R.T @ W0 - W0) < 1e-5, layer
