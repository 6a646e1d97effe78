"""The one way a picture is made: previews, class images, comparisons and the web app all call `generate`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from dora_diffusion.errors import ConfigError, PromptError
from dora_diffusion.models.loading import Base

__all__ = ["GenerationRequest", "check_prompt", "generate"]

MOST_SIDE = 4096  # pixels
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerationRequest:
    """One picture. None takes the base's own guidance scale and size (pixels). Raises ConfigError."""

    prompt: str
    seed: int = 0
    negative_prompt: str = ""
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_inference_steps <= 1000:
            raise ConfigError(f"num_inference_steps is {self.num_inference_steps}; it must be between 1 and 1000.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; it must be a whole number of at least 0.")
        for side in (self.width, self.height):
            if side is not None and not 8 <= side <= MOST_SIDE:
                raise ConfigError(f"a side of {side} pixels cannot be drawn; it must be between 8 and {MOST_SIDE}.")
        if self.guidance_scale is not None and not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ConfigError(f"guidance_scale is {self.guidance_scale}; it must be a number of at least 0.")


def check_prompt(pipe: DiffusionPipeline, prompt: str) -> None:
    """Raise PromptError if every tokenizer of the pipeline would cut the prompt, naming the words lost."""
    worst: tuple[int, int, str] | None = None
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None:
            continue
        limit = tokenizer.model_max_length if name != "tokenizer_3" else 256
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(ids) <= limit:
            return
        lost = tokenizer.decode(ids[limit - 1 : -1]).strip()
        if worst is None or limit > worst[1]:
            worst = (len(ids), limit, lost)
    if worst is not None:
        length, limit, lost = worst
        raise PromptError(
            f"the prompt is {length} tokens long and this base reads {limit}: the end, {lost[:80]!r}, "
            f"would be lost. Shorten it: {prompt[:60]!r}…"
        )


def _check_size(base: Base, request: GenerationRequest) -> None:
    for name, side in (("width", request.width), ("height", request.height)):
        if side is None:
            continue
        base.check_side(name, side)
        if side % base.multiple:
            near = max(1, round(side / base.multiple)) * base.multiple
            raise ConfigError(f"{name} is {side}; this base draws multiples of {base.multiple}, such as {near}.")


@torch.inference_mode()
def generate(base: Base, request: GenerationRequest, on_step: OnStep | None = None) -> Image.Image:
    """Draw one picture with whatever adapters are in the base now.

    One picture a call and noise from a CPU generator, so that a seed gives the same picture whatever else is drawn.
    `on_step(done, total)` is called after every denoising step; what it raises stops the drawing. Raises PromptError,
    and ConfigError for a size the base cannot draw.
    """
    check_prompt(base.pipe, request.prompt)
    check_prompt(base.pipe, request.negative_prompt)
    _check_size(base, request)
    if request.negative_prompt and "true_cfg_scale" in inspect.signature(base.pipe.__call__).parameters:
        raise PromptError(
            f"{base.name} draws with a guidance that was distilled into it and would pass over the negative prompt "
            f"{request.negative_prompt[:60]!r}: leave it out."
        )
    parts = [part for part in base.pipe.components.values() if isinstance(part, nn.Module)]
    were_training = [part.training for part in parts]
    for part in parts:  # an adapter in training may have a dropout, in a text encoder too
        part.eval()
    total = request.num_inference_steps

    def report(_pipe: object, step: int, _t: object, values: dict[str, object]) -> dict[str, object]:
        if on_step is not None:
            on_step(step + 1, total)
        return values

    try:
        result = base.pipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=total,
            guidance_scale=base.guidance_scale if request.guidance_scale is None else request.guidance_scale,
            width=request.width or base.size,
            height=request.height or base.size,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            callback_on_step_end=report,
        )
    finally:
        for part, was_training in zip(parts, were_training, strict=True):
            part.train(was_training)
    return result.images[0]
