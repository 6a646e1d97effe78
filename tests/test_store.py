"""Encoded pictures and captions on disk: found by what they were made of, never encoded twice, never wrong."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import config

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.data import cache
from dora_diffusion.data.cache import EncodedImages, encode_images
from dora_diffusion.data.folder import TrainingImage, read_folder
from dora_diffusion.data.store import CACHE_VARIABLE, Store, cache_folder
from dora_diffusion.errors import DataError
from dora_diffusion.models.loading import Base, load_base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.events import Finished, Preparing
from dora_diffusion.training.loop import Step
from dora_diffusion.training.run import train


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def images(pictures: Path, tmp_path: Path) -> list[TrainingImage]:
    shutil.copytree(pictures, tmp_path / "pictures")
    return list(read_folder(tmp_path / "pictures", "a disc").images)


def encoded(base: Base, images: list[TrainingImage], **more: object) -> tuple[EncodedImages, int]:
    """The one group, and how many entries were made for it."""
    store = Store()
    (group,) = encode_images(base, images, [(16, 16)], store=store, **more)  # type: ignore[arg-type]
    return group, store.fresh


def test_nothing_is_encoded_twice_and_the_bits_are_the_same(folder, images, sd_base) -> None:  # type: ignore[no-untyped-def]
    first, made = encoded(sd_base, images)
    again, anew = encoded(sd_base, images)
    assert (made, anew) == (8 + 2, 0)  # pictures; the caption and the empty one
    index, noise = torch.arange(8), torch.randn(8, *first.shape)
    assert torch.equal(first.latents(index, noise), again.latents(index, noise))
    for name, tensor in first.conditioning.tensors.items():
        assert torch.equal(tensor, again.conditioning.tensors[name])
    folder.rename(folder.with_name("elsewhere"))
    afresh, _ = encoded(sd_base, images)
    assert torch.equal(first.latents(index, noise), afresh.latents(index, noise))


def test_what_the_store_has_makes_no_difference_to_the_rest(folder, images, sd_base) -> None:  # type: ignore[no-untyped-def]
    encoded(sd_base, images[:3])
    partly, made = encoded(sd_base, images)
    assert made == 5
    folder.rename(folder.with_name("elsewhere"))
    whole, _ = encoded(sd_base, images)
    index = torch.arange(8)
    assert torch.equal(partly.mean(index), whole.mean(index))


def test_one_changed_picture_or_caption_alone_is_encoded_again(folder, images, sd_base) -> None:  # type: ignore[no-untyped-def]
    encoded(sd_base, images)
    shutil.copyfile(images[0].path, images[1].path)  # the same content under another name is there
    assert encoded(sd_base, images)[1] == 0
    images[2].path.write_bytes(images[2].path.read_bytes() + b"\0")
    assert encoded(sd_base, images)[1] == 1
    images[3] = TrainingImage(images[3].path, "another disc")
    assert encoded(sd_base, images)[1] == 1
    assert encoded(sd_base, images, mirrored=True)[1] == 8 - 1  # of which two have one content


def test_other_weights_other_sizes_and_another_tokenizer_are_other_entries(folder, images, sd_base, sd_folder) -> None:  # type: ignore[no-untyped-def]
    encoded(sd_base, images)
    with torch.no_grad():
        next(sd_base.pipe.vae.parameters()).view(-1)[-1] += 1e-3
    assert encoded(sd_base, images)[1] == 8
    other = load_base(str(sd_folder), device="cpu")
    with torch.no_grad():
        other.pipe.text_encoder.get_input_embeddings().weight[-1, -1] += 1e-3
    assert encoded(other, images)[1] == 2
    longer = load_base(str(sd_folder), device="cpu")
    longer.pipe.tokenizer.add_tokens(["<disc>"])
    assert encoded(longer, images)[1] == 2
    store = Store()
    encode_images(load_base(str(sd_folder), device="cpu"), images, [(24, 24)], store=store)
    assert store.fresh == 8


@torch.no_grad()  # an adapter's sums are of another order where gradients are wanted
def conditioned(base: Base, images: list[TrainingImage]) -> bool:
    """Whether the captions' conditioning is what the encoder says now."""
    group, _ = encoded(base, images)
    now = base.family.encode(base.pipe, [images[0].caption]).tensors
    return all(torch.equal(rows[0], now[name][0]) for name, rows in group.conditioning.tensors.items())


def test_an_adapter_in_the_text_encoder_counts_at_its_strength(folder, images, sd_base) -> None:  # type: ignore[no-untyped-def]
    settings = AdapterConfig(rank=2, target_modules=("to_q",))
    adapter = inject_adapter(sd_base.denoiser, settings, text_encoders={"text_encoder": sd_base.pipe.text_encoder})
    for parameter in adapter.parameters():
        parameter.data.normal_()
    for strength in (1.0, 0.0, 0.5, 1.0):
        adapter.strength = strength
        assert conditioned(sd_base, images)
    before = encoded(sd_base, images)[0].conditioning
    adapter.eject()
    assert conditioned(sd_base, images)
    after = encoded(sd_base, images)[0].conditioning
    assert not torch.equal(before.tensors["encoder_hidden_states"], after.tensors["encoder_hidden_states"])


