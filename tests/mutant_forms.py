"""Files of other forms than B A for the mutants, and what they mean in numpy's float64, by formulas of its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

Arrays = dict[str, np.ndarray]
# Of each layer of the tiny model: factors of its outputs and inputs, and blocks of its outputs.
FACTORS = {"to_q": ((2, 3), (2, 3)), "proj_in": ((1, 7), (1, 5)), "conv_in": ((2, 2), (1, 3))}
RANK, ALPHA = 2, 3.0
FORM_LEAVES = (
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *(f"{name}.weight" for name in ("a1", "a2", "b1", "b2")),
    *("oft_blocks", "rescale", "oft_R.weight", "oft_R.scaled_oft", "scalar", "weight", "on_input"),
)


def form_seeds(model: nn.Module) -> list[dict[str, Tensor]]:
    """A sound file of each form, as LyCORIS names it."""
    torch.manual_seed(3)
    makers = (_loha, _loha_tucker, _lokr, _lokr_whole, _lokr_tucker, _glora, _oft, _boft, _ia3, _ia3_input, _rotation)
    plain = [_file(model, maker, None) for maker in makers]
    return plain + [_file(model, maker, axis) for maker in (_loha, _lokr, _lokr_whole, _glora) for axis in (0, 1)]


def _file(model: nn.Module, maker: object, axis: int | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in FACTORS:
        W0 = model.get_submodule(layer).weight.detach()
        held = maker(layer, W0)  # type: ignore[operator]
        if held is None:
            continue
        if axis is not None:
            others = [i for i in range(W0.dim()) if i != axis]
            held["dora_scale"] = W0.square().sum(dim=others, keepdim=True).sqrt() * (0.7 + 0.6 * torch.rand(()))
        tensors |= {f"lycoris_{layer}.{leaf}": tensor for leaf, tensor in held.items()}
    return tensors


def _some(*shape: int) -> Tensor:
    return 0.4 * torch.randn(*shape)


def _alpha() -> dict[str, Tensor]:
    return {"alpha": torch.tensor(ALPHA)}


def _loha(layer: str, W0: Tensor) -> dict[str, Tensor]:
    out, columns = W0.flatten(1).shape
    return {
        **{f"hada_w{i}_a": _some(out, RANK) for i in (1, 2)},
        **{f"hada_w{i}_b": _some(RANK, columns) for i in (1, 2)},
        **_alpha(),
    }


def _loha_tucker(layer: str, W0: Tensor) -> dict[str, Tensor]:
    if W0.dim() == 2:
        return _loha(layer, W0) | {"scalar": torch.tensor(0.5)}
    sizes = {"w1_a": W0.shape[0], "w2_a": W0.shape[0], "w1_b": W0.shape[1], "w2_b": W0.shape[1]}
    cores = {f"hada_t{i}": _some(RANK, RANK, *W0.shape[2:]) for i in (1, 2)}
    return {**{f"hada_{name}": _some(RANK, size) for name, size in sizes.items()}, **cores, **_alpha()}


def _lokr(layer: str, W0: Tensor) -> dict[str, Tensor]:
    (out_1, out_2), (in_1, in_2) = FACTORS[layer]
    columns = in_2 * W0[0, 0].numel()
    return {
        "lokr_w1": _some(out_1, in_1),
        "lokr_w2_a": _some(out_2, RANK),
        "lokr_w2_b": _some(RANK, columns),
        **_alpha(),
    }


def _lokr_whole(layer: str, W0: Tensor) -> dict[str, Tensor]:
    (out_1, out_2), (in_1, in_2) = FACTORS[layer]
    return {"lokr_w1": _some(out_1, in_1), "lokr_w2": _some(out_2, in_2, *W0.shape[2:]), "alpha": torch.tensor(1e10)}


def _lokr_tucker(layer: str, W0: Tensor) -> dict[str, Tensor]:
    (out_1, out_2), (in_1, in_2) = FACTORS[layer]
    first = {"lokr_w1_a": _some(out_1, RANK), "lokr_w1_b": _some(RANK, in_1), **_alpha()}
    if W0.dim() == 2:
        return first | {"lokr_w2": _some(out_2, in_2)}
    core = {"lokr_t2": _some(RANK, RANK, *W0.shape[2:])}
    return first | core | {"lokr_w2_a": _some(RANK, out_2), "lokr_w2_b": _some(RANK, in_2)}


def _glora(layer: str, W0: Tensor) -> dict[str, Tensor]:
    out, inputs, ones = W0.shape[0], W0.shape[1], (1,) * (W0.dim() - 2)
    halves = {"a1": (inputs, RANK, *ones), "a2": (RANK, inputs, *ones), "b1": (out, RANK, *ones)}
    shapes = {**halves, "b2": (RANK, *W0.shape[1:])}
    return {**{f"{name}.weight": _some(*shape) for name, shape in shapes.items()}, **_alpha()}


def _oft(layer: str, W0: Tensor) -> dict[str, Tensor]:
    blocks, size = FACTORS[layer][0]
    rescale = {"rescale": 1 + _some(W0.shape[0], *(1,) * (W0.dim() - 1))}
    return {"oft_blocks": _some(blocks, size, size), "alpha": torch.tensor(0.02), **rescale}


def _boft(layer: str, W0: Tensor) -> dict[str, Tensor] | None:
    blocks = {"to_q": _some(1, 3, 2, 2), "conv_in": _some(2, 2, 2, 2)}.get(layer)
    return None if blocks is None else {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}


def _ia3(layer: str, W0: Tensor) -> dict[str, Tensor]:
    shape = (W0.shape[0],) if W0.dim() == 2 else (1, W0.shape[0], 1, 1)
    return {"weight": _some(*shape), "on_input": torch.tensor(0.0)}


def _ia3_input(layer: str, W0: Tensor) -> dict[str, Tensor]:
    shape = (W0.shape[1],) if W0.dim() == 2 else (1, W0.shape[1], 1, 1)
    return {"weight": _some(*shape), "on_input": torch.tensor(1.0)}


def _rotation(layer: str, W0: Tensor) -> dict[str, Tensor]:
    size = {"to_q": 3, "proj_in": 5, "conv_in": 3}[layer]
    blocks = 1 if layer == "to_q" else W0[0].numel() // size
    scaled = {"oft_R.scaled_oft": torch.tensor(1.0)} if layer == "conv_in" else {}
    return {"oft_R.weight": 0.3 * _some(blocks, size * (size - 1) // 2), **scaled}


# What they mean.


def form_delta(W0: np.ndarray, held: Arrays, scale_of: object) -> np.ndarray | None:
    """dW before magnitudes; None for a module that is a LoRA or a difference. `scale_of` a rank is alpha / rank."""
    for mark, meaning in MEANINGS.items():
        if mark in held:
            known = {"alpha", "dora_scale", "scalar", *FORM_LEAVES}
            assert held.keys() <= known, held.keys() - known
            own = OWN[meaning]
            assert (held.keys() & set(FORM_LEAVES)) <= {*own, "scalar"}, f"{sorted(held)} is of two forms"
            delta = meaning(W0, held, scale_of)
            return delta * (held["scalar"].item() if "scalar" in held else 1.0)
    return None


def _hadamard(W0: np.ndarray, held: Arrays, scale_of: object) -> np.ndarray:
    rank = held["hada_w1_b"].shape[0]
    assert held["hada_w2_b"].shape == held["hada_w1_b"].shape and held["hada_w2_a"].shape == held["hada_w1_a"].shape
    assert ("hada_t1" in held) == ("hada_t2" in held)
    return scale_of(rank) * (_factor(held, "1") * _factor(held, "2")).reshape(W0.shape)  # type: ignore[operator]


def _factor(held: Arrays, which: str) -> np.ndarray:
    a, b = held[f"hada_w{which}_a"], held[f"hada_w{which}_b"]
    if f"hada_t{which}" in held:
        return np.einsum("ijhw,ip,jr->prhw", held[f"hada_t{which}"], a, b)
    return a.reshape(len(a), -1) @ b.reshape(len(b), -1)


def _kronecker(W0: np.ndarray, held: Arrays, scale_of: object) -> np.ndarray:
    whole = {"lokr_w1", "lokr_w2"} <= held.keys()
    ranks = {held[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in held}
    assert whole or len(ranks) == 1
    scale = 1.0 if whole else scale_of(*ranks)  # type: ignore[operator]
    (w1,) = [held["lokr_w1"]] if "lokr_w1" in held else [held["lokr_w1_a"] @ held["lokr_w1_b"]]
    assert "lokr_w1" not in held or not {"lokr_w1_a", "lokr_w1_b"} & held.keys()
    if "lokr_w2" in held:
        assert not {"lokr_w2_a", "lokr_w2_b", "lokr_t2"} & held.keys()
        w2 = held["lokr_w2"]
    elif "lokr_t2" in held:
        w2 = np.einsum("ijhw,ip,jr->prhw", held["lokr_t2"], held["lokr_w2_a"], held["lokr_w2_b"])
    else:
        w2 = held["lokr_w2_a"] @ held["lokr_w2_b"]
    w2 = w2.reshape(len(w2), W0.shape[1] // w1.shape[1], *W0.shape[2:])
    product = np.einsum("ab,cd...->acbd...", w1, w2)
    return scale * product.reshape(W0.shape)


def _input_and_output(W0: np.ndarray, held: Arrays, scale_of: object) -> np.ndarray:
    a1, a2, b1, b2 = (held[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    new = a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]
    old = a1.shape[0] == a2.shape[1] == b1.shape[0] == b2.shape[1]
    if old and (not new or a1.shape[0] < a1.shape[1]):
        a1, a2, b1, b2 = a2, a1, b2, b1
    rank = b2.shape[0]
    assert a1.shape[1] == a2.shape[0] == b1.shape[1] == rank
    A = a1.reshape(len(a1), -1) @ a2.reshape(rank, -1)
    B = (b1.reshape(len(b1), -1) @ b2.reshape(rank, -1)).reshape(W0.shape)
    return scale_of(rank) * (np.einsum("oi...,ij->oj...", W0, A) + B)  # type: ignore[operator]


def _turned_outputs(W0: np.ndarray, held: Arrays, scale_of: object) -> np.ndarray:
    P = held["oft_blocks"]
    Q = P - np.swapaxes(P, -1, -2)
    limit = (float(held["alpha"].reshape(())) if "alpha" in held else 0.0) * len(W0)
    norm = np.sqrt((Q**2).sum()) + 1e-8
    if limit > 0 and norm > limit:
        Q = Q * limit / norm
    size = P.shape[-1]
    R = (np.eye(size) + Q) @ np.linalg.inv(np.eye(size) - Q)
    W = W0.reshape(len(W0), -1)
    if P.ndim == 3:
        W = np.einsum("knm,kni->kmi", R, W.reshape(len(P), size, -1)).reshape(W.shape)
    else:
        for i, factor in enumerate(R):
            far = 2**i * size // 2
            pairs = W.reshape(-1, 2, far, W.shape[1]).swapaxes(1, 2).reshape(-1, size, W.shape[1])
            pairs = np.einsum("bij,bjc->bic", factor, pairs)
            W = pairs.reshape(-1, far, 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape)
    W = W.reshape(W0.shape)
    if "rescale" in held:
        W = W * held["rescale"].reshape(len(W0), *(1,) * (W0.ndim - 1))
    return W - W0


def _scaled(W0: np.ndarray, held: Arrays, scale_of: object) -> np.ndarray:
    w, on_input = held["weight"], held["on_input"].item()
    assert on_input in (0, 1)
    axis = 1 if on_input else 0
    return W0 * w.reshape([-1 if i == axis else 1 for i in range(W0.ndim)])


def _turned_inputs(W0: np.ndarray, held: Arrays, scale_of: object) -> np.ndarray:
    upper = held["oft_R.weight"]
    size = next(n for n in range(2, 100) if n * (n - 1) // 2 == upper.shape[1])
    if "oft_R.scaled_oft" in held:
        upper = upper / (2 * np.sqrt(size - 1))
    Q = np.zeros((len(upper), size, size))
    rows, columns = np.triu_indices(size, 1)
    Q[:, rows, columns] = upper
    Q = Q - Q.swapaxes(1, 2)
    R = np.eye(size) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
    W = W0.reshape(len(W0), -1, size)
    R = np.broadcast_to(R, (W.shape[1], size, size))
    R = R if W0.ndim == 4 else R.swapaxes(1, 2)
    return np.einsum("ork,rkc->orc", W, R).reshape(W0.shape) - W0


MEANINGS = {
    "hada_w1_a": _hadamard,
    "lokr_w1": _kronecker,
    "lokr_w1_a": _kronecker,
    "a1.weight": _input_and_output,
    "oft_blocks": _turned_outputs,
    "on_input": _scaled,
    "oft_R.weight": _turned_inputs,
}
OWN = {
    _hadamard: [leaf for leaf in FORM_LEAVES if leaf.startswith("hada_")],
    _kronecker: [leaf for leaf in FORM_LEAVES if leaf.startswith("lokr_")],
    _input_and_output: ["a1.weight", "a2.weight", "b1.weight", "b2.weight"],
    _turned_outputs: ["oft_blocks", "rescale"],
    _scaled: ["weight", "on_input"],
    _turned_inputs: ["oft_R.weight", "oft_R.scaled_oft"],
}
