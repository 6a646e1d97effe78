"""Text encoder and denoiser, trained together on cached latents: what the bases have in common."""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .icons import Icon, caption
from .muon import Muon, Together
from .prompts import GUIDANCE, STEPS
from .speed import mixed_precision, quicken
from .state import MovingAverage, Training, learning_rate_factor
from .tokenizer import MAX_TOKENS

LATENT_SIZE = 16


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


class Denoiser(nn.Module, ABC):
    """A base's trained parts as one module: text encoder, and UNet or transformer."""

    ends: tuple[str, ...]  # names of the first and last layers, which AdamW trains
    parts: tuple[str, ...]  # the pipeline's parts that the weights lie in
    summary: str  # the pipeline in words, for the model card
    sampler: str
    absent: tuple[str, ...] = ()  # parts that the stock class has and this base does without

    @abstractmethod
    def noised(self, x0: Tensor, eps: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, the time that the model is told, and what it should say; `share` [N] in 0..1 is how noisy."""

    @abstractmethod
    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The prediction for noisy latents [N, 4, 16, 16], times [N] and token ids [N, tokens]."""

    @abstractmethod
    def pipeline(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> DiffusionPipeline:
        """These very parts in diffusers' stock pipeline; call it on a copy, for it makes them ready to draw."""

    def quicken(self) -> None:
        """Whatever makes training quicker on a CPU."""


def _new_optimizer(model: Denoiser, plan: DenoiserPlan) -> Together:
    """Muon for the inner matrices; AdamW for embeddings, the two ends, and vectors."""
    embeddings, matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith("text_encoder") and "embedding" in name:
            embeddings.append(parameter)
        elif parameter.ndim > 1 and not name.startswith(model.ends):
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups = [
        {"params": rest, "base_lr": plan.learning_rate},
        {"params": embeddings, "base_lr": plan.embedding_rate},
    ]
    adam = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return Together(Muon(matrices, plan.muon_rate), adam)


def new_training(
    kind: type[Denoiser], plan: DenoiserPlan, tokenizer: CLIPTokenizer, device: torch.device, seed: int
) -> Training:
    """Fresh models with their optimizer, average and random numbers."""
    torch.manual_seed(seed)
    model = kind(tokenizer)
    quicken(model, device)
    if device.type == "cpu":
        model.quicken()
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


def _noise_shares(n: int, draw: torch.Generator) -> Tensor:
    """Spread over 0..1: half evenly, half about the noise levels where shapes are decided."""
    spread = (torch.arange(n) / n + torch.rand((), generator=draw)) % 1.0
    evenly = torch.arange(n) % 2 == 0
    shapes = torch.sigmoid(0.6 + 0.9 * torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4)))
    return torch.where(evenly, spread, shapes)


def train(
    run: Training,
    plan: DenoiserPlan,
    latents: Tensor,
    captions: Captions,
    device: torch.device,
) -> Iterator[float]:
    """Yields each step's loss, from the step the run stands at to the plan's end."""
    model = run.module
    assert isinstance(model, Denoiser)
    model.train()
    forward = model
    if plan.compile:
        # Without this the gradients of embeddings are added up in whatever order the threads come.
        torch.use_deterministic_algorithms(True, warn_only=True)
        forward = torch.compile(model, dynamic=False)
    latents = latents.contiguous(memory_format=torch.channels_last)
    while run.step < plan.steps:
        run.set_learning_rate(learning_rate_factor(run.step, plan.steps, plan.warmup, plan.decay_steps))
        index = captions.pick(plan.batch, run.generator)
        share = _noise_shares(plan.batch, run.generator)
        eps = torch.randn(plan.batch, *latents.shape[1:], generator=run.generator)
        tokens = captions.tokens(index, run.generator)
        noisy, t, target = model.noised(latents[index], eps, share)
        with mixed_precision(device):
            predicted = forward(noisy.to(device), t.to(device), tokens.to(device))
        loss = F.mse_loss(predicted.float(), target.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.average.update()
        run.step += 1
        yield loss.item()


def sample(
    model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, prompts: Sequence[str], seed: int
) -> list[Image.Image]:
    """Pictures as the stock pipeline draws them with a copy of the model, one seed for all."""
    pipeline = copy.deepcopy(model).eval().pipeline(copy.deepcopy(vae), tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    with mixed_precision(next(model.parameters()).device):
        return pipeline(list(prompts), num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators).images
