"""A look inside files: what they are, and what they changed, against numpy's arithmetic on the raw tensors."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import bases
import numpy as np
import pytest
import torch
from oracles import perturb
from PIL import Image
from safetensors.torch import load_file, save_file
from stock_diffusers import pipeline_around
from torch import nn

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.errors import AdapterFileError, AdapterMismatchError
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import save_adapter
from dora_diffusion.inspection.analysis import Analysis, LayerChange, fit
from dora_diffusion.inspection.look import comparable, look_at, names_of
from dora_diffusion.inspection.plots import COLOURS, draw_analyses, nice_ticks
from dora_diffusion.inspection.summary import summarise
from dora_diffusion.models.loading import Base

TARGETS = (r"down_blocks\.0\..*attn[12]\.(to_q|to_v)", r"down_blocks\.1\..*(conv1|conv_shortcut)")


@pytest.fixture
def base() -> Base:
    return Base("small", pipeline_around(bases.unet()))  # type: ignore[arg-type]


@pytest.fixture
def adapter_file(base: Base, tmp_path: Path):  # type: ignore[no-untyped-def]
    def make(kind: str, targets: tuple[str, ...] = TARGETS) -> Path:
        config = AdapterConfig(kind, rank=3, alpha=6.0, target_modules=targets)  # type: ignore[arg-type]
        adapter = perturb(inject_adapter(base.denoiser, config, seed=3), seed=3)
        path = save_adapter(adapter, tmp_path / f"{kind}.safetensors", training={"steps": 300}, base_name="small")
        adapter.eject()
        return path

    return make


def tuned(model: nn.Module, seed: int = 4) -> nn.Module:
    """The model as if fine-tuned whole: every layer by another amount."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.1 * torch.rand((), generator=g) * parameter.std() if parameter.numel() > 1 else 0.0
            parameter.add_(size * torch.randn(parameter.shape, generator=g))
    return model


# The paper's quantities, by numpy in float64.


def weight(model: nn.Module, layer: str) -> np.ndarray:
    return model.get_submodule(layer).weight.detach().double().numpy()


def adapted_weight(model: nn.Module, path: Path, layer: str) -> np.ndarray:
    tensors = load_file(path)
    W0 = weight(model, layer)
    A, B = (tensors[f"unet.{layer}.lora_{p}.weight"].double().flatten(1).numpy() for p in "AB")
    V = W0 + 2.0 * (B @ A).reshape(W0.shape)
    m = tensors.get(f"unet.{layer}.lora_magnitude_vector")
    if m is None:
        return V
    rows = V.reshape(len(V), -1)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True) * m.double().numpy().reshape(-1, 1)).reshape(W0.shape)


def assert_analysis(layer: LayerChange, W0: np.ndarray, W: np.ndarray, rank: int) -> None:
    rows0, rows = W0.reshape(len(W0), -1), W.reshape(len(W), -1)
    m0, m = np.linalg.norm(rows0, axis=1), np.linalg.norm(rows, axis=1)
    cos = (rows0 * rows).sum(1) / (m0 * m)
    sigma = np.linalg.svd(rows - rows0, compute_uv=False)
    p = sigma[sigma > 1e-9 * sigma[0]] / sigma.sum()
    assert layer.magnitude_change == pytest.approx(np.abs(m - m0).mean(), rel=1e-5)
    assert layer.direction_change == pytest.approx((1 - cos).mean(), rel=1e-4)
    assert layer.relative_size == pytest.approx(np.linalg.norm(rows - rows0) / np.linalg.norm(rows0), rel=1e-5)
    taken = len(layer.singular_values)
    assert layer.singular_values == pytest.approx(sigma[:taken], rel=1e-4, abs=1e-5 * sigma[0])
    assert np.square(sigma[taken:]).sum() <= 1e-9 * np.square(sigma).sum()
    assert layer.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-3)
    assert layer.energy == pytest.approx(np.square(sigma[:rank]).sum() / np.square(sigma).sum(), rel=1e-5)


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_an_adapters_analysis_is_the_papers(base, adapter_file, kind):
    path = adapter_file(kind)
    before = {name: parameter.clone() for name, parameter in base.denoiser.named_parameters()}
    [(summary, analysis)] = look_at([path], base)
    assert len(analysis.layers) == summary.layers >= 6
    for layer in analysis.layers:
        W0 = weight(base.denoiser, layer.layer)
        assert_analysis(layer, W0, adapted_weight(base.denoiser, path, layer.layer), rank=3)
    if kind == "lora":
        assert all(len(layer.singular_values) == 3 and layer.energy == pytest.approx(1) for layer in analysis.layers)
    x, y = zip(*((layer.direction_change, layer.magnitude_change) for layer in analysis.layers))
    assert analysis.correlation == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)
    sizes = [layer.relative_size for layer in analysis.largest]
    assert sizes == sorted(sizes, reverse=True)
    after = dict(base.denoiser.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("how", ["pipeline", "unet", "file", "sharded", "half"])
def test_a_model_that_was_fine_tuned_whole_is_analysed_alike(base, tmp_path, how):
    model = tuned(bases.unet())
    if how == "half":
        model.to(torch.float16)
    if how == "pipeline":
        path = tmp_path / "tuned"
        pipeline_around(model).save_pretrained(path)
    elif how == "file":
        path = tmp_path / "tuned.safetensors"
        save_file(model.state_dict(), path)
    else:
        path = tmp_path / "unet"
        model.save_pretrained(path, max_shard_size="200KB" if how == "sharded" else "10GB")
        assert len(list(path.glob("*.safetensors"))) > 1 or how != "sharded"
    [(summary, analysis)] = look_at([path], base)
    assert summary.kind == "full fine-tuning" and analysis.rank == 16
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert {layer.layer for layer in analysis.layers} == linear
    for layer in analysis.layers[::9]:
        assert_analysis(layer, weight(base.denoiser, layer.layer), weight(model, layer.layer), rank=16)


def test_a_model_of_another_base_is_refused(base, tmp_path):
    other = bases.unet(block_out_channels=(32, 96), norm_num_groups=8)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"is \[96.* in the fine-tuned model and \[64.* in the base"):
        look_at([tmp_path / "other.safetensors"], base)
    save_file({"conv_in.weight": torch.zeros(2, 2)}, tmp_path / "part.safetensors")
    with pytest.raises(
        AdapterMismatchError, match=r"no fine-tuned UNet2DConditionModel of this base: .* are not in it"
    ):
        look_at([tmp_path / "part.safetensors"], base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match="has no weights of a UNet or transformer"):
        look_at([tmp_path / "empty"], base)


