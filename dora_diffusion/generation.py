"""The one way a picture is made: previews, class images, comparisons and the web app all call `generate`."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase

from dora_diffusion.errors import ConfigError, PromptError
from dora_diffusion.memory import within_memory
from dora_diffusion.models.loading import Base, ways_to_load_less

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
    most = _default(pipe, "max_sequence_length") or sys.maxsize
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None:
            continue
        limit = min(tokenizer.model_max_length, most - _template_tokens(pipe, tokenizer))
        # A word that came with an adapter may stand for several vectors, a token each.
        text = pipe.maybe_convert_prompt(prompt, tokenizer) if hasattr(pipe, "maybe_convert_prompt") else prompt
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
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


def _default(pipe: DiffusionPipeline, parameter: str) -> int | float | None:
    """The default of one of the pipeline's parameters; None too where it has no such parameter."""
    found = inspect.signature(pipe.__call__).parameters.get(parameter)
    return None if found is None else found.default


def _template_tokens(pipe: DiffusionPipeline, tokenizer: PreTrainedTokenizerBase) -> int:
    """What the chat template takes of the tokens that a language model reads; Qwen-Image does not count its own.

    Without thinking the template is a few tokens longer than with it; pipelines differ in which they ask for.
    """
    if not tokenizer.chat_template or hasattr(pipe, "prompt_template_encode"):
        return 0
    empty = [{"role": "user", "content": ""}]
    text = tokenizer.apply_chat_template(empty, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return len(tokenizer(text).input_ids)


def _guidance(base: Base, request: GenerationRequest) -> dict[str, float | str]:
    """Guidance scale and negative prompt by this pipeline's names for them. Raises PromptError."""
    scale = base.guidance_scale if request.guidance_scale is None else request.guidance_scale
    parameters = inspect.signature(base.pipe.__call__).parameters
    if "true_cfg_scale" in parameters and _default(base.pipe, "guidance_scale") is None:
        return {"true_cfg_scale": scale, "negative_prompt": request.negative_prompt}
    if "negative_prompt" in parameters and "true_cfg_scale" not in parameters:
        return {"guidance_scale": scale, "negative_prompt": request.negative_prompt}
    if request.negative_prompt:  # FLUX.1's guidance is distilled into it, FLUX.2 klein's is from the empty prompt
        raise PromptError(
            f"{base.name} takes no negative prompt: its pipeline would pass over {request.negative_prompt[:60]!r}. "
            "Leave it out."
        )
    return {"guidance_scale": scale}


@torch.inference_mode()
def generate(base: Base, request: GenerationRequest, on_step: OnStep | None = None) -> Image.Image:
    """Draw one picture with whatever adapters are in the base now.

    One picture a call and noise from a CPU generator, so that a seed gives the same picture whatever else is drawn.
    `on_step(done, total)` is called after every denoising step; what it raises stops the drawing. Raises PromptError,
    NotEnoughMemoryError, and ConfigError for a size the base cannot draw.
    """
    width, height = request.width or base.size, request.height or base.size
    ways = [f"a smaller picture than {width} x {height}", *ways_to_load_less(base.packing)]
    return within_memory(lambda: _generate(base, request, on_step), "to draw", base.device, ways)


def _generate(base: Base, request: GenerationRequest, on_step: OnStep | None) -> Image.Image:
    check_prompt(base.pipe, request.prompt)
    check_prompt(base.pipe, request.negative_prompt)
    for name, side in (("width", request.width), ("height", request.height)):
        if side is not None:
            base.check_side(name, side)
    guidance = _guidance(base, request)
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
            num_inference_steps=total,
            **guidance,
            width=request.width or base.size,
            height=request.height or base.size,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            callback_on_step_end=report,
        )
    finally:
        for part, was_training in zip(parts, were_training, strict=True):
            part.train(was_training)
    return result.images[0]
