"""The families that can be trained, each against its stock diffusers pipeline: how it is asked, its files."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import bases
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from oracles import perturb, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_diffusion.adapters.injection import AdapterConfig, adaptable_layers, inject_adapter, matching_layers
from dora_diffusion.errors import ConfigError, PromptError
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, read_adapter_file, save_adapter
from dora_diffusion.formats.original import is_flux2
from dora_diffusion.generation import GenerationRequest, check_prompt, generate
from dora_diffusion.inspection.parity import compare_programs
from dora_diffusion.inspection.programs import program_named
from dora_diffusion.inspection.repair import repair
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.families import FAMILIES, family_of
from dora_diffusion.models.loading import Base
from dora_diffusion.models.quantising import quantise

later = pytest.mark.parametrize("make", [bases.chroma, bases.flux2_klein, bases.qwen_image, bases.z_image])


def flux_dev() -> DiffusionPipeline:
    return bases.flux(guidance_embeds=True)


def flux_schnell() -> DiffusionPipeline:
    return bases.flux(guidance_embeds=False)


@pytest.mark.parametrize("make", [flux_dev, flux_schnell, *bases.TRANSFORMERS])
def test_a_transformer_is_asked_as_its_pipeline_asks_it(make: Callable[[], DiffusionPipeline]) -> None:
    """One step from pure noise: the stock pipeline moves the latents by what our call predicts."""
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    family, base = family_of(pipe), Base("base", pipe)
    prompts = ["disc", "a red disc, longer than the other"]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    step = pipe.scheduler.step

    def recorded(prediction: Tensor, t: Tensor, x: Tensor, **values: object) -> tuple[Tensor]:
        seen.append((prediction, t, x))
        return step(prediction, t, x, **values)

    pipe.scheduler.step = recorded
    without = {
        "true_cfg_scale" if make is bases.qwen_image else "guidance_scale": 0.0 if make is bases.z_image else 1.0
    }
    pipe(prompt=list(prompts), height=32, width=48, num_inference_steps=1, output_type="latent", **without)
    ((expected, t, x),) = seen
    unpack = {
        "FluxPipeline": lambda z: pipe._unpack_latents(z, 16, 24, 1),
        "ChromaPipeline": lambda z: pipe._unpack_latents(z, 16, 24, 1),
        "QwenImagePipeline": lambda z: pipe._unpack_latents(z, 16, 24, 1).squeeze(2),
        "Flux2KleinPipeline": lambda z: z.transpose(1, 2).reshape(2, 16, 8, 12),
    }.get(family.pipeline, lambda z: z)
    with torch.no_grad():
        conditioning = Conditioning.stack([family.encode(pipe, [prompt]) for prompt in prompts])
        found = family.predict(pipe.transformer, unpack(x), t.expand(2), conditioning)
    torch.testing.assert_close(found, unpack(expected), atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert base.size % base.multiple == 0 and 32 % base.multiple == 0


EVERY = (bases.stable_diffusion, bases.stable_diffusion_xl, *bases.TRANSFORMERS)
WITH_TRAINED_ENCODERS = EVERY[:4]  # CLIP's


def loss_and_gradients(make: Callable[[], DiffusionPipeline], checkpointed: bool, encoders: bool) -> dict[str, Tensor]:
    """A training step's loss and gradients for captions of two lengths, the text encoders trained too if asked."""
    pipe = make()
    family = family_of(pipe)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    trained = {name: getattr(pipe, name) for name in family.text_encoders} if encoders else {}
    config = AdapterConfig(rank=4, target_modules=family.target_modules)
    adapter = perturb(inject_adapter(denoiser, config, seed=0, text_encoders=trained))
    if checkpointed:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    prompts = ["disc", "a red disc, longer than the other"]
    with torch.set_grad_enabled(encoders):
        conditioning = Conditioning.stack([family.encode(pipe, [prompt]) for prompt in prompts])
    with torch.no_grad():
        mean, _ = family.posterior(pipe, torch.zeros(1, 3, 64, 64))
    x = torch.randn(2, *mean.shape[1:], generator=torch.Generator().manual_seed(1))
    losses = [
        family.predict(denoiser, x + i, torch.tensor([300.0, 700.0]), conditioning).square().mean() for i in (0, 1)
    ]
    sum(losses).backward()  # the first call is computed again after the second was made
    gradients = {name: p.grad for name, p in adapter.named_parameters().items() if p.grad is not None}
    return {"loss 0": losses[0].detach(), "loss 1": losses[1].detach(), **gradients}


