"""Embeddings beside an adapter's layers: a new word while the adapter is in, and the pipeline as it was after."""

from __future__ import annotations

import warnings
from pathlib import Path

import bases
import dialect_files as files
import pytest
import torch
from dialect_files import Made, make
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from dora_diffusion.errors import AdapterFileError, PromptError
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import attach_trainable, load_adapter, read_adapter_file
from dora_diffusion.generation import check_prompt

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PROMPT = "a my_token owl"


def vectors(n: int, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def with_words(model: object, words: dict[str, Tensor]) -> Made:
    made = make(model, [Q], files.flat("lora_unet_"), files.kohya, files.lora_delta)
    made.tensors |= words
    return made


def load_quietly(pipe: object, path: Path, **options: object) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_adapter(pipe, path, **options)


def encoded(pipe: object, prompt: str = PROMPT) -> Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def state_of(pipe: object) -> dict[str, object]:
    """All that words could have touched, by identity where there is one."""
    encoder = pipe.text_encoder
    return {
        "tokenizer": pipe.tokenizer,
        "tokens": len(pipe.tokenizer),
        "embedding": encoder.get_input_embeddings(),
        "weight": encoder.get_input_embeddings().weight,
        "rows": encoder.get_input_embeddings().num_embeddings,
        "vocab_size": encoder.config.vocab_size,
        "attributes": sorted(pipe.__dict__),
    }


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    return all(
        a[name] is b[name] or a[name] == b[name] for name in ("tokens", "rows", "vocab_size", "attributes")
    ) and all(a[name] is b[name] for name in ("tokenizer", "embedding", "weight"))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("key", ["bundle_emb.my_token.clip_l", "bundle_emb.my_token.string_to_param.*"])
def test_a_word_is_read_as_diffusers_reads_the_same_embedding(tmp_path, count, key):
    pipe, stock = bases.stable_diffusion(), bases.stable_diffusion()
    before, plain = state_of(pipe), encoded(pipe)
    adapter = load_quietly(pipe, with_words(pipe.unet, {key: vectors(count)}).save(tmp_path / "a.safetensors"))
    stock.load_textual_inversion(vectors(count), token="my_token")
    assert torch.equal(encoded(pipe), encoded(stock)) and not torch.equal(encoded(pipe), plain)
    adapter.strength = 0
    assert same(state_of(pipe), before) and torch.equal(encoded(pipe), plain)
    adapter.strength = 0.5  # a word is there or not
    assert torch.equal(encoded(pipe), encoded(stock))
    adapter.eject()
    assert same(state_of(pipe), before) and torch.equal(encoded(pipe), plain)


def test_words_of_several_adapters_are_taken_out_in_any_order(tmp_path):
    pipe, stock = bases.stable_diffusion(), bases.stable_diffusion()
    before = state_of(pipe)
    paths = [
        with_words(pipe.unet, {f"bundle_emb.{word}.clip_l": vectors(2, seed=i)}).save(tmp_path / f"{word}.safetensors")
        for i, word in enumerate(("my_token", "other"))
    ]
    first, second = (load_quietly(pipe, path) for path in paths)
    for i, word in enumerate(("my_token", "other")):
        stock.load_textual_inversion(vectors(2, seed=i), token=word)
    assert torch.equal(encoded(pipe, "my_token, other"), encoded(stock, "my_token, other"))
    first.eject()
    stock.unload_textual_inversion("my_token")
    assert torch.equal(encoded(pipe, "my_token, other"), encoded(stock, "my_token, other"))
    second.eject()
    assert same(state_of(pipe), before)


def test_the_same_word_of_two_adapters_is_not_mixed(tmp_path):
    pipe = bases.stable_diffusion()
    paths = [
        with_words(pipe.unet, {"bundle_emb.my_token.clip_l": vectors(n, seed=n)}).save(tmp_path / f"{n}.safetensors")
        for n in (3, 1)
    ]
    first = load_quietly(pipe, paths[0])
    expected = encoded(pipe)
    with pytest.warns(UserWarning, match="'my_token'.*there is a word of this name already"):
        load_adapter(pipe, paths[1])
    assert torch.equal(encoded(pipe), expected)
    first.eject()


def test_a_word_that_counts_for_several_tokens_is_counted_so(tmp_path):
    """`check_prompt` counts what the text encoder is given."""
    pipe = bases.stable_diffusion()
    words = {"bundle_emb.my_token.clip_l": vectors(12)}
    adapter = load_quietly(pipe, with_words(pipe.unet, words).save(tmp_path / "a.safetensors"))
    check_prompt(pipe, "my_token")
    with pytest.raises(PromptError, match="would be lost"):
        check_prompt(pipe, "my_token and my_token")
    adapter.eject()
    check_prompt(pipe, "my_token and my_token")


def test_both_encoders_of_sdxl_learn_their_own_vectors(tmp_path):
    pipe, stock = bases.stable_diffusion_xl(), bases.stable_diffusion_xl()
    words = {f"bundle_emb.my_token.{kind}": vectors(2, seed=i) for i, kind in enumerate(("clip_l", "clip_g"))}
    adapter = load_quietly(pipe, with_words(pipe.unet, words).save(tmp_path / "a.safetensors"))
    for i, end in enumerate(("", "_2")):
        parts = {"tokenizer": getattr(stock, f"tokenizer{end}"), "text_encoder": getattr(stock, f"text_encoder{end}")}
        stock.load_textual_inversion(vectors(2, seed=i), token="my_token", **parts)
    with torch.no_grad():
        ours, theirs = (p.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1) for p in (pipe, stock))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    adapter.eject()


