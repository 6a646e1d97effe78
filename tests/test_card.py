"""The model card of a run: what the hub reads of it, and that its code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from training_helpers import config

from dora_diffusion.training.events import Preparing
from dora_diffusion.training.run import train


@pytest.mark.parametrize("norm_axis", ["output", "input"])
def test_a_runs_card_is_one_for_the_hub_and_its_code_draws(
    norm_axis: str, tmp_path: Path, pictures: Path, sd_folder: Path
) -> None:
    out = tmp_path / "discs"
    prompts = {"preview_prompts": ['a "blue" disc', "disc"], "preview_every": 3}
    list(train(config(pictures, out, sd_folder, norm_axis=norm_axis, **prompts)))
    card = ModelCard.load(out / "README.md")
    assert card.data.instance_prompt == "disc" and card.data.library_name == "diffusers"
    assert {"lora", "dora"} <= set(card.data.tags) and card.data.base_model is None  # a folder of this machine
    assert [each["text"] for each in card.data.widget] == prompts["preview_prompts"]
    for each in card.data.widget:
        Image.open(out / each["output"]["url"]).verify()
    assert "# discs" in card.text and "| steps | 6 | 6 |" in card.text
    assert re.search(r"\| held-out loss \| \d\.\d+ \| \d\.\d+ \|", card.text)

    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    code = code.replace("THIS FOLDER OR REPOSITORY", str(out)).replace("THIS FOLDER", str(out))
    names: dict[str, object] = {}
    exec(code.replace('disc")', 'disc", num_inference_steps=2)').replace(".images[0]", ".images[0].size"), names)
    assert names["image"] == (16, 16)


def test_a_card_that_somebody_wrote_stays(tmp_path: Path, pictures: Path, sd_folder: Path) -> None:
    short = config(pictures, tmp_path, sd_folder, kind="dora", steps=1)
    card = tmp_path / "README.md"
    card.write_text("mine")
    assert any("is yours and stays" in event.text for event in train(short) if isinstance(event, Preparing))
    assert card.read_text() == "mine"
    card.unlink()
    list(train(short, overwrite=True))
    first = card.read_text()
    assert 'pipe("disc")' in first
    list(train(short.model_copy(update={"preview_prompts": ["disc"], "preview_seeds": []}), overwrite=True))
    assert "previews" not in card.read_text()
    list(train(short.model_copy(update={"steps": 2}), overwrite=True))
    assert "| steps | 2 |" in card.read_text() and "| steps | 1 |" in first
    assert "widget" not in first and "previews" not in first