def test_a_row_of_zeros_has_no_direction_and_no_change_no_energy(base, tmp_path):
    model = bases.unet()
    with torch.no_grad():
        base.denoiser.conv_out.weight[1] = 0
        model.conv_out.weight[1] = 0
        model.conv_out.weight[0] *= 2
    save_file(model.state_dict(), tmp_path / "tuned.safetensors")
    [(_, analysis)] = look_at([tmp_path / "tuned.safetensors"], base)
    changed = next(layer for layer in analysis.layers if layer.layer == "conv_out")
    assert changed.direction_change == pytest.approx(0, abs=1e-12) and changed.magnitude_change > 0
    assert changed.effective_rank == pytest.approx(1)
    still = next(layer for layer in analysis.layers if layer.layer == "conv_in")
    assert (still.relative_size, still.effective_rank, still.energy) == (0, 0, 1)


# The summary.


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_the_summary_says_what_the_file_is(base, adapter_file, tmp_path, dialect):
    path = adapter_file("dora")
    if dialect == "kohya":
        path = convert_adapter(path, tmp_path / "kohya.safetensors", "kohya").path
    summary = summarise(path)
    assert (summary.kind, summary.dialect, summary.norm_axis) == ("DoRA", dialect, "output")
    assert (summary.rank, summary.alphas) == (3, {6.0: summary.layers})
    assert summary.targets == {
        "attn1.to_q": 1,
        "attn1.to_v": 1,
        "attn2.to_q": 1,
        "attn2.to_v": 1,
        "conv1": 1,
        "conv_shortcut": 1,
    }
    tensors = load_file(path)
    assert summary.parameters == sum(t.numel() for k, t in tensors.items() if not k.endswith(".alpha"))
    assert summary.size == path.stat().st_size
    assert summary.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert summary.training == {"steps": 300} and summary.base == "small"


def test_an_unreadable_file_is_said_to_be_one(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterFileError):
        summarise(tmp_path / "broken.safetensors")
    with pytest.raises(AdapterFileError, match="absent"):
        summarise(tmp_path / "absent.safetensors")


# Several files.


def test_only_layers_that_all_files_change_are_compared(base, adapter_file, tmp_path):
    dora = adapter_file("dora")
    lora = adapter_file("lora", (r"down_blocks\.0\..*attn1\.(to_q|to_v|to_k)",))
    analyses = [analysis for _, analysis in look_at([dora, lora], base)]
    shared = comparable(analyses)
    names = [{layer.layer.rpartition(".")[2] for layer in a.layers} for a in shared]
    assert names == [{"to_q", "to_v"}] * 2
    other = adapter_file("lora", ("conv_out",))
    with pytest.raises(AdapterFileError, match="change no layer in common"):
        comparable([a for _, a in look_at([dora, other], base)])


def test_names_are_told_apart_by_their_folders():
    paths = [Path("a/x.safetensors"), Path("b/x.safetensors"), Path("b/y.safetensors"), Path("runs/tuned")]
    assert names_of(paths) == ["a/x", "b/x", "y", "tuned"]


# The plot.


def analysis_of(points: list[tuple[float, float]], kind: str) -> Analysis:
    layers = [LayerChange(f"l{i}", y, x, 0.1, (2.0, 1.0), 1.9, 1.0) for i, (x, y) in enumerate(points)]
    return Analysis(kind, kind, 4, tuple(layers))


