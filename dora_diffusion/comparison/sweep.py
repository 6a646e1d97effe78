"""Sweeps: prompts x seeds x strengths of each adapter, as one comparison with many columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dora_diffusion.comparison.compare import columns_of
from dora_diffusion.comparison.request import Column, CompareRequest
from dora_diffusion.errors import ConfigError

__all__ = ["MOST_PICTURES", "sweep_request", "sweep_size"]

MOST_PICTURES = 300


def sweep_size(prompts: int, seeds: int, strengths: int, adapters: int) -> int:
    """How many pictures a sweep draws, the base's among them."""
    return prompts * seeds * (1 + strengths * adapters)


def sweep_request(
    prompts: Sequence[str],
    seeds: Sequence[int],
    strengths: Sequence[float],
    adapters: Sequence[Path],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float | None = None,
    negative_prompt: str = "",
    width: int | None = None,
    height: int | None = None,
    partial: bool = False,
) -> CompareRequest:
    """The base's column, then each adapter at each strength. Raises ConfigError and AdapterFileError."""
    if not strengths or not adapters:
        raise ConfigError("a sweep needs at least one strength and one adapter.")
    size = sweep_size(len(prompts), len(seeds), len(strengths), len(adapters))
    if size > MOST_PICTURES:
        raise ConfigError(f"{size} pictures are more than the {MOST_PICTURES} of one sweep. Give fewer of something.")
    columns = tuple(
        Column(named.label, named.path, strength)
        for named in columns_of(adapters, partial=partial)
        for strength in strengths
    )
    return CompareRequest(
        prompts=tuple(prompts),
        seeds=tuple(seeds),
        adapters=columns,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        partial=partial,
    )
