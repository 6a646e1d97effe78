"""What a file's keys end with, in each dialect, and what of a layer's update they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "IN_PEFTS_KEYS",
    "LEAVES",
    "Leaf",
    "adapter_names",
    "dialect_of",
    "foreign",
    "split_key",
    "split_keys",
    "without_adapter_name",
]


@dataclass(frozen=True)
class Leaf:
    """A key's ending: whose it is (None: anybody's), and what it holds."""

    dialect: str | None
    holds: str


IN_PEFTS_KEYS = ("PEFT", "diffusers", "ComfyUI")  # the dialects that call the factors lora_A and lora_B
# What ComfyUI's files have before a checkpoint's names, and no file of diffusers.
_COMFYUIS = ("diffusion_model.", "model.diffusion_model.", "text_encoders.")
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
    # Whole differences: of any weight and bias (ComfyUI, LyCORIS), and of a norm's (LyCORIS's train_norm).
    "diff": Leaf("diff", "difference"),
    "diff_b": Leaf("diff", "bias_difference"),
    "w_norm": Leaf("LyCORIS", "difference"),
    "b_norm": Leaf("LyCORIS", "bias_difference"),
    "set_weight": Leaf("diff", "replacement"),  # ComfyUI's: what stands in the weight's place
    "reshape_weight": Leaf(None, "reshape"),  # ComfyUI's: the shape that it pads the weight to, with zeros
    "lora_B.bias": Leaf("PEFT", "lora_bias"),  # PEFT's lora_bias=True, and BFL's control adapters
    "lora.down.weight": Leaf("old diffusers", "lora_A"),
    "lora.up.weight": Leaf("old diffusers", "lora_B"),
    "lora_linear_layer.down.weight": Leaf("old diffusers", "lora_A"),
    "lora_linear_layer.up.weight": Leaf("old diffusers", "lora_B"),
    "alpha": Leaf(None, "alpha"),
    # LyCORIS's other forms, which PEFT names alike behind its own prefix.
    **{f"hada_{name}": Leaf("LyCORIS", f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": Leaf("LyCORIS", f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"{name}.weight": Leaf("LyCORIS", name) for name in ("a1", "a2", "b1", "b2")},
    "oft_blocks": Leaf("LyCORIS", "oft_blocks"),
    "oft_R.weight": Leaf("LyCORIS", "oft_R"),  # OneTrainer's, of the inputs
    "oft_R.scaled_oft": Leaf("LyCORIS", "oft_scaled"),
    "rescale": Leaf("LyCORIS", "rescale"),
    "on_input": Leaf("LyCORIS", "on_input"),
    "scalar": Leaf("LyCORIS", "scalar"),
}
# Old diffusers joined the first of these to the layer with an underscore: "to_q_lora.down.weight". XLabs does it too,
# and numbers FLUX's two streams: "qkv_lora1.down.weight".
_JOINED = re.compile(r"(.+?)(?:_lora|(_lora[12]))\.(down|up)\.weight")
_XLABS = re.compile(r"(?:diffusion_model\.)?(?:double|single)_blocks\.\d+\.processor\.")
# PEFT's state_dict, which DiffSynth and ModelScope save, has the adapter's name in its keys: "lora_A.default.weight".
_NAMED = re.compile(
    r"(.+\.(?:lora_[AB]|lora_magnitude_vector|(?:hada|lokr)_\w+))\.(?!(?:weight|bias)(?:\.|$))([^.]+)(\.weight|\.bias)?"
)
# FLUX's and Chroma's checkpoints call a norm's weight `scale`. BFL's control adapters have it whole under that name,
# those of diffusers' scripts under diffusers' own; ComfyUI's endings may follow.
_SCALE = re.compile(r"(.+[._](?:query_norm|key_norm|norms\.\d+))\.scale(?:\.(?P<as>diff|set_weight))?")
_NORM = re.compile(r"(.+\.norm_(?:added_)?[qk])\.weight")
# What keys end with (after a dot) that no adapter read here has, and what it is.
_FOREIGN = {
    r"lokr_t1": "a LoKr with a core in its first factor, which no program writes",
    r"oft_diag": "kohya's OFT",
    r"oft_R\.\w+\.weight|oft_R": "PEFT's OFT",
    r"boft_[RS](?:\.\w+)?": "PEFT's BOFT",
    r"ia3_l(?:\.\w+)?": "PEFT's IA3",
    r"vera_lambda_[bd](?:\.\w+)?|vera_[AB](?:\.\w+)?": "PEFT's VeRA",
    r"lora_E(?:\.\w+)?|ranknum(?:\.\w+)?": "PEFT's AdaLoRA",
    r"fourierft_spectrum(?:\.\w+)?": "PEFT's FourierFT",
    r"hra_u(?:\.\w+)?": "PEFT's HRA",
    r"miss_block(?:\.\w+)?|bone_block(?:\.\w+)?": "PEFT's MiSS or Bone",
    r"randlora_(?:A|B|lambda|gamma)(?:\.\w+)?": "PEFT's RandLoRA",
    r"vblora_(?:logits_[AB]|vector_bank)(?:\.\w+)?": "PEFT's VB-LoRA",
    r"ln_tuning_layers(?:\.\w+)?\.(?:weight|bias)": "PEFT's LN tuning",
    r"lora_down|lora_up": "a LoRA as nunchaku keeps it",
    r"bm\.weight": "LyCORIS GLoRA with a core",
    r"(?:q_layer|p_layer)\.weight|lambda_layer": "LyCORIS T-LoRA, which is relative to values that its file lacks",
    r"lora_embedding_[AB]": "PEFT's embedding LoRA",
}
_FOREIGN_KEYS = [(re.compile(rf"(?:(.*)\.)?(?:{ending})"), kind) for ending, kind in _FOREIGN.items()]


def foreign(key: str) -> tuple[str, str] | None:
    """The module of a key of a method that is not read here, and what it is; None for any other key."""
    for pattern, kind in _FOREIGN_KEYS:
        if found := pattern.fullmatch(key):
            return found[1] or key, kind
    return None


_LONGEST_FIRST = sorted(LEAVES, key=len, reverse=True)
IA3_FACTOR = Leaf("LyCORIS", "factor")  # "weight", which means this only beside an "on_input"


def split_keys(keys: Iterable[str]) -> dict[str, tuple[str, Leaf] | None]:
    """`split_key` of all keys of a file, which tell each other what they are."""
    found = {key: split_key(key) for key in keys}
    for split in list(found.values()):
        if split and split[1].holds == "on_input" and f"{split[0]}.weight" in found:
            found[f"{split[0]}.weight"] = (split[0], IA3_FACTOR)
    return found


def adapter_names(keys: Iterable[str]) -> list[str]:
    """The names that PEFT has for an adapter, as they stand in these keys."""
    return sorted({found[2] for key in keys if (found := _NAMED.fullmatch(key))})


def without_adapter_name(key: str) -> str:
    """`to_q.lora_A.default.weight` as `to_q.lora_A.weight`."""
    found = _NAMED.fullmatch(key)
    return found[1] + (found[3] or "") if found else key


def split_key(key: str) -> tuple[str, Leaf] | None:
    """The module's name in a key and what the key holds of it; None for a key of no dialect known here."""
    if joined := _JOINED.fullmatch(key):
        theirs = LEAVES[f"lora.{joined[3]}.weight"]
        return joined[1] + (joined[2] or ""), Leaf("XLabs", theirs.holds) if _XLABS.match(key) else theirs
    if scale := _SCALE.fullmatch(key) or _NORM.fullmatch(key):
        return scale[1], LEAVES[scale.groupdict().get("as") or "set_weight"]
    key = without_adapter_name(key)
    for leaf in _LONGEST_FIRST:
        if key.endswith("." + leaf) and len(key) > len(leaf) + 1:
            return key[: -len(leaf) - 1], LEAVES[leaf]
    return None


