"""The text encoder and the UNet, trained together on cached latents."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .autoencoder import LATENT_CHANNELS
from .icons import Icon, caption
from .muon import Muon, Together
from .speed import mixed_precision, quicken
from .state import MovingAverage, Training, learning_rate_factor
from .tokenizer import MAX_TOKENS

LATENT_SIZE = 16
TEXT_WIDTH = 192


@dataclass(frozen=True)
class DenoiserPlan:
    """How long and how hard to train."""

    steps: int = 40_000
    decay_steps: int = 8_000
    batch: int = 32
    learning_rate: float = 8e-4
    muon_rate: float = 2e-3
    embedding_rate: float = 3e-3
    warmup: int = 300
    average: float = 0.999
    compile: bool = False


def new_scheduler() -> DDIMScheduler:
    """Velocity prediction down to no signal at all, so that white backgrounds are really white."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text model whose token embeddings start far apart."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    for name, parameter in model.named_parameters():
        if "token_embedding" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "position_embedding" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def new_unet() -> UNet2DConditionModel:
    """About eight million parameters, with attention at every level for adapters to work on."""
    levels = (64, 128, 144)
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * len(levels),
        up_block_types=("CrossAttnUpBlock2D",) * len(levels),
        block_out_channels=levels,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        # Heads per level, whatever diffusers calls it; one where attention costs most.
        attention_head_dim=(1, 4, 4),
        norm_num_groups=16,
    )


class Denoiser(nn.Module):
    """Both trained parts as one module: noisy latents, time and tokens to velocity."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        words = self.text_encoder(tokens).last_hidden_state  # [N, tokens, width]
        return self.unet(noisy, t, words, return_dict=False)[0]


def _new_optimizer(model: Denoiser, plan: DenoiserPlan) -> Together:
    """Muon for the inner matrices; AdamW for embeddings, the two ends, and vectors."""
    embeddings, matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith("text_encoder") and "embedding" in name:
            embeddings.append(parameter)
        elif parameter.ndim > 1 and "unet.conv_" not in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups = [
        {"params": rest, "base_lr": plan.learning_rate},
        {"params": embeddings, "base_lr": plan.embedding_rate},
    ]
    adam = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return Together(Muon(matrices, plan.muon_rate), adam)


def new_training(plan: DenoiserPlan, tokenizer: CLIPTokenizer, device: torch.device, seed: int) -> Training:
    """Fresh models with their optimizer, average and random numbers."""
    torch.manual_seed(seed)
    model = Denoiser(new_text_encoder(tokenizer), new_unet())
    quicken(model, device)
    if device.type == "cpu":
        # Plain products are twice as quick as PyTorch's fused attention backward on a CPU.
        model.unet.set_attn_processor(AttnProcessor())
    optimizer = _new_optimizer(model, plan)
    draw = torch.Generator().manual_seed(seed)
    return Training(model, optimizer, MovingAverage(model, plan.average), draw)


class Captions:
    """Token ids for icons, with captions varied at each call."""

    def __init__(self, tokenizer: CLIPTokenizer, icons: Sequence[Icon]) -> None:
        self._tokenizer, self._icons = tokenizer, icons
        self._weights = torch.tensor([icon.weight for icon in icons])

    def pick(self, n: int, draw: torch.Generator) -> Tensor:
        """Indices of n random icons, by their weights."""
        return torch.multinomial(self._weights, n, replacement=True, generator=draw)

    def tokens(self, index: Tensor, draw: torch.Generator) -> Tensor:
        """Fresh captions of the icons at `index`: [N, tokens]."""
        seed = int(torch.randint(2**62, (), generator=draw))
        dice = random.Random(seed)
        texts = [caption(self._icons[k], dice) for k in index.tolist()]
        return self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_TOKENS,
            return_tensors="pt",
        ).input_ids  # fmt: skip


def _timesteps(n: int, draw: torch.Generator) -> Tensor:
    """Spread over 0..999: half evenly, half about the noise levels where shapes are decided."""
    spread = (torch.arange(n) / n + torch.rand((), generator=draw)) % 1.0
    evenly = torch.arange(n) % 2 == 0
    shapes = torch.sigmoid(0.6 + 0.9 * torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4)))
    return (torch.where(evenly, spread, shapes) * 1000).long().clamp(max=999)


def train(
    run: Training,
    plan: DenoiserPlan,
    latents: Tensor,
    captions: Captions,
    device: torch.device,
) -> Iterator[float]:
    """Yields each step's loss, from the step the run stands at to the plan's end."""
    model = run.module
    model.train()
    forward = torch.compile(model, dynamic=False) if plan.compile else model
    signal = new_scheduler().alphas_cumprod
    latents = latents.contiguous(memory_format=torch.channels_last)
    while run.step < plan.steps:
        run.set_learning_rate(learning_rate_factor(run.step, plan.steps, plan.warmup, plan.decay_steps))
        index = captions.pick(plan.batch, run.generator)
        t = _timesteps(plan.batch, run.generator)
        eps = torch.randn(plan.batch, *latents.shape[1:], generator=run.generator)
        tokens = captions.tokens(index, run.generator)
        a = signal[t].sqrt().view(-1, 1, 1, 1)
        s = (1 - signal[t]).sqrt().view(-1, 1, 1, 1)
        x0 = latents[index]
        noisy, velocity = (a * x0 + s * eps).to(device), (a * eps - s * x0).to(device)
        with mixed_precision(device):
            predicted = forward(noisy, t.to(device), tokens.to(device))
        loss = F.mse_loss(predicted.float(), velocity)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.average.update()
        run.step += 1
        yield loss.item()


@torch.no_grad()
def sample(
    model: Denoiser,
    tokenizer: CLIPTokenizer,
    prompts: Sequence[str],
    seed: int,
    steps: int = 25,
    guidance: float = 4.0,
) -> Tensor:
    """Latents drawn for prompts with the shipped scheduler: [N, 4, 16, 16]."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    scheduler = new_scheduler()
    scheduler.set_timesteps(steps)
    ids = tokenizer([*prompts, *[""] * len(prompts)], padding="max_length", truncation=True,
                    max_length=MAX_TOKENS, return_tensors="pt").input_ids  # fmt: skip
    shape = (len(prompts), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with mixed_precision(device):
        words = model.text_encoder(ids.to(device)).last_hidden_state
        for t in scheduler.timesteps:
            both = torch.cat([x, x]).to(device)
            velocity = model.unet(both, t.to(device), words, return_dict=False)[0].float().cpu()
            wanted, plain = velocity.chunk(2)
            x = scheduler.step(plain + guidance * (wanted - plain), t, x).prev_sample
    model.train(was_training)
    return x