@pytest.mark.parametrize(
    ("make", "encoders"),
    [(make, on) for make in EVERY for on in (False, True) if not on or make in WITH_TRAINED_ENCODERS],
)
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(
    make: Callable[[], DiffusionPipeline], encoders: bool
) -> None:
    plain, checkpointed = (loss_and_gradients(make, on, encoders) for on in (False, True))
    assert plain.keys() == checkpointed.keys() and len(plain) > 2
    assert any(name.startswith("text_encoder.") for name in plain) == encoders
    for name, value in plain.items():
        torch.testing.assert_close(
            checkpointed[name], value, atol=1e-6, rtol=1e-5, msg=lambda said, n=name: f"{n}: {said}"
        )


@pytest.mark.parametrize("make", [bases.stable_diffusion, *bases.TRANSFORMERS])
def test_latents_of_pictures_are_what_the_pipeline_decodes(make: Callable[[], DiffusionPipeline]) -> None:
    """What the stock pipeline makes of our latents is what the autoencoder makes of its own posterior's mean."""
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    family = family_of(pipe)
    pixels = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        own = pipe.vae.encode(pixels.unsqueeze(2) if make is bases.qwen_image else pixels).latent_dist
        expected = pipe.vae.decode(own.mode()).sample
        mean, std = family.posterior(pipe, pixels)
    pack = {
        "FluxPipeline": lambda z: pipe._pack_latents(z, *z.shape),
        "ChromaPipeline": lambda z: pipe._pack_latents(z, *z.shape),
        "QwenImagePipeline": lambda z: pipe._pack_latents(z, *z.shape),
    }.get(family.pipeline, lambda z: z)
    pipe.scheduler.step = lambda _prediction, _t, x, **_values: (x,)
    size = {"height": 32, "width": 48, "num_inference_steps": 1}
    drawn = pipe(prompt="disc", latents=pack(mean), output_type="pt", **size).images
    wanted = (expected.reshape(1, 3, 32, 48) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn, wanted, atol=1e-4, rtol=1e-4)
    assert std.shape == mean.shape and (std > 0).all()


@pytest.mark.parametrize("make", [bases.flux, bases.flux2_klein])
def test_a_negative_prompt_that_would_be_passed_over_is_refused(make: Callable[[], DiffusionPipeline]) -> None:
    with pytest.raises(PromptError, match="Leave it out"):
        generate(Base("base", make()), GenerationRequest("disc", negative_prompt="square"))


@pytest.mark.parametrize("make", [bases.flux2_klein, bases.qwen_image, bases.z_image])
def test_a_language_model_is_asked_how_much_of_a_prompt_it_reads(make: Callable[[], DiffusionPipeline]) -> None:
    pipe = make()
    chat = [{"role": "user", "content": ""}]
    text = pipe.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    limit = 512 - (0 if make is bases.qwen_image else len(pipe.tokenizer(text).input_ids))
    check_prompt(pipe, "x" * limit)
    with pytest.raises(PromptError, match=f"{limit + 1} tokens long and this base reads {limit}"):
        check_prompt(pipe, "x" * (limit + 1))
    seen: list[Tensor] = []
    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda _module, _given, values: seen.append(values["input_ids"]), with_kwargs=True
    )
    pipe.encode_prompt(["x" * limit])
    hook.remove()
    assert pipe.tokenizer.decode(seen[0][0], skip_special_tokens=True).count("x") >= limit  # nothing of it was cut


# Files.


