"""Load a base model: the embedded one, a folder, a single file or a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from dora_diffusion.errors import BaseModelError, ConfigError
from dora_diffusion.formats.loading import text_encoders_of
from dora_diffusion.formats.storage import read_header
from dora_diffusion.memory import ran_out, within_memory
from dora_diffusion.models.families import Family, family_of
from dora_diffusion.models.naming import ASSETS, EMBEDDED, find_base
from dora_diffusion.models.quantising import Packing, base_label, quantise
from dora_diffusion.quiet import quieten

__all__ = ["Base", "Device", "load_base", "pick_device", "ways_to_load_less"]

Device = Literal["auto", "cpu", "cuda", "mps"]
ON_DISK = {"F16": torch.float16, "BF16": torch.bfloat16}  # which float32 holds exactly


@dataclass(frozen=True)
class Base:
    """A loaded base: the diffusers pipeline, and what the rest asks of it."""

    name: str
    pipe: DiffusionPipeline
    packing: Packing | None = None  # how load_base quantised the denoiser's blocks

    @cached_property
    def family(self) -> Family:
        return family_of(self.pipe)

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer. Raises BaseModelError when the pipeline has neither."""
        for part in ("unet", "transformer"):
            module = getattr(self.pipe, part, None)
            if isinstance(module, nn.Module):
                return module
        raise BaseModelError(f"{self.name} is a {type(self.pipe).__name__}, which has no unet and no transformer.")

    @property
    def label(self) -> str:
        """The base as people should read it."""
        return base_label(self.name, self.packing)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is; the other parts may wait elsewhere."""
        return next(self.denoiser.parameters()).device

    def put_aside(self) -> None:
        """Move all but the denoiser to main memory: what only encodes and decodes is as large as the denoiser today."""
        self._move_others(torch.device("cpu"))

    def bring_back(self) -> None:
        """Move what was put aside to the denoiser's device again."""
        self._move_others(self.device)

    def _move_others(self, device: torch.device) -> None:
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module) and part is not self.denoiser:
                part.to(device)

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders that can be trained beside the denoiser, by their names in the pipeline."""
        return {name: m for name, m in text_encoders_of(self.pipe).items() if name in self.family.text_encoders}

    @property
    def vae_scale(self) -> int:
        """Pixels per latent, along each side."""
        return int(self.pipe.vae_scale_factor)

    @property
    def size(self) -> int:
        """The side in pixels of the square pictures this base was made for."""
        latents = self.denoiser.config.get("sample_size") or getattr(self.pipe, "default_sample_size", 128)  # type: ignore[operator, union-attr]
        return int(latents) * self.vae_scale

    @property
    def multiple(self) -> int:
        """What a picture's sides in pixels must be multiples of."""
        patch = self.denoiser.config.get("patch_size") or 1  # type: ignore[operator, union-attr]
        return self.vae_scale * int(patch) * self.family.packs

    @property
    def largest(self) -> int | None:
        """The longest side in pixels that the denoiser has places for; None when there is no end to it."""
        places, patch = (self.denoiser.config.get(key) for key in ("pos_embed_max_size", "patch_size"))  # type: ignore[operator, union-attr]
        return int(places) * int(patch) * self.vae_scale if places else None

    def check_side(self, name: str, side: int) -> None:
        """Raise ConfigError when a picture with this side in pixels, called `name`, cannot be made."""
        if self.largest and side > self.largest:
            raise ConfigError(f"{name} is {side}; this base draws at most {self.largest} pixels a side.")
        if side % self.multiple:
            near = max(1, round(side / self.multiple)) * self.multiple
            raise ConfigError(f"{name} is {side}; this base wants a multiple of {self.multiple}, such as {near}.")

    @property
    def guidance_scale(self) -> float:
        return EMBEDDED[self.name].guidance_scale if self.name in EMBEDDED else self.family.guidance_scale

    @property
    def learning_rate(self) -> float:
        return EMBEDDED[self.name].learning_rate if self.name in EMBEDDED else self.family.learning_rate


def pick_device(device: Device | torch.device = "auto") -> torch.device:
    """The device named, or the best one there is. Raises BaseModelError when the named one is missing."""
    if isinstance(device, torch.device):
        return device
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available.get(device, False):
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise BaseModelError(f"device {device!r} is not available here; these are: {there}.")
    return torch.device(device)


