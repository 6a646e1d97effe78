"""Adapter files: read back here, read by stock diffusers, written by PEFT, and every way a file can be bad."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import resource
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import bases
import pytest
import torch
from oracles import inputs_of, largest_difference, output_of, perturb, relative_error
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stock_diffusers import pipeline_around
from torch import Tensor, nn

from dora_diffusion.adapters.injection import Adapter, AdapterConfig, inject_adapter
from dora_diffusion.errors import AdapterFileError, AdapterMismatchError, AdapterStateError, ConfigError, OutputError
from dora_diffusion.formats import storage
from dora_diffusion.formats.description import Description, identify_base
from dora_diffusion.formats.files import load_adapter, read_adapter_file, save_adapter
from dora_diffusion.formats.storage import read_safetensors, write_safetensors

kinds = pytest.mark.parametrize("kind", ["dora", "lora"])
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WITH_CONVOLUTIONS = (*ATTENTION, "conv1", "conv_shortcut", "conv_in", "time_emb_proj")
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def trained(model: nn.Module, kind: str = "dora", **options: object) -> Adapter:
    config = AdapterConfig(kind=kind, **{"rank": 4, "alpha": 6.0, **options})
    return perturb(inject_adapter(model, config, seed=1))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sound DoRA file for bases.unet()."""
    return save_adapter(trained(bases.unet()), tmp_path / "style.safetensors")


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    """The file again, with its tensors and its header changed."""
    tensors, header = load_file(path), header_of(path)
    change(tensors, header)
    save_file(tensors, path, metadata=header)
    return path


# Written here, read here.


MODELS = {
    "unet": (bases.unet, ATTENTION),
    "unet with convolutions": (bases.unet, WITH_CONVOLUTIONS),
    "sd3": (bases.sd3_transformer, JOINT),
    "flux": (bases.flux_transformer, JOINT),
}


@kinds
@pytest.mark.parametrize("make, targets", MODELS.values(), ids=MODELS.keys())
def test_a_saved_adapter_loads_into_a_fresh_model_with_the_same_output(tmp_path, make, targets, kind):
    model = make()
    adapter = trained(model, kind, target_modules=targets)
    save_adapter(adapter, tmp_path / "a.safetensors")
    fresh = make()
    base_output = output_of(fresh)
    loaded = load_adapter(fresh, tmp_path / "a.safetensors")
    assert torch.equal(output_of(fresh), output_of(model))
    assert (loaded.config.kind, loaded.config.rank, loaded.config.alpha) == (kind, 4, 6.0)
    assert loaded.config.target_modules == targets
    loaded.eject()
    assert torch.equal(output_of(fresh), base_output)


@kinds
def test_ranks_alphas_and_the_stabilised_scale_come_back_as_they_were(tmp_path, unet, kind):
    adapter = trained(
        unet,
        kind,
        use_rslora=True,
        rank_pattern={f"{FIRST}.to_q": 2, f"{FIRST}.to_k": 7},
        alpha_pattern={f"{FIRST}.to_q": 3.0, f"{FIRST}.to_v": 0.5},
    )
    save_adapter(adapter, tmp_path / "a.safetensors")
    loaded = load_adapter(bases.unet(), tmp_path / "a.safetensors")
    assert {p: (u.rank, u.scale) for p, u in loaded.updates().items()} == {
        p: (u.rank, u.scale) for p, u in adapter.updates().items()
    }
    assert torch.equal(output_of(loaded.model), output_of(unet))


def test_an_adapter_loads_into_a_pipelines_denoiser_at_the_given_strength(saved):
    pipes = [pipeline_around(bases.unet()) for _ in range(2)]
    load_adapter(pipes[0], saved, strength=0.8)
    load_adapter(pipes[1].unet, saved).strength = 0.8
    assert torch.equal(output_of(pipes[0].unet), output_of(pipes[1].unet))
    assert not torch.equal(output_of(pipes[0].unet), output_of(bases.unet()))


