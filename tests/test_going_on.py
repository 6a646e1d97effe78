"""Training on from an adapter that is there already: the same model at the start, and a run like any other."""

from __future__ import annotations

from pathlib import Path

import bases
import pytest
import torch
from dialect_files import flat, kohya, lora_delta, make
from diffusers import StableDiffusionPipeline
from training_helpers import config, stop_after

from dora_diffusion.adapters.injection import AnyKind
from dora_diffusion.errors import AdapterFileError, AdapterMismatchError, ConfigError, TrainingError
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import read_adapter_file
from dora_diffusion.models.loading import Base, load_base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.events import Finished, Preparing
from dora_diffusion.training.loop import held_out_loss, make_accelerator, new_adapter, prepare
from dora_diffusion.training.run import train


def finish(settings: TrainConfig) -> dict[str, Finished]:
    return {event.kind: event for event in train(settings) if isinstance(event, Finished)}


def loss_at_the_start(settings: TrainConfig, base: Base, kind: AnyKind = "dora") -> float:
    training = prepare(settings, base, make_accelerator(settings))
    adapter, _ = new_adapter(training, kind)  # type: ignore[arg-type]
    try:
        loss = held_out_loss(training)
        assert loss is not None
        return loss
    finally:
        adapter.eject()


def later(settings: TrainConfig, **values: object) -> TrainConfig:
    """The same pictures and rate, and nothing of the adapter's shape, which is the file's."""
    shape = {"rank": 16, "alpha": 16.0, "norm_axis": "output", "use_rslora": False}
    shape |= {"train_text_encoder": False, "train_convolutions": False}
    return settings.model_copy(update={**shape, **values})


@pytest.mark.parametrize(
    "shape",
    [{}, {"norm_axis": "input"}, {"train_text_encoder": True}, {"train_convolutions": True, "use_rslora": True}],
    ids=["dora", "by input", "text encoder", "convolutions, rslora"],
)
def test_twins_go_on_from_a_runs_folder(tmp_path: Path, pictures: Path, sd_folder: Path, shape: dict) -> None:  # type: ignore[type-arg]
    first = config(pictures, tmp_path / "first", sd_folder, steps=8, **shape)
    before = finish(first)
    second = later(first, out=str(tmp_path / "second"), start_from=str(tmp_path / "first"))
    base = load_base(str(sd_folder), device="cpu")
    for kind in first.kinds:
        assert loss_at_the_start(second, base, kind) == before[kind].held_out_loss
    after = finish(second)
    for kind in first.kinds:
        assert after[kind].base_loss == before[kind].base_loss
        assert after[kind].held_out_loss < before[kind].held_out_loss  # type: ignore[operator]
        old, new = read_adapter_file(before[kind].path), read_adapter_file(after[kind].path)
        assert old.layers == new.layers and old.config == new.config and old.norm_axis == new.norm_axis
        assert new.description is not None and new.description.training["started_from"] == before[kind].path.name


