"""Adapters go into real models and come out again without a trace."""

from __future__ import annotations

import copy
import itertools
import math
import re
import threading

import bases
import pytest
import torch
from oracles import BY_INPUT, KINDS, adapted_weight, config_of, inputs_of, output_of, perturb, relative_error
from peft import LoraConfig
from torch import nn

from dora_diffusion.adapters.injection import Adapter, AdapterConfig, adaptable_layers, inject_adapter, matching_layers
from dora_diffusion.adapters.layers import AdaptedLayer
from dora_diffusion.errors import AdapterStateError, ConfigError, TargetError

JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
WITH_CONVOLUTIONS = ("to_q", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "time_emb_proj")
MODELS = {
    "unet": (bases.unet, AdapterConfig().target_modules, 16),
    "unet with convolutions": (bases.unet, WITH_CONVOLUTIONS, None),
    "sd3": (bases.sd3_transformer, AdapterConfig().target_modules, 8),
    "sd3 joint": (bases.sd3_transformer, JOINT, None),
    "flux": (bases.flux_transformer, AdapterConfig().target_modules, None),
    "flux joint": (bases.flux_transformer, JOINT, None),
}
all_models = pytest.mark.parametrize("make, targets", [row[:2] for row in MODELS.values()], ids=MODELS.keys())
kinds = pytest.mark.parametrize("kind", KINDS)


def inject(model: nn.Module, kind: str = "dora", **options: object) -> Adapter:
    return inject_adapter(model, config_of(kind, **{"rank": 4, "alpha": 6.0, **options}), seed=1)


def trained(model: nn.Module, kind: str = "dora", seed: int = 0, **options: object) -> Adapter:
    return perturb(inject(model, kind, **options), seed)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The model with an adapter in it.


@kinds
@all_models
def test_a_models_output_is_unchanged_at_the_start_and_changed_after_training(make, targets, kind):
    model = make()
    before = output_of(model)
    adapter = inject(model, kind, target_modules=targets)
    assert torch.equal(output_of(model), before)
    perturb(adapter)
    assert relative_error(output_of(model), before) > 0.01


@kinds
@all_models
def test_eject_leaves_no_trace(make, targets, kind):
    model = make()
    model.conv_in.requires_grad_(False) if hasattr(model, "conv_in") else next(model.parameters()).requires_grad_(False)
    modules = {name: id(module) for name, module in model.named_modules()}
    classes = {name: type(module) for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes = set(vars(model))
    before, output = bits(model), output_of(model)

    adapter = trained(model, kind, target_modules=targets)
    assert {name: id(module) for name, module in model.named_modules()} != modules
    adapter.eject()

    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert set(trainable.values()) == {True, False}
    assert set(vars(model)) == attributes
    assert same_bits(bits(model), before)
    assert torch.equal(output_of(model), output)


def test_hooks_run_while_adapted_and_stay_after_eject(unet):
    calls = []
    path = next(iter(matching_layers(unet, ["to_q"])))
    unet.get_submodule(path).register_forward_hook(lambda *_: calls.append("forward"))
    adapter = inject(unet)
    output_of(unet)
    assert calls == ["forward"]
    adapter.eject()
    output_of(unet)
    assert calls == ["forward"] * 2


@kinds
def test_parameters_are_exactly_the_trainable_ones(unet, kind):
    adapter = inject(unet, kind, target_modules=WITH_CONVOLUTIONS)
    ours = {id(p) for p in adapter.parameters()}
    assert ours == {id(p) for p in unet.parameters() if p.requires_grad}
    assert ours == {id(p) for p in adapter.named_parameters().values()}
    assert adapter.num_parameters() == sum(p.numel() for p in unet.parameters() if p.requires_grad)
    leaves = {name.rpartition(".")[2] for name in adapter.named_parameters()}
    assert leaves == {"lora_A", "lora_B"} | {"dora": {"magnitude"}, BY_INPUT: {"input_magnitude"}, "lora": set()}[kind]


@kinds
def test_training_changes_the_adapter_and_no_bit_of_the_base(unet, kind):
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    adapter = perturb(inject(unet, kind))
    start = {name: p.detach().clone() for name, p in adapter.named_parameters().items()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    unet(**inputs_of(unet)).sample.square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, start[name]) for name, p in adapter.named_parameters().items())
    adapter.eject()
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())


