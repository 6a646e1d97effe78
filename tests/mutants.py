"""Adapter files gone wrong in every way that a seed can think of, and a second reading of them to compare with.

`reference_deltas` shares nothing with the package: the header by hand, numbers by numpy, formulas in float64. It says
what W' - W0 a file means for each layer, or None where it means nothing that an adapter could.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import dialect_files as files
import numpy as np
import torch
from dialect_files import make
from mutant_forms import FORM_LEAVES, form_delta, form_seeds
from torch import Tensor, nn

SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "BOOL": 1,
}
Entries = dict[str, tuple[str, list[int], bytes]]  # dtype, shape, numbers
Denoiser = nn.Module


class Tiny(nn.Module):
    """Four layers: square, oblong, a convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q = nn.Linear(6, 6)
        self.proj_in = nn.Linear(5, 7)
        self.conv_in = nn.Conv2d(3, 4, 3)
        self.norm1 = nn.GroupNorm(2, 4)
        nn.init.normal_(self.norm1.weight)


def seeds(model: nn.Module) -> list[tuple[Entries, dict[str, str]]]:
    """One sound file of each dialect."""
    paths = ["to_q", "proj_in", "conv_in"]
    linear = paths[:2]
    peft_header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 6.0, "unet.use_rslora": False})}
    ours = {"dora_diffusion": json.dumps({"kind": "dora", "rank": 4, "alpha": 6.0, "target_modules": ["to_q"]})}
    made = [
        (make(model, paths, files.flat("lora_unet_"), files.kohya, files.lora_delta), {"ss_output_name": "a"}),
        (make(model, paths, files.flat("lora_unet_"), files.kohya_dora, files.dora_delta), ours),
        (
            make(model, paths, files.flat("lora_unet_"), files.kohya_input_axis, files.input_axis_delta),
            {"ot_revision": "1"},
        ),
        (make(model, paths, files.dotted("unet."), _peft_dora, files.dora_delta), peft_header | ours),
        (make(model, paths, files.dotted("unet."), files.peft, files.lora_delta), {}),
        (make(model, linear, files.dotted("base_model.model."), files.nvlabs, files.dora_delta), {}),
        (make(model, paths, files.flat("lora_unet_"), _difference, files.lora_delta), {}),
    ]
    for number, ends in ((0, ("diff_b", "w_norm", "b_norm")), (4, ("lora_B.bias",)), (6, ("diff_b", "diff", "diff_b"))):
        m, header = made[number]
        prefix = "unet." if number == 4 else "lora_unet_"
        biases = {f"{prefix}{path}.{ends[0]}": torch.randn(len(model.get_parameter(f"{path}.bias"))) for path in paths}
        norm = {f"{prefix}norm1.{end}": torch.randn(4) for end in ends[1:]}
        made.append((replace(m, tensors={**m.tensors, **biases, **norm}), header))
    made.append((replace(m, tensors={"diffusion_model.norm1.set_weight": torch.randn(4), **biases}), {}))
    sound = [({key: entry_of(t) for key, t in m.tensors.items()}, header) for m, header in made]
    return sound + [({key: entry_of(t) for key, t in tensors.items()}, {}) for tensors in form_seeds(model)]


def _peft_dora(v: files.Values) -> dict[str, Tensor]:
    m = v.by_output.reshape(1, -1, 1, 1) if v.W0.dim() == 4 else v.by_output
    return {**files.peft(v), "lora_magnitude_vector": m}


def _difference(v: files.Values) -> dict[str, Tensor]:
    return {"diff": files.lora_delta(v).float()}


def entry_of(tensor: Tensor) -> tuple[str, list[int], bytes]:
    return "F32", list(tensor.shape), tensor.detach().contiguous().numpy().astype("<f4").tobytes()


def pack(entries: Entries, metadata: object, order: list[str] | None = None) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    data, at = b"", 0
    for key in order or entries:
        dtype, shape, numbers = entries[key]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(numbers)]}
        data, at = data + numbers, at + len(numbers)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# Mutations.


