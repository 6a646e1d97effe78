"""The finished base: a stock pipeline folder in float16, with its papers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from .denoiser import Denoiser
from .files import replace_folder
from .icons import BASE_SETS
from .tokenizer import save_tokenizer

# Kept over from the landed folder when new weights replace the old ones.
PAPERS = ("README.md", "contact_sheet.png", "evaluation.json")


def notice() -> str:
    """Sources and licences of the pictures that the weights were trained on."""
    lines = [
        "DoRA Diffusion: embedded emoji base model",
        "",
        "The weights were trained from scratch on pictures rendered from these icon sets",
        "(as packaged by Iconify, https://github.com/iconify/icon-sets):",
        "",
    ]
    for info in BASE_SETS:
        lines += [
            f"{info.title} (@iconify-json/{info.folder}), by {info.author}",
            f"    {info.url}",
            f"    Licence: {info.licence}",
            "",
        ]
    lines += [
        "Twemoji graphics are licensed under CC BY 4.0,",
        "https://creativecommons.org/licenses/by/4.0/; they were rendered at 64 x 64 pixels on",
        "white and learned from. No other pictures were used.",
        "The weights themselves are offered under the project's licence, Apache-2.0.",
        "",
    ]
    return "\n".join(lines)


def _tidy_configs(folder: Path, parts: Iterable[str]) -> None:
    """Drops the working folder's path, and asks for float32.

    Without the latter transformers loads float16 and diffusers float32, which do not mix.
    """
    for part in ("vae", *parts):
        config = folder / part / "config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)
        if part.startswith("text_encoder"):
            settings["dtype"] = "float32"
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export(vae: AutoencoderKL, model: Denoiser, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Writes the pipeline folder in one swap; papers that lie in the old one stay."""
    half = copy.deepcopy(model).half().eval()
    if not all(torch.isfinite(p).all() for p in half.parameters()):
        raise FloatingPointError("the weights are not finite in float16; nothing was written")
    pipeline = half.pipeline(copy.deepcopy(vae).half(), tokenizer)
    with replace_folder(out) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        for tokens in folder.glob("tokenizer*"):
            save_tokenizer(tokenizer, tokens)
        _tidy_configs(folder, half.parts)
        (folder / "NOTICE").write_text(notice(), encoding="utf-8")
        for name in PAPERS:
            if (out / name).exists():
                (folder / name).write_bytes((out / name).read_bytes())
