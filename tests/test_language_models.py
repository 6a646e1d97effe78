"""Whole transformers models against PEFT's `use_dora=True`: the families of the DoRA paper's own experiments.

LLaMA (commonsense reasoning), LLaVA (visual instruction tuning) and BART (VL-BART's text model), each small and with
random weights, and GPT-2, whose linear layers keep their weight transposed. Liu et al. 2024, section 5.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from oracles import perturb, relative_error
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from dora_diffusion import AdapterConfig, inject_adapter
from dora_diffusion.adapters.injection import Adapter
from dora_diffusion.errors import AdapterStateError

RANK, ALPHA = 4, 10.0
Inputs = dict[str, Tensor]


def tokens(*shape: int, top: int = 60) -> Tensor:
    return torch.randint(3, top, shape, generator=torch.Generator().manual_seed(7))


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped queries: k_proj and v_proj are narrower than q_proj
        attention_bias=True,
        max_position_embeddings=64,
    )


def llama() -> tuple[nn.Module, Inputs]:
    ids = tokens(2, 9)
    return LlamaForCausalLM(llama_config()), {"input_ids": ids, "labels": ids}


def llava() -> tuple[nn.Module, Inputs]:
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=llama_config(), image_token_index=63, vision_feature_layer=-1)
    )
    picture = torch.full((2, 4), 63)  # 8 x 8 pixels in patches of 4
    ids = torch.cat((tokens(2, 3), picture, tokens(2, 6)), 1)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(8))
    return model, {"input_ids": ids, "pixel_values": pixels, "labels": ids}


def bart() -> tuple[nn.Module, Inputs]:
    config = BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
        dropout=0.0,
    )
    return BartForConditionalGeneration(config), {"input_ids": tokens(2, 9), "labels": tokens(2, 7)}


def gpt2() -> tuple[nn.Module, Inputs]:
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    ids = tokens(2, 9)
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Family:
    make: Callable[[], tuple[nn.Module, Inputs]]
    targets: tuple[str, ...]
    layers: int
    transposed: bool = False  # what PEFT calls fan_in_fan_out


ATTENTION, GATED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("up_proj", "down_proj", "gate_proj")
FAMILIES = {
    "LLaMA": Family(llama, ATTENTION + GATED, 2 * 7),
    # The language model and the vision tower, whose attention ends in out_proj.
    "LLaVA": Family(llava, (*ATTENTION, "out_proj", *GATED, "fc1", "fc2"), 2 * 7 + 3 * 6),
    "BART": Family(bart, ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), 2 * (4 + 2) + 2 * (8 + 2)),
    "GPT-2": Family(gpt2, ("c_attn", "c_proj", "c_fc"), 2 * 4, transposed=True),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def make(family: Family) -> tuple[nn.Module, Inputs]:
    """The model with every weight drawn large enough, biases too, for its layers to matter."""
    torch.manual_seed(3)
    model, inputs = family.make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model, inputs


def peft_twin(model: nn.Module, adapter: Adapter, family: Family) -> nn.Module:
    """PEFT's DoRA on this model with the values of the adapter, which is in another copy of it."""
    twin = get_peft_model(
        model,
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            use_dora=True,
            target_modules=list(family.targets),
            lora_dropout=0.0,
            fan_in_fan_out=family.transposed,
        ),
    )
    theirs = peft_parameters(twin)
    assert theirs.keys() == adapter.named_parameters().keys()
    with torch.no_grad():
        for name, parameter in adapter.named_parameters().items():
            theirs[name].copy_(parameter)
    return twin


def peft_parameters(twin: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's parameters under this project's names."""
    found = {}
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            name = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
            found[name.replace("lora_magnitude_vector", "magnitude")] = parameter
    return found


def run(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient of the input embeddings; one backward pass of the model's own loss."""
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    embeddings.grad = None
    output = model(**inputs)
    output.loss.backward()
    return output.logits.detach(), embeddings.grad


@every_family
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_model_equals_pefts_dora_in_output_and_gradients(name, training):
    family = FAMILIES[name]
    model, inputs = make(family)
    plain, other = run(copy.deepcopy(model).eval(), inputs)[0], copy.deepcopy(model)
    adapter = inject_adapter(
        model, AdapterConfig(kind="dora", rank=RANK, alpha=ALPHA, target_modules=family.targets), seed=1
    )
    assert len(adapter.layers) == family.layers
    perturb(adapter, size=0.05)
    twin = peft_twin(other, adapter, family)
    logits, of_embeddings = run(model.train(training), inputs)
    their_logits, of_their_embeddings = run(twin.train(training), inputs)

    assert relative_error(their_logits, plain) > 0.1, "the adapter must change something for this test to mean anything"
    assert relative_error(logits, their_logits) < 2e-5
    assert relative_error(of_embeddings, of_their_embeddings) < 5e-5
    theirs = peft_parameters(twin)
    for parameter_name, parameter in adapter.named_parameters().items():
        assert relative_error(parameter.grad, theirs[parameter_name].grad) < 1e-4, parameter_name


@every_family
def test_at_the_start_the_model_is_the_base_and_after_ejecting_too(name):
    model, inputs = make(FAMILIES[name])
    with torch.no_grad():
        before = model.eval()(**inputs).logits
        adapter = inject_adapter(model, AdapterConfig(rank=RANK, target_modules=FAMILIES[name].targets))
        assert torch.equal(model(**inputs).logits, before)
        perturb(adapter)
        assert not torch.equal(model(**inputs).logits, before)
        adapter.eject()
        assert torch.equal(model(**inputs).logits, before)


def test_a_transposed_weight_is_not_fused_into():
    model, _ = make(FAMILIES["GPT-2"])
    adapter = perturb(inject_adapter(model, AdapterConfig(rank=RANK, target_modules=("attn.c_proj",))))  # square
    before = model.transformer.h[0].attn.c_proj.base.weight.clone()
    with pytest.raises(AdapterStateError, match="cannot fuse into a Conv1D: its weight is kept transposed"):
        adapter.fuse()
    assert torch.equal(model.transformer.h[0].attn.c_proj.base.weight, before)


def quantise(model: nn.Module) -> nn.Module:
    """Every linear layer but the head in NF4, as transformers does on loading."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            packed = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, torch.float32, True, "nf4"
            )
            packed.load_state_dict(module.state_dict())
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, packed.to("cpu"))
    return model.requires_grad_(False)


def test_a_model_in_nf4_equals_pefts_dora_on_it():
    """QDoRA: PEFT's dequantises the weight for every norm."""
    config = llama_config()
    config.hidden_size, config.intermediate_size = 64, 128  # whole blocks of NF4
    family = Family(
        lambda: (LlamaForCausalLM(config), {"input_ids": tokens(2, 9), "labels": tokens(2, 9)}), ATTENTION + GATED, 14
    )
    model, inputs = make(family)
    model = quantise(model).train()
    other = copy.deepcopy(model)
    adapter = perturb(
        inject_adapter(model, AdapterConfig(rank=RANK, alpha=ALPHA, target_modules=family.targets), seed=1), size=0.05
    )
    twin = peft_twin(other, adapter, family).train()
    logits, of_embeddings = run(model, inputs)
    their_logits, of_their_embeddings = run(twin, inputs)
    assert relative_error(logits, their_logits) < 2e-5
    assert relative_error(of_embeddings, of_their_embeddings) < 5e-5
    theirs = peft_parameters(twin)
    for name, parameter in adapter.named_parameters().items():
        assert relative_error(parameter.grad, theirs[name].grad) < 1e-4, name
