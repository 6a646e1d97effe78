"""One module of a file: whether its tensors go together, and the one form they are brought into."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dora_diffusion.formats.forms import (
    MAGNITUDES,
    Form,
    Held,
    bias_problems,
    form_of,
    forms_in,
    magnitude_problem,
)

__all__ = ["check_module", "foreign_kind", "one_form"]


def check_module(held: Held) -> tuple[list[str], list[str]]:
    """What is missing of a module, and what is misshapen, each in words."""
    held = _by_their_parameters(held)
    found = forms_in(held)
    if "on_input" in held:
        return _without_factor(held)
    if not found:
        return ["lora_A", "lora_B"], []
    if len(found) > 1:
        return [], _of_two_forms(found, held)
    [form] = found
    missing, beside = form.missing_and_beside(held)
    if "scalar" in held and form.name not in SCALED_FIRST:
        beside.append("scalar")
    if not form.takes_magnitude:
        beside += [p for p in MAGNITUDES if p in held]
    if missing:
        return missing, []
    if beside:
        return [], [f"{p} beside {_said(form)}" for p in beside]
    if problem := form.problem(held):
        return [], [problem]
    wrong = _magnitude_problems(form, held) + _of_one_number(held) + bias_problems(held, form) + _shape_problems(held)
    return [], wrong + _alpha_problems(held, form.is_scaled(held))


def _without_factor(held: Held) -> tuple[list[str], list[str]]:
    """What is wrong with an IA3 that could not be told by its input or output."""
    on_input = held["on_input"]
    wrong = on_input.numel() != 1 or on_input.item() not in (0, 1)
    shown = f"on_input of shape {list(on_input.shape)}" if on_input.numel() != 1 else f"on_input is {on_input.item():g}"
    return ([] if "factor" in held else ["weight"]), [f"{shown}; it must be 0 or 1"] if wrong else []


def _said(form: Form) -> str:
    return "a whole difference" if form.name == "difference" else form.label


def _of_two_forms(found: Sequence[Form], held: Held) -> list[str]:
    """A whole difference beside something else is said of that, as it has always been."""
    if any(form.name == "difference" for form in found):
        return [f"{p} beside a whole difference" for p in held if p not in ("difference", "alpha")]
    return [f"two forms of update, {' and '.join(dict.fromkeys(form.label for form in found))}, of one layer"]


def _by_their_parameters(held: Held) -> dict[str, Tensor]:
    """What means one thing beside another by the name of what it is: IA3's factor, OFT's constraint."""
    tensors = dict(held)
    if "factor" in tensors and "on_input" in tensors:
        on_input = tensors["on_input"]
        if on_input.numel() == 1 and on_input.item() in (0, 1):
            del tensors["on_input"]
            tensors["input_factor" if on_input.item() else "output_factor"] = tensors.pop("factor")
    if "oft_blocks" in tensors:
        # Older files have no alpha: it is the constraint, and 0 is none.
        tensors["constraint"] = tensors.pop("alpha", torch.zeros(()))
    if _is_old_glora(tensors):
        for first, second in (("a1", "a2"), ("b1", "b2")):
            tensors[first], tensors[second] = tensors[second], tensors[first]
    return tensors


def _is_old_glora(held: Held) -> bool:
    """LyCORIS's first GLoRA called a1 what it calls a2 now, and b1 what it calls b2."""
    if not held.keys() >= {"a1", "a2", "b1", "b2"} or any(held[p].dim() < 2 for p in ("a1", "a2", "b1", "b2")):
        return False
    rows, columns = ([held[p].shape[axis] for p in ("a1", "a2", "b1", "b2")] for axis in (0, 1))
    is_new = columns[0] == rows[1] == columns[2] == rows[3]
    is_old = rows[0] == columns[1] == rows[2] == columns[3]
    # On a square layer both fit, and the rank is the smaller of the two.
    return is_old and (not is_new or rows[0] < columns[0])


def foreign_kind(held: Held, peft_named: bool) -> str:
    """What a module is that is sound and not read here; empty for one that is read, or broken."""
    dims = {held[p].dim() for p in ("lora_A", "lora_B", "difference", "replacement") if p in held}
    if "oft_R" in held and peft_named:
        return "PEFT's OFT"
    if dims and dims <= {3, 5}:
        return "an update of convolutions along one axis or three, as models for sound and video have them"
    return ""


def _magnitude_problems(form: Form, held: Held) -> list[str]:
    if form.name == "lora":
        A, B = held["lora_A"], held["lora_B"]
        sizes = f"{B.shape[0]} outputs and {A.shape[1]} inputs"
        wrong = [
            f"{p} of shape {list(held[p].shape)} for {sizes}" for p in MAGNITUDES if p in held and not _fits(p, held)
        ]
    else:
        problem = magnitude_problem(held, form.sizes(held))
        wrong = [problem] if problem else []
    return wrong + (["two magnitudes"] if sum(p in held for p in MAGNITUDES) > 1 else [])