def mutant(rng: random.Random, sound: list[tuple[Entries, dict[str, str]]]) -> bytes:
    """One to three changes of a sound file: of its tensors, then of its header's text, then of its bytes."""
    entries, metadata = rng.choice(sound)
    entries, metadata = dict(entries), dict(metadata)
    level = rng.choice(("tensors", "tensors", "header", "bytes"))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if level == "tensors" and entries:
            rng.choice(TENSOR_CHANGES)(rng, entries, metadata, sound)
    data = bytearray(pack(entries, metadata))
    for _ in range(rng.choice((1, 1, 2, 3))):
        if level == "header":
            rng.choice(HEADER_CHANGES)(rng, data)
        elif level == "bytes":
            rng.choice(BYTE_CHANGES)(rng, data)
    return bytes(data)


def _drop(rng: random.Random, entries: Entries, *_: object) -> None:
    del entries[rng.choice(list(entries))]


def _rename(
    rng: random.Random, entries: Entries, metadata: object, sound: list[tuple[Entries, dict[str, str]]]
) -> None:
    old = rng.choice(list(entries))
    other = rng.choice(list(rng.choice(sound)[0]))
    module, _, leaf = old.partition(".") if rng.random() < 0.5 else old.rpartition(".")
    new = rng.choice((
        other, old + "x", old[1:], old.upper(), old.replace(".", "_"), old.replace("_", "."), "", "." + leaf, module,
        f"{module}.alpha", f"{module}.dora_scale", f"{module}.magnitude", f"{module}.diff", f"{module}.diff_b",
        f"{module}.w_norm", f"{module}.b_norm", f"{module}.set_weight", f"{module}.reshape_weight", f"{module}.scale",
        f"{module}.lora_B.bias",
        old.replace("lora_unet_", "lora_te_"), old.replace("unet.", "transformer."), "lycoris_" + old, f"{old}.weight",
        old.replace("to_q", "proj_in"), old.replace("to_q", "to_k"), "x" * 3000,
    ))  # fmt: skip
    entries[new] = entries.pop(old)


def _values(rng: random.Random, entries: Entries, *_: object) -> None:
    key = rng.choice(list(entries))
    dtype, shape, numbers = entries[key]
    if dtype == "F32" and numbers:
        a = np.frombuffer(numbers, "<f4").copy()
        a[rng.randrange(len(a))] = rng.choice((np.nan, np.inf, -np.inf, 0, -1, 1e38, 1e-45, 1e7, -1e5))
        if rng.random() < 0.2:
            a[:] = rng.choice((np.nan, 0.0, -1.0, 1e-20))
        entries[key] = dtype, shape, a.tobytes()