def dialect_of(leaves: Iterable[Leaf], header: Iterable[str], modules: Iterable[str], prefixes: Iterable[str]) -> str:
    """The dialect's name, by whose endings and prefixes the keys have. `prefixes` are those that diffusers' files have.

    Raises ValueError naming two that do not go together.
    """
    leaves, modules = list(leaves), list(modules)
    has_forms = any(leaf.dialect == "LyCORIS" for leaf in leaves)  # which stand beside any dialect's LoRA
    named = {(leaf.dialect, "lora_" in leaf.holds) for leaf in leaves if leaf.dialect and leaf.dialect != "LyCORIS"}
    low_rank = sorted({name for name, is_low_rank in named if is_low_rank})
    magnitudes = sorted({name for name, is_low_rank in named if not is_low_rank and name != "diff"})
    for found in (low_rank, magnitudes):
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]}")
    if magnitudes and magnitudes[0] in ("ai-toolkit", "NVlabs"):
        return magnitudes[0]
    name = low_rank[0] if low_rank else "LyCORIS" if has_forms else "diff"
    if name == "kohya" and any(key.startswith("ot_") for key in header):
        return "OneTrainer"
    if name != "PEFT":
        return name
    if magnitudes == ["kohya"] or any(module.startswith(_COMFYUIS) for module in modules):
        return "ComfyUI"
    return "diffusers" if any(module.startswith(tuple(prefixes)) for module in modules) else name