def _fits(parameter: str, held: Held) -> bool:
    m, out = held[parameter], held["lora_B"].shape[0]
    ones = (1,) * (held["lora_A"].dim() - 2)
    if parameter == "dora_scale":
        return tuple(m.shape) in ((out, 1, *ones), (1, held["lora_A"].shape[1], *ones), (out,), (out, 1))
    return tuple(m.shape) in ((out,), (out, 1), (1, out, *ones), (out, 1, *ones))


def _alpha_problems(held: Held, counts: bool) -> list[str]:
    alpha = held.get("alpha")
    if alpha is None:
        return []
    if alpha.numel() != 1:
        return [f"alpha of shape {list(alpha.shape)}"]
    if not counts:
        return []
    value = float(alpha)
    return [] if math.isfinite(value) and value > 0 else [f"alpha is {value:g}; it must be above 0"]


def _shape_problems(held: Held) -> list[str]:
    """ComfyUI pads a weight to this shape before it adds the update, which has that shape itself."""
    if "reshape" not in held:
        return []
    shape, own = held["reshape"].tolist(), list(form_of(held).sizes(held).shape)
    return [] if shape == own else [f"reshape_weight says {shape}, the update is for {own}"]


def _of_one_number(held: Held) -> list[str]:
    scalar = held.get("scalar")
    wrong = scalar is not None and (scalar.numel() != 1 or not math.isfinite(float(scalar)))
    return [f"scalar of shape {list(scalar.shape)}"] if wrong and scalar is not None else []


# LyCORIS's old files keep a trained factor of the whole update beside it; newer ones multiply it into these.
SCALED_FIRST = {"lora": ("lora_B",), "loha": ("hada_w1_a",), "lokr": ("lokr_w1", "lokr_w1_a"), "glora": ("a2", "b2")}


def one_form(held: Held) -> tuple[dict[str, Tensor], list[str]]:
    """A checked module's tensors by the names of our parameters, and what is worth saying of it."""
    tensors, notes = _by_their_parameters(held), []
    form = form_of(tensors)
    if "scalar" in tensors:
        scalar = tensors.pop("scalar").float().reshape(())
        for name in SCALED_FIRST[form.name]:
            if name in tensors:
                tensors[name] = tensors[name].float() * scalar
        notes.append("scalar, a factor of the whole update, is multiplied into its first tensor, as LyCORIS does now")
    if "lora_mid" in tensors:
        down = tensors["lora_A"].flatten(1).float()  # [r, in]
        tensors["lora_A"] = torch.einsum("mn...,nj->mj...", tensors.pop("lora_mid").float(), down)
        notes.append("lora_mid (a Tucker core) is multiplied into lora_A: the same update, without the core")
    if "reshape" in tensors:
        shape = [int(n) for n in tensors.pop("reshape").tolist()]
        notes.append(
            f"a weight is padded with zeros to {shape} (reshape_weight): the base has to have it in that shape"
        )
    if form.name == "loha" and "hada_t1" not in tensors:
        tensors |= {p: t.flatten(1) for p, t in tensors.items() if p.startswith("hada_")}
    if form.name == "glora" and _is_old_glora(held):
        notes.append("a1 and a2, b1 and b2 have changed places: LyCORIS's first GLoRA called them the other way round")
    if "constraint" in tensors:
        tensors["constraint"] = tensors["constraint"].reshape(())
    if form.name == "lora" and tensors["lora_B"].dim() < tensors["lora_A"].dim():
        tensors["lora_B"] = tensors["lora_B"][:, :, None, None]
    if "dora_scale" in tensors:
        notes += _named_by_axis(tensors, form)
    if form.name == "lora":
        for parameter in ("magnitude", "unscaled_magnitude", "input_magnitude"):
            if parameter in tensors:
                tensors[parameter] = tensors[parameter].flatten()
    if not form.is_scaled(tensors) and "alpha" in tensors and float(tensors["alpha"]) != form.rank_of(tensors):
        del tensors["alpha"]
    return tensors, notes


def _named_by_axis(tensors: dict[str, Tensor], form: Form) -> list[str]:
    """A dora_scale by the axis that its shape tells. Other forms than LoRA keep its ones, which tell a convolution."""
    m, sizes = tensors.pop("dora_scale"), form.sizes(tensors)
    by_output = m.shape[0] == sizes.outputs and m.numel() == sizes.outputs
    tensors["magnitude" if by_output else "input_magnitude"] = m
    square = tensors["lora_A"].shape[1] if form.name == "lora" else sizes.columns
    if by_output and m.dim() == 1 and square == sizes.outputs:
        return ["a dora_scale with one axis on a square layer: read as the norm by output, as PEFT writes it"]
    return []