def test_an_autoencoder_that_works_in_tiles_and_a_tokenizer_that_fills_up_otherwise(folder, images, sd_base) -> None:  # type: ignore[no-untyped-def]
    whole, _ = encoded(sd_base, images)
    sd_base.pipe.vae.enable_tiling()
    assert encoded(sd_base, images)[1] == 8
    sd_base.pipe.vae.disable_tiling()
    sd_base.pipe.tokenizer.padding_side = "left"
    assert conditioned(sd_base, images)
    sd_base.pipe.tokenizer.padding_side = "right"
    sd_base.pipe.tokenizer.chat_template = "{{ messages }}"
    assert encoded(sd_base, images)[1] == 2
    assert torch.equal(whole.mean(torch.arange(8)), encoded(sd_base, images)[0].mean(torch.arange(8)))


def test_what_a_tokenizer_was_last_called_for_makes_no_other_entry(folder, images, sd_base) -> None:  # type: ignore[no-untyped-def]
    assert encoded(sd_base, images, cut_captions=True)[1] == 10
    sd_base.pipe.tokenizer("a", padding="max_length", truncation=True, max_length=5)
    assert encoded(sd_base, images, cut_captions=True)[1] == 0


def test_another_number_of_threads_is_another_entry(folder, images, sd_base) -> None:  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    encoded(sd_base, images)
    try:
        torch.set_num_threads(before + 1)
        assert encoded(sd_base, images)[1] == 10
    finally:
        torch.set_num_threads(before)
    assert encoded(sd_base, images)[1] == 0


def test_where_a_base_lies_makes_no_other_entry(folder, images, sd_base, sd_folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    encoded(sd_base, images)
    shutil.copytree(sd_folder, tmp_path / "moved")
    assert encoded(load_base(str(tmp_path / "moved"), device="cpu"), images)[1] == 0


def test_the_folder_by_the_environment(monkeypatch, tmp_path, run) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    assert cache_folder() == tmp_path / ".cache/dora-diffusion"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own/dora-diffusion"
    monkeypatch.setenv(CACHE_VARIABLE, "~nobody-of-this-name/x")
    assert "there is no user whose home is '~nobody-of-this-name'" in run("cache").flat


def test_what_is_no_file_of_the_cache_stays(folder, run) -> None:  # type: ignore[no-untyped-def]
    (folder / "encoded/aa/strange.safetensors").mkdir(parents=True)
    assert "0 encoded" in run("cache").flat and "deleted 0" in run("cache", "--clear").flat
    assert "give both" in run("cache", "--older-than", 3).flat


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_entry_is_encoded_again(damage, folder, images, sd_base) -> None:  # type: ignore[no-untyped-def]
    first, _ = encoded(sd_base, images)
    path = first.posteriors[0][4].path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"cut": bytes(content[:-7]), "flipped": bytes(content), "empty": b""}[damage])
    with pytest.raises(DataError, match="start the run again"):
        first.mean(torch.tensor([4]))
    again, made = encoded(sd_base, images)
    assert made == 1 and torch.isfinite(again.mean(torch.arange(8))).all()


def test_without_room_encodings_stay_in_memory_and_it_is_said(images, sd_base, tmp_path, monkeypatch, pictures) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a file").write_text("in the way")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "a file"))
    events = list(train(config(pictures, tmp_path / "out", Path("unused"), kind="lora"), base=sd_base))
    assert any(isinstance(event, Finished) for event in events)
    assert any(isinstance(e, Preparing) and "kept in memory, not on disk" in e.text for e in events)


def test_several_writers_do_each_other_no_harm(folder, images, sd_folder) -> None:  # type: ignore[no-untyped-def]
    found: list[torch.Tensor] = []

    def encode(base: Base) -> None:
        group, _ = encoded(base, images)
        found.append(group.mean(torch.arange(8)))

    threads = [threading.Thread(target=encode, args=(load_base(str(sd_folder), device="cpu"),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(torch.equal(each, found[0]) for each in found)
    assert len(Store().contents()) == 10


def test_a_resumed_run_and_a_twin_encode_nothing(folder, pictures, sd_folder, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    settings = config(pictures, tmp_path / "out", sd_folder, kind="both")
    list(train(settings))
    calls: list[object] = []
    monkeypatch.setattr(cache, "_to_pixels", lambda picture: calls.append(picture))
    list(train(settings, overwrite=True))
    assert not calls


def test_a_run_whose_encodings_are_deleted_says_so_and_resumes_with_the_same_bits(  # type: ignore[no-untyped-def]
    folder, pictures, sd_folder, tmp_path
) -> None:
    def settings(name: str) -> TrainConfig:
        return config(pictures, tmp_path / name, sd_folder, kind="dora", steps=6, checkpoint_every=2)

    list(train(settings("whole")))
    with pytest.raises(DataError, match="The checkpoint after step 2 is whole: train with --resume"):
        for event in train(settings("cut")):
            if isinstance(event, Step) and event.step == 3:
                Store().clear(math.inf)
    list(train(settings("cut"), resume=True))
    whole, cut = (load_file(tmp_path / name / "dora.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)


def test_the_command_shows_what_is_there_and_clears_it(folder, images, sd_base, run) -> None:  # type: ignore[no-untyped-def]
    assert "0 encoded pictures and captions" in run("cache").flat
    group, _ = encoded(sd_base, images)
    old = time.time() - 5 * 86400
    os.utime(group.posteriors[0][0].path, (old, old))
    shown = run("cache").flat
    assert "10 encoded pictures and captions" in shown and "0 to 5 days ago" in shown
    assert "deleted 1 encoded" in run("cache", "--clear", "--older-than", 3).flat
    assert "deleted 9 encoded" in run("cache", "--clear").flat
    assert not Store().contents()
