"""A hash of all that decides what an encoder makes of a picture or a caption: where two are equal, so are the bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import diffusers
import PIL
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor, nn

__all__ = ["bytes_of", "machine", "of_texts", "of_weights"]

LIBRARIES = " ".join(each.__version__ for each in (torch, diffusers, transformers, PIL))
OF_EVERY_MODULE = {*vars(nn.Module())} - {"training"}
OF_ADAPTERS = ("_strength", "_active_adapter", "_disable_adapters")  # the last two are PEFT's
ELSEWHERE = ("name_or_path",)  # where it came from, which says nothing of what it is
OF_TOKENIZERS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "special_tokens_map",
    "split_special_tokens",
    "chat_template",
)


def machine(device: torch.device) -> str:
    """What last bits depend on beside the encoder: the libraries, and the device or the number of threads."""
    if device.type == "cuda":
        return f"{LIBRARIES} {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"{LIBRARIES} cpu {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
    return f"{LIBRARIES} {device.type}"


def of_weights(module: nn.Module) -> str:
    """All that a module is: the classes, configurations and settings of its parts, and every number in it.

    Settings are such as an autoencoder's tiles or the strength of an adapter that is in it.
    """
    digest = hashlib.sha256(_config(module).encode())
    for name, part in module.named_modules():
        digest.update(f"{name} {type(part).__name__} {_settings(part)}".encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def of_texts(pipe: DiffusionPipeline, encoders: Mapping[str, str]) -> str:
    """A pipeline's tokenizers and settings, with the hashes of its text encoders."""
    digest = hashlib.sha256(repr(sorted(encoders.items())).encode())
    settings = {**pipe.config, **vars(pipe)}
    public = {key: settings[key] for key in sorted(settings) if not key.startswith("_")}
    digest.update(repr({key: value for key, value in public.items() if isinstance(value, (int, str))}).encode())
    for name, part in sorted(pipe.components.items()):
        if part is not None and name.startswith("tokenizer"):
            said = {key: getattr(part, key, None) for key in OF_TOKENIZERS}
            digest.update(f"{name} {type(part).__name__} {said!r} {_table(part)}".encode())
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _table(tokenizer: object) -> str:
    """How text becomes tokens, without how the last call wanted them cut and filled up, which each call says anew."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary: dict[str, int] = tokenizer.get_vocab()  # type: ignore[attr-defined]
        return repr(sorted(vocabulary.items()))
    table = json.loads(backend.to_str())
    return json.dumps({**table, "padding": None, "truncation": None}, sort_keys=True)


def _config(module: nn.Module) -> str:
    """A model's configuration, without where it came from and what saved it."""
    config = getattr(module, "config", {})
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    said = {key: value for key, value in fields.items() if not key.startswith("_") and not key.endswith("_version")}
    return json.dumps(said, sort_keys=True, default=str)


def _settings(part: nn.Module) -> str:
    held = vars(part)
    names = (key for key in held if key not in OF_EVERY_MODULE and key not in ELSEWHERE and not key.startswith("_"))
    return repr([(key, _in_order(held[key])) for key in (*sorted(names), *OF_ADAPTERS) if _is_plain(held.get(key))])


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(each) for key, each in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))


def _in_order(value: object) -> object:
    return sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else value