def load_base(
    name: str = "emoji",
    *,
    device: Device | torch.device = "auto",
    dtype: torch.dtype | None = None,
    packing: Packing | None = None,
) -> Base:
    """Load a base by "emoji" or "emoji-dit", a folder in diffusers layout, a .safetensors checkpoint or a hub id.

    dtype defaults to float32 on a CPU and bfloat16 elsewhere; `packing` quantises the denoiser's blocks. Weights are
    read from safetensors only. Raises BaseModelError, NotEnoughMemoryError, and ConfigError for a packing that cannot
    be had.
    """
    name = find_base(name)
    target = pick_device(device)
    dtype = dtype or (torch.float32 if target.type == "cpu" else torch.bfloat16)
    quieten()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    return within_memory(
        lambda: _load_base(name, target, dtype, packing),
        f"to load the base {name!r}",
        target,
        ways_to_load_less(packing),
    )


def _load_base(name: str, device: torch.device, dtype: torch.dtype, packing: Packing | None) -> Base:
    base = Base(name, _load_pipeline(name, dtype, packing), packing)
    base.pipe.set_progress_bar_config(disable=True)
    if packing is not None:
        quantise(base.denoiser, packing, device, dtype)
    base.pipe.to(device)
    return base


def ways_to_load_less(packing: Packing | None) -> list[str]:
    """What leaves more memory to a base that is loaded as `packing` says."""
    packed = (
        'the base packed (--quantise nf4 of generate, compare and app, quantise = "nf4" of a training, '
        'packing="nf4" in Python)'
    )
    return [*([] if packing == "nf4" else [packed]), "other programs closed that hold some of it"]


def _load_pipeline(name: str, dtype: torch.dtype, packing: Packing | None) -> DiffusionPipeline:
    path = Path(ASSETS / EMBEDDED[name].folder if name in EMBEDDED else name)
    try:
        if path.is_file():
            return _load_single_file(path, dtype)
        if not path.is_dir() and packing is not None:
            path = Path(DiffusionPipeline.download(name, use_safetensors=True))
        if path.is_dir():
            dtypes = _dtypes(path, dtype) if packing is not None else dtype
            return DiffusionPipeline.from_pretrained(path, dtype=dtypes, use_safetensors=True, **_absent_parts(path))
        return DiffusionPipeline.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except BaseModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, SafetensorError) as error:
        if ran_out(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"cannot load the base {name!r}: {reason} "
            "Check the name, the connection to the hub and, for a gated model, that you are logged in "
            "(`hf auth login`); or use the embedded base with --base emoji."
        ) from error


def _dtypes(folder: Path, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What the parts are read in where the denoiser will be packed: in float32 all but the denoiser, which stays as it
    lies on disk, mapped from there, until each of its layers is packed."""
    dtypes = {"default": dtype}
    for part in ("unet", "transformer"):
        files = sorted((folder / part).glob("*.safetensors"))
        held = {its for file in files for its, _ in read_header(file, "base").tensors.values()}
        if dtype == torch.float32 and len(held) == 1:
            dtypes[part] = ON_DISK.get(held.pop(), dtype)
    return dtypes


def _absent_parts(folder: Path) -> dict[str, None]:
    """Parts the folder was saved without, such as Stable Diffusion 3's third text encoder: they must be named."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name: None for name, entry in index.items() if entry == [None, None]}


def _load_single_file(path: Path, dtype: torch.dtype) -> DiffusionPipeline:
    if path.suffix != ".safetensors":
        raise BaseModelError(f"{path}: only .safetensors checkpoints are loaded; others can run code when opened.")
    from diffusers.pipelines.stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline

    with safe_open(str(path), framework="pt") as file:
        keys = set(file.keys())
    if any("lora_" in key for key in keys):
        raise BaseModelError(f"{path} is an adapter, no base: give it as an adapter, and with --base what it is for.")
    if not all(any(key.startswith(part) for key in keys) for part in ("model.diffusion_model.", "first_stage_model.")):
        raise BaseModelError(
            f"{path} is no whole checkpoint of Stable Diffusion 1, 2 or XL, the ones that are read from a single file. "
            "For another family, give the folder that its diffusers pipeline was saved in, or its hub id."
        )
    # SDXL's second text encoder is what tells the two checkpoint layouts apart.
    is_xl = any(key.startswith("conditioner.embedders.1.") for key in keys)
    pipeline = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    pipe = pipeline.from_single_file(str(path), dtype=dtype)
    if "v_pred" in keys:  # how SDXL checkpoints that predict v say so; diffusers would take them for epsilon
        changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in keys}
        changes |= {"timestep_spacing": "trailing"} if "ztsnr" in keys else {}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    return pipe
