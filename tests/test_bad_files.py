"""Files that are broken, hostile or none of ours: each is a clear error, and none is loaded in silence."""

from __future__ import annotations

import json
import random
import re
import resource
import signal
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import bases
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants import Tiny, entry_of, mutant, pack, reference_deltas, seeds, weights_of, write
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.adapters.layers import AdaptedLayer
from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, read_adapter_file, save_adapter
from dora_diffusion.formats.patterns import Patterns
from dora_diffusion.formats.storage import MAX_HEADER

MUTANTS = 20_000
QUICK = 600


@pytest.fixture
def model() -> nn.Module:
    return Tiny()


def refused(path: Path, model: nn.Module, *said: str) -> None:
    with pytest.raises(AdapterFileError) as raised:
        load_adapter(model, path)
    for part in (str(path), *said):
        assert part in str(raised.value), raised.value
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())


def file_of(tmp_path: Path, change: dict[str, torch.Tensor | None], kind: int = 1, **metadata: str) -> Path:
    """A sound kohya DoRA (or another seed) with some entries changed, added or, with None, left out."""
    entries, header = seeds(Tiny())[kind]
    entries = {key: entry for key, entry in entries.items() if change.get(key, 0) is not None}
    entries |= {key: entry_of(tensor) for key, tensor in change.items() if tensor is not None}
    return write(tmp_path / "a.safetensors", pack(entries, header | metadata))


DOWN, UP = "lora_unet_to_q.lora_down.weight", "lora_unet_to_q.lora_up.weight"
SCALE, ALPHA = "lora_unet_to_q.dora_scale", "lora_unet_to_q.alpha"


def test_the_seeds_are_sound(tmp_path, model):
    for i in range(len(seeds(model))):
        adapter = load_adapter(model, file_of(tmp_path, {}, kind=i))
        assert len(adapter.layers) >= 2
        adapter.eject()


SHAPES = {
    "rank 0": ({DOWN: torch.zeros(0, 6), UP: torch.zeros(6, 0)}, "to_q: no rank in common"),
    "a rank that would be spread": ({UP: torch.ones(6, 1)}, "to_q: no rank in common: lora_A [4, 6], lora_B [6, 1]"),
    "a magnitude that would be spread": (
        {SCALE: torch.ones(1, 1)},
        "dora_scale of shape [1, 1] for 6 outputs and 6 inputs",
    ),
    "a magnitude for each weight": ({SCALE: torch.ones(6, 6)}, "dora_scale of shape [6, 6]"),
    "an alpha for each rank": ({ALPHA: torch.ones(4)}, "alpha of shape [4]"),
    "an alpha of zero": ({ALPHA: torch.tensor(0.0)}, "alpha is 0; it must be above 0"),
    "an alpha below zero": ({ALPHA: torch.tensor(-2.0)}, "alpha is -2; it must be above 0"),
    "half a module": ({UP: None}, "missing:\n  lora_unet_to_q: lora_B"),
    "no magnitude in one layer": ({SCALE: None}, "missing:\n  lora_unet_to_q: its magnitude"),
    "another layer's width": (
        {DOWN: torch.ones(4, 5), SCALE: torch.ones(6, 1)},
        "adapter for 6 x [5], this layer has 6 x [6]",
    ),
    "a key of nobody's": (
        {"lora_unet_to_q.lora_sideways": torch.ones(1)},
        "unexpected:\n  lora_unet_to_q.lora_sideways",
    ),
    "a layer of nobody's": ({DOWN.replace("to_q", "to_k"): torch.ones(4, 6)}, "lora_unet_to_k: lora_B"),
    "a bias of another size": (
        {"lora_unet_to_q.diff_b": torch.ones(5)},
        "lora_unet_to_q: bias_difference of shape [5] for 6 outputs",
    ),
    "a difference beside a LoRA": ({"lora_unet_to_q.diff": torch.ones(6, 6)}, "lora_A beside a whole difference"),
}


