"""A fused layer's update as the updates of its parts, and parts together again as one of the fused layer.

Output rows are cut wherever a form has them in rows of its own tensors. A LoKr whose rows do not fall together with
those of its first factor keeps the whole product and says which rows of it are the layer's (`rows`). A norm by input
runs over the rows of all parts, so its magnitude is shared (`shared_magnitude`): each part knows its fellows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dora_diffusion.formats.forms import BIASES, Held, form_of, name_of
from dora_diffusion.formats.original import Rows, Transformer

__all__ = ["cannot_fall_apart", "cut", "has_no_parts", "is_open", "is_turned", "together"]

BESIDE_BY_ROW = ("magnitude", "unscaled_magnitude", *BIASES)
Part = dict[str, Tensor]


def cannot_fall_apart(tensors: Held, rows: Sequence[Rows]) -> str:
    """Why a fused layer's update has no such rows; empty when it has."""
    height = form_of(tensors).sizes(tensors).outputs  # 0 where the form is of the inputs
    if height and not all(part.fits(height) for part in rows):
        return f"{height} rows do not fall into {rows[0].of} equal shares"
    return ""


def has_no_parts(tensors: Held, rows: Sequence[Rows]) -> str:
    """What a sound update of a fused layer is that is not the sum of its parts; empty for one that is."""
    of_inputs = {"oft_R", "input_factor"} & tensors.keys()
    if any(part.swapped_if_two for part in rows) and not of_inputs:
        return (
            f"{form_of(tensors).label} of a layer whose halves change places in the last block, without its sizes, so "
            "that only a base says which block that is"
        )
    if len(rows) < 2 and not any(part.swapped for part in rows):
        return ""
    name = name_of(tensors)
    if "oft_R" in tensors:
        return ""
    if name == "boft":
        return "a BOFT of a fused layer, which turns rows of one part into rows of another"
    if name == "oft" and any(_blocks_of(tensors, part) is None for part in rows):
        return "an OFT of a fused layer, with blocks that reach from one part into another"
    return ""


def is_open(model: Transformer, theirs: str, tensors: Held) -> bool:
    """Whether nothing says in which order the checkpoint's layer of this name has its halves."""
    sizes = form_of(tensors).sizes(tensors)
    return any(part.rows.settled(sizes.outputs, sizes.columns).swapped_if_two for part in model.parts(theirs))


def is_turned(model: Transformer, theirs: str, tensors: Held) -> bool:
    """Whether the checkpoint's layer of this name has its two halves the other way round."""
    sizes = form_of(tensors).sizes(tensors)
    return model.is_turned(theirs, sizes.outputs, sizes.columns)


def cut(tensors: Held, rows: Sequence[Rows]) -> list[Part]:
    """The parts of a fused layer's update, each with its rows; of one that was put together of several, their ranks."""
    parts = [_cut_one(tensors, part) for part in rows]
    if len(parts) < 2:
        return parts
    for part in parts:
        if "input_magnitude" in part:
            part["shared_magnitude"] = part.pop("input_magnitude")
    return _own_ranks(parts) if tensors.keys() >= {"lora_A", "alpha"} else parts


def _cut_one(tensors: Held, rows: Rows) -> Part:
    if rows.of == 1 and not rows.swapped:
        return dict(tensors)
    cutter = _by_row if "oft_R" in tensors else _CUTTERS.get(form_of(tensors).name, _by_row)
    part = cutter(tensors, rows)
    return part | {p: rows.cut(tensors[p]) for p in BESIDE_BY_ROW if p in tensors}


def _by_row(tensors: Held, rows: Rows) -> Part:
    return {p: rows.cut(t) if p in form_of(tensors).by_row else t for p, t in tensors.items()}


def _cut_loha(tensors: Held, rows: Rows) -> Part:
    """With Tucker's cores the factor of the outputs has them in its columns."""
    if "hada_t1" not in tensors:
        return _by_row(tensors, rows)
    return {p: rows.cut(t.T).T if p in ("hada_w1_a", "hada_w2_a") else t for p, t in tensors.items()}


def _cut_lokr(tensors: Held, rows: Rows) -> Part:
    first = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
    if "rows" not in tensors and tensors[first].shape[0] % (2 if rows.swapped else rows.of) == 0:
        return {**tensors, first: rows.cut(tensors[first])}
    height = form_of(tensors).sizes(tensors).outputs
    numbers = torch.arange(height)
    if "rows" in tensors:  # cut before: these are rows of those
        numbers = torch.cat([numbers[int(start) : int(stop)] for start, stop in tensors["rows"]])
    numbers = rows.cut(numbers)
    if torch.equal(numbers, torch.arange(height)):
        return {p: t for p, t in tensors.items() if p != "rows"}
    breaks = (numbers.diff() != 1).nonzero().flatten() + 1
    ranges = [(int(run[0]), int(run[-1]) + 1) for run in torch.tensor_split(numbers, breaks)]
    return {**tensors, "rows": torch.tensor(ranges, dtype=torch.float32)}  # [ranges, 2]


