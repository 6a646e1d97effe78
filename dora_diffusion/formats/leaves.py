"""What a file's keys end with, in each dialect, and what of a layer's update they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["LEAVES", "NOT_READ", "Leaf", "dialect_of", "split_key"]


@dataclass(frozen=True)
class Leaf:
    """A key's ending: whose it is (None: anybody's), and what it holds."""

    dialect: str | None
    holds: str


LEAVES = {
    "lora_A.weight": Leaf("PEFT", "lora_A"),
    "lora_B.weight": Leaf("PEFT", "lora_B"),
    "lora_magnitude_vector": Leaf("PEFT", "magnitude"),
    "lora_magnitude_vector.weight": Leaf("PEFT", "magnitude"),
    "lora_down.weight": Leaf("kohya", "lora_A"),
    "lora_up.weight": Leaf("kohya", "lora_B"),
    "lora_mid.weight": Leaf("kohya", "lora_mid"),
    "dora_scale": Leaf("kohya", "dora_scale"),
    "magnitude": Leaf("ai-toolkit", "unscaled_magnitude"),
    "weight_m_wdecomp.weight": Leaf("NVlabs", "magnitude"),
    "diff": Leaf("diff", "difference"),
    "lora.down.weight": Leaf("old diffusers", "lora_A"),
    "lora.up.weight": Leaf("old diffusers", "lora_B"),
    "lora_linear_layer.down.weight": Leaf("old diffusers", "lora_A"),
    "lora_linear_layer.up.weight": Leaf("old diffusers", "lora_B"),
    "alpha": Leaf(None, "alpha"),
}
# Old diffusers joined the first of these to the layer with an underscore: "to_q_lora.down.weight".
_JOINED = re.compile(r"(.+)_lora\.(down|up)\.weight")
# What keys end with that no adapter read here has, and what writes it.
NOT_READ = {
    "diff_b": "a change of biases",
    "w_norm": "a change of normalisation weights",
    "b_norm": "a change of normalisation biases",
    "hada_w1_a": "LyCORIS LoHa",
    "hada_w2_a": "LyCORIS LoHa",
    "lokr_w1": "LyCORIS LoKr",
    "lokr_w1_a": "LyCORIS LoKr",
    "lokr_w2": "LyCORIS LoKr",
    "lokr_w2_a": "LyCORIS LoKr",
    "oft_blocks": "LyCORIS OFT",
    "oft_diag": "LyCORIS OFT",
    "on_input": "LyCORIS IA3",
    "a1.weight": "LyCORIS GLoRA",
    "lora_B.bias": "a trained bias (PEFT's lora_bias)",
    "lora_embedding_A": "PEFT's embedding LoRA",
}
_LONGEST_FIRST = sorted(LEAVES, key=len, reverse=True)


def split_key(key: str) -> tuple[str, Leaf] | None:
    """The module's name in a key and what the key holds of it; None for a key of no dialect known here."""
    if joined := _JOINED.fullmatch(key):
        return joined[1], LEAVES[f"lora.{joined[2]}.weight"]
    for leaf in _LONGEST_FIRST:
        if key.endswith("." + leaf) and len(key) > len(leaf) + 1:
            return key[: -len(leaf) - 1], LEAVES[leaf]
    return None


def dialect_of(leaves: Iterable[Leaf], header: Iterable[str], prefixed: bool) -> str:
    """The dialect's name, by whose endings the keys have. Raises ValueError naming two that do not go together."""
    named = {(leaf.dialect, "lora_" in leaf.holds) for leaf in leaves if leaf.dialect}
    low_rank = sorted({name for name, is_low_rank in named if is_low_rank})
    magnitudes = sorted({name for name, is_low_rank in named if not is_low_rank and name != "diff"})
    for found in (low_rank, magnitudes):
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]}")
    if magnitudes and magnitudes[0] in ("ai-toolkit", "NVlabs"):
        return magnitudes[0]
    name = low_rank[0] if low_rank else "diff"
    if name == "kohya" and any(key.startswith("ot_") for key in header):
        return "OneTrainer"
    return "diffusers" if name == "PEFT" and prefixed else name