@pytest.mark.parametrize("change, said", SHAPES.values(), ids=SHAPES.keys())
def test_a_wrong_shape_or_key_is_named(tmp_path, model, change, said):
    refused(file_of(tmp_path, change), model, said)


def test_all_that_is_wrong_stands_in_one_error(tmp_path, model):
    change = {UP: None, "lora_unet_proj_in.dora_scale": torch.ones(3), "lora_unet_conv_in.odd": torch.ones(1)}
    elsewhere = {DOWN: torch.ones(4, 6), UP: torch.ones(6, 4), SCALE: torch.ones(6, 1)}
    path = file_of(tmp_path, change | {key.replace("to_q", "to_v"): tensor for key, tensor in elsewhere.items()})
    refused(
        path,
        model,
        "does not fit this base: 1 of 4 layers match",
        "to_v: not in this model (nearest: to_q)",
        "missing:\n  lora_unet_to_q: lora_B",
        "unexpected:\n  lora_unet_conv_in.odd",
        "misshapen:\n  lora_unet_proj_in: dora_scale of shape [3]",
    )
    with pytest.warns(UserWarning, match="loaded in part: 1 of 4 layers"):
        assert list(load_adapter(model, path, partial=True).layers) == ["conv_in"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e12])
def test_values_no_weight_can_have_are_named(tmp_path, model, value):
    refused(file_of(tmp_path, {DOWN: torch.full((4, 6), value)}), model, "not finite", DOWN, "earlier checkpoint")


@pytest.mark.parametrize(
    "dtype, size", [("I32", 4), ("I8", 1), ("BOOL", 1), ("F8_E4M3FNUZ", 1), ("F8_E8M0", 1), ("U16", 2), ("F4", 1)]
)
def test_numbers_of_another_kind_are_named(tmp_path, model, dtype, size):
    entries, header = seeds(Tiny())[1]
    entries[DOWN] = dtype, [4, 6], bytes(24 * size)
    path = write(tmp_path / "a.safetensors", pack(entries, header))
    refused(path, model, f"{DOWN} ({dtype})", "float16, bfloat16 and 8-bit floats (e4m3fn, e5m2)")


@pytest.mark.parametrize("dtype, size", [("I64", 8), ("I32", 4), ("F16", 2)])
def test_an_alpha_that_is_a_whole_number_is_read(tmp_path, model, dtype, size):
    entries, header = seeds(Tiny())[1]
    number = np.array(6, {"I64": "<i8", "I32": "<i4", "F16": "<f2"}[dtype]).tobytes()
    for module in ("to_q", "proj_in", "conv_in"):
        entries[f"lora_unet_{module}.alpha"] = dtype, [], number
    assert load_adapter(model, write(tmp_path / "a.safetensors", pack(entries, header))).config.alpha == 6


def test_two_dialects_in_one_file_are_named(tmp_path, model):
    sound = seeds(Tiny())
    path = write(tmp_path / "a.safetensors", pack(sound[0][0] | sound[4][0], {}))
    refused(path, model, "mixes two dialects, PEFT and kohya", "convert each by itself")
    entries = {k: e for k, e in sound[1][0].items()} | {"lora_unet_to_q.magnitude": entry_of(torch.ones(6))}
    refused(write(path, pack(entries, {})), model, "mixes two dialects, ai-toolkit and kohya")


def test_one_layer_under_two_names_is_named(tmp_path, model):
    entries, _ = seeds(Tiny())[0]
    twice = {key.replace("lora_unet_", "lycoris_"): entry for key, entry in entries.items() if "to_q" in key}
    refused(write(tmp_path / "a.safetensors", pack(entries | twice, {})), model, "the layer to_q is there already")


def test_a_file_bent_for_one_program_is_not_loaded(tmp_path, model):
    path = file_of(tmp_path, {}, dora_diffusion_made_for="ComfyUI")
    refused(path, model, "was made for one program alone (ComfyUI)", "Use the file it was made from")
    with pytest.raises(AdapterFileError, match="one program alone"):
        convert_adapter(path, tmp_path / "b.safetensors", "diffusers")


