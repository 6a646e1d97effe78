"""Runs of LoKr, DoKR, LoHa and DoHa: all that a LoRA's run does, and files that LyCORIS and ComfyUI's rule read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lycoris_files import delta_of
from torch import Tensor
from training_helpers import config, losses, stop_after

from dora_diffusion.errors import ConfigError
from dora_diffusion.formats.files import load_adapter, read_adapter_file
from dora_diffusion.formats.storage import read_safetensors
from dora_diffusion.models.loading import load_base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.events import Finished, Preparing, Saved, Settled
from dora_diffusion.training.loop import make_accelerator, new_adapter, prepare
from dora_diffusion.training.run import train

LOKR: dict[str, object] = {"parametrisation": "lokr", "rank": 1, "factor": 4}
WHOLE: dict[str, object] = {"parametrisation": "lokr", "full_matrix": True}
LOHA: dict[str, object] = {"parametrisation": "loha", "rank": 2}
FORMS = {"lokr": LOKR, "lokr whole": WHOLE, "loha": LOHA}


def finish(settings: TrainConfig) -> dict[str, Path]:
    return {event.kind: event.path for event in train(settings) if isinstance(event, Finished)}


def comfyui_weight(W0: Tensor, keys: dict[str, Tensor], module: str) -> Tensor:
    """W' at strength 1 as comfy/weight_adapter/lokr.py, loha.py and base.py compute it, in float64.

    alpha is divided by the rank of whichever factor has one, and the scale is 1 without; magnitudes by input multiply
    the sum's columns over their norms. (Those by output it does not divide by the sum's norm: docs/parity.md.)
    """
    held = {k[len(module) + 1 :]: v.double() for k, v in keys.items() if k.startswith(module + ".")}
    alpha, rank = float(held["alpha"]), None
    if "hada_w1_a" in held:
        m1, m2 = held["hada_w1_a"] @ held["hada_w1_b"], held["hada_w2_a"] @ held["hada_w2_b"]
        dW, rank = m1 * m2, held["hada_w1_b"].shape[0]
    else:
        w2 = held.get("lokr_w2")
        if w2 is None:
            w2, rank = held["lokr_w2_a"] @ held["lokr_w2_b"], held["lokr_w2_b"].shape[0]
        w1 = held["lokr_w1"]
        dW = torch.kron(w1[:, :, None, None] if w2.dim() == 4 else w1, w2)
    V = W0.double() + (1.0 if rank is None else alpha / rank) * dW.reshape(W0.shape)
    m = held.get("dora_scale")
    if m is None:
        return V
    assert m.shape[:2] == (1, W0.shape[1])
    return V * (m / V.transpose(0, 1).flatten(1).norm(dim=1).reshape(m.shape))


@pytest.mark.parametrize("norm_axis", ["output", "input"])
@pytest.mark.parametrize("form", FORMS)
def test_a_runs_files_mean_the_same_in_lycoris_and_by_comfyuis_rule(
    tmp_path: Path, pictures: Path, sd_folder: Path, form: str, norm_axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lycoris = pytest.importorskip("lycoris")
    monkeypatch.setattr(lycoris.LycorisNetwork, "LORA_PREFIX", "lora_unet")
    shape = {"norm_axis": norm_axis, "train_convolutions": True, "train_feed_forward": True}
    made = finish(config(pictures, tmp_path / "run", sd_folder, steps=3, **{**shape, **FORMS[form]}))
    base = load_base(str(sd_folder), device="cpu")
    original = {n: p.detach().clone() for n, p in base.denoiser.named_parameters()}
    for kind, path in made.items():
        keys, _ = read_safetensors(path)
        theirs: dict[str, Tensor] = {}
        if norm_axis == "output" or kind == "lora":  # LyCORIS's loader makes modules with magnitudes by output alone
            with torch.no_grad():
                network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), base.denoiser)
                theirs = {part.lora_name: delta_of(part.eval()) for part in network.loras}
            assert len(theirs) == len(keys_by_module(keys))
        adapter = load_adapter(base, path)
        assert len(adapter.layers) == len(keys_by_module(keys))
        for layer, update in adapter.updates().items():
            W0, module = original[f"{layer}.weight"], "lora_unet_" + layer.replace(".", "_")
            W = W0.double() + update.delta_weight().double()
            assert (W - W0.double()).abs().max() > 1e-4
            if norm_axis == "input" or kind == "lora":
                assert (W - comfyui_weight(W0, keys, module)).abs().max() < 1e-5, layer
            if norm_axis == "output" or kind == "lora":
                found = W0.double() + theirs.pop(module).double()
                assert (W - found).abs().max() < 1e-5, layer
        assert not theirs
        adapter.eject()


def keys_by_module(keys: dict[str, Tensor]) -> set[str]:
    return {key.partition(".")[0] for key in keys}


def test_the_saved_keys_are_those_that_lycoris_writes(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    path = finish(config(pictures, tmp_path, sd_folder, kind="dora", rank=1, parametrisation="lokr"))["dora"]
    keys, header = read_safetensors(path)
    module = next(key for key in keys if key.endswith("lokr_w1")).removesuffix(".lokr_w1")
    held = {key.removeprefix(module + ".") for key in keys if key.startswith(module + ".")}
    assert module.startswith("lora_unet_") and held == {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha", "dora_scale"}
    assert keys[f"{module}.dora_scale"].dim() == 2
    said = json.loads(header["dora_diffusion"])
    assert (said["kind"], said["parametrisation"], said["rank"], said["alpha"]) == ("dora", "lokr", 1, 4.0)


@pytest.mark.parametrize("form", FORMS)
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path: Path, pictures: Path, sd_folder: Path, form: str) -> None:
    shape = {"dropout": 0.1, "train_text_encoder": True, "mixed_precision": "bf16", **FORMS[form]}
    whole = config(pictures, tmp_path / "whole", sd_folder, kind="dora", save_every=2, **shape)
    events = list(train(whole))
    assert [event.step for event in events if isinstance(event, Saved)] == [2, 4]
    parts = whole.model_copy(update={"out": str(tmp_path / "parts")})
    list(train(parts, should_stop=stop_after(3)))
    list(train(parts, resume=True))
    assert (tmp_path / "whole/dora.safetensors").read_bytes() == (tmp_path / "parts/dora.safetensors").read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_twins_see_the_same_pictures_and_learn(tmp_path: Path, pictures: Path, sd_folder: Path, form: str) -> None:
    events = list(train(config(pictures, tmp_path, sd_folder, steps=12, **FORMS[form])))
    (settled,) = [event.config for event in events if isinstance(event, Settled)]
    assert settled.parametrisation == FORMS[form]["parametrisation"]
    first = {kind: losses(events, kind)[0] for kind in ("lora", "dora")}
    assert first["lora"] == first["dora"]  # the base's bits at the start, with magnitudes or without
    for event in events:
        if isinstance(event, Finished):
            assert event.held_out_loss < event.base_loss  # type: ignore[operator]
    card = (tmp_path / "README.md").read_text()
    labels = ("LoHa", "DoHa") if form == "loha" else ("LoKr", "DoKR")
    assert f"{labels[0]} and {labels[1]} for" in card and f"| {labels[0]} | {labels[1]} |" in card


@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on_from_its_own_files(tmp_path: Path, pictures: Path, sd_folder: Path, form: str) -> None:
    first = config(pictures, tmp_path / "first", sd_folder, norm_axis="input", **FORMS[form])
    made = finish(first)
    second = config(pictures, tmp_path / "second", sd_folder, start_from=str(tmp_path / "first"))
    second = second.model_copy(update={"rank": 16, "alpha": 16.0})
    base = load_base(str(sd_folder), device="cpu")
    training = prepare(second, base, make_accelerator(second))
    for kind in second.kinds:
        adapter, _ = new_adapter(training, kind)
        own = {name: p.detach().clone() for name, p in adapter.named_parameters().items()}
        scales = {path: update.scale for path, update in adapter.updates().items()}
        adapter.eject()
        loaded = load_adapter(base, made[kind])
        assert own.keys() == loaded.named_parameters().keys()
        assert all(torch.equal(own[name], p) for name, p in loaded.named_parameters().items())
        assert scales == {path: update.scale for path, update in loaded.updates().items()}
        loaded.eject()
    after = finish(second)
    for kind, path in after.items():
        old, new = read_adapter_file(made[kind]), read_adapter_file(path)
        assert old.config == new.config and old.norm_axis == new.norm_axis


@pytest.mark.parametrize("norm_axis", ["output", "input"])
@pytest.mark.parametrize("form", FORMS)
def test_without_magnitudes_it_goes_on_with_those_of_what_it_is(
    tmp_path: Path, pictures: Path, sd_folder: Path, form: str, norm_axis: str
) -> None:
    start = finish(config(pictures, tmp_path / "first", sd_folder, kind="lora", **FORMS[form]))["lora"]
    second = config(pictures, tmp_path / "second", sd_folder, kind="dora", start_from=str(start), norm_axis=norm_axis)
    second = second.model_copy(update={"rank": 16, "alpha": 16.0})
    base = load_base(str(sd_folder), device="cpu")
    loaded = load_adapter(base, start)
    before = {path: update.delta_weight() for path, update in loaded.updates().items()}
    loaded.eject()
    adapter, _ = new_adapter(prepare(second, base, make_accelerator(second)), "dora")
    for path, update in adapter.updates().items():
        assert (update.delta_weight() - before[path]).abs().max() < 1e-6
    adapter.eject()
    said = [event.text for event in train(second) if isinstance(event, Preparing)]
    label = "DoHa" if form == "loha" else "DoKR"
    assert any(
        text.startswith(f"{label}: goes on from lora.safetensors, a {label.replace('Do', 'Lo').replace('KR', 'Kr')}")
        for text in said
    )
    assert read_adapter_file(tmp_path / "second/dora.safetensors").norm_axis == norm_axis


def test_one_parametrisation_does_not_go_on_as_another(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    lora = finish(config(pictures, tmp_path / "lora", sd_folder, kind="lora"))["lora"]
    lokr = finish(config(pictures, tmp_path / "lokr", sd_folder, kind="dora", **LOKR))["dora"]
    later = config(pictures, tmp_path / "on", sd_folder, kind="dora").model_copy(update={"rank": 16, "alpha": 16.0})

    def refused(start: Path, says: str, **values: object) -> None:
        with pytest.raises(ConfigError, match=says):
            list(train(later.model_copy(update={"start_from": str(start), **values})))

    refused(
        lora, "is a LoRA, and parametrisation = lokr was given: .* Leave parametrisation out", parametrisation="lokr"
    )
    refused(lora, "dora-diffusion merge .*lora.safetensors --base", parametrisation="loha")
    refused(lokr, "is a DoKR, and parametrisation = loha was given", parametrisation="loha")
    refused(lokr, "is a DoKR, and a LoKr is to be trained: set kind to dora", kind="lora")
    refused(lokr, "has factor = 4, and factor = 8 was given. Leave factor out", parametrisation="lokr", factor=8)


def test_what_is_next_after_going_on_from_a_lokr_is_what_there_is_for_it(pictures, sd_folder, tmp_path, run) -> None:  # type: ignore[no-untyped-def]
    list(train(config(pictures, tmp_path / "first", sd_folder, kind="dora", parametrisation="lokr", steps=2)))
    start = (
        "--instance-prompt",
        "a disc",
        "--set",
        f"start_from={tmp_path / 'first'}",
        "--set",
        "steps=2",
        "--set",
        "resolution=16",
    )
    said = run("train", "--images", pictures, "--base", sd_folder, "--out", tmp_path / "next", "--kind", "dora", *start)
    assert "dora-diffusion parity" in said.flat, said.flat
    assert "dora-diffusion parity" in (tmp_path / "next/README.md").read_text()
