"""The README.md of a finished run: what its adapters are, and how to load them; the hub shows it as a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from dora_diffusion.formats.files import AdapterFile
from dora_diffusion.markdown import code, plain
from dora_diffusion.models.loading import Base
from dora_diffusion.models.naming import EMBEDDED, is_hub_id
from dora_diffusion.training.config import TrainConfig

__all__ = ["MADE_HERE", "card_text"]

MADE_HERE = "trained with DoRA Diffusion"  # by which a card is known for one of ours

LOAD = """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base})
pipe.load_lora_weights("THIS FOLDER OR REPOSITORY", weight_name="{file}")
image = pipe({prompt}).images[0]
```
"""
LOAD_HERE = """
{where} In Python:

```python
from diffusers import DiffusionPipeline
from dora_diffusion import load_adapter

pipe = DiffusionPipeline.from_pretrained({base})
load_adapter(pipe, "THIS FOLDER/{file}")
image = pipe({prompt}).images[0]
```
"""

BY_INPUT = "Its norm runs by input, as ComfyUI, Forge, A1111 and InvokeAI compute it: put the file among their LoRAs."
FORM = "ComfyUI and LyCORIS read a {label}, stock diffusers does not: put the file among ComfyUI's LoRAs."
FORM_BY_OUTPUT = (
    FORM + " Of magnitudes by output, as these are, ComfyUI computes another norm: what is trained with "
    "norm_axis = 'input' is exact there."
)


def card_text(
    config: TrainConfig, base: Base, files: Sequence[AdapterFile], prompt: str, pictures: Mapping[str, Path]
) -> str:
    """`files` are the run's adapters, `prompt` one that shows them, `pictures` previews by the prompt they show."""
    name = Path(config.out).resolve().name
    kinds = " and ".join(file.config.kind_label for file in files)
    last = files[-1]
    embedded = f"dora_diffusion/assets/{EMBEDDED[config.base].folder}" if config.base in EMBEDDED else config.base
    return "\n".join(
        (
            f"---\n{_front_matter(config, files, pictures)}\n---\n",
            f"# {plain(name)}\n",
            f"{kinds} for {code(base.label)}, {MADE_HERE}.\n",
            *(f"![{plain(said)}]({path.as_posix()})\n" for said, path in pictures.items()),
            *([f"Say {code(config.instance_prompt)}.\n"] if config.instance_prompt else []),
            "## Load\n",
            _load(last, _literal(embedded), _literal(prompt)),
            "What other programs make of it, and a file for each: `dora-diffusion parity` and `convert`.\n",
            "## Training\n",
            _table(files),
        )
    )


def _load(file: AdapterFile, base: str, prompt: str) -> str:
    """How to load it, in the programs that compute it."""
    where = BY_INPUT if file.norm_axis == "input" else ""
    if file.config.parametrisation != "lora":
        where = (FORM_BY_OUTPUT if file.norm_axis == "output" else FORM).format(label=file.config.kind_label)
    text = LOAD_HERE if where else LOAD
    return text.lstrip().format(where=where, base=base, file=file.path.name, prompt=prompt)


def _literal(text: str) -> str:
    """Text as Python code, in double quotes as the rest of the example; JSON's strings are Python's too."""
    return json.dumps(text, ensure_ascii=False)


def _front_matter(config: TrainConfig, files: Sequence[AdapterFile], pictures: Mapping[str, Path]) -> str:
    return ModelCardData(
        base_model=config.base if is_hub_id(config.base) and not Path(config.base).exists() else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", "text-to-image", "template:diffusion-lora", *_kinds(files)],
        instance_prompt=config.instance_prompt,
        widget=[{"text": said, "output": {"url": path.as_posix()}} for said, path in pictures.items()] or None,
    ).to_yaml()


def _kinds(files: Sequence[AdapterFile]) -> list[str]:
    """As the hub's tags: of the kinds, and of the parametrisation where it is no LoRA's."""
    forms = {file.config.parametrisation for file in files} - {"lora"}
    return [*(file.config.kind for file in files), *sorted(forms)]


def _table(files: Sequence[AdapterFile]) -> str:
    """What each adapter is and has learned, a column for each."""
    facts = [file.description.training if file.description else {} for file in files]
    rows: dict[str, list[object]] = {
        "rank, alpha": [f"{file.config.rank}, {file.config.alpha:g}" for file in files],
        "factor": [_factor(file) for file in files],
        "layers": [len(file.layers) for file in files],
    }
    for key, said in SAID.items():
        rows[said] = [_written(fact.get(key)) for fact in facts]
    head = ["", *(file.config.kind_label for file in files)]
    lines = [head, ["---"] * len(head), *([said, *map(str, values)] for said, values in rows.items() if any(values))]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _factor(file: AdapterFile) -> str:
    """LoKr's, in words; nothing of other forms."""
    config = file.config
    if config.parametrisation != "lokr":
        return ""
    return ("as square as can be" if config.factor == -1 else str(config.factor)) + ", whole" * config.full_matrix


# The summary of a run, as files carry it, in words.
SAID = {
    "images": "pictures",
    "steps": "steps",
    "batch_size": "batch",
    "optimizer": "optimizer",
    "learning_rate": "learning rate",
    "resolution": "resolution, pixels",
    "objective": "objective",
    "seed": "seed",
    "held_out_loss_base": "held-out loss of the base",
    "held_out_loss": "held-out loss",
    "started_from": "trained on from",
}


def _written(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else plain(value)