def with_header(tmp_path: Path, text: bytes, size: int | None = None) -> Path:
    return write(tmp_path / "a.safetensors", struct.pack("<Q", len(text) if size is None else size) + text)


def test_a_name_that_stands_twice_in_the_header_is_named(tmp_path, model):
    entry = '"to_q.lora_A.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    refused(with_header(tmp_path, f"{{{entry}, {entry}}}".encode()), model, "'to_q.lora_A.weight' twice")


@pytest.mark.parametrize("size", [10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_larger_than_the_file_is_named(tmp_path, model, size):
    refused(with_header(tmp_path, b"{}", size), model, f"its header should have {size:,} bytes, and 2 are there")


def test_a_header_larger_than_any_adapters_is_not_read(tmp_path, model):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:  # a sparse file: it takes no room
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, model, "no adapter needs more than")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"1", b"\xff\xfe", b'{"a": 1}', b'{"__metadata__": {"a": 1}}']
)
def test_a_header_that_is_no_table_of_tensors_is_named(tmp_path, model, text):
    refused(with_header(tmp_path, text), model, "is no sound safetensors file")


LONG = "a" * 250
ENDLESS = ["(a+)+$", "(a|aa)+b", "((a+)b?)+c", "(a+b?)+c", "(.*a){20}b", "((((a{99}){99}){99}){99})", "(a|b)*" * 60]
ENDLESS += ["a?" * 40 + "b", "(?=(a+))b", r"(a)\1b", "[^a]*" * 4, "(a|b)" * 20]


def pattern_file(tmp_path: Path, name: str, patterns: dict[str, object]) -> Path:
    tensors = {f"unet.{name}.lora_A.weight": torch.ones(4, 6), f"unet.{name}.lora_B.weight": torch.ones(6, 4)}
    text = json.dumps({"unet.lora_alpha": 6, "unet.alpha_pattern": patterns})
    save_file(tensors, tmp_path / "p.safetensors", metadata={"lora_adapter_metadata": text})
    return tmp_path / "p.safetensors"


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_that_could_take_for_ever_is_not_tried(tmp_path, pattern):
    """By re these take years, and then the test's own limit ends it."""
    with pytest.raises(AdapterFileError, match="could take for ever to match"):
        read_adapter_file(pattern_file(tmp_path, LONG, {pattern: 3}))


def peft_header(**fields: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in fields.items()})}


def test_a_dora_that_has_lost_every_magnitude_is_no_lora(tmp_path, model):
    """By its own header, and by PEFT's: without them it would be a LoRA of other weights."""
    adapter = inject_adapter(model, AdapterConfig("dora", rank=2, target_modules=("to_q", "proj_in")), seed=1)
    path = save_adapter(adapter, tmp_path / "a.safetensors")
    adapter.eject()
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = {key: tensor for key, tensor in load_file(path).items() if "magnitude" not in key}
    for kept in header.keys() & {"dora_diffusion", "lora_adapter_metadata"}:
        save_file(tensors, path, metadata={kept: header[kept]})
        with pytest.raises(AdapterFileError, match=r"every magnitude.*says"):
            load_adapter(model, path)
    save_file(tensors, path)
    load_adapter(model, path).eject()


