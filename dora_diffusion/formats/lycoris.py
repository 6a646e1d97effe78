"""A module's tensors by the endings of LyCORIS's keys, which the layouts of kohya and ComfyUI have too."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.content import AdapterFile
from dora_diffusion.formats.forms import form_of
from dora_diffusion.formats.fusing import Held

__all__ = ["module_keys"]

ENDINGS = {
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "difference": "diff",
    "bias_difference": "diff_b",
    "replacement": "set_weight",
    "unscaled_magnitude": "magnitude",
    "constraint": "alpha",
    "oft_R": "oft_R.weight",
    "output_factor": "weight",
    "input_factor": "weight",
    **{name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")},
}
# Beside other updates, where LyCORIS looks for them; ComfyUI and Forge read both spellings.
NORM_ENDINGS = {"difference": "w_norm", "bias_difference": "b_norm"}


def module_keys(name: str, held: Held, file: AdapterFile, layer: str) -> Iterator[tuple[str, Tensor]]:
    """A module's keys, with the scale of this layer of the file."""
    form = form_of(held)
    is_norm = "difference" in held and held["difference"].dim() == 1 and file.config.kind != "full"
    endings = ENDINGS | (NORM_ENDINGS if is_norm else {})
    if alone := [p for p in ("rows", "shared_magnitude") if p in held]:
        what = "a norm over the rows" if alone[-1] == "shared_magnitude" else "rows of a LoKr"
        raise AdapterFileError(
            f"{file.path}: {layer} has {what} of a fused layer whose other parts are not with it, so that it cannot be "
            "written by itself. Write it as a difference, which is exact everywhere (--to diff, with the base)."
        )
    for parameter, tensor in held.items():
        if parameter == "oft_scaled":
            continue
        if parameter in ("magnitude", "input_magnitude"):
            yield f"{name}.dora_scale", _dora_scale(parameter, tensor, held)
        else:
            yield f"{name}.{endings.get(parameter, parameter)}", tensor
    if "oft_scaled" in held:
        yield f"{name}.oft_R.scaled_oft", torch.tensor(True)
    if form.name == "ia3":
        yield f"{name}.on_input", torch.tensor(int("input_factor" in held))
    elif form.is_scaled(held):
        yield f"{name}.alpha", torch.tensor(file.scale_of(layer) * form.rank_of(held))
    elif form.name == "lokr":  # LyCORIS reads none without an alpha, whatever it is
        yield f"{name}.alpha", torch.tensor(float(file.config.rank_of(layer)))


def _dora_scale(parameter: str, m: Tensor, held: Held) -> Tensor:
    """With the weight's number of axes: LoRA's A tells it, of other forms the magnitude has it."""
    ones = (1,) * (held["lora_A"].dim() - 2 if "lora_A" in held else max(m.dim() - 2, 0))
    return m.reshape((-1, 1, *ones) if parameter == "magnitude" else (1, -1, *ones))