def saved(make: Callable[[], DiffusionPipeline], path: Path, kind: str) -> dict[str, Tensor]:
    """A file with an adapter of the family's own layers, feed-forward too; what it changes, by the layers' names."""
    pipe = make()
    family = family_of(pipe)
    targets = (*family.target_modules, *family.feed_forward)
    adapter = perturb(
        inject_adapter(pipe.transformer, AdapterConfig(kind=kind, rank=4, alpha=6.0, target_modules=targets))
    )
    save_adapter(adapter, path)
    return {layer: update.delta_weight() for layer, update in adapter.updates().items()}


@pytest.mark.parametrize(
    ("model", "config", "pipeline", "layers"),
    [
        # klein 4B: five double blocks with eight projections, twenty single ones with two.
        (
            Flux2Transformer2DModel,
            {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
            "Flux2KleinPipeline",
            5 * 8 + 20 * 2,
        ),
        (QwenImageTransformer2DModel, {}, "QwenImagePipeline", 60 * 8),
        (ZImageTransformer2DModel, {}, "ZImagePipeline", (30 + 2 + 2) * 4),
    ],
)
def test_the_published_sizes_have_these_layers(
    model: type[nn.Module], config: dict[str, int], pipeline: str, layers: int
) -> None:
    (family,) = (family for family in FAMILIES if family.pipeline == pipeline)
    with torch.device("meta"):
        transformer = model(**config)
    found = matching_layers(transformer, family.target_modules)
    assert len(found) == layers
    if pipeline == "Flux2KleinPipeline":  # told from FLUX.1 by these
        for original, path in (("linear1", "to_qkv_mlp_proj"), ("linear2", "to_out")):
            layer = transformer.get_submodule(f"single_transformer_blocks.0.attn.{path}")
            assert is_flux2({f"single_blocks.0.{original}": (layer.out_features, layer.in_features)})
    assert matching_layers(transformer, family.feed_forward)


def drawn(pipe: DiffusionPipeline, **options: object) -> Tensor:
    """The latents that the whole stock pipeline draws."""
    pipe.set_progress_bar_config(disable=True)
    options |= {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    return pipe(prompt="disc", generator=torch.Generator().manual_seed(3), **options).images


@pytest.mark.parametrize("make", bases.TRANSFORMERS)
def test_a_transformers_scale_is_a_strength_for_as_long_as_it_is_given(make: Callable[[], DiffusionPipeline]) -> None:
    pipe = make()
    family = family_of(pipe)
    (told,) = (name for name in inspect.signature(pipe.__call__).parameters if name.endswith("attention_kwargs"))
    encoders = {name: getattr(pipe, name) for name in family.text_encoders}
    config = AdapterConfig(rank=4, target_modules=family.target_modules)
    adapter = perturb(inject_adapter(pipe.transformer, config, seed=0, text_encoders=encoders))
    whole = drawn(pipe)
    scaled = {scale: drawn(pipe, **{told: {"scale": scale}}) for scale in (0.4, 0.0)}
    assert torch.equal(drawn(pipe), whole)
    for scale, found in scaled.items():
        adapter.strength = scale
        assert torch.equal(found, drawn(pipe)) and relative_error(found, whole) > 1e-4


@later
def test_the_attention_projections_are_all_adapted(make: Callable[[], DiffusionPipeline]) -> None:
    pipe = make()
    adapter = inject_adapter(pipe.transformer, AdapterConfig(rank=4, target_modules=family_of(pipe).target_modules))
    blocks = ("layers.", "noise_refiner.", "context_refiner.", "transformer_blocks.", "single_transformer_blocks.")
    attention = {
        path
        for path in adaptable_layers(pipe.transformer)
        if path.startswith(blocks) and (".attn." in path or ".attention." in path)
    }
    assert adapter.layers.keys() == attention


@later
@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_a_file_draws_the_same_through_stock_diffusers(
    make: Callable[[], DiffusionPipeline], kind: str, tmp_path: Path
) -> None:
    saved(make, tmp_path / "a.safetensors", kind)
    pipe, stock = make(), make()
    bare = drawn(pipe)
    adapter = load_adapter(pipe, tmp_path / "a.safetensors")
    stock.load_lora_weights(str(tmp_path / "a.safetensors"))
    assert relative_error(drawn(pipe), drawn(stock)) < 1e-4
    assert relative_error(drawn(pipe), bare) > 1e-3
    adapter.eject()
    assert torch.equal(drawn(pipe), bare)


@later
@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_kohya_and_back_gives_the_same_bits(make: Callable[[], DiffusionPipeline], kind: str, tmp_path: Path) -> None:
    deltas = saved(make, tmp_path / "a.safetensors", kind)
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "k.safetensors", "kohya")
    flat = load_file(tmp_path / "k.safetensors")
    assert all(key.startswith("lycoris_") for key in flat)
    convert_adapter(tmp_path / "k.safetensors", tmp_path / "back.safetensors", "diffusers")
    before, after = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    adapter = load_adapter(make(), tmp_path / "k.safetensors")
    assert {
        layer: relative_error(update.delta_weight(), deltas[layer]) < 1e-5
        for layer, update in adapter.updates().items()
    } == dict.fromkeys(deltas, True)


@later
def test_names_without_a_transformers_prefix_and_flat_ones_are_read(
    make: Callable[[], DiffusionPipeline], tmp_path: Path
) -> None:
    """As ai-toolkit ("diffusion_model."), musubi-tuner ("lora_unet_") and a PEFT folder name them."""
    deltas = saved(make, tmp_path / "a.safetensors", "lora")
    tensors = load_file(tmp_path / "a.safetensors")
    for prefix in ("diffusion_model.", "base_model.model."):
        renamed = {prefix + key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        save_file(renamed, tmp_path / "b.safetensors")
        file = read_adapter_file(tmp_path / "b.safetensors")
        assert set(file.layers) == set(deltas) and file.prefix == "transformer"
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "k.safetensors", "kohya")
    flat = load_file(tmp_path / "k.safetensors")
    save_file({key.replace("lycoris_", "lora_unet_"): t for key, t in flat.items()}, tmp_path / "f.safetensors")
    adapter = load_adapter(make(), tmp_path / "f.safetensors")
    assert all(
        relative_error(update.delta_weight(), deltas[layer]) < 1e-5 for layer, update in adapter.updates().items()
    )


@later
def test_the_frozen_base_can_be_packed(make: Callable[[], DiffusionPipeline]) -> None:
    transformer = make().transformer
    attention = [path for path in adaptable_layers(transformer) if path.endswith("to_q")]
    quantise(transformer, "int8", torch.device("cpu"), torch.float32)
    assert attention and all(type(transformer.get_submodule(path).weight) is not nn.Parameter for path in attention)
    modulations = getattr(transformer, "distilled_guidance_layer", nn.Module())  # Chroma's
    assert all(type(parameter) is nn.Parameter for parameter in modulations.parameters())


@later
def test_parity_says_what_is_known_of_other_programs(make: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    saved(make, tmp_path / "a.safetensors", "dora")
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "k.safetensors", "kohya")
    base = Base("base", make())
    found = {parity.program.name: parity for parity in compare_programs(tmp_path / "k.safetensors", base)}
    assert found["lycoris"].right
    assert found.keys() & {"forge", "a1111"} == set()
    name = type(base.denoiser).__name__
    with pytest.raises(ConfigError, match=f"how Forge names the layers of a {name} is not known"):
        repair(tmp_path / "a.safetensors", base, program_named("forge"), tmp_path / "forge.safetensors")
    repaired = tmp_path / "comfyui.safetensors"
    comfyui = found["comfyui"]
    assert comfyui.read == len(comfyui.layers) and comfyui.reasons == ("divides by ||W0||, not by ||W0 + s B A||",)
    repair(tmp_path / "a.safetensors", base, program_named("comfyui"), repaired)
    assert all(key.startswith("lycoris_") for key in load_file(repaired))