def test_a_stopped_run_that_went_on_resumes_to_the_same_bits(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    first = config(pictures, tmp_path / "first", sd_folder, kind="dora", rank=3, alpha=2.0)
    start = finish(first)["dora"].path
    whole = later(first, out=str(tmp_path / "whole"), start_from=str(start))
    finished = finish(whole)["dora"].path
    parts = whole.model_copy(update={"out": str(tmp_path / "parts")})
    told = [list(train(parts, should_stop=stop_after(3)))]
    written = (tmp_path / "parts/config.toml").read_text()
    assert "rank = 3" in written and "alpha = 2.0" in written
    told.append(list(train(parts, resume=True)))
    texts = [[event.text for event in events if isinstance(event, Preparing)] for events in told]
    assert [any("loss of what it goes on from" in text for text in each) for each in texts] == [True, False]
    assert finished.read_bytes() == (tmp_path / "parts/dora.safetensors").read_bytes()

    list(train(parts.model_copy(update={"out": str(tmp_path / "third")}), should_stop=stop_after(3)))
    start.write_bytes(finished.read_bytes())  # another adapter under the same name
    with pytest.raises(TrainingError, match=r"or .*dora.safetensors, changed since"):
        list(train(parts.model_copy(update={"out": str(tmp_path / "third")}), resume=True))


@pytest.mark.parametrize("norm_axis", ["output", "input"])
def test_a_lora_goes_on_as_a_dora_that_is_the_same_model(
    tmp_path: Path, pictures: Path, sd_folder: Path, norm_axis: str
) -> None:
    start = finish(config(pictures, tmp_path / "first", sd_folder, kind="lora", steps=8))["lora"]
    base = load_base(str(sd_folder), device="cpu")
    second = config(pictures, tmp_path, sd_folder, kind="dora", start_from=str(start.path), norm_axis=norm_axis)
    training = prepare(second, base, make_accelerator(second))
    adapter, _ = new_adapter(training, "dora")
    stock = StableDiffusionPipeline.from_pretrained(sd_folder)
    original = {
        name: module.weight.detach().clone() for name, module in stock.unet.named_modules() if hasattr(module, "weight")
    }
    stock.load_lora_weights(start.path)
    stock.fuse_lora()
    for path, update in adapter.updates().items():
        delta = stock.unet.get_submodule(path).weight - original[path]  # what stock diffusers makes of the LoRA
        torch.testing.assert_close(update.delta_weight(), delta, rtol=0, atol=1e-6)
    adapter.eject()
    after = finish(second)["dora"]
    assert after.held_out_loss < start.held_out_loss  # type: ignore[operator]
    assert read_adapter_file(after.path).norm_axis == norm_axis


def test_a_kohya_lora_goes_on_as_both_kinds(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    base = load_base(str(sd_folder), device="cpu")
    paths = [path for path, _ in base.denoiser.named_modules() if path.endswith(("to_q", "ff.net.2"))]
    start = make(base.denoiser, paths, flat("lora_unet_"), kohya, lora_delta).save(tmp_path / "kohya.safetensors")
    after = finish(config(pictures, tmp_path / "on", sd_folder, start_from=str(start), learning_rate=1e-3, alpha=6.0))
    for kind, finished in after.items():
        file = read_adapter_file(finished.path)
        assert (file.config.kind, file.config.rank, file.config.alpha) == (kind, 4, 6.0)
        assert sorted(file.layers) == sorted(paths)


def test_what_cannot_be_gone_on_from_is_said(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    base = load_base(str(sd_folder), device="cpu")
    first = config(pictures, tmp_path / "first", sd_folder)
    dora, lora = finish(first)["dora"].path, tmp_path / "first/lora.safetensors"

    def refused(start: Path, error: type[Exception], says: str, **values: object) -> None:
        values = {"kind": "dora", "out": str(tmp_path / "on"), "start_from": str(start), **values}
        with pytest.raises(error, match=says):
            list(train(first.model_copy(update=values)))
        assert not (tmp_path / "on/config.toml").exists()

    refused(dora, ConfigError, "is a DoRA, and a LoRA is to be trained: set kind to dora. Or make", kind="lora")
    refused(dora, ConfigError, "has rank = 4, and rank = 8 was given. Leave rank out", rank=8)
    refused(dora, ConfigError, "norm_axis = output, and norm_axis = input was given", norm_axis="input")
    refused(dora, ConfigError, "has its own layers, and train_feed_forward = True was given", train_feed_forward=True)
    refused(tmp_path / "none.safetensors", AdapterFileError, "no adapter file at .*Check the path")
    refused(tmp_path, AdapterFileError, "folder")
    whole = convert_adapter(dora, tmp_path / "whole.safetensors", "diff", base=base).path
    refused(whole, ConfigError, "holds whole differences")
    other = make(bases.unet(cross_attention_dim=24), ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"],
                 flat("lora_unet_"), kohya, lora_delta).save(tmp_path / "other.safetensors")  # fmt: skip
    refused(other, AdapterMismatchError, "does not fit this base", alpha=6.0)
    convert_adapter(lora, tmp_path / "lora.safetensors", "lora", base=base, rank=2)
    (tmp_path / "dora.safetensors").write_bytes(dora.read_bytes())
    refused(tmp_path, ConfigError, "are no twins", kind="both")
    with pytest.raises(TrainingError, match="which --overwrite replaces"):
        list(train(first.model_copy(update={"kind": "dora", "start_from": str(dora)}), overwrite=True))
    assert dora.exists()
