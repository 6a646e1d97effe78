"""Adapters in whole pipelines, as people work with them: the README's lines, and no leftover after unloading."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from dialect_files import dora_delta, fresh, input_axis_delta, kohya_dora, kohya_input_axis
from oracles import largest_difference, output_of, perturb, relative_error
from test_convert import saved
from test_dialects import kohya_pipeline_file
from torch import Tensor

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.adapters.layers import AdaptedLayer
from dora_diffusion.errors import AdapterStateError, ConfigError
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, read_adapter_file, save_adapter

README = Path(__file__).parent.parent / "README.md"
ENCODERS = {"sd": {"text_encoder": "lora_te_"}, "xl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}}
STEPS = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}


def picture(pipe: object, **options: object) -> Tensor:
    """What the whole pipeline draws: text encoders, denoiser and VAE."""
    return pipe("a cat", generator=torch.Generator().manual_seed(1), **STEPS, **options).images


@pytest.fixture(params=["sd", "xl"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def paths(tmp_path: Path, family: str) -> list[Path]:
    """Two files over denoiser and text encoders: DoRA by output and by input."""
    pipe = fresh(family)
    kinds = {"a": (kohya_dora, dora_delta), "b": (kohya_input_axis, input_axis_delta)}
    return [
        kohya_pipeline_file(pipe, ENCODERS[family], *formula).save(tmp_path / f"{name}.safetensors")
        for name, formula in kinds.items()
    ]


def test_after_unloading_the_pipeline_draws_the_bases_bits(family, paths):
    pipe = fresh(family)
    base = picture(pipe)
    names = {part: [n for n, _ in getattr(pipe, part).named_modules()] for part in ("unet", "text_encoder")}
    adapters = [load_adapter(pipe, path, strength=0.7) for path in paths]
    stacked = picture(pipe)
    assert largest_difference(stacked, base) > 1e-3
    adapters[0].fuse()
    adapters[1].fuse()
    assert largest_difference(picture(pipe), stacked) < 1e-4
    adapters[0].unfuse()
    adapters[1].strength = 0.0
    adapters[0].strength = 0.0
    assert torch.equal(picture(pipe), base), "strength 0 is the base, bit for bit"
    for adapter in adapters:
        adapter.eject()
    assert torch.equal(picture(pipe), base)
    assert {part: [n for n, _ in getattr(pipe, part).named_modules()] for part in names} == names
    assert all(p.requires_grad for part in names for p in getattr(pipe, part).parameters())
    with pytest.raises(AdapterStateError):
        adapters[0].fuse()


def test_adapters_are_taken_out_in_any_order(family, paths):
    pipe = fresh(family)
    base, one = picture(pipe), None
    first = load_adapter(pipe, paths[0])
    one = picture(pipe)
    second = load_adapter(pipe, paths[1])
    second.eject()
    assert torch.equal(picture(pipe), one)
    second = load_adapter(pipe, paths[1])
    first.eject()
    assert {type(m) for m in pipe.text_encoder.modules()} & {AdaptedLayer}
    second.eject()
    assert torch.equal(picture(pipe), base)


def test_the_text_encoders_layers_count(family, paths):
    """An adapter without its text encoders draws something else: they are really adapted."""
    pipe = fresh(family)
    adapter = load_adapter(pipe, paths[0])
    whole = picture(pipe)
    for layer, update in adapter.updates().items():
        if layer.startswith("text_encoder"):
            update.strength = 0.0
    assert largest_difference(picture(pipe), whole) > 1e-4


def test_a_strength_is_linear_in_every_part(family, paths):
    pipe = fresh(family)
    adapter = load_adapter(pipe, paths[1], strength=0.5)
    for layer in adapter.layers.values():
        W0, half = layer.frozen.weight, layer.merged_weight()
        assert relative_error(half - W0, 0.5 * layer.updates[adapter.name].delta_weight()) < 1e-4


def test_names_are_one_for_the_whole_pipeline(family, paths):
    pipe = fresh(family)
    load_adapter(pipe, paths[0], name="style")
    with pytest.raises(ConfigError, match="'style' is in the model already"):
        load_adapter(pipe, paths[1], name="style")


def test_a_pipelines_adapter_is_saved_with_its_text_encoders(tmp_path, family, paths):
    pipe = fresh(family)
    adapter = load_adapter(pipe, paths[0])
    saved_path = save_adapter(adapter, tmp_path / "whole.safetensors")
    assert read_adapter_file(saved_path).layers.__len__() == len(adapter.layers)
    again = fresh(family)
    load_adapter(again, saved_path)
    assert torch.equal(picture(again), picture(pipe))


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_the_same_file_draws_the_same_through_stock_diffusers(tmp_path, family, kind):
    path, _ = saved(tmp_path, family, kind)
    ours, theirs = fresh(family), fresh(family)
    adapter = load_adapter(ours, path)
    theirs.load_lora_weights(str(path), adapter_name="style")
    theirs.set_adapters(["style"], [1.0])
    assert largest_difference(picture(ours), picture(theirs)) < 1e-4
    adapter.fuse()
    theirs.fuse_lora(components=[n for n in ("unet", "text_encoder", "text_encoder_2") if hasattr(theirs, n)])
    assert largest_difference(picture(ours), picture(theirs)) < 1e-4
    assert largest_difference(picture(ours), picture(fresh(family))) > 1e-3


# diffusers' own calls on a pipeline with an adapter in it.


@pytest.mark.parametrize("scale", [0.5, 0.0, 1.0, -0.3])
def test_diffusers_scale_is_a_strength_for_as_long_as_it_is_given(family, paths, scale):
    pipe = fresh(family)
    first, second = (load_adapter(pipe, path, strength=w) for path, w in zip(paths, (0.8, 0.6)))
    whole = picture(pipe)
    scaled = picture(pipe, cross_attention_kwargs={"scale": scale})
    assert torch.equal(picture(pipe), whole), "the next call has no scale"
    first.strength, second.strength = 0.8 * scale, 0.6 * scale
    assert torch.equal(scaled, picture(pipe))
    assert largest_difference(scaled, whole) > 1e-3 or scale == 1
    first.eject()
    second.eject()
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": scale}), picture(fresh(family)))


def test_scale_is_what_stock_diffusers_makes_of_a_lora(tmp_path, family):
    path, _ = saved(tmp_path, family, "lora")
    ours, theirs = fresh(family), fresh(family)
    load_adapter(ours, path)
    theirs.load_lora_weights(str(path))
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    assert largest_difference(picture(ours, **half), picture(theirs, **half)) < 1e-4
    assert largest_difference(picture(ours, **half), picture(ours)) > 1e-3


def test_scale_does_not_pass_over_a_fused_adapter(family, paths):
    pipe = fresh(family)
    adapter = load_adapter(pipe, paths[0], name="style")
    adapter.fuse()
    fused = picture(pipe)
    with pytest.raises(AdapterStateError, match=r"scale=0.5 cannot act on style, which is fused.*adapter.unfuse\(\)"):
        picture(pipe, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(picture(pipe), fused)
    with pytest.raises(ConfigError, match="scale is 'half'; it must be a number"):
        adapter.unfuse()
        picture(pipe, cross_attention_kwargs={"scale": "half"})


def test_a_pipeline_with_an_adapter_in_it_is_not_saved_but_merged_it_is(tmp_path, family, paths):
    pipe = fresh(family)
    adapter = load_adapter(pipe, paths[0])
    with pytest.raises(AdapterStateError, match=r"adapter\.merge\(\).*adapter\.eject\(\).*save_adapter"):
        pipe.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(AdapterStateError, match="cannot save a model while an adapter is in it"):
        pipe.unet.save_pretrained(tmp_path / "refused")
    drawn = picture(pipe)
    adapter.merge()
    pipe.save_pretrained(tmp_path / "merged")
    again = type(pipe).from_pretrained(tmp_path / "merged")
    again.set_progress_bar_config(disable=True)
    assert largest_difference(picture(again), drawn) < 1e-4
    other = fresh(family)
    load_adapter(other, paths[0]).eject()
    other.save_pretrained(tmp_path / "plain")
    plain, base = type(pipe).from_pretrained(tmp_path / "plain").unet.state_dict(), fresh(family).unet.state_dict()
    assert plain.keys() == base.keys() and all(torch.equal(plain[name], base[name]) for name in base)


def test_diffusers_fusing_and_unloading_say_what_they_cannot_do(tmp_path, family, paths):
    path, _ = saved(tmp_path, family, "lora")
    pipe = fresh(family)
    adapter = load_adapter(pipe, paths[0])
    whole = picture(pipe)
    with pytest.raises(AdapterStateError, match=r"fuse_lora fuses what load_lora_weights loaded.*adapter.fuse\(\)"):
        pipe.fuse_lora()
    with pytest.warns(UserWarning, match="fuse_lora fuses what load_lora_weights loaded"):
        pipe.fuse_lora(components=["text_encoder"])
    with pytest.raises(AdapterStateError, match=r"unload_lora_weights takes out .* adapter.eject\(\)"):
        pipe.unload_lora_weights()
    assert torch.equal(picture(pipe), whole)
    adapter.eject()
    pipe.load_lora_weights(str(path))
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def test_stock_loras_stand_beside_an_adapter_in_other_layers(tmp_path):
    """Both act, either heeds scale, and each is taken out by its own call."""
    attention, feed_forward = (saved_at(tmp_path, targets) for targets in (("to_q", "to_v"), ("ff.net.2",)))
    pipe, stock = fresh("sd"), fresh("sd")
    adapter = load_adapter(pipe, attention)
    pipe.load_lora_weights(str(feed_forward), adapter_name="b")
    stock.load_lora_weights(str(attention), adapter_name="a")
    stock.load_lora_weights(str(feed_forward), adapter_name="b")
    stock.set_adapters(["a", "b"], [1.0, 0.7])
    pipe.set_adapters(["b"], [0.7])
    for options in ({}, {"cross_attention_kwargs": {"scale": 0.5}}):
        assert largest_difference(picture(pipe, **options), picture(stock, **options)) < 1e-4
    adapter.eject()
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe), picture(fresh("sd")))
    adapter = load_adapter(pipe, attention)
    before = picture(pipe)
    for part in ("unet", "text_encoder"):
        copied = copy.deepcopy(getattr(pipe, part))
        assert getattr(copied, "load_adapter", copied.load_lora_adapter if part == "unet" else None).__self__ is copied
    with pytest.raises(AdapterStateError, match=r"load_lora_weights cannot.*Load this file with load_adapter too"):
        pipe.load_lora_weights(str(attention))
    assert torch.equal(picture(pipe), before)


def test_stock_loras_cannot_stand_on_a_text_encoders_adapter(tmp_path, family):
    path, _ = saved(tmp_path, family, "lora")
    pipe = fresh(family)
    adapter = load_adapter(pipe, path)
    encoder = pipe.text_encoder
    from peft import LoraConfig

    with pytest.raises(AdapterStateError, match=r"Load this file with load_adapter too.*adapter\.eject\(\)"):
        encoder.load_adapter(peft_config=LoraConfig(target_modules=["q_proj"]), adapter_state_dict={"a": torch.ones(1)})
    adapter.eject()
    assert "load_adapter" not in encoder.__dict__ and not encoder._forward_pre_hooks


def test_a_scale_ends_with_its_call_however_that_ends(family, paths):
    pipe = fresh(family)
    adapter = load_adapter(pipe, paths[0])
    before, half = picture(pipe), {"cross_attention_kwargs": {"scale": 0.5}}
    scaled = picture(pipe, **half)

    def fail(_pipe, _step, _timestep, _values):
        raise RuntimeError("stopped")

    def wrong_prompt():
        with pytest.raises(TypeError, match="same type"):  # raised in encode_prompt, after it has scaled
            pipe("a", negative_prompt=("b",), **half, num_inference_steps=2)

    wrong_prompt()
    assert torch.equal(picture(pipe), before)
    wrong_prompt()
    assert torch.equal(picture(pipe, **half), scaled)
    with pytest.raises(RuntimeError, match="stopped"):
        picture(pipe, **half, callback_on_step_end=fail)
    assert torch.equal(picture(pipe), before)
    wrong_prompt()
    adapter.strength = 0.5
    assert torch.equal(picture(pipe), scaled)
    wrong_prompt()
    assert torch.equal(picture(pipe), scaled), "what was set stays, and is not taken for what was before the scale"
    wrong_prompt()
    adapter.fuse()
    assert largest_difference(picture(pipe), scaled) < 1e-4


def saved_at(folder: Path, targets: tuple[str, ...]) -> Path:
    pipe = fresh("sd")
    adapter = perturb(
        inject_adapter(pipe.unet, AdapterConfig("lora", rank=4, alpha=6.0, target_modules=targets), seed=1)
    )
    return save_adapter(adapter, folder / f"{targets[0]}.safetensors")


def test_a_copy_of_a_pipeline_has_an_adapter_of_its_own(family, paths):
    pipe = fresh(family)
    adapter = load_adapter(pipe, paths[0], strength=0.7)
    whole, half = picture(pipe), picture(pipe, cross_attention_kwargs={"scale": 0.5})
    other = copy.copy(pipe)
    for name in ("unet", *ENCODERS[family]):
        setattr(other, name, copy.deepcopy(getattr(pipe, name)))
    adapter.eject()
    assert torch.equal(picture(other), whole)
    assert torch.equal(picture(other, cross_attention_kwargs={"scale": 0.5}), half)
    assert torch.equal(picture(pipe), picture(fresh(family)))


def test_other_pipelines_of_the_same_models_draw_with_the_adapter(family, paths):
    pipe = fresh(family)
    load_adapter(pipe, paths[0])
    other = type(pipe).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(picture(other), picture(pipe))
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    assert torch.equal(picture(other, **half), picture(pipe, **half))


def test_a_pipeline_in_bfloat16_keeps_its_adapter_up_to_rounding(family, paths):
    pipe = fresh(family)
    adapter = load_adapter(pipe, paths[0])
    deltas = {path: update.delta_weight() for path, update in adapter.updates().items()}
    pipe.to(torch.bfloat16)
    for path, update in adapter.updates().items():
        assert relative_error(update.delta_weight(), deltas[path]) < 0.02, path
    assert torch.isfinite(picture(pipe)).all()
    adapter.eject()
    assert torch.equal(picture(pipe), picture(fresh(family).to(torch.bfloat16)))


def test_a_compiled_denoiser_heeds_scale(tmp_path):
    pipe = fresh("sd")
    adapter = load_adapter(pipe, saved(tmp_path, "sd", "dora")[0])
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    expected, whole = picture(pipe, **half), picture(pipe)
    unet = pipe.unet
    pipe.unet = torch.compile(unet, backend="eager")
    assert largest_difference(picture(pipe, **half), expected) < 1e-4
    assert largest_difference(picture(pipe), whole) < 1e-4
    adapter.eject()


def test_the_readmes_lines_run(tmp_path, monkeypatch):
    """The blocks in the README, on a small pipeline and on files of two dialects by its names."""
    text = README.read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(from diffusers import StableDiffusionPipeline\n.*?)```", text, re.DOTALL)
    (stock,) = re.findall(r"```python\n(pipe\.load_lora_weights.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    path, _ = saved(tmp_path, "sd", "dora")
    Path("outputs/demo").mkdir(parents=True)
    path.rename("outputs/demo/dora.safetensors")
    convert_adapter("outputs/demo/dora.safetensors", "from_comfyui.safetensors", "kohya")
    pipe = fresh("sd")
    base = output_of(pipe.unet)
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", lambda *_, **__: pipe)
    block = block.replace("num_inference_steps=25", "num_inference_steps=1, height=16, width=16")
    exec(compile(block, str(README), "exec"), {})
    assert Path("owl.png").is_file()
    assert torch.equal(output_of(pipe.unet), base), "the last line leaves the base as it was"
    exec(compile(stock, str(README), "exec"), {"pipe": pipe})
    expected = fresh("sd")
    load_adapter(expected, "outputs/demo/dora.safetensors")
    assert largest_difference(output_of(pipe.unet), output_of(expected.unet)) < 1e-4