def test_two_files_load_into_one_model_and_add(tmp_path, unet):
    base = output_of(unet)
    for kind in ("dora", "lora"):
        save_adapter(trained(bases.unet(), kind, target_modules=["conv_out"]), tmp_path / f"{kind}.safetensors")
    outputs = []
    for names in (["dora"], ["lora"], ["dora", "lora"]):
        adapters = [load_adapter(unet, tmp_path / f"{name}.safetensors") for name in names]
        outputs.append(output_of(unet))
        for adapter in adapters:
            adapter.eject()
    # The last layer is linear, so there the differences of the outputs add up as those of the weights do.
    assert largest_difference(outputs[2] - base, (outputs[0] - base) + (outputs[1] - base)) < 1e-5


def test_saving_while_fused_writes_the_same_file(tmp_path, unet):
    adapter = trained(unet)
    live = save_adapter(adapter, tmp_path / "live.safetensors").read_bytes()
    adapter.fuse()
    assert save_adapter(adapter, tmp_path / "fused.safetensors").read_bytes() == live


def test_the_same_adapter_is_written_as_the_same_bytes_each_time(tmp_path, unet):
    adapter = trained(unet)
    written = {save_adapter(adapter, tmp_path / "a.safetensors", base_name="b").read_bytes() for _ in range(8)}
    assert len(written) == 1