@kinds
def test_gradient_checkpointing_of_the_model_gives_the_same_gradients(kind):
    gradients = []
    for checkpointing in (False, True):
        model = bases.unet().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        adapter = trained(model, kind)
        model(**inputs_of(model)).sample.square().sum().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients))


def test_the_same_seed_gives_the_same_start_and_another_seed_another(unet):
    starts = []
    for seed in (3, 3, 4):
        adapter = inject_adapter(unet, AdapterConfig(), seed=seed)
        starts.append([u.lora_A.detach().clone() for u in adapter.updates().values()])
        adapter.eject()
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1]))
    assert not any(torch.equal(a, b) for a, b in zip(starts[0], starts[2]))


def test_dora_and_lora_start_from_the_same_matrices(unet):
    starts = []
    for kind in ("dora", "lora"):
        adapter = inject(unet, kind)
        starts.append([u.lora_A.detach().clone() for u in adapter.updates().values()])
        adapter.eject()
    assert all(torch.equal(a, b) for a, b in zip(*starts))


@kinds
def test_a_deep_copy_of_an_adapted_model_is_a_model_of_its_own(unet, kind):
    adapter = trained(unet, kind)
    output = output_of(unet)
    twin, twin_adapter = copy.deepcopy((unet, adapter))
    assert torch.equal(output_of(twin), output)
    perturb(twin_adapter, seed=5)
    assert not torch.equal(output_of(twin), output)
    assert torch.equal(output_of(unet), output)
    twin_adapter.eject()
    adapter.eject()
    assert same_bits(bits(twin), bits(unet))
    assert all(p.requires_grad for p in twin.parameters())


def test_an_adapted_models_state_dict_fits_its_twin(unet):
    trained(unet)
    twin = bases.unet()
    inject(twin)
    twin.load_state_dict(unet.state_dict())
    assert torch.equal(output_of(twin), output_of(unet))


@kinds
def test_a_half_precision_model_can_be_adapted_and_left(kind):
    model = bases.unet().to(torch.bfloat16)
    before = bits(model)
    adapter = trained(model, kind)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    adapter.fuse()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    adapter.unfuse()
    adapter.eject()
    assert same_bits(bits(model), before)


# Strength and fusing.


@kinds
@all_models
def test_strength_zero_is_the_base_bit_for_bit(make, targets, kind):
    model = make()
    before = output_of(model)
    adapter = trained(model, kind, target_modules=targets)
    adapter.strength = 0
    assert torch.equal(output_of(model), before)
    adapter.strength = 0.5
    assert not torch.equal(output_of(model), before)


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_a_strength_that_is_no_number_is_refused_and_changes_nothing(unet, strength):
    adapter = trained(unet)
    before = output_of(unet)
    with pytest.raises(ConfigError, match="finite number"):
        adapter.strength = strength
    assert adapter.strength == 1
    assert torch.equal(output_of(unet), before)


@kinds
@all_models
def test_fusing_keeps_the_output_and_unfusing_gives_back_the_original_bits(make, targets, kind):
    model = make()
    adapter = trained(model, kind, target_modules=targets)
    before, live = bits(model), output_of(model)
    adapter.fuse()
    assert adapter.is_fused
    assert relative_error(output_of(model), live) < 1e-5
    assert not same_bits(bits(model), before)
    adapter.unfuse()
    assert not adapter.is_fused
    assert same_bits(bits(model), before)
    assert torch.equal(output_of(model), live)
    assert all(layer.frozen.original is None for layer in adapter.layers.values()), "no second copy is kept"