def test_fluxs_t5_learns_what_the_file_has_for_t5(tmp_path):
    pipe = bases.flux()
    made = make(
        pipe.transformer,
        ["transformer_blocks.0.attn.to_q"],
        files.dotted("transformer."),
        files.kohya,
        files.lora_delta,
    )
    made.tensors |= {"bundle_emb.my_token.t5": vectors(1), "bundle_emb.my_token.clip_l": vectors(1, seed=1)}
    adapter = load_quietly(pipe, made.save(tmp_path / "a.safetensors"))
    for tokenizer, encoder, seed in (
        (pipe.tokenizer, pipe.text_encoder, 1),
        (pipe.tokenizer_2, pipe.text_encoder_2, 0),
    ):
        i = tokenizer.convert_tokens_to_ids("my_token")
        assert torch.equal(encoder.get_input_embeddings().weight[i], vectors(1, seed=seed)[0])
    adapter.eject()


@pytest.mark.parametrize(
    "words, said",
    [
        (
            {"bundle_emb.my_token.clip_l": vectors(2, width=40)},
            r"embedding 'my_token' \(clip_l, 2 vectors\) is not loaded: its vectors have 40",
        ),
        ({"bundle_emb.my_token.clip_g": vectors(2)}, r"there is no text_encoder_2 with a tokenizer"),
        ({"bundle_emb.my_token.clip_l_out": vectors(2)}, r"clip_l_out is an embedding of OneTrainer behind the text"),
        ({"emb_params": vectors(2)}, r"emb_params is an embedding without its word"),
    ],
)
def test_what_cannot_be_learned_is_named_and_the_layers_are_loaded(tmp_path, words, said):
    pipe = bases.stable_diffusion()
    before = state_of(pipe)
    path = with_words(pipe.unet, words).save(tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=said):
        adapter = load_adapter(pipe, path)
    assert list(adapter.layers) == [Q] and same(state_of(pipe), before)


def test_a_bare_model_has_no_tokenizer_and_says_so(tmp_path):
    path = with_words(bases.unet(), {"bundle_emb.my_token.clip_l": vectors(2)}).save(tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="'my_token'.*is not loaded.*whole pipeline"):
        load_adapter(bases.unet(), path)


def test_an_embedding_alone_is_no_adapter(tmp_path):
    path = Made({"bundle_emb.my_token.clip_l": vectors(2)}).save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"is an embedding.*load_textual_inversion"):
        load_adapter(bases.stable_diffusion(), path)


def test_a_converted_file_keeps_its_words_or_says_that_it_cannot(tmp_path):
    path = with_words(bases.unet(), {"bundle_emb.my_token.clip_l": vectors(2)}).save(tmp_path / "a.safetensors")
    convert_adapter(path, tmp_path / "k.safetensors", "kohya")
    assert torch.equal(load_file(tmp_path / "k.safetensors")["bundle_emb.my_token.clip_l"], vectors(2))
    conversion = convert_adapter(path, tmp_path / "d.safetensors", "diffusers")
    assert any("'my_token' (clip_l, 2 vectors) is not written" in note for note in conversion.notes)
    assert read_adapter_file(tmp_path / "k.safetensors").words[0].text == "my_token"


def test_training_on_says_that_words_are_left_behind(tmp_path):
    path = with_words(bases.unet(), {"bundle_emb.my_token.clip_l": vectors(2)}).save(tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="'my_token'.*is not trained on, and not in what is saved"):
        attach_trainable(bases.unet(), read_adapter_file(path), "lora")


def test_merged_words_stay_in_what_is_saved(tmp_path):
    pipe = bases.stable_diffusion()
    adapter = load_quietly(
        pipe, with_words(pipe.unet, {"bundle_emb.my_token.clip_l": vectors(2)}).save(tmp_path / "a.safetensors")
    )
    adapter.merge()
    expected = encoded(pipe)
    pipe.save_pretrained(tmp_path / "merged")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", local_files_only=True, safety_checker=None)
    assert torch.equal(encoded(again), expected)