def _blocks_of(tensors: Held, rows: Rows) -> Tensor | None:
    """The numbers of the blocks that turn these rows among themselves; None where one reaches further."""
    blocks, size = tensors["oft_blocks"].shape[:2]
    numbers = rows.cut(torch.arange(blocks * size))
    if len(numbers) % size:
        return None
    runs = numbers.reshape(-1, size)
    whole = (runs[:, 0] % size == 0).all() and (runs.diff(dim=1) == 1).all()
    return runs[:, 0] // size if whole else None


def _cut_oft(tensors: Held, rows: Rows) -> Part:
    """The blocks of these rows."""
    numbers, part = _blocks_of(tensors, rows), _constrained(tensors)
    assert numbers is not None, "callers ask has_no_parts first"
    part["oft_blocks"] = part["oft_blocks"][numbers]
    return part | ({"rescale": rows.cut(tensors["rescale"])} if "rescale" in tensors else {})


def _constrained(tensors: Held) -> Part:
    """An OFT whose constraint, which is on all of its blocks together, is done with."""
    P, constraint = tensors["oft_blocks"], float(tensors.get("constraint", torch.zeros(())))
    if constraint > 0:
        norm, limit = (P - P.mT).double().norm(), constraint * P.shape[0] * P.shape[1]
        P = (P.double() * min(1.0, limit / (float(norm) + 1e-8))).float()
    return {**tensors, "oft_blocks": P, "constraint": torch.zeros(())}


_CUTTERS: dict[str, Callable[[Held, Rows], Part]] = {"loha": _cut_loha, "lokr": _cut_lokr, "oft": _cut_oft}


def _own_ranks(parts: list[Part]) -> list[Part]:
    """Of a low-rank update that was put together of its parts' each part has its own ranks again."""
    used = [part["lora_B"].flatten(1).ne(0).any(dim=0) for part in parts]  # [rank] of each
    if not torch.stack(used).sum(dim=0).eq(1).all() or not all(columns.any() for columns in used):
        return parts
    for part, columns in zip(parts, used):
        part["lora_A"], part["lora_B"] = part["lora_A"][columns], part["lora_B"][:, columns]
        part["alpha"] = part["alpha"].double() * (columns.sum() / columns.numel())  # s stays
    return parts


def together(parts: Sequence[Mapping[str, Tensor]]) -> Part | None:
    """The fused layer's update whose parts these are, all of them and in order; None where they are of no such one."""
    first = parts[0]
    if any(part.keys() != first.keys() for part in parts) or first.keys() & {"unscaled_magnitude", "input_magnitude"}:
        return None  # a norm by input of each alone is none of all their rows
    if name_of(first) == "boft":
        return None
    if name_of(first) == "oft" and "oft_blocks" in first:
        parts = [_constrained(part) for part in parts]
        first = parts[0]
    whole: Part = {}
    for name, tensor in first.items():
        if name == "rows":
            continue
        tensors = [part[name] for part in parts]
        axis = _row_axis(name, first)
        if axis is not None:
            if len({(*t.shape[:axis], *t.shape[axis + 1 :]) for t in tensors}) > 1:
                return None
            whole[name] = torch.cat(tensors, dim=axis)
        elif all(torch.equal(t, tensor) for t in tensors):
            whole["input_magnitude" if name == "shared_magnitude" else name] = tensor
        else:
            return None
    if "rows" in first and not _covers([part["rows"] for part in parts], form_of(whole).sizes(whole).outputs):
        return None
    return whole


def _row_axis(name: str, held: Held) -> int | None:
    """The axis along which parts of this tensor stand one behind the other; None for one that they share."""
    form = form_of(held)
    if name in BESIDE_BY_ROW:
        return 0
    if form.name == "loha" and name in form.by_row:
        return 1 if "hada_t1" in held else 0
    if form.name == "lokr":
        return 0 if name in ("lokr_w1", "lokr_w1_a") and "rows" not in held else None
    return 0 if name in form.by_row or name in ("oft_blocks", "rescale") else None


def _covers(rows: Sequence[Tensor], height: int) -> bool:
    """Whether the ranges are all rows of the fused layer, in order."""
    ranges = [(int(start), int(stop)) for each in rows for start, stop in each]
    return [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])] and ranges[-1][1] == height
