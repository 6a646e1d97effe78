"""The scripts that train the embedded bases: resumed runs give the same bits, the pipelines agree."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from oracles import perturb
from transformers import CLIPTokenizer

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.formats.files import save_adapter
from dora_diffusion.models.loading import load_base
from dora_diffusion.models.naming import ASSETS, EMBEDDED

SCRIPTS = Path(__file__).parent.parent / "train_scripts"
sys.path.insert(0, str(SCRIPTS))

from emoji_base import autoencoder, denoiser  # noqa: E402
from emoji_base.bases import KINDS  # noqa: E402
from emoji_base.export import export  # noqa: E402
from emoji_base.icons import Icon, caption  # noqa: E402
from emoji_base.mmdit import PADDING, MMDiTDenoiser  # noqa: E402
from emoji_base.renditions import PLACES, RENDITIONS, Rendition, in_all_renditions, moved  # noqa: E402
from emoji_base.state import Training  # noqa: E402
from emoji_base.tokenizer import build_tokenizer  # noqa: E402

CPU = torch.device("cpu")
ICONS = [Icon(name, (), style, "") for name in ("apple", "cat", "house") for style in ("noto", "fluent")]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer({"apple", "cat", "house", "noto", "fluent"})


def losses_to(end: int, run: Training, losses: Iterator[float], checkpoint: Path) -> list[float]:
    """Goes on from `checkpoint`, if it is there, to step `end`, and saves it again."""
    if checkpoint.exists():
        run.load(checkpoint)
    found = []
    for loss in losses:
        found.append(loss)
        if run.step == end:
            break
    run.save(checkpoint)
    return found


def same_weights(one: Path, other: Path) -> bool:
    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    whole = [first["module"][name].equal(second["module"][name]) for name in first["module"]]
    average = [a.equal(b) for a, b in zip(first["average"]["values"], second["average"]["values"], strict=True)]
    return all(whole) and all(average)


@pytest.mark.parametrize(
    ("base", "compiled"),
    [*((base, False) for base in KINDS), pytest.param("emoji", True, marks=pytest.mark.slow)],
)
def test_a_resumed_denoiser_gives_the_same_bits(
    base: str, compiled: bool, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    plan = denoiser.DenoiserPlan(steps=4, decay_steps=2, batch=4, warmup=2, compile=compiled)
    latents = torch.randn(len(ICONS), 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def run_to(end: int, checkpoint: Path) -> list[float]:
        torch.compiler.reset()  # as in a process of its own
        run = denoiser.new_training(KINDS[base], plan, tokenizer, CPU, seed=0)
        losses = denoiser.train(run, plan, latents, denoiser.Captions(tokenizer, ICONS), CPU)
        return losses_to(end, run, losses, checkpoint)

    whole = run_to(4, tmp_path / "whole.pt")
    assert run_to(2, tmp_path / "parts.pt") + run_to(4, tmp_path / "parts.pt") == whole
    assert same_weights(tmp_path / "whole.pt", tmp_path / "parts.pt")


@pytest.mark.parametrize("base", KINDS)
def test_training_can_start_from_an_earlier_base(base: str) -> None:
    folder = ASSETS / base
    plan = denoiser.DenoiserPlan(steps=1)
    run = denoiser.new_training(KINDS[base], plan, CLIPTokenizer.from_pretrained(folder / "tokenizer"), CPU, seed=0)
    run.take_weights(folder)
    loaded = load_base(base, device="cpu").pipe
    for part in KINDS[base].parts:
        theirs = getattr(loaded, part).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(run.module, part).state_dict().items())
    live = [p for p in run.module.parameters() if p.requires_grad]
    assert all(torch.equal(p, value) for p, value in zip(live, run.average.values, strict=True))


def test_renditions_share_an_icons_weight_and_are_named_in_its_captions() -> None:
    icons = [replace(icon, weight=1.0 + k) for k, icon in enumerate(ICONS)]
    found = in_all_renditions(icons)
    assert len(found) == len(icons) * len(RENDITIONS) * len(PLACES)
    for icon in icons:
        of_it = [each for each in found if each.name == icon.name and each.style.endswith(icon.style)]
        assert sum(each.weight for each in of_it) == pytest.approx(icon.weight)
        assert {each.style.removesuffix(icon.style).strip() for each in of_it} == {each.word for each in RENDITIONS}
    outlined = next(each for each in found if each.style.startswith("outlined"))
    said = [caption(outlined, random.Random(seed)) for seed in range(400)]
    assert said.count(f"{outlined.name}, {outlined.style} style") > 200
    unknown = [text for text in said if text.endswith(" style") and "outlined" not in text]
    assert 20 < len(unknown) < 90  # a word of nobody's for the style


@pytest.mark.parametrize("rendition", RENDITIONS, ids=lambda rendition: rendition.word or "plain")
def test_a_rendition_keeps_the_paper_white_and_changes_the_drawing(rendition: Rendition) -> None:
    pixels = np.full((2, 64, 64, 3), 255, np.uint8)
    pixels[:, 16:48, 20:44] = np.linspace((250, 0, 40), (20, 90, 250), 24).astype(np.uint8)
    for drawn in (pixels if rendition.change is None else rendition.change(pixels), moved(pixels, True, 0)):
        assert drawn.shape == pixels.shape and drawn.dtype == np.uint8
        assert (drawn[:, 0] >= 250).all() and (drawn[:, 32, 32] < 200).any()
    if rendition.change is not None:
        assert not np.array_equal(rendition.change(pixels), pixels)


def test_a_resumed_autoencoder_gives_the_same_bits(tmp_path: Path) -> None:
    pictures = torch.randint(256, (6, 64, 64, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    plan = autoencoder.AutoencoderPlan(steps=3, batch=2)

    def run_to(end: int, checkpoint: Path) -> list[float]:
        run = autoencoder.new_training(plan, CPU, seed=0)
        return losses_to(end, run, autoencoder.train(run, plan, pictures, CPU), checkpoint)

    whole = run_to(3, tmp_path / "whole.pt")
    assert run_to(1, tmp_path / "parts.pt") + run_to(3, tmp_path / "parts.pt") == whole
    assert same_weights(tmp_path / "whole.pt", tmp_path / "parts.pt")


def test_counted_padding_is_what_the_pipeline_computes_with_all_of_it(tokenizer: CLIPTokenizer) -> None:
    torch.manual_seed(3)
    model = MMDiTDenoiser(tokenizer).eval()
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # the gates start at zero, where everything agrees
    noisy, t = torch.randn(2, 4, 16, 16), torch.tensor([200.0, 900.0])
    prompts = ["apple, noto style", "cat"]
    tokens = tokenizer(prompts, padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        ours = model(noisy, t, tokens)
        pipeline = model.pipeline(autoencoder.new_autoencoder(), tokenizer)
        words, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        stock = pipeline.transformer(noisy, words, pooled, t).sample
    assert words.shape[1] == tokens.shape[1] + PADDING
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4 * float(stock.abs().max()))


@pytest.mark.parametrize("base", KINDS)
def test_the_exported_folder_loads_as_a_stock_pipeline_and_draws(
    base: str, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    model, vae = KINDS[base](tokenizer), autoencoder.new_autoencoder()
    export(vae, model, tokenizer, tmp_path / "base")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "base", **dict.fromkeys(KINDS[base].absent))
    assert type(pipeline).__name__ in KINDS[base].summary
    assert isinstance(pipeline.vae, AutoencoderKL) and (tmp_path / "base" / "NOTICE").exists()
    image = pipeline("cat, noto style", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)


@pytest.mark.parametrize("base", EMBEDDED)
def test_an_embedded_base_is_a_stock_pipeline_and_stock_diffusers_reads_its_adapters(base: str, tmp_path: Path) -> None:
    folder = ASSETS / EMBEDDED[base].folder
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 24e6
    ours = load_base(base, device="cpu")
    stock = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(KINDS[base].absent))

    def picture(pipeline: DiffusionPipeline) -> torch.Tensor:
        settings = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        return pipeline("owl, noto style", guidance_scale=ours.guidance_scale, **settings).images

    plain = picture(ours.pipe)
    assert plain.shape == (1, 3, 64, 64) and torch.equal(plain, picture(stock))
    config = AdapterConfig(rank=4, alpha=2.0, target_modules=ours.family.target_modules)
    adapter = perturb(inject_adapter(ours.denoiser, config, seed=0), size=0.02)
    changed = picture(ours.pipe)
    stock.load_lora_weights(save_adapter(adapter, tmp_path / "dora.safetensors"))
    assert (changed - plain).abs().max() > 0.01
    torch.testing.assert_close(picture(stock), changed, rtol=0, atol=1e-3)