def _shape(rng: random.Random, entries: Entries, *_: object) -> None:
    key = rng.choice(list(entries))
    dtype, shape, numbers = entries[key]
    new = rng.choice((
        shape[::-1], [*shape, 1], [1, *shape], [len(numbers) // SIZES[dtype]], [1, len(numbers) // SIZES[dtype]],
        [len(numbers) // SIZES[dtype], 1], [*shape, 1, 1], [1, *shape, 1, 1],
    ))  # fmt: skip
    entries[key] = dtype, list(new), numbers


def _size(rng: random.Random, entries: Entries, *_: object) -> None:
    """Other sizes with numbers to fill them: ranks that do not pair up, shapes that would be spread."""
    key = rng.choice(list(entries))
    shape = entries[key][1]
    new = [rng.choice((n, n, 0, 1, n + 1, 2 * n, 6)) for n in shape] or [rng.choice((0, 1, 2))]
    count = int(np.prod(new))
    if count < 50_000:
        filled = np.random.default_rng(rng.randrange(9999)).normal(size=count).astype("<f4")
        entries[key] = "F32", new, filled.tobytes()


def _dtype(rng: random.Random, entries: Entries, *_: object) -> None:
    key = rng.choice(list(entries))
    _, shape, numbers = entries[key]
    dtype = rng.choice(list(SIZES))
    count = int(np.prod(shape)) if shape else 1
    entries[key] = dtype, shape, (numbers * 8)[: count * SIZES[dtype]]


def _swap(rng: random.Random, entries: Entries, *_: object) -> None:
    """Two tensors of one module under each other's names."""
    key = rng.choice(list(entries))
    others = [other for other in entries if other.partition(".")[0] == key.partition(".")[0]]
    other = rng.choice(others)
    entries[key], entries[other] = entries[other], entries[key]


def _truncate(rng: random.Random, entries: Entries, *_: object) -> None:
    """The first rows of a tensor alone."""
    key = rng.choice(list(entries))
    dtype, shape, numbers = entries[key]
    if shape and shape[0] > 1:
        rows = rng.randrange(1, shape[0])
        entries[key] = dtype, [rows, *shape[1:]], numbers[: len(numbers) // shape[0] * rows]


def _mix(
    rng: random.Random, entries: Entries, metadata: dict[str, str], sound: list[tuple[Entries, dict[str, str]]]
) -> None:
    others, header = rng.choice(sound)
    for key in rng.sample(list(others), rng.randrange(1, len(others) + 1)):
        entries.setdefault(key, others[key])
    if rng.random() < 0.3:
        metadata.update(header)


def _metadata(rng: random.Random, entries: Entries, metadata: dict[str, str], *_: object) -> None:
    key = rng.choice(("lora_adapter_metadata", "dora_diffusion", "format", ""))
    metadata[key] = rng.choice((
        "", "{", "[]", "null", "{}", '{"unet.lora_alpha": 1e400}', '{"unet.lora_alpha": -1}',
        '{"unet.lora_alpha": "a"}',
        '{"unet.lora_alpha": 12, "unet.use_rslora": true}', '{"unet.alpha_pattern": {"(a+)+$": 3}}',
        '{"unet.alpha_pattern": {"(": 3}}', "[" * 5000, '{"kind": "lora"}', '{"unet.lora_alpha": ' + "9" * 5000 + "}",
        '{"kind": "dora", "rank": -1, "alpha": 1, "target_modules": [1]}', "\\u0000", '{"unet.lora_alpha": null}',
        '{"unet.alpha_pattern": []}', '{"unet.alpha_pattern": {"to_q": 3}}', '{"unet.r": 0}',
    ))  # fmt: skip


def _text(change: Callable[[random.Random, str], str]) -> Callable[[random.Random, bytearray], None]:
    """A change of the header's text, its size told rightly."""

    def changed(rng: random.Random, data: bytearray) -> None:
        size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
        text = data[8 : 8 + min(size, len(data))].decode("utf-8", "replace")
        new = change(rng, text).encode("utf-8", "replace")
        data[:] = struct.pack("<Q", len(new)) + new + data[8 + min(size, len(data)) :]

    return changed


def _swap_number(rng: random.Random, text: str) -> str:
    numbers = list(re.finditer(r"-?\d+", text))
    if not numbers:
        return text
    found = rng.choice(numbers)
    new = rng.choice(
        ("0", "-1", "1", "4", "1e9", "18446744073709551616", "99999999999", "1.5", "null", '"a"', "[]", "true")
    )
    return text[: found.start()] + new + text[found.end() :]


def _duplicate(rng: random.Random, text: str) -> str:
    pairs = list(re.finditer(r'"[^"]+": \{[^{}]*\}', text))
    if not pairs:
        return text
    found = rng.choice(pairs)
    return text[: found.end()] + ", " + found.group() + text[found.end() :]


def _swap_text(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    piece = rng.choice(('"', "{", "}", "[", "]", ",", ":", "\\", " ", "é", "\x00", "null", "__metadata__", "a" * 100))
    return text[:at] + piece + text[at + rng.choice((0, 1, 5)) :]


def _swap_dtype(rng: random.Random, text: str) -> str:
    return re.sub(r'"F32"', lambda m: f'"{rng.choice([*SIZES, "F4", "f32", ""])}"', text, count=rng.choice((1, 0)))


def _nest(rng: random.Random, text: str) -> str:
    return rng.choice(("[" * 30_000, "{" + '"a":{' * 3000, "[]", "{}", "null", "1", '"a"', text * 2))


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.randrange(256)


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))


def _remove(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.choice((1, 4, 8, 100))]


def _size_of_header(rng: random.Random, data: bytearray) -> None:
    data[:8] = struct.pack(
        "<Q", rng.choice((0, 1, 7, len(data), max(len(data) - 8, 0), 2**31, 2**40, 2**63, 2**64 - 1))
    )


def _pickle(rng: random.Random, data: bytearray) -> None:
    data[:0] = rng.choice((b"\x80\x02", b"\x80\x04\x95", b"PK\x03\x04"))


TENSOR_CHANGES = (_drop, _rename, _rename, _values, _shape, _size, _dtype, _mix, _metadata, _swap, _truncate)
HEADER_CHANGES = tuple(map(_text, (_swap_number, _swap_number, _duplicate, _swap_text, _swap_dtype, _nest)))
BYTE_CHANGES = (_flip, _flip, _flip, _cut, _insert, _remove, _size_of_header, _pickle)


# The second reading.


LEAF = re.compile(
    r"(?P<module>.+?)(?:\.|_(?=lora\.))(?P<leaf>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?|lora_down\.weight|"
    r"lora_up\.weight|lora_mid\.weight|dora_scale|alpha|magnitude|weight_m_wdecomp\.weight|diff|lora\.down\.weight|"
    r"lora\.up\.weight|lora_linear_layer\.down\.weight|lora_linear_layer\.up\.weight|"
    + "|".join(re.escape(leaf) for leaf in FORM_LEAVES)
    + r"|diff_b|w_norm|b_norm|set_weight|reshape_weight|lora_B\.bias)$"
)
NAMED = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.(?!weight\b|bias\b)[^.]+(?=\.weight$|$)")  # an adapter's name
FLAT = re.compile(r"lora_unet_|lora_transformer_|lycoris_")
DOWN = ("lora_A.weight", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight")
UP = ("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight")
BY_OUTPUT = ("lora_magnitude_vector", "lora_magnitude_vector.weight", "magnitude", "weight_m_wdecomp.weight")


EIGHT_BIT = {"F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}  # bits of the exponent and of the fraction


def eight_bit_floats(codes: np.ndarray, exponent: int, fraction: int) -> np.ndarray:
    """Sign, exponent and fraction as IEEE 754 has them; e4m3fn has one NaN of each sign and no infinity."""
    codes = codes.astype("<i8")
    e, f = (codes >> fraction) & (2**exponent - 1), codes & (2**fraction - 1)
    bias = 2 ** (exponent - 1) - 1
    size = np.where(e == 0, f * 2.0 ** (1 - bias - fraction), (1 + f / 2**fraction) * 2.0 ** (e - bias))
    odd = (e == 2**exponent - 1) & ((f == 2**fraction - 1) if exponent == 4 else True)
    return np.where(codes & 128, -1.0, 1.0) * np.where(odd, np.nan, size)


def read_by_hand(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        raw = data[8 + size + start : 8 + size + end]
        if entry["dtype"] == "BF16":
            numbers = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        elif entry["dtype"] in EIGHT_BIT:
            numbers = eight_bit_floats(np.frombuffer(raw, "u1"), *EIGHT_BIT[entry["dtype"]])
        else:
            numbers = np.frombuffer(
                raw, {"F": "<f", "I": "<i", "U": "<u", "B": "<u"}[entry["dtype"][0]] + str(SIZES[entry["dtype"]])
            )
        tensors[key] = numbers.astype("<f8").reshape(entry["shape"])
    return tensors, metadata


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    named = dict(model.named_parameters())
    return {n.removesuffix(".weight"): p.detach().double().numpy() for n, p in named.items() if n.endswith(".weight")}


def reference_deltas(data: bytes, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """W' - W0 by layer, and of biases by "<layer>.bias", in float64.

    Raises for a file that it makes nothing of: loading that one was wrong.
    """
    tensors, metadata = read_by_hand(data)
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        found = LEAF.fullmatch(NAMED.sub(r"\1", key))
        assert found, f"{key!r} is no key of an adapter, and was loaded"
        module = found["module"].replace(".", "_") if FLAT.match(key) else found["module"]
        held = modules.setdefault(module, {})
        assert found["leaf"] not in held
        held[found["leaf"]] = tensor
    deltas: dict[str, np.ndarray] = {}
    for module, held in modules.items():
        bare = re.sub(
            r"^(base_model\.model\.)?((?:unet|transformer|(?:model\.)?diffusion_model|pipe\.dit)\.(?:base_model\.model\.)?|"
            r"lora_unet_|lora_transformer_|lycoris_)?",
            "",
            module,
        )
        layer = next(path for path in weights if bare.replace(".", "_") == path.replace(".", "_"))
        assert layer not in deltas, "two modules for one layer"
        W0 = weights[layer]
        if "reshape_weight" in held:
            assert held["reshape_weight"].tolist() == list(W0.shape)
        only_bias = not held.keys() - {"diff_b", "b_norm", "alpha", "reshape_weight"}
        deltas[layer] = np.zeros(W0.shape) if only_bias else _delta(layer, W0, held, metadata)
        biases = [held[leaf] for leaf in ("diff_b", "b_norm") if leaf in held]
        if "lora_B.bias" in held:
            rank = next(held[leaf] for leaf in DOWN if leaf in held).shape[0]
            biases.append(_scale(layer, rank, held, metadata) * held["lora_B.bias"])
        if biases:
            (b,) = biases
            assert b.shape == W0.shape[:1]
            deltas[f"{layer}.bias"] = b
    return deltas


def _delta(layer: str, W0: np.ndarray, held: dict[str, np.ndarray], metadata: dict[str, str]) -> np.ndarray:
    wholes = [held[leaf] for leaf in ("diff", "w_norm") if leaf in held]
    wholes += [held["set_weight"].reshape(W0.shape) - W0] if "set_weight" in held else []
    if wholes:
        (whole,) = wholes
        return whole.reshape(W0.shape)
    V = W0 + _before_magnitudes(W0, held, lambda rank: _scale(layer, rank, held, metadata))
    rows, columns = (V.shape[0], *(1,) * (V.ndim - 1)), (1, V.shape[1], *(1,) * (V.ndim - 2))
    magnitudes = [held[leaf] for leaf in (*BY_OUTPUT, "dora_scale") if leaf in held]
    if not magnitudes:
        return V - W0
    (m,) = magnitudes
    by_output = "dora_scale" not in held or (m.size == rows[0] and m.shape[0] == rows[0])
    n = np.sqrt((V**2).sum(tuple(range(1, V.ndim)) if by_output else (0, *range(2, V.ndim)), keepdims=True))
    g = m.reshape(rows if by_output else columns) / np.where(n > 1e-12, n, np.inf)
    return g * V - W0


def _scale(layer: str, rank: int, held: dict[str, np.ndarray], metadata: dict[str, str]) -> float:
    return float(held["alpha"].reshape(())) / rank if "alpha" in held else _peft_scale(layer, rank, metadata)


def _before_magnitudes(W0: np.ndarray, held: dict[str, np.ndarray], scale_of: Callable[[int], float]) -> np.ndarray:
    if (delta := form_delta(W0, held, scale_of)) is not None:
        return delta
    (A,), (B,) = ([held[leaf] for leaf in leaves if leaf in held] for leaves in (DOWN, UP))
    factor = held["scalar"].item() if "scalar" in held else 1.0
    return factor * scale_of(A.shape[0]) * (B.reshape(B.shape[0], -1) @ A.reshape(A.shape[0], -1)).reshape(W0.shape)


def _peft_scale(layer: str, rank: int, metadata: dict[str, str]) -> float:
    fields = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    alpha = fields.get("unet.lora_alpha", fields.get("lora_alpha"))
    alpha = rank if alpha is None else float(alpha)
    alpha = float((fields.get("unet.alpha_pattern") or {}).get(layer, alpha))
    return alpha / (rank**0.5 if fields.get("unet.use_rslora", fields.get("use_rslora")) else rank)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