@kinds
def test_the_fused_weight_is_the_formulas(unet, kind):
    adapter = trained(unet, kind, target_modules=WITH_CONVOLUTIONS)
    adapter.strength = 0.7
    expected = {}
    for path, layer in adapter.layers.items():
        W0 = layer.base.weight.double()
        expected[path] = W0 + 0.7 * (adapted_weight(layer.base.weight, layer.updates[adapter.name]) - W0)
    adapter.fuse()
    for path, layer in adapter.layers.items():
        assert relative_error(layer.base.weight, expected[path]) < 1e-6, path


@pytest.mark.parametrize("pair", [("dora", "lora"), ("dora", "dora")], ids="+".join)
@pytest.mark.parametrize("fused, unfused", list(itertools.product(((0, 1), (1, 0)), repeat=2)))
def test_two_adapters_fuse_and_unfuse_in_any_order(unet, pair, fused, unfused):
    before = bits(unet)
    adapters = [trained(unet, kind, seed) for seed, kind in enumerate(pair)]
    adapters[0].strength = 0.6
    live = output_of(unet)
    for i in fused:  # after the first of them one is fused and one is live
        adapters[i].fuse()
        assert relative_error(output_of(unet), live) < 1e-5
    for i in unfused:
        adapters[i].unfuse()
        assert relative_error(output_of(unet), live) < 1e-5
    assert torch.equal(output_of(unet), live)
    for i in unfused:
        adapters[i].eject()
    assert same_bits(bits(unet), before)


def test_two_adapters_on_different_layers_can_share_some(unet):
    before = output_of(unet)
    first = trained(unet, target_modules=["to_q", "to_k"])
    alone = output_of(unet)
    second = trained(unet, "lora", target_modules=["to_k", "to_v"])
    second.eject()
    assert torch.equal(output_of(unet), alone)
    first.eject()
    assert torch.equal(output_of(unet), before)
    assert not any(isinstance(module, AdaptedLayer) for module in unet.modules())


@kinds
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.5])
def test_strength_can_change_while_fused(unet, kind, strength):
    adapter = trained(unet, kind)
    before = bits(unet)
    adapter.strength = strength
    live = output_of(unet)
    adapter.strength = 1
    adapter.fuse()
    adapter.strength = strength
    assert relative_error(output_of(unet), live) < 1e-5
    adapter.unfuse()
    assert same_bits(bits(unet), before)


@kinds
def test_ejecting_while_fused_gives_back_the_original_bits(unet, kind):
    before = bits(unet)
    adapter = trained(unet, kind)
    adapter.fuse()
    adapter.eject()
    assert same_bits(bits(unet), before)


def test_ejecting_one_fused_adapter_leaves_the_other_fused(unet):
    second = trained(unet, "lora", seed=1)
    alone = output_of(unet)
    first = trained(unet, "dora")
    first.fuse()
    second.fuse()
    first.eject()
    assert second.is_fused
    assert relative_error(output_of(unet), alone) < 1e-5


def test_fusing_twice_and_unfusing_what_is_not_fused_do_nothing(unet):
    adapter = trained(unet)
    before = bits(unet)
    adapter.unfuse()
    assert same_bits(bits(unet), before)
    adapter.fuse()
    fused = bits(unet)
    adapter.fuse()
    assert same_bits(bits(unet), fused)


@pytest.mark.parametrize("action", ["fuse", "unfuse", "eject", "strength"])
def test_an_ejected_adapter_says_that_it_was_ejected(unet, action):
    adapter = trained(unet)
    before = bits(unet) if adapter.eject() is None else None
    with pytest.raises(AdapterStateError, match=r"adapter_0.*was ejected.*load it again"):
        setattr(adapter, action, 0.5) if action == "strength" else getattr(adapter, action)()
    assert same_bits(bits(unet), before)
    assert "ejected" in repr(adapter)


