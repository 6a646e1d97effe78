"""The original names of normalisation layers, and of all others: a checkpoint with these names, made from a model, is
that model again through diffusers' own conversion."""

from __future__ import annotations

from collections.abc import Callable

import bases
import pytest
import torch
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from test_vectors import sd35
from torch import Tensor, nn

from dora_diffusion.adapters.injection import changeable_layers
from dora_diffusion.formats import names
from dora_diffusion.formats.anatomy import anatomy_of
from dora_diffusion.formats.original import TRANSFORMERS


def full_width(model_class: type[nn.Module]) -> nn.Module:
    """A block of each kind as wide as diffusers' conversion wants it; all but the norms without memory."""
    with torch.device("meta"):
        model = model_class(num_layers=1, num_single_layers=1)
    for i, view in enumerate(changeable_layers(model).values()):
        if not view.in_shape:
            view.module.weight = nn.Parameter(torch.full((view.out_features,), float(i)))
    return model


TRANSFORMER_MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sd3": (sd35, "convert_sd3_transformer_checkpoint_to_diffusers"),
    "flux": (lambda: full_width(FluxTransformer2DModel), "convert_flux_transformer_checkpoint_to_diffusers"),
    "chroma": (lambda: full_width(ChromaTransformer2DModel), "convert_chroma_transformer_checkpoint_to_diffusers"),
    "flux2": (bases.flux2_transformer, "convert_flux2_transformer_checkpoint_to_diffusers"),
    "z-image": (bases.z_image_transformer, "convert_z_image_transformer_checkpoint_to_diffusers"),
}
SCALES = {"flux": "scale", "chroma": "scale", "flux2": "scale"}  # what the checkpoint calls a norm's weight


def original_checkpoint(family: str, model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters under the names that the tables here have for the original checkpoint."""
    table, state = TRANSFORMERS[family], dict(model.state_dict())
    checkpoint: dict[str, Tensor] = {}
    for (theirs, ours), fused in table.fused.items():
        for number in {path.split(".")[1] for path in state if path.startswith(ours + ".")}:
            for name, (members, _) in fused.items():
                for end in ("weight", "bias"):
                    keys = [f"{ours}.{number}.{member}.{end}" for member in members]
                    if all(key in state for key in keys):
                        checkpoint[f"{theirs}.{number}.{name}.{end}"] = torch.cat([state.pop(key) for key in keys])
    for path, view in changeable_layers(model).items():
        original = table.original(path)
        for end in ("weight", "bias"):
            if f"{path}.{end}" not in state:
                continue
            value = state.pop(f"{path}.{end}")
            assert original is not None, f"{path} has no original name"
            parts = table.parts(original)
            assert [part.layer for part in parts] == [path]
            if parts[0].rows.settled(view.out_features, view.in_shape[0] if view.in_shape else 0).swapped:
                value = torch.cat(value.chunk(2)[::-1])
            checkpoint[f"{original}.{end if view.in_shape else SCALES.get(family, end)}"] = value
    return {**checkpoint, **{name.replace("pos_embed.pos_embed", "pos_embed"): value for name, value in state.items()}}


@pytest.mark.parametrize("family", TRANSFORMER_MODELS)
def test_diffusers_makes_the_model_of_a_checkpoint_with_our_names(family):
    make, converter = TRANSFORMER_MODELS[family]
    model = make()
    expected = model.state_dict()
    given = original_checkpoint(family, model)
    found = getattr(single_file_utils, converter)(dict(given))
    found = {name: tensor for name, tensor in found.items() if name in expected or "inv_freq" not in name}
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not same(found[name], expected[name])]


def same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and (expected.is_meta or torch.equal(found, expected))


def test_a_unets_norms_have_the_names_of_its_checkpoint():
    """diffusers' conversion of a whole UNet: every layer of ours, norms too, at the original name that we give it."""
    model = bases.unet()
    anatomy = anatomy_of(model, changeable_layers(model))
    state, checkpoint = model.state_dict(), {}
    originals = {ours: theirs for theirs, ours in anatomy.originals.items()}
    for path in changeable_layers(model):
        for end in ("weight", "bias"):
            if f"{path}.{end}" in state:
                checkpoint[f"model.diffusion_model.{originals[path]}.{end}"] = state[f"{path}.{end}"]
    found = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, dict(model.config))
    assert found.keys() == state.keys()
    assert not [name for name in state if not torch.equal(found[name], state[name])]


@pytest.mark.parametrize("family", [*TRANSFORMER_MODELS, "unet", "qwen"])
def test_every_norm_is_found_by_its_dotted_and_its_flat_names(family):
    models = {"unet": bases.unet, "qwen": bases.qwen_transformer}
    model = models[family]() if family in models else TRANSFORMER_MODELS[family][0]()
    views = changeable_layers(model)
    anatomy = anatomy_of(model, views)
    originals = {ours: theirs for theirs, ours in anatomy.originals.items()}
    for path, view in views.items():
        if view.in_shape:
            continue
        original = originals[path] if family == "unet" else TRANSFORMERS[family].original(path)
        assert original is not None
        for name in (path, original):
            for written in (
                f"diffusion_model.{name}",
                f"transformer.{name}",
                "lora_unet_" + name.replace(".", "_"),
                "lycoris_" + name.replace(".", "_"),
            ):
                located = names.locate(written, anatomy)
                assert [part.layer for part in located.parts] == [path], written
