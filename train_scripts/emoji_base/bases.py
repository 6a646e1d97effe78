"""The embedded bases by name."""

from __future__ import annotations

from .denoiser import Denoiser
from .mmdit import MMDiTDenoiser
from .unet import UNetDenoiser

KINDS: dict[str, type[Denoiser]] = {"emoji": UNetDenoiser, "emoji-dit": MMDiTDenoiser}