# Names of layers and of adapters.


def names_matched(model: nn.Module, *targets: str) -> list[str]:
    return list(matching_layers(model, targets))


def test_a_target_is_the_end_of_a_name_at_a_dot(unet):
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
    assert names_matched(unet, "to_q") == [n for n in names if n.endswith(".to_q")]
    assert names_matched(unet, "attn2.to_out.0") == [n for n in names if n.endswith(".attn2.to_out.0")]
    assert names_matched(unet, "conv_in") == ["conv_in"]
    with pytest.raises(TargetError):
        names_matched(unet, "o_q")


def test_a_target_is_a_regular_expression_for_the_whole_name(unet):
    found = names_matched(unet, r"down_blocks\..*\.attn\d\.to_[qk]")
    assert found == [n for n in names_matched(unet, "to_q", "to_k") if n.startswith("down_blocks.")]
    assert found
    with pytest.raises(TargetError):
        names_matched(unet, r"down_blocks\..*\.attn")


def test_one_target_may_be_given_as_a_bare_string():
    assert AdapterConfig(target_modules="to_q") == AdapterConfig(target_modules=("to_q",))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "target, near", [("to_qq", "to_q"), ("to_out", "to_out.0"), ("conv_shortcuts", "conv_shortcut")]
)
def test_a_target_that_matches_nothing_names_near_ones_and_leaves_the_model_alone(unet, target, near):
    before = bits(unet)
    with pytest.raises(TargetError) as raised:
        inject(unet, target_modules=["to_q", target])
    assert repr(target) in str(raised.value)
    assert re.search(rf"Near or usual names there:.*\b{re.escape(near)}", str(raised.value))
    assert same_bits(bits(unet), before)
    assert all(p.requires_grad for p in unet.parameters())


def test_a_target_near_nothing_names_what_there_is(unet):
    with pytest.raises(TargetError, match=r"matches no layer of UNet2DConditionModel.*conv1"):
        inject(unet, target_modules=["zzzzzz"])


def test_a_broken_regular_expression_is_said_to_be_one(unet):
    with pytest.raises(TargetError, match=r"'attn\(\.\*' is neither .* nor a regular expression"):
        inject(unet, target_modules=["attn(.*"])


def test_layers_that_are_adapted_keep_their_names(unet):
    names = list(adaptable_layers(unet))
    inject(unet, target_modules=WITH_CONVOLUTIONS)
    assert list(adaptable_layers(unet)) == names
    inject(unet, target_modules=WITH_CONVOLUTIONS)
    assert list(adaptable_layers(unet)) == names


@pytest.mark.parametrize("name", ["style", "a.b", "keys", "training"])
def test_a_name_that_is_taken_or_cannot_be_used_is_refused(unet, name):
    adapter = inject_adapter(unet, AdapterConfig(), name="style")
    before = bits(unet)
    with pytest.raises(ConfigError, match="choose another"):
        inject_adapter(unet, AdapterConfig(), name=name)
    assert same_bits(bits(unet), before)
    adapter.eject()
    assert all(p.requires_grad for p in unet.parameters())


def test_unnamed_adapters_get_names_of_their_own(unet):
    names = [inject(unet).name for _ in range(3)]
    assert len(set(names)) == 3