def columns_of(image: Image.Image, colour: str, rows: slice) -> np.ndarray:
    """Where along the x axis the picture has this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    close = np.abs(np.asarray(image.convert("RGB"), dtype=int) - wanted).max(2) < 40
    return np.flatnonzero(close[rows].any(0))


def test_every_file_has_its_panel_with_its_slope():
    rising = [(0.1 * i, 0.2 * i) for i in range(1, 9)]
    falling = [(0.1 * i, 2.0 - 0.2 * i) for i in range(1, 9)]
    image = draw_analyses([analysis_of(rising, "LoRA"), analysis_of(falling, "DoRA")])
    pixels = np.asarray(image.convert("RGB"), dtype=int)
    assert (pixels[0, 0] == 255).all()
    for kind, sign in (("LoRA", 1), ("DoRA", -1)):
        wanted = np.array([int(COLOURS[kind][i : i + 2], 16) for i in (1, 3, 5)])
        y, x = np.nonzero(np.abs(pixels[70:270] - wanted).max(2) < 40)
        assert len(x) > 100
        assert sign * np.corrcoef(x, -y)[0, 1] > 0.98
    left, right = (columns_of(image, COLOURS[kind], slice(70, 270)) for kind in ("LoRA", "DoRA"))
    assert left.max() < right.min()


def test_a_plot_of_one_layer_or_none_that_moved_can_be_drawn():
    for points in ([(0.5, 0.25)], [(0.0, 0.0)] * 4, [(0.1, 0.3)] * 5):
        assert draw_analyses([analysis_of(points, "LoRA")]).width > 300
    assert draw_analyses([analysis_of([(0.1, 0.2)] * 3, f"file {i}") for i in range(7)]).height > 900


def test_panels_and_legend_name_files_apart_that_differ_late_or_in_other_scripts():
    long = "a-run-with-quite-a-long-name-of-its-own-and-more-words-"
    names = [long + "evening", long + "morning", "Straße", "Strase", "вечер", "漢", "字"]
    analyses = [replace(analysis_of([(0.1, 0.2)] * 3, "LoRA"), name=name) for name in names]
    image = draw_analyses(analyses)
    titles = [(22 + i % 3 * 374 + 66, 22 + i // 3 * 334) for i in range(len(names))]
    assert len({image.crop((x, y, x + 274, y + 22)).tobytes() for x, y in titles}) == len(names)
    legend = np.asarray(draw_analyses(analyses[:2]).convert("L"))[22 + 334 + 24 : 22 + 334 + 42]
    right = draw_analyses([analyses[0], analyses[0]]).convert("L")
    assert (legend != np.asarray(right)[22 + 334 + 24 : 22 + 334 + 42]).any() and (legend[:, -22:] == 255).all()


@pytest.mark.parametrize("low, high", [(0, 1), (0.00037, 0.0021), (-5, 320), (7, 7), (0, 0), (1e-9, 2e-9), (999, 1001)])
def test_ticks_are_round_and_cover_the_values(low, high):
    ticks = nice_ticks(low, high)
    steps = np.diff(ticks)
    assert 2 <= len(ticks) <= 7
    assert np.allclose(steps, steps[0])
    assert round(steps[0] / 10 ** math.floor(math.log10(steps[0] * 1.0000001)), 6) in (1, 2, 5)
    assert ticks[0] <= low + 1e-12 * abs(low) and ticks[-1] >= high - 1e-12 * abs(high)


def test_the_line_is_numpys():
    points = [(0.0, 1.0), (1.0, 3.5), (2.0, 3.0), (5.0, 9.0)]
    x, y = zip(*points)
    assert fit(points)[:2] == pytest.approx(np.polyfit(x, y, 1))
    assert fit(points)[2] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert fit([(1.0, 1.0)] * 5) is None and fit(points[:2]) is None


# The command.


def test_the_command_describes_analyses_and_draws(run, tmp_path):
    from dora_diffusion.models.loading import load_base

    emoji = load_base("emoji", device="cpu").denoiser
    files = []
    for kind in ("dora", "lora"):
        config = AdapterConfig(kind, rank=2, alpha=3.0, target_modules=(r"mid_block\..*to_[qkv]",))
        adapter = perturb(inject_adapter(emoji, config, seed=0), size=0.02)
        files.append(save_adapter(adapter, tmp_path / f"{kind}.safetensors"))
        adapter.eject()
    emoji.conv_in.weight.data.mul_(1.1)
    tuned(emoji).save_pretrained(tmp_path / "tuned")
    plain = run("inspect", files[0])
    assert plain.status == 0 and "DoRA" in plain.out and "SHA-256" in plain.out and "correlation" not in plain.out
    plot = tmp_path / "plot.png"
    shown = run("inspect", *files, tmp_path / "tuned", "--base", "emoji", "--plot", plot)
    assert shown.status == 0 and shown.flat.count("The layers that changed most") == 3
    assert Image.open(plot).width > 900
    found = json.loads(run("inspect", *files, "--base", "emoji", "--json").out)
    assert [entry["kind"] for entry in found] == ["DoRA", "LoRA"]
    assert len(found[1]["analysis"]["layers"]) == found[1]["layers"]
    assert run("inspect", files[0], "--plot", plot).status == 1
