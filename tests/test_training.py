"""Training: objectives, resuming, twins, prior preservation, and what a run writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import bases
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from PIL import Image
from prodigyopt import Prodigy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_helpers import HANGS, config, losses, stop_after

from dora_diffusion.data.cache import encode_images
from dora_diffusion.data.folder import read_folder
from dora_diffusion.data.store import CACHE_VARIABLE
from dora_diffusion.errors import ConfigError, DataError, OutputError, TrainingError
from dora_diffusion.formats.files import load_adapter, read_adapter_file, save_adapter
from dora_diffusion.generation import GenerationRequest, generate
from dora_diffusion.inspection.parity import compare_programs
from dora_diffusion.models.loading import Base, load_base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.events import Finished, Measured, Preparing, Previewed, Resumed, Saved, Stopped
from dora_diffusion.training.loop import (
    Step,
    conditioning_for,
    held_out_loss,
    make_accelerator,
    new_adapter,
    prepare,
    squared_error,
    steps,
)
from dora_diffusion.training.objectives import objective_of
from dora_diffusion.training.run import train


def prepared_loss(settings: TrainConfig, base: Base) -> float:
    loss = held_out_loss(prepare(settings, base, make_accelerator(settings)))
    assert loss is not None
    return loss


# Objectives


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusion_objectives_agree_with_float64_arithmetic(prediction: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True)
    objective = objective_of(scheduler)
    x0, eps = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    t = torch.tensor([0, 10, 500, 900, 999])
    abar = scheduler.alphas_cumprod.double()[t].reshape(-1, 1, 1, 1)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    noisy = a * x0.double() + s * eps.double()
    target = eps.double() if prediction == "epsilon" else a * eps.double() - s * x0.double()
    torch.testing.assert_close(objective.noisy(x0, eps, t).double(), noisy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(objective.target(x0, eps, t).double(), target, atol=1e-5, rtol=1e-5)


def test_flow_noisy_latents_and_timesteps_agree_with_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    objective = objective_of(scheduler)
    t = objective.timesteps(64, torch.Generator().manual_seed(0))
    assert torch.isin(t, scheduler.timesteps).all()
    x0, eps = torch.randn(64, 4, 3, 3), torch.randn(64, 4, 3, 3)
    expected = torch.cat([scheduler.scale_noise(x0[i : i + 1], t[i : i + 1], eps[i : i + 1]) for i in range(64)])
    torch.testing.assert_close(objective.noisy(x0, eps, t), expected)
    # Following the predicted velocity from x_t to sigma 0 must give x0.
    sigma = (t / 1000).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(expected - sigma * objective.target(x0, eps, t), x0, atol=1e-4, rtol=1e-4)


def test_noise_levels_are_drawn_as_asked() -> None:
    draw = torch.Generator().manual_seed(0)
    for scheduler, own in (
        (DDIMScheduler(), "uniform"),
        (FlowMatchEulerDiscreteScheduler(shift=1.0), "logit_normal"),
    ):
        for sampling in (None, "uniform", "logit_normal"):
            t = objective_of(scheduler, sampling).timesteps(20_000, draw) / 1000
            assert t.mean() == pytest.approx(0.5, abs=0.02)
            # A uniform variable's deviation, and that of the logistic function of a standard normal one.
            deviation = 0.2887 if (sampling or own) == "uniform" else 0.2083
            assert t.std() == pytest.approx(deviation, abs=0.01), (scheduler, sampling)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_follow_the_paper(prediction: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction)
    t = torch.tensor([1, 200, 600, 990])
    snr = compute_snr(scheduler, t).double()
    expected = snr.clamp_max(5.0) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(objective_of(scheduler).weight(t, 5.0).double(), expected, atol=1e-6, rtol=1e-5)


def test_the_held_out_loss_is_the_mean_squared_error_at_fixed_noise(sd_base: Base, pictures: Path) -> None:
    settings = config(pictures, Path("unused"), Path("unused"))
    training = prepare(settings, sd_base, make_accelerator(settings))
    measured = held_out_loss(training)
    (held_out,), (instances,) = training.held_out, training.instances
    assert len(held_out) == 2 and len(instances) == 6
    unet, scheduler = sd_base.denoiser, DDPMScheduler.from_config(sd_base.pipe.scheduler.config)
    generator = torch.Generator().manual_seed(20240209)
    eps = torch.randn(16, 4, 8, 8, generator=generator)
    t = ((torch.arange(8) + 0.5) / 8 * 1000).long().repeat(2)
    x0 = held_out.mean(torch.arange(2)).repeat_interleave(8, 0)
    text = held_out.conditioning.tensors["encoder_hidden_states"][:1].expand(16, -1, -1)
    with torch.no_grad():
        prediction = unet(scheduler.add_noise(x0, eps, t), t, text).sample
    assert measured == pytest.approx(((prediction - eps) ** 2).mean().item(), rel=1e-5)


def test_random_flip_trains_on_mirror_images_too(tmp_path: Path, sd_base: Base) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(8):
        picture = Image.new("RGB", (24, 24), "white")
        picture.paste((30 * i, 90, 200), (2, 5, 11, 20))
        picture.save(pictures / f"{i}.png")
    images = read_folder(pictures, "disc").images
    (encoded,) = encode_images(sd_base, images, [(16, 16)], mirrored=True)
    sizes = ((16, 16), Image.Resampling.LANCZOS)
    pixels = np.stack([np.asarray(Image.open(image.path).resize(*sizes)) for image in images])
    flipped = torch.from_numpy(pixels[:, :, ::-1] / 127.5 - 1).permute(0, 3, 1, 2).float()
    vae = sd_base.pipe.vae
    with torch.no_grad():
        expected = vae.encode(flipped).latent_dist.mean * vae.config.scaling_factor
    assert (encoded.views, len(encoded)) == (2, 8)
    torch.testing.assert_close(encoded.mean(torch.arange(8), view=1), expected, atol=1e-5, rtol=1e-5)
    plain, random = (
        list(train(config(pictures, tmp_path / str(flip), Path("unused"), kind="lora", random_flip=flip), base=sd_base))
        for flip in (False, True)
    )
    assert losses(plain, "lora") != losses(random, "lora")
    measured = [next(e.held_out_loss for e in events if isinstance(e, Measured)) for events in (plain, random)]
    assert measured[0] == measured[1]  # pictures are measured on as they are


def test_shuffled_tags_train_and_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, pictures: Path, sd_folder: Path
) -> None:
    plain = config(pictures, tmp_path / "plain", sd_folder, kind="dora", instance_prompt="disc, red, round, on white")
    shuffled = plain.model_copy(update={"out": str(tmp_path / "shuffled"), "shuffle_tags_after": 1})
    events = [list(train(settings)) for settings in (plain, shuffled)]
    assert losses(events[0], "dora") != losses(events[1], "dora")
    measured = [next(e.held_out_loss for e in each if isinstance(e, Measured)) for each in events]
    assert measured[0] == measured[1]  # captions are measured as they were written
    parts = shuffled.model_copy(update={"out": str(tmp_path / "parts")})
    list(train(parts, should_stop=stop_after(3)))
    list(train(parts, resume=True))
    whole, resumed = (tmp_path / name / "dora.safetensors" for name in ("shuffled", "parts"))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize("packing", ["nf4", "int8"])
def test_a_packed_base_trains_and_its_adapter_fits_the_whole_one(
    packing: Literal["nf4", "int8"], tmp_path: Path, pictures: Path
) -> None:
    whole, packed = load_base("emoji", device="cpu"), load_base("emoji", device="cpu", packing=packing)
    names = [name for name, layer in whole.denoiser.named_modules() if type(layer) is nn.Linear and "block" in name]
    held = 0
    for name in names:
        W, layer = whole.denoiser.get_submodule(name).weight, packed.denoiser.get_submodule(name)
        if packing == "int8":
            found, step = layer.weight.dequantize(), W.abs().amax(1, keepdim=True) / 127
            assert ((found - W).abs() <= 0.51 * step).all()
        elif W.shape[1] % 64 == 0:
            expected = bnb.dequantize_4bit(*bnb.quantize_4bit(W.detach(), quant_type="nf4", compress_statistics=True))
            found = bnb.dequantize_4bit(layer.weight, layer.weight.quant_state)
            torch.testing.assert_close(found, expected)
        else:
            assert layer.weight.equal(W)
            continue
        held += 1
    assert held > 0.7 * len(names)
    values = {"kind": "dora", "steps": 12, "learning_rate": 1e-3, "quantise": packing, "preview_prompts": ["disc"]}
    settings = config(pictures, tmp_path, Path("emoji"), **values)
    measured = [e.held_out_loss for e in train(settings) if isinstance(e, Measured)]
    assert measured[-1] < measured[0]
    adapter = load_adapter(whole.pipe, tmp_path / "dora.safetensors")
    assert prepared_loss(settings, whole) < 1.02 * measured[-1]
    adapter.eject()
    wanted = rf"quantise = '{packing}', but the base that was given was loaded without packing: give load_base\('emoji'"
    with pytest.raises(ConfigError, match=wanted):
        list(train(settings, base=whole, overwrite=True))
    again = settings.model_copy(update={"quantise": None, "steps": 1, "out": str(tmp_path / "again")})
    list(train(again, base=packed))
    assert f'quantise = "{packing}"' in (tmp_path / "again" / "config.toml").read_text()


def test_a_resolution_that_does_not_fit_the_base_is_refused(tmp_path: Path, pictures: Path) -> None:
    bases.flux().save_pretrained(tmp_path / "base")
    settings = config(pictures, tmp_path / "out", tmp_path / "base", resolution=18)
    with pytest.raises(ConfigError, match="18; this base wants a multiple of 4, such as 16"):
        list(train(settings))


def test_a_size_beyond_the_bases_places_is_refused(tmp_path: Path, pictures: Path) -> None:
    base = Base("base", bases.stable_diffusion_3())
    assert base.largest is not None
    with pytest.raises(ConfigError, match=f"resolution is 512; this base draws at most {base.largest} pixels"):
        list(train(config(pictures, tmp_path, Path("base"), resolution=512), base=base))
    with pytest.raises(ConfigError, match=f"height is 512; this base draws at most {base.largest} pixels"):
        generate(base, GenerationRequest("disc", height=512))


# Runs


def test_twins_lower_the_held_out_loss_and_write_what_is_promised(
    tmp_path: Path, pictures: Path, sd_folder: Path
) -> None:
    settings = config(pictures, tmp_path, sd_folder, steps=12, preview_prompts=["disc"], preview_every=6)
    events = list(train(settings))
    for kind in ("lora", "dora"):
        (finished,) = [e for e in events if isinstance(e, Finished) and e.kind == kind]
        assert finished.held_out_loss is not None and finished.base_loss is not None
        assert finished.held_out_loss < finished.base_loss
        assert finished.path == tmp_path / f"{kind}.safetensors" and finished.path.exists()
    # Twins see the same first batch, and B is zero: the first losses are the same number.
    assert losses(events, "lora")[0] == losses(events, "dora")[0]
    assert losses(events, "lora")[-1] != losses(events, "dora")[-1]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["step"]) for e in lines] == [(k, s) for k in ("lora", "dora") for s in range(13)]
    assert {e["held_out_loss"] for e in lines if e["step"] == 0} == {
        e.base_loss for e in events if isinstance(e, Finished)
    }
    assert len([e for e in events if isinstance(e, Previewed)]) == 4
    assert not (tmp_path / "checkpoints").exists()
    again = TrainConfig.from_values({**settings.model_dump(exclude_none=True), "learning_rate": 1e-2}, "again")
    assert again.steps == 12 and "learning_rate = 0.01" in (tmp_path / "config.toml").read_text()


def test_adapters_kept_on_the_way_are_those_of_shorter_runs(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    steady = {"lr_scheduler": "constant", "validate_every": 100, "kind": "dora"}
    events = list(train(config(pictures, tmp_path / "long", sd_folder, save_every=2, **steady)))
    saved = {event.step: event.path for event in events if isinstance(event, Saved)}
    assert list(saved) == [2, 4]
    assert saved[4] == tmp_path / "long/steps/dora-00004.safetensors"
    shorter = train(config(pictures, tmp_path / "short", sd_folder, steps=4, **steady))
    (short,) = [event for event in shorter if isinstance(event, Finished)]
    ours, theirs = load_file(saved[4]), load_file(short.path)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    description = read_adapter_file(saved[4]).description
    assert description is not None
    assert (description.training["steps"], description.training["held_out_loss"]) == (4, short.held_out_loss)
    list(train(config(pictures, tmp_path / "long", sd_folder, **steady), overwrite=True))
    assert not saved[2].exists()  # another run's


@pytest.mark.parametrize("make", [bases.stable_diffusion_xl, *bases.TRANSFORMERS, "v_prediction"])
def test_every_family_and_objective_trains(make, tmp_path: Path, pictures: Path) -> None:  # type: ignore[no-untyped-def]
    pipe: DiffusionPipeline = bases.stable_diffusion("v_prediction") if make == "v_prediction" else make()
    pipe.save_pretrained(tmp_path / "base")
    settings = config(pictures, tmp_path / "out", tmp_path / "base", kind="dora", steps=16, resolution=16)
    events = list(train(settings))
    measured = [e.held_out_loss for e in events if isinstance(e, Measured)]
    assert measured[-1] < measured[0]
    stored = load_file(tmp_path / "out" / "dora.safetensors")
    prefix = "transformer." if make in bases.TRANSFORMERS else "unet."
    assert stored and all(key.startswith(prefix) for key in stored)


def sd3_with_t5() -> DiffusionPipeline:
    return bases.stable_diffusion_3(with_t5=True)


@pytest.mark.parametrize(("make", "name"), [(sd3_with_t5, "text_encoder_3"), (bases.flux, "text_encoder_2")])
def test_a_t5_reads_each_caption_once_while_clip_is_trained(
    make: Callable[[], DiffusionPipeline], name: str, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))  # in which nothing is from before
    base = Base("base", make())
    settings = config(pictures, tmp_path, Path("base"), kind="dora", train_text_encoder=True, resolution=16)
    read: list[int] = []
    handle = getattr(base.pipe, name).register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    list(train(settings, base=base))
    assert sum(read) == 2, "one caption and the empty prompt"
    handle.remove()
    training = prepare(settings, base, make_accelerator(settings))
    (images,) = training.instances
    whole = base.family.encode(base.pipe, list(images.captions))
    again = base.family.encode_trained(base.pipe, list(images.captions), images.conditioning)
    for key, tensor in whole.tensors.items():
        torch.testing.assert_close(again.tensors[key], tensor, atol=1e-4, rtol=1e-3)  # batches of one and of two


@pytest.mark.parametrize(
    ("make", "encoders"),
    [
        (bases.stable_diffusion, 1),
        (bases.stable_diffusion_xl, 2),
        (bases.stable_diffusion_3, 2),
        (sd3_with_t5, 2),
        (bases.flux, 1),
    ],
)
def test_trained_text_encoders_have_pefts_gradients_and_their_files_draw_the_same_in_diffusers(
    make: Callable[[], DiffusionPipeline], encoders: int, tmp_path: Path, pictures: Path
) -> None:
    base = Base("base", make())
    values = {"kind": "dora", "train_text_encoder": True, "resolution": 16, "dropout": 0.3, "steps": 4}
    values |= {"text_encoder_learning_rate": 5e-3, "preview_prompts": ["disc"], "preview_every": 2}
    settings = config(pictures, tmp_path, Path("base"), **values)
    events = list(train(settings, base=base))
    measured = [event.held_out_loss for event in events if isinstance(event, Measured)]
    assert measured[-1] < measured[0]
    path = tmp_path / "dora.safetensors"
    names = load_file(path)
    assert len({name.partition(".")[0] for name in names if name.startswith("text_encoder")}) == encoders

    # Ours and PEFT's, on the same noise.
    training = prepare(settings, base, make_accelerator(settings))
    adapter = load_adapter(base.pipe, path)
    generator = torch.Generator().manual_seed(5)
    (images,), index = training.instances, torch.tensor([0, 1])
    x0 = images.mean(index)
    eps, t = torch.randn(x0.shape, generator=generator), training.objective.timesteps(2, generator)
    error = squared_error(training, x0, eps, t, conditioning_for(training, images, index))
    error.mean().backward()
    ours = {name: p.grad for name, p in adapter.named_parameters().items() if name.startswith("text_encoder")}
    adapter.eject()
    stock = make()
    stock.load_lora_weights(str(path))
    named: dict[str, Tensor] = {}
    for part_name, part in stock.components.items():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(True)  # the file has a dropout
            named |= {f"{part_name}.{name}": p for name, p in part.named_parameters() if "lora_" in name}
    oracle = replace(training, base=Base("stock", stock))
    error = squared_error(oracle, x0, eps, t, conditioning_for(oracle, images, index))
    error.mean().backward()
    compared = 0
    for name, gradient in ours.items():
        layer, _, leaf = name.rpartition(".")
        ending = {"lora_A": "lora_A", "lora_B": "lora_B", "magnitude": "lora_magnitude_vector"}[leaf]
        (found,) = (p for key, p in named.items() if f"{layer}.{ending}." in key)
        if gradient is None:  # the last layer of SDXL's first text encoder, which its pipeline does not read
            assert found.grad is None
            continue
        assert found.grad is not None and gradient.abs().max() > 0
        torch.testing.assert_close(gradient, found.grad.reshape(gradient.shape), atol=1e-6, rtol=1e-3)
        compared += 1
    assert compared >= 3 * 4


def test_the_feed_forward_layers_are_trained_beside_the_attention(
    tmp_path: Path, pictures: Path, sd_folder: Path
) -> None:
    for name, more in (("attention", False), ("both", True)):
        list(train(config(pictures, tmp_path / name, sd_folder, kind="lora", steps=1, train_feed_forward=more)))
    attention, both = (
        {key.rpartition(".lora_")[0].removeprefix("unet.") for key in load_file(tmp_path / name / "lora.safetensors")}
        for name in ("attention", "both")
    )
    unet = load_base(str(sd_folder), device="cpu").denoiser
    feed_forward = {name for name, layer in unet.named_modules() if type(layer) is nn.Linear and ".ff." in name}
    assert feed_forward and both == attention | feed_forward and not attention & feed_forward


def test_a_unets_convolutions_are_trained_beside_the_attention(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    base = load_base(str(sd_folder), device="cpu")
    list(
        train(config(pictures, tmp_path / "both", sd_folder, steps=2, kind="dora", train_convolutions=True), base=base)
    )
    names = {name for name, layer in base.denoiser.named_modules() if isinstance(layer, nn.Conv2d)}
    adapter = load_adapter(base.pipe, tmp_path / "both" / "dora.safetensors")
    convolutions = {name for name in adapter.layers if name in names}
    assert convolutions == {name for name in names if ".resnets." in name and name.endswith(("conv1", "conv2"))}
    assert {name for name in adapter.layers if ".attn1." in name}
    assert all(update.delta_weight().abs().max() > 0 for update in adapter.updates().values())
    with pytest.raises(ConfigError, match="Stable Diffusion 3 has no convolutions to adapt"):
        refused = config(pictures, tmp_path / "dit", sd_folder, train_convolutions=True)
        list(train(refused, base=Base("dit", bases.stable_diffusion_3())))


def test_text_encoder_keys_that_cannot_hold_are_refused(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    with pytest.raises(ConfigError, match="train_text_encoder is false"):
        list(train(config(pictures, tmp_path, sd_folder, text_encoder_learning_rate=1e-4)))
    pipe = bases.stable_diffusion_3()
    pipe.register_modules(text_encoder=None, text_encoder_2=None)
    with pytest.raises(ConfigError, match="base has no text encoder that can be trained"):
        list(train(config(pictures, tmp_path, Path("base"), train_text_encoder=True), base=Base("base", pipe)))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    values = {"dropout": 0.1, "gradient_accumulation_steps": 2, "caption_dropout": 0.5, "weight_decay": 0.01}
    values |= {"random_flip": True, "train_text_encoder": True, "text_encoder_learning_rate": 2e-3}
    whole = config(pictures, tmp_path / "whole", sd_folder, **values)
    list(train(whole))
    parts = whole.model_copy(update={"out": str(tmp_path / "parts")})
    for stop in (4, 5):  # within the LoRA, then within the DoRA
        events = list(train(parts, resume=stop != 4, should_stop=stop_after(stop)))
        assert isinstance(events[-1], Stopped) and events[-1].checkpoint.exists()
    events = list(train(parts, resume=True))
    assert any(isinstance(event, Resumed) for event in events)
    for name in ("lora.safetensors", "dora.safetensors", "log.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_prodigy_finds_its_steps_and_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, pictures: Path, sd_folder: Path
) -> None:
    whole = config(pictures, tmp_path / "whole", sd_folder, optimizer="prodigy", learning_rate=None, steps=120)
    whole = whole.model_copy(update={"kind": "dora", "batch_size": 8, "validate_every": 5, "lr_scheduler": "constant"})
    events = list(train(whole))
    sizes = [event.learning_rate for event in events if isinstance(event, Step)]
    assert sizes[-1] > 100 * sizes[5]
    (finished,) = [event for event in events if isinstance(event, Finished)]
    assert finished.held_out_loss < finished.base_loss
    assert "learning_rate = 1.0" in (tmp_path / "whole" / "config.toml").read_text()

    parts = whole.model_copy(update={"out": str(tmp_path / "parts")})
    list(train(parts, should_stop=stop_after(87)))  # the norms were kept for the held-out loss just before
    list(train(parts, resume=True))
    for name in ("dora.safetensors", "log.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()

    # Its authors' own, with what they advise for diffusion models.
    training = prepare(whole, load_base(str(sd_folder), device="cpu"), make_accelerator(whole))
    adapter, _ = new_adapter(training, "dora")
    stock = Prodigy([{"params": list(adapter.parameters()), "initial_lr": 1.0}], use_bias_correction=True)
    for _ in steps(training, "dora", adapter, stock):
        pass
    path = save_adapter(adapter, tmp_path / "stock.safetensors")
    trained = load_file(finished.path)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in load_file(path).items())


def test_what_prodigy_cannot_do_or_lacks_is_said(
    tmp_path: Path, pictures: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"optimizer": "prodigy", "train_text_encoder": True, "text_encoder_learning_rate": 0.5}
    with pytest.raises(ConfigError, match="Prodigy has one rate for all"):
        list(train(config(pictures, tmp_path, sd_folder, **rates)))
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ConfigError, match=r"needs prodigyopt: pip install 'dora-diffusion\[prodigy\]'"):
        list(train(config(pictures, tmp_path, sd_folder, optimizer="prodigy")))


def test_a_norm_by_input_trains_resumes_and_is_right_in_the_programs_that_compute_it(
    tmp_path: Path, pictures: Path, sd_folder: Path
) -> None:
    values = {"norm_axis": "input", "train_text_encoder": True, "steps": 12}
    whole = config(pictures, tmp_path / "whole", sd_folder, **values)
    events = list(train(whole))
    (finished,) = [e for e in events if isinstance(e, Finished) and e.kind == "dora"]
    assert finished.held_out_loss < finished.base_loss
    assert losses(events, "lora")[0] == losses(events, "dora")[0]

    parts = whole.model_copy(update={"out": str(tmp_path / "parts"), "kind": "dora"})
    list(train(parts, should_stop=stop_after(5)))
    list(train(parts, resume=True))
    assert finished.path.read_bytes() == (tmp_path / "parts" / "dora.safetensors").read_bytes()

    stored = load_file(finished.path)
    scales = {key: tensor for key, tensor in stored.items() if key.endswith(".dora_scale")}
    assert scales and all(tensor.shape[0] == 1 for tensor in scales.values())
    assert {key.split("_")[1] for key in stored} == {"unet", "te"}
    base = load_base(str(sd_folder), device="cpu")
    right = {p.program.name for p in compare_programs(finished.path, base) if p.right and p.right_at_strength}
    assert right == {"comfyui", "forge", "forge-neo", "a1111", "invokeai", "sdnext"}
    adapter = load_adapter(base.pipe, finished.path)
    assert adapter.config.norm_axis == "input"
    assert read_adapter_file(tmp_path / "whole" / "lora.safetensors").dialect == "diffusers"


def test_a_checkpoint_from_before_prodigy_goes_on_with_the_same_bits(
    tmp_path: Path, pictures: Path, sd_folder: Path
) -> None:
    whole = config(pictures, tmp_path / "whole", sd_folder, kind="dora")
    list(train(whole))
    parts = whole.model_copy(update={"out": str(tmp_path / "parts")})
    (*_, stopped) = train(parts, should_stop=stop_after(3))
    with safe_open(stopped.checkpoint, framework="pt") as file:
        header = {key: value for key, value in file.metadata().items() if key != "optimizer"}
    save_file(load_file(stopped.checkpoint), stopped.checkpoint, header)
    list(train(parts, resume=True))
    adapters = [(tmp_path / name / "dora.safetensors").read_bytes() for name in ("whole", "parts")]
    assert adapters[0] == adapters[1]


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Five square pictures, two high ones and one wide."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for i, size in enumerate([(64, 64)] * 5 + [(48, 80)] * 2 + [(72, 56)]):
        picture = Image.new("RGB", size, "white")
        picture.paste((30 * i, 90, 200), (10, 10, 30, 30))
        picture.save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("make", [bases.stable_diffusion_xl, *bases.TRANSFORMERS])
def test_pictures_of_all_shapes_train_equally_often_and_a_resumed_run_ends_with_the_same_bits(
    make: Callable[[], DiffusionPipeline], tmp_path: Path, shapes: Path
) -> None:
    pipe = make()
    base = Base("shapes", pipe)
    values = {"kind": "dora", "resolution": 64, "batch_size": 1, "steps": 8, "held_out": 0, "caption_dropout": 0.0}
    settings = config(shapes, tmp_path / "whole", Path("shapes"), **values)
    seen: list[tuple[int, ...]] = []
    given = "hidden_states" if hasattr(pipe, "transformer") else "sample"

    def record(_module: nn.Module, positional: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = named.get(given, positional[0] if positional else None)
        seen.append(tuple(x[0].shape))  # of the batch's only picture; Z-Image is given a list

    hook = base.denoiser.register_forward_pre_hook(record, with_kwargs=True)
    texts = [event.text for event in train(settings, base=base) if isinstance(event, Preparing)]
    hook.remove()
    # A batch for each picture, in eight steps.
    assert sorted(Counter(seen).values()) == [1, 2, 5]
    assert "pictures by shape: 5 of 64 x 64, 2 of 48 x 80, 1 of 72 x 56" in texts
    parts = settings.model_copy(update={"out": str(tmp_path / "parts")})
    list(train(parts, base=base, should_stop=stop_after(5)))
    list(train(parts, base=base, resume=True))
    name = "dora.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    cropped = settings.model_copy(update={"out": str(tmp_path / "cropped"), "aspect_ratio_bucketing": False})
    seen.clear()
    hook = base.denoiser.register_forward_pre_hook(record, with_kwargs=True)
    list(train(cropped, base=base))
    hook.remove()
    assert len(set(seen)) == 1


def test_what_only_encodes_waits_in_main_memory_while_the_denoiser_trains(
    tmp_path: Path, pictures: Path, sd_base: Base
) -> None:
    settings = config(pictures, tmp_path / "plain", Path("base"), steps=4, kind="dora", preview_prompts=["disc"])
    settings = settings.model_copy(update={"preview_every": 2})
    list(train(settings, base=sd_base))
    happened: list[str] = []
    for name in ("vae", "text_encoder", "unet"):
        part = getattr(sd_base.pipe, name)

        def moved(*where: object, name: str = name, part: nn.Module = part, **options: object) -> nn.Module:
            happened.append(f"{name} to {where[0]}")
            return type(part).to(part, *where, **options)

        part.to = moved
    monitored = settings.model_copy(update={"out": str(tmp_path / "aside"), "offload": True})
    for event in train(monitored, base=sd_base):
        happened.append(type(event).__name__)
    whole, parts = "vae to cpu", "text_encoder to cpu"  # there is no other device here: aside and back look alike
    trained = happened[happened.index(whole) :]
    assert trained[:2] == [whole, parts] and not any("unet" in each for each in happened)
    assert trained.count(whole) == trained.count(parts) == 2 + 2 * 2  # aside, two previews, and back in the end
    assert trained[-2:] == [whole, parts] and trained[trained.index("Previewed") - 4 :][:4] == [whole, parts] * 2
    name = "dora.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "aside" / name).read_bytes()
    wrong = monitored.model_copy(update={"train_text_encoder": True, "out": str(tmp_path / "wrong")})
    with pytest.raises(ConfigError, match="leave one out"):
        list(train(wrong, base=sd_base))


def test_same_seed_same_bits_and_another_seed_other_bits(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        list(train(config(pictures, tmp_path / name, sd_folder, kind="dora", steps=2, seed=seed)))
    a, b, c = ((tmp_path / name / "dora.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_prior_preservation_draws_class_images_and_adds_their_loss(
    tmp_path: Path, pictures: Path, sd_folder: Path
) -> None:
    plain = list(train(config(pictures, tmp_path / "plain", sd_folder, kind="lora", steps=1)))
    values = {"kind": "lora", "steps": 1, "class_prompt": "shape", "num_class_images": 2}
    prior = list(train(config(pictures, tmp_path / "prior", sd_folder, **values)))
    assert len(list((tmp_path / "prior" / "class_images").glob("*.png"))) == 2
    assert losses(prior, "lora")[0] > losses(plain, "lora")[0]


def test_what_is_to_be_said_of_pictures_and_captions_is_said(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    """Of the pictures that are measured on, too."""
    for name in ("images", "measured"):
        shutil.copytree(pictures, tmp_path / name)
        (tmp_path / name / f"stray-{name}.txt").write_text("whose?")
    measured = str(tmp_path / "measured")
    run = config(tmp_path / "images", tmp_path / "out", sd_folder, kind="lora", steps=1, validation_images=measured)
    said = [event.text for event in train(run) if isinstance(event, Preparing)]
    for name in ("images", "measured"):
        assert f"captions not used, as no picture has their name: stray-{name}.txt" in said


def test_the_base_is_left_as_it_was(tmp_path: Path, pictures: Path, sd_base: Base) -> None:
    before = {name: tensor.clone() for name, tensor in sd_base.denoiser.state_dict().items()}
    list(train(config(pictures, tmp_path, Path("unused"), steps=2), base=sd_base))
    after = sd_base.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_finished_run_is_not_overwritten_unasked(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    settings = config(pictures, tmp_path, sd_folder, kind="lora", steps=1)
    list(train(settings))
    bits = (tmp_path / "lora.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="--overwrite"):
        list(train(settings))
    assert (tmp_path / "lora.safetensors").read_bytes() == bits
    list(train(settings.model_copy(update={"seed": 1}), overwrite=True))
    assert (tmp_path / "lora.safetensors").read_bytes() != bits


def test_resuming_with_other_values_or_other_pictures_is_refused(
    tmp_path: Path, pictures: Path, sd_folder: Path
) -> None:
    mine = tmp_path / "pictures"
    mine.mkdir()
    for path in pictures.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    settings = config(mine, tmp_path / "out", sd_folder, kind="lora")
    with pytest.raises(TrainingError, match="nothing to resume"):
        list(train(settings, resume=True))
    list(train(settings, should_stop=stop_after(2)))
    with pytest.raises(TrainingError, match=r"rank: was 4, is 8"):
        list(train(settings.model_copy(update={"rank": 8}), resume=True))
    with pytest.raises(TrainingError, match="--resume to go on"):
        list(train(settings))
    (mine / "0.txt").write_text("another caption")
    with pytest.raises(TrainingError, match="pictures or captions"):
        list(train(settings, resume=True))


def test_a_diverging_run_ends_at_the_step_and_leaves_no_adapter(tmp_path: Path, pictures: Path, sd_base: Base) -> None:
    settings = config(pictures, tmp_path, Path("base"), kind="lora", checkpoint_every=1, save_every=1, held_out=0)
    events = []
    with pytest.raises(TrainingError) as raised:
        for event in train(settings, base=sd_base):
            events.append(event)
            if isinstance(event, Saved) and event.step == 3:  # as an update that is too large would leave them
                next(p for n, p in sd_base.denoiser.named_parameters() if n.endswith("lora_B")).data[0] = 1e38
    assert "LoRA: the loss is nan at step 3: the run has diverged. Try a learning_rate below 0.01" in str(raised.value)
    assert "Kept from before: the checkpoint after step 3, steps/lora-00003.safetensors" in str(raised.value)
    assert not (tmp_path / "lora.safetensors").exists() and len(losses(events, "lora")) == 3
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "steps/lora-00003.safetensors").values())


def test_weights_that_overflow_are_found_in_the_step_that_made_them(
    tmp_path: Path, pictures: Path, sd_base: Base
) -> None:
    settings = config(pictures, tmp_path, Path("base"), kind="dora", learning_rate=100, held_out=0, steps=2)
    settings = settings.model_copy(update={"weight_decay": 1e38})  # beyond what a configuration may hold
    with pytest.raises(TrainingError, match=r"DoRA: weights are no numbers any more at step [12]: the run has"):
        list(train(settings, base=sd_base))
    assert not list(tmp_path.rglob("dora*.safetensors"))


def test_a_base_that_gives_no_numbers_is_told_from_a_run_that_diverges(
    tmp_path: Path, pictures: Path, sd_base: Base
) -> None:
    with torch.no_grad():
        sd_base.denoiser.conv_in.weight[0] = float("nan")
    for held_out in (2, 0):
        with pytest.raises(TrainingError, match="before any step was made, so it is the base that gives no numbers"):
            list(train(config(pictures, tmp_path, Path("base"), held_out=held_out), base=sd_base, overwrite=True))


def test_holding_out_every_picture_is_refused(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    with pytest.raises(DataError, match="only 8 pictures"):
        list(train(config(pictures, tmp_path, sd_folder, held_out=8)))


def test_an_output_folder_that_cannot_be_made_is_said_so(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="--out"):
        list(train(config(pictures, tmp_path / "file" / "out", sd_folder)))
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.slow
def test_two_processes_share_the_batches_and_write_once(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    settings = config(pictures, tmp_path / "out", sd_folder, kind="dora", steps=3)
    (tmp_path / "run.toml").write_text(settings.to_toml())
    script = Path(__file__).parent.parent / "train_scripts" / "dreambooth.py"
    # What `accelerate launch` starts on several GPUs, here with gloo on the CPU.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "run.toml")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("DoRA finished") == 1
    entries = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    logged = [entry["loss"] for entry in entries if entry["step"]]
    assert len(logged) == 3 and len(entries) == 4
    # The first step's loss is the mean over the first two batches, as a single process that learns nothing sees them.
    alone = settings.model_copy(update={"out": str(tmp_path / "alone"), "learning_rate": 1e-12})
    first, second, _ = losses(list(train(alone)), "dora")
    assert first != second and logged[0] == pytest.approx((first + second) / 2, rel=1e-5)


def test_a_loaded_base_knows_its_size_and_family(sd_folder: Path) -> None:
    base = load_base(str(sd_folder), device="cpu")
    assert (base.size, base.vae_scale, base.family.name) == (16, 2, "Stable Diffusion 1 and 2")


def test_two_runs_never_write_into_one_folder(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    settings = config(pictures, tmp_path / "out", sd_folder, steps=1)
    first = train(settings)
    assert [next(first).text, next(first).text][1] == "reading and encoding the pictures"  # type: ignore[union-attr]
    with pytest.raises(OutputError, match=r"another run is training into .*out\. Wait"):
        list(train(settings))
    assert isinstance(list(first)[-1], Finished)
    assert isinstance(list(train(settings, overwrite=True))[-1], Finished)