# The configuration.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "loha"}, "kind is 'loha'; it must be 'dora' or 'lora'"),
        ({"rank": 0}, "rank is 0; it must be a whole number of at least 1"),
        ({"rank": 2.5}, r"rank is 2\.5"),
        ({"rank": True}, "rank is True"),
        ({"rank_pattern": {"to_q": -1}}, "rank is -1"),
        ({"alpha": math.nan}, "alpha is nan; it must be a number above 0"),
        ({"alpha": 0.0}, r"alpha is 0\.0"),
        ({"alpha": "8"}, "alpha is '8'"),
        ({"alpha_pattern": {"to_q": math.inf}}, "alpha is inf"),
        ({"dropout": 1.0}, r"dropout is 1\.0; it must be at least 0 and below 1"),
        ({"dropout": -0.1}, r"dropout is -0\.1"),
        ({"dropout": math.nan}, "dropout is nan"),
        ({"dropout": "0.1"}, r"dropout is '0\.1'"),
        ({"target_modules": ()}, "name at least one layer, such as 'to_q'"),
        ({"target_modules": ("to_q", "")}, "name at least one layer"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_used_says_what_can(options, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**options)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 50])
def test_the_scale_is_pefts(unet, rank, use_rslora):
    twin = bases.unet()
    options = {"use_rslora": use_rslora, "target_modules": ["to_q", "to_v"]}
    twin.add_adapter(LoraConfig(r=rank, lora_alpha=7, **options))
    adapter = inject(unet, rank=rank, alpha=7.0, **options)
    theirs = {path: twin.get_submodule(path).scaling["default"] for path in adapter.layers}
    assert {path: update.scale for path, update in adapter.updates().items()} == pytest.approx(theirs)


def test_rank_and_alpha_may_differ_for_single_layers(unet):
    first, second = names_matched(unet, "to_q")[:2]
    adapter = inject(unet, rank_pattern={first: 2}, alpha_pattern={second: 1.0}, target_modules=["to_q"])
    updates = adapter.updates()
    assert {path: (u.rank, u.scale) for path, u in updates.items() if path in (first, second)} == {
        first: (2, 6.0 / 2),
        second: (4, 1.0 / 4),
    }
    assert {(u.rank, u.scale) for path, u in updates.items() if path not in (first, second)} <= {(4, 6.0 / 4)}


def test_load_copies_every_value(unet):
    adapter = trained(unet)
    twin = bases.unet()
    output_of(twin)
    other = inject(twin)
    output_of(twin)  # the norm of the start is kept now
    other.load({name: p.detach() for name, p in adapter.named_parameters().items()})
    assert torch.equal(output_of(twin), output_of(unet))


# What must not be left half done.


class NoLinearMap(nn.Module):
    """Has the sizes of a linear layer and a ReLU inside."""

    in_features = out_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Parameter(torch.eye(8))

    def forward(self, x):
        return (x @ self.inside).relu()


def test_a_layer_that_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), NoLinearMap())
    before = dict(model.named_modules())
    with pytest.raises(TargetError, match="no linear map"):
        inject_adapter(model, AdapterConfig(target_modules=("0", "1"), rank=2))
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())


class Packed(nn.Module):
    """A linear layer without a dense weight."""

    in_features = out_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.scale


def test_fusing_writes_to_no_layer_when_one_of_them_is_packed():
    model = nn.Sequential(nn.Linear(8, 8), Packed())
    before = model[0].weight.clone()
    adapter = perturb(inject_adapter(model, AdapterConfig(target_modules=("0", "1"), rank=2), seed=0))
    with pytest.raises(AdapterStateError, match="packed"):
        adapter.fuse()
    adapter.eject()
    assert torch.equal(model[0].weight, before)


def test_a_layer_whose_weight_is_read_and_not_called_is_no_target():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(TargetError, match="matches no layer"):
        inject_adapter(model, AdapterConfig(target_modules=("linear1",)))


def test_a_model_can_be_looked_at_while_adapters_come_and_go():
    """The web app's adapter card does, while pictures are drawn."""
    pipe = bases.stable_diffusion()
    wanted, over = list(adaptable_layers(pipe.unet)), threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            inject_adapter(pipe.unet, AdapterConfig(rank=1, target_modules=("attn1.to_q",)), seed=0).eject()

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        for _ in range(300):
            assert list(adaptable_layers(pipe.unet)) == wanted
    finally:
        over.set()
        other.join()