def test_what_peft_says_otherwise_than_the_tensors_is_said(tmp_path):
    tensors = {"unet.to_q.lora_A.weight": torch.ones(2, 6), "unet.to_q.lora_B.weight": torch.ones(6, 2)}
    save_file(tensors, tmp_path / "a.safetensors", metadata=peft_header(r=16, lora_alpha=8))
    file = read_adapter_file(tmp_path / "a.safetensors")
    assert file.scale_of("to_q") == 4 and any("r = 16, no layer has that rank" in note for note in file.notes)
    tensors["unet.to_q.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "a.safetensors", metadata=peft_header(r=2, lora_alpha=8))
    file = read_adapter_file(tmp_path / "a.safetensors")
    assert file.scale_of("to_q") == 1.5 and any("another .alpha than PEFT's" in note for note in file.notes)
    save_file(tensors, tmp_path / "a.safetensors", metadata=peft_header(r=2, lora_alpha=3))
    assert not read_adapter_file(tmp_path / "a.safetensors").notes


def test_a_sound_boft_that_cannot_be_cut_is_not_called_damaged(tmp_path):
    """As LyCORIS trains FLUX.1 in sd-scripts: rows of q, k and v change places."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.oft_blocks": torch.zeros(5, 16, 6, 6), f"{name}.alpha": torch.tensor(0)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="a BOFT of a fused layer, which turns rows of one part") as raised:
        load_adapter(bases.flux_transformer(), tmp_path / "a.safetensors")
    assert "damaged" not in str(raised.value) and "The file is sound" in str(raised.value)


def test_many_patterns_for_many_layers_are_looked_up(tmp_path):
    """As a file with an alpha of each layer's own has them; one by one that would be ninety thousand expressions."""
    names = [f"down_blocks.{i}.attentions.{j}.to_q" for i in range(6) for j in range(50)]
    tensors = {f"unet.{n}.lora_A.weight": torch.ones(1, 1) for n in names}
    tensors |= {f"unet.{n}.lora_B.weight": torch.ones(1, 1) for n in names}
    patterns = {f"^{re.escape(name)}": i + 1 for i, name in enumerate(names)}
    text = json.dumps({"unet.lora_alpha": 6, "unet.alpha_pattern": patterns})
    save_file(tensors, tmp_path / "m.safetensors", metadata={"lora_adapter_metadata": text})
    config = read_adapter_file(tmp_path / "m.safetensors").config
    assert [config.alpha_of(name) for name in names] == list(range(1, len(names) + 1))


PATTERNS = [
    ["to_q"],
    ["attn1.to_q", "to_q"],
    ["to_q", "attn1.to_q"],
    ["^down_blocks.0.attn1.to_q", "to_k"],
    [r"^down_blocks\.0\.attn1\.to_q$", r"attn1\.to_k"],
    ["down_blocks"],
    ["o_q"],
    [".*attn1.*", "to_q"],
    [r"down_blocks\.\d+\..*to_(q|k)", "mid_block.attn1.to_q"],
    ["mid_block.attn1.to_.", "a+b?$"],
    ["attn..to_q"],
    ["to_[qk]", "attn2.to_q"],
    ["[^.]+", "to_q"],
    ["", "to_q"],
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_patterns_fit_as_in_peft(patterns):
    names = [
        f"{block}.{attention}.{layer}"
        for block in ("down_blocks.0", "down_blocks.11", "mid_block")
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_out.0")
    ]
    ours = Patterns(patterns)
    for name in [*names, "to_q", "attn1_to_q"]:
        found = ours.first(name)
        assert (name if found is None else patterns[found]) == get_pattern_key(patterns, name), name


@pytest.mark.parametrize("value", ["1e308", "1e7", "0", "-1", "NaN", "Infinity", "true", '"8"', "[8]", "1" * 400])
@pytest.mark.parametrize("key", ['"unet.lora_alpha": {}', '"unet.alpha_pattern": {{"to_q": {}}}'])
def test_an_alpha_that_no_training_has_is_named(tmp_path, model, key, value):
    path = file_of(tmp_path, {}, kind=4, lora_adapter_metadata="{" + key.format(value) + "}")
    refused(path, model, "has a damaged header", "it must be a number above 0 and at most 1,000,000")


@pytest.mark.parametrize("value", ['"false"', '"true"', "0", "1", "[]"])
def test_a_stabilised_scale_is_said_by_true_or_false(tmp_path, model, value):
    text = f'{{"unet.lora_alpha": 6, "unet.use_rslora": {value}}}'
    refused(file_of(tmp_path, {}, kind=4, lora_adapter_metadata=text), model, "use_rslora is", "must be true or false")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"unet.lora_alpha": ' + "[" * 100_000, "7", '{"unet.r": 1'])
def test_a_configuration_that_is_none_is_named(tmp_path, model, text):
    refused(file_of(tmp_path, {}, kind=4, lora_adapter_metadata=text), model, "has a damaged header")


def test_partial_has_its_limits(tmp_path, model):
    path = file_of(tmp_path, {DOWN: torch.full((4, 6), float("nan"))})
    with pytest.raises(AdapterFileError, match="not finite"):
        load_adapter(model, path, partial=True)
    with pytest.raises(AdapterFileError, match="cannot be read whole"):
        read_adapter_file(write(path, pack({UP: entry_of(torch.ones(6, 4))}, {})), partial=True)


# The fuzz.


class Mill:
    """Loads mutants one after another: each is an AdapterFileError, or means what a second reading says it means."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "mutant.safetensors"
        self.model = Tiny()
        self.sound, self.outcomes = seeds(self.model), {"refused": 0, "loaded": 0}
        self.before = {name: p.clone() for name, p in self.model.state_dict().items()}
        self.weights = weights_of(self.model)

    def check_seeds(self) -> None:
        """Every sound file is loaded, and means what the second reading says."""
        for entries, metadata in self.sound:
            self.read(pack(entries, metadata))
            assert self.outcomes["refused"] == 0, list(entries)

    def try_one(self, rng: random.Random) -> None:
        self.read(mutant(rng, self.sound))

    def read(self, data: bytes) -> None:
        try:
            with _within_seconds(10):
                adapter = load_adapter(self.model, write(self.path, data))
        except AdapterFileError:
            self.outcomes["refused"] += 1
        else:
            self.outcomes["loaded"] += 1
            expected = reference_deltas(data, self.weights)
            updates = adapter.updates()
            found = {layer: update.delta_weight().double().numpy() for layer, update in updates.items()}
            biases = {layer: update.bias_difference for layer, update in updates.items()}
            found |= {f"{la}.bias": b.detach().double().numpy() for la, b in biases.items() if b is not None}
            adapter.eject()
            assert found.keys() == expected.keys()
            for layer, delta in expected.items():
                size = max(np.abs(delta).max(), 1e-3)
                assert np.abs(found[layer] - delta).max() <= 1e-3 * size, (layer, data[:2000])
        assert not any(isinstance(module, AdaptedLayer) for module in self.model.modules())
        assert all(p.requires_grad for p in self.model.parameters())
        assert all(torch.equal(p, self.before[name]) for name, p in self.model.state_dict().items())


class _within_seconds:
    """A hang becomes a failure."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def ring(*_: object) -> None:
            raise TimeoutError("a file took too long")

        self.before = signal.signal(signal.SIGALRM, ring)
        signal.alarm(self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.before)


@pytest.fixture
def no_warnings_shown() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_mutated_files_are_refused_or_mean_what_they_say(tmp_path, no_warnings_shown):
    mill, rng = Mill(tmp_path), random.Random(1)
    mill.check_seeds()
    for _ in range(QUICK):
        mill.try_one(rng)
    assert mill.outcomes["refused"] > QUICK // 2 and mill.outcomes["loaded"] > QUICK // 50


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_thousand_mutated_files(tmp_path, no_warnings_shown):
    mill, rng = Mill(tmp_path), random.Random(0)
    for _ in range(500):  # what is loaded on first use is loaded
        mill.try_one(rng)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    # Hypothesis draws every random number of a mutant, so that a failure comes as the smallest file that shows it.
    @settings(
        max_examples=MUTANTS, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.randoms(use_true_random=False))
    def every_mutant(rng: random.Random) -> None:
        mill.try_one(rng)

    every_mutant()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{mill.outcomes}, {grown:.0f} MiB more memory at the peak")
    assert sum(mill.outcomes.values()) >= MUTANTS
    assert grown < 200