def test_an_ejected_adapter_cannot_be_saved(tmp_path, unet):
    adapter = trained(unet)
    adapter.eject()
    with pytest.raises(AdapterStateError, match="cannot save adapter 'adapter_0': it was ejected"):
        save_adapter(adapter, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_only_a_model_or_a_pipeline_with_a_denoiser_takes_an_adapter(saved):
    with pytest.raises(AdapterMismatchError, match="cannot load an adapter into a str: give a diffusers pipeline"):
        load_adapter("emoji", saved)


# What the header says.


@kinds
def test_the_header_describes_the_adapter(tmp_path, unet, kind):
    adapter = trained(unet, kind, dropout=0.1, target_modules=["to_q", r".*\.conv1"])
    path = save_adapter(adapter, tmp_path / "a.safetensors", training={"steps": 300, "loss": 0.5}, base_name="emoji")
    description = Description.model_validate_json(header_of(path)["dora_diffusion"])
    assert description.model_dump(exclude={"base"}) == {
        "format_version": 1,
        "kind": kind,
        "rank": 4,
        "alpha": 6.0,
        "dropout": 0.1,
        "use_rslora": False,
        "target_modules": ("to_q", r".*\.conv1"),
        "norm_axis": "output" if kind == "dora" else "none",
        "parametrisation": "lora",
        "factor": -1,
        "full_matrix": False,
        "training": {"steps": 300, "loss": 0.5},
        "conversion": {},
    }
    assert (description.base.name, description.base.model_class) == ("emoji", "UNet2DConditionModel")
    assert description.base.fingerprint == identify_base(bases.unet()).fingerprint
    assert read_adapter_file(path).description == description


def test_the_fingerprint_tells_bases_apart_and_survives_half_precision():
    base = identify_base(bases.unet())
    half = identify_base(bases.unet().to(torch.bfloat16))
    other = identify_base(bases.unet(), None)
    changed = bases.unet()
    with torch.no_grad():
        changed.get_submodule(f"{FIRST}.to_q").weight.mul_(1.1)
    assert base.fingerprint == other.fingerprint
    assert base.same_weights(half)
    assert not base.same_weights(identify_base(changed))
    assert base.fingerprint != identify_base(changed).fingerprint


def test_the_base_is_identified_by_its_own_weights_while_adapted_and_fused(unet):
    before = identify_base(unet)
    adapter = trained(unet)
    assert identify_base(unet) == before
    adapter.fuse()
    assert identify_base(unet) == before


def test_the_sketch_is_the_root_mean_square_of_the_weights(unet):
    sketch = identify_base(unet).sketch
    assert sketch
    for layer, value in sketch.items():
        assert value == pytest.approx(unet.get_submodule(layer).weight.double().square().mean().sqrt().item(), rel=1e-3)


# Read by stock diffusers, in a process that never imports this project.


STOCK = {
    f"{base}, {kind}, {'with convolutions, ' * (targets == WITH_CONVOLUTIONS)}{how}": (base, kind, targets, how)
    for base, targets, how in (
        ("unet", ATTENTION, "pipeline"),
        ("unet", WITH_CONVOLUTIONS, "pipeline"),
        ("sd3", JOINT, "pipeline"),
        ("sd3", JOINT, "load_lora_adapter"),
    )
    for kind in ("dora", "lora")
}
PATTERNS = {"rank_pattern": {f"{FIRST}.to_q": 2}, "alpha_pattern": {f"{FIRST}.to_q": 5.0, f"{FIRST}.to_v": 0.5}}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The outputs of every job in STOCK, here and in stock diffusers."""
    folder = tmp_path_factory.mktemp("stock")
    here, jobs = {}, []
    for i, (name, (base, kind, targets, how)) in enumerate(STOCK.items()):
        model = bases.unet() if base == "unet" else bases.sd3_transformer()
        model.save_pretrained(folder / base)
        save_file(inputs_of(model), folder / f"{base}_inputs.safetensors")
        patterns = PATTERNS if targets == WITH_CONVOLUTIONS else {}
        adapter = trained(model, kind, target_modules=targets, **patterns)
        save_adapter(adapter, folder / f"{i}.safetensors")
        here[name] = output_of(model)
        jobs.append({"name": name, "base": base, "file": f"{i}.safetensors", "how": how})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("stock_diffusers.py")
    result = subprocess.run([sys.executable, script, folder], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return here, load_file(folder / "outputs.safetensors")


@pytest.mark.parametrize("name", STOCK)
def test_stock_diffusers_draws_the_same_with_the_file(stock, name):
    here, there = stock
    base, *_ = STOCK[name]
    plain = output_of(bases.unet() if base == "unet" else bases.sd3_transformer())
    assert largest_difference(there[name], here[name]) <= 1e-5
    assert largest_difference(there[name], plain) > 0.01


# Written by PEFT, read here.


def peft_unet(kind: str, **options: object) -> nn.Module:
    """A UNet with PEFT's own adapter, its values as if trained."""
    model = bases.unet()
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(WITH_CONVOLUTIONS), **options}
    model.add_adapter(LoraConfig(use_dora=kind == "dora", init_lora_weights=False, **options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
    return model


def assert_draws_the_same(path: Path, theirs: nn.Module) -> Adapter:
    fresh = bases.unet()
    adapter = load_adapter(fresh, path)
    expected = output_of(theirs)
    assert relative_error(output_of(fresh), expected) <= 1e-5
    assert relative_error(output_of(bases.unet()), expected) > 0.01
    return adapter


PATTERN_OPTIONS = {
    "one rank, one alpha": {},
    "ranks and alphas by layer": {
        "rank_pattern": {"attn1.to_q": 2, "conv_in": 9},
        "alpha_pattern": {"attn1.to_q": 90, "conv_in": 1, "to_q": 3},  # the first that fits counts
    },
    "patterns that are expressions": {"alpha_pattern": {r".*attentions.*to_[qk]": 2, "^conv_in": 1}},
    "rank-stabilised": {"use_rslora": True},
}


@kinds
@pytest.mark.parametrize("options", PATTERN_OPTIONS.values(), ids=PATTERN_OPTIONS.keys())
def test_a_file_of_save_lora_adapter_draws_the_same_here(tmp_path, kind, options):
    theirs = peft_unet(kind, **options)
    theirs.save_lora_adapter(tmp_path)
    adapter = assert_draws_the_same(tmp_path / "pytorch_lora_weights.safetensors", theirs)
    scales = {path: theirs.get_submodule(path).scaling["default"] for path in adapter.layers}
    assert {path: update.scale for path, update in adapter.updates().items()} == pytest.approx(scales)


@pytest.mark.parametrize("kind, ending", [("dora", ""), ("dora", ".weight"), ("lora", "")])
def test_a_file_of_save_lora_weights_draws_the_same_in_both_spellings_of_the_magnitude(tmp_path, kind, ending):
    theirs = peft_unet(kind)
    layers = get_peft_model_state_dict(theirs)
    marked = "lora_magnitude_vector"
    layers = {re.sub(rf"{marked}(\.weight)?$", marked + ending, key): tensor for key, tensor in layers.items()}
    assert any(key.endswith(marked + ending) for key in layers) == (kind == "dora")
    metadata = theirs.peft_config["default"].to_dict()
    pipe = pipeline_around(bases.unet())
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    assert_draws_the_same(tmp_path / "pytorch_lora_weights.safetensors", theirs)


@kinds
def test_a_file_without_metadata_has_alpha_equal_to_rank_as_diffusers_has_it(tmp_path, kind):
    theirs = peft_unet(kind, lora_alpha=4, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 2})
    layers = {f"unet.{key}": tensor.contiguous() for key, tensor in get_peft_model_state_dict(theirs).items()}
    save_file(layers, tmp_path / "old.safetensors")
    assert_draws_the_same(tmp_path / "old.safetensors", theirs)


def test_a_half_precision_file_loads_as_float32(saved):
    rewrite(saved, lambda tensors, _: tensors.update({k: t.half() for k, t in tensors.items()}))
    adapter = load_adapter(bases.unet(), saved)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


# Writing whole or not at all.


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, unet):
    path = save_adapter(trained(unet), tmp_path / "a.safetensors")
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))  # a full disk, half way through
    try:
        with pytest.raises(OutputError, match=rf"cannot write {re.escape(str(path))}.*room left"):
            save_adapter(trained(bases.unet(seed=1)), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_safetensors({"a": torch.zeros(3)}, tmp_path / "a.safetensors", {})
    old = path.read_bytes()

    def interrupted(_tensors: object, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("dora_diffusion.formats.storage.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors({"a": torch.ones(3)}, path, {})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_is_no_folder_is_an_output_error(tmp_path, unet):
    (tmp_path / "file").write_text("here before")
    with pytest.raises(
        OutputError, match=r"cannot write .*file.*a\.safetensors.*leads through a file.*Choose another place"
    ):
        save_adapter(trained(unet), tmp_path / "file" / "a.safetensors")
    assert (tmp_path / "file").read_text() == "here before"


def test_a_folder_that_cannot_be_written_to_is_an_output_error(tmp_path, unet, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # Not by chmod, which does not bind root.
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(OutputError, match=r"cannot write .*: Permission denied\. Choose a place"):
        save_adapter(trained(unet), tmp_path / "a.safetensors")


def test_missing_folders_above_the_file_are_made(tmp_path, unet):
    path = save_adapter(trained(unet), tmp_path / "new" / "folder" / "a.safetensors")
    assert read_adapter_file(path).config.rank == 4


# Bad files: each says which file, what is wrong and the way out, and nothing goes into the model.


def refused(path: Path, *said: str, error: type[AdapterFileError] = AdapterFileError) -> str:
    """Loading fails with this message and leaves the model as it was."""
    model = bases.unet()
    before, names = {n: t.clone() for n, t in model.state_dict().items()}, [n for n, _ in model.named_modules()]
    with pytest.raises(error) as raised:
        load_adapter(model, path)
    assert type(raised.value) is error
    message = str(raised.value)
    for part in (str(path), *said):
        assert part in message, message
    assert [n for n, _ in model.named_modules()] == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    return message


def test_a_missing_file_names_near_ones(saved):
    refused(saved.with_name("stile.safetensors"), "no adapter file at", "Near names there: style.safetensors")
    refused(saved.parent / "none" / "a.safetensors", "no adapter file at", "Check the path")


def test_a_folder_names_the_file_in_it(saved):
    refused(saved.parent, "is a folder", f"Did you mean {saved}?")


@pytest.mark.parametrize("size", [0, 4, 20, 5000, -1])
def test_a_file_that_was_cut_short_says_so(saved, size):
    saved.write_bytes(saved.read_bytes()[:size])
    refused(saved, "is no sound safetensors file", "cut short", "download or train it again")


def test_random_bytes_are_no_adapter(tmp_path):
    path = tmp_path / "noise.safetensors"
    path.write_bytes(bytes((7 * i * i + 3) % 251 for i in range(4000)))
    refused(path, "is no sound safetensors file")


class RunsCode:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.witness,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_named_as_one_and_its_code_never_runs(tmp_path, zipped):
    path, witness = tmp_path / "trap.safetensors", tmp_path / "it-ran"
    torch.save({"unet.to_q.lora_A.weight": RunsCode(witness)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "is a pickle", "never loaded here", "Get the .safetensors version")
    assert not witness.exists()
    torch.load(path.rename(path.with_suffix(".pt")), weights_only=False)
    assert witness.exists(), "the trap must work for this test to mean anything"


def header_size(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_a_sound_file_that_begins_as_a_pickle_does_is_read(saved, start):
    # A file begins with the size of its header, so one in 32 begins with 0x80.
    rewrite(saved, lambda _, header: header.update(padding=""))
    missing = (int.from_bytes(start, "little") - header_size(saved)) % 256 ** len(start)
    rewrite(saved, lambda _, header: header.update(padding="-" * missing))
    assert saved.read_bytes().startswith(start)
    assert read_adapter_file(saved).config.rank == 4


def test_a_file_without_tensors_says_so(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    refused(tmp_path / "empty.safetensors", "it has no tensors", "Give a LoRA or DoRA file of PEFT, diffusers, kohya")


@pytest.mark.parametrize("ending, missing", [("lokr_w1", "lokr_w2"), ("hada_w1_a", "hada_w1_b"), ("a1.weight", "a2")])
def test_a_form_of_which_a_part_is_missing_is_refused(tmp_path, ending, missing):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{layer}.{ending}": torch.zeros(4, 32), f"{layer}.alpha": torch.tensor(4.0)}
    save_file(tensors, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "missing", f"{layer}: {missing}", "damaged or incomplete")


def test_a_whole_model_is_no_adapter(tmp_path, unet):
    save_file(dict(unet.state_dict()), tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "is the denoiser of a model, whole", "--base FILE", "inspect FILE")


@pytest.mark.parametrize("leaf", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_a_missing_half_is_named(saved, leaf):
    rewrite(saved, lambda tensors, _: tensors.pop(f"unet.{FIRST}.to_q.{leaf}"))
    parameter = {"lora_magnitude_vector": "its magnitude"}.get(leaf, leaf.removesuffix(".weight"))
    refused(saved, "cannot be read whole", f"missing:\n  unet.{FIRST}.to_q: {parameter}", "download or save it again")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("leaf", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_values_that_are_not_finite_are_named(saved, leaf, value):
    rewrite(saved, lambda tensors, _: tensors[f"unet.{FIRST}.to_q.{leaf}"].view(-1)[3:4].fill_(value))
    refused(saved, "not finite", f"{FIRST}.to_q.", "use an earlier checkpoint")


@pytest.mark.parametrize(
    "key, value",
    [
        ("dora_diffusion", "{"),
        ("dora_diffusion", "{}"),
        ("dora_diffusion", '{"kind": "loha", "rank": 4, "alpha": 6, "target_modules": []}'),
        ("lora_adapter_metadata", "not JSON"),
        ("lora_adapter_metadata", "[]"),
        ("lora_adapter_metadata", '{"unet.lora_alpha": "six"}'),
        ("lora_adapter_metadata", '{"unet.lora_alpha": NaN}'),
        ("lora_adapter_metadata", '{"unet.lora_alpha": [6]}'),
        ("lora_adapter_metadata", '{"unet.alpha_pattern": [1]}'),
        ("lora_adapter_metadata", '{"unet.alpha_pattern": {"to_q": null}}'),
        ("lora_adapter_metadata", '{"unet.alpha_pattern": {"to_(q": 3}}'),
    ],
)
def test_a_damaged_header_is_an_adapter_file_error(saved, key, value):
    rewrite(saved, lambda _, header: header.update({key: value}))
    refused(saved, "has a damaged header", "Download or save it again")


@pytest.mark.parametrize("shape", [(32, 1), (32, 5), (32,), (32, 4, 1, 1), (32, 0)], ids=str)
def test_halves_that_do_not_pair_up_are_named(saved, shape):
    # [32, 1] would be spread over all four ranks without a word if it were only copied.
    rewrite(saved, lambda tensors, _: tensors.update({f"unet.{FIRST}.to_q.lora_B.weight": torch.ones(shape)}))
    refused(saved, f"misshapen:\n  unet.{FIRST}.to_q: no rank in common", "download or save it again")


# Sound files for another base.


def test_an_adapter_of_another_base_names_the_layers_and_both_bases(tmp_path):
    other = bases.sd3_transformer()
    path = save_adapter(trained(other), tmp_path / "sd3.safetensors", base_name="tiny-sd3")
    message = refused(
        path,
        "does not fit this base: 0 of 8 layers match",
        "transformer_blocks.0.attn.to_q: not in this model",
        "Trained on 'tiny-sd3' (SD3Transformer2DModel",
        "UNet2DConditionModel",
        "Load it with the base it was trained on",
        error=AdapterMismatchError,
    )
    assert identify_base(other).fingerprint in message
    assert identify_base(bases.unet()).fingerprint in message


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_an_adapter_for_other_widths_names_both_shapes(tmp_path, kind):
    wider = bases.unet(cross_attention_dim=48)
    path = save_adapter(trained(wider, kind), tmp_path / "wide.safetensors")
    refused(path, "attn2.to_k: adapter for 32 x [48], this layer has 32 x [32]", error=AdapterMismatchError)


def test_one_misfit_among_many_layers_is_enough_to_load_nothing(saved):
    def rename(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        for key in [key for key in tensors if f"{FIRST}.to_q." in key]:
            tensors[key.replace("to_q", "to_qq")] = tensors.pop(key)

    rewrite(saved, rename)
    refused(saved, f"{FIRST}.to_qq: not in this model (nearest: {FIRST}.to_q)", error=AdapterMismatchError)


def test_a_magnitude_of_another_size_is_named(saved):
    key = f"unet.{FIRST}.to_q.lora_magnitude_vector"
    rewrite(saved, lambda tensors, _: tensors.update({key: torch.ones(1)}))
    refused(saved, f"{FIRST}.to_q: magnitude of shape [1] for 32 outputs and 32 inputs")


def test_a_base_with_other_weights_is_warned_of_and_takes_the_adapter(saved):
    other = bases.unet(seed=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    before = output_of(other)
    with pytest.warns(UserWarning, match=r"style\.safetensors was trained on .*same layers, other weights"):
        adapter = load_adapter(other, saved)
    assert not torch.equal(output_of(other), before)
    adapter.eject()
    assert torch.equal(output_of(other), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_base_is_not_warned_of(saved, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(bases.unet().to(dtype), saved)


@pytest.mark.parametrize("options", [{"strength": float("nan")}, {"name": "a.b"}])
def test_an_option_that_cannot_be_used_loads_nothing(saved, unet, options):
    before = [name for name, _ in unet.named_modules()]
    with pytest.raises(ConfigError):
        load_adapter(unet, saved, **options)
    assert [name for name, _ in unet.named_modules()] == before
    assert all(p.requires_grad for p in unet.parameters())


def test_reading_a_file_again_and_again_keeps_no_memory(tmp_path: Path) -> None:
    """A web server reads adapters for months; safetensors' own lazy reader loses some bytes with every tensor."""
    path = write_safetensors({f"tensor_{i}": torch.ones(4, 4) for i in range(200)}, tmp_path / "a.safetensors", {})
    readers = [tracemalloc.Filter(True, pattern) for pattern in (storage.__file__, "*safetensors*")]

    def kept_after(reads: int) -> int:
        """Bytes that the reader's own lines still hold: what other tests left running allocates elsewhere."""
        for _ in range(reads):
            read_safetensors(path)
        gc.collect()
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(readers).traces)

    tracemalloc.start()
    try:
        before = kept_after(20)
        assert (kept_after(20) - before) / 20 < 1000  # bytes; the lazy reader loses thousands
    finally:
        tracemalloc.stop()
