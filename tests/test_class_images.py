"""Prior preservation's pictures belong to what drew them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_helpers import config

from dora_diffusion.data.pictures import open_image
from dora_diffusion.errors import ConfigError, DataError, DoraDiffusionError, PromptError
from dora_diffusion.generation import GenerationRequest, generate
from dora_diffusion.models.loading import Base
from dora_diffusion.training.class_images import class_images
from dora_diffusion.training.run import train


def made(out: Path, base: Base, prompt: str = "shape", number: int = 2) -> tuple[list[Path], list[str]]:
    """The class images of a run, and what was said meanwhile."""
    settings = config(out, out, Path("unused"), class_prompt=prompt, num_class_images=number)
    drawing = class_images(settings, base, out)
    said = []
    while True:
        try:
            said.append(next(drawing).text)
        except StopIteration as end:
            return end.value, [line for line in said if line != "drawing class images"]


def test_they_are_what_the_base_draws_and_are_kept(tmp_path: Path, sd_base: Base) -> None:
    paths, said = made(tmp_path, sd_base)
    assert [path.name for path in paths] == ["0000.png", "0001.png"] and said == []
    for seed, path in enumerate(paths):
        assert open_image(path).tobytes() == generate(sd_base, GenerationRequest("shape", seed)).tobytes()
    times = [path.stat().st_mtime_ns for path in paths]
    paths, said = made(tmp_path, sd_base)
    assert [path.stat().st_mtime_ns for path in paths] == times and said == []


def test_those_of_another_prompt_or_base_are_drawn_again(tmp_path: Path, sd_base: Base) -> None:
    paths, _ = made(tmp_path, sd_base)
    paths, said = made(tmp_path, sd_base, prompt="a dog")
    assert said == ["class images that an earlier run drew (prompt 'shape') are drawn again: 2"]
    assert open_image(paths[1]).tobytes() == generate(sd_base, GenerationRequest("a dog", 1)).tobytes()
    with torch.no_grad():
        for parameter in sd_base.denoiser.parameters():
            parameter.mul_(1.1)
    paths, said = made(tmp_path, sd_base, prompt="a dog")
    assert said == [f"class images that an earlier run drew (other weights of {sd_base.name}) are drawn again: 2"]
    assert open_image(paths[1]).tobytes() == generate(sd_base, GenerationRequest("a dog", 1)).tobytes()


def test_a_damaged_one_is_drawn_again(tmp_path: Path, sd_base: Base) -> None:
    paths, _ = made(tmp_path, sd_base)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-40])
    paths, said = made(tmp_path, sd_base)
    assert said == ["class images that are damaged are drawn again: 1"] and paths[1].read_bytes() == whole


def test_the_users_own_are_used_and_never_written_over(tmp_path: Path, sd_base: Base) -> None:
    folder = tmp_path / "class_images"
    folder.mkdir()
    for name in ("0000.png", "rex.jpg"):
        Image.new("RGB", (40, 40), "red").save(folder / name)
    mine = [(folder / name).read_bytes() for name in ("0000.png", "rex.jpg")]
    for prompt in ("shape", "a dog"):
        paths, said = made(tmp_path, sd_base, prompt, number=3)
        assert [path.name for path in paths] == ["0000.png", "rex.jpg", "0001.png"]
        assert said[0] == "class images that say nothing of what drew them are taken as your own: 2"
    assert [(folder / name).read_bytes() for name in ("0000.png", "rex.jpg")] == mine


def test_a_damaged_one_of_the_users_own_is_an_error_that_names_it(tmp_path: Path, sd_base: Base) -> None:
    (tmp_path / "class_images").mkdir()
    (tmp_path / "class_images" / "0001.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"class_images/0001\.png is no picture.*delete it"):
        made(tmp_path, sd_base)


def test_what_is_no_file_among_them_is_an_error_and_not_waited_for(tmp_path: Path, sd_base: Base) -> None:
    (tmp_path / "class_images").mkdir()
    os.mkfifo(tmp_path / "class_images" / "a.png")
    with pytest.raises(DataError, match=r"a\.png is a named pipe"):
        made(tmp_path, sd_base)
    (tmp_path / "class_images" / "a.png").unlink()
    (tmp_path / "class_images" / "a.png").mkdir()
    with pytest.raises(DataError, match=r"a\.png is a folder"):
        made(tmp_path, sd_base)


def test_more_of_the_users_own_than_are_asked_for_are_said(tmp_path: Path, sd_base: Base) -> None:
    (tmp_path / "class_images").mkdir()
    for name in "abc":
        Image.new("RGB", (64, 64)).save(tmp_path / "class_images" / f"{name}.png")
    paths, said = made(tmp_path, sd_base)
    assert [path.name for path in paths] == ["a.png", "b.png"]
    assert said[0] == "class images of your own beyond num_class_images = 2, which are not used: 1"


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"instance_prompt": "disc"}, DataError),
        ({"instance_prompt": "disc " * 200}, PromptError),
        ({"text_encoder_learning_rate": 1e-3}, ConfigError),
    ],
    ids=["picture", "caption", "option"],
)
def test_what_is_wrong_with_pictures_and_options_is_said_before_any_is_drawn(
    values: dict[str, object], wrong: type[DoraDiffusionError], tmp_path: Path, pictures: Path, sd_base: Base
) -> None:
    images = tmp_path / "images"
    shutil.copytree(pictures, images)
    if wrong is DataError:
        (images / "z.png").write_bytes((images / "0.png").read_bytes()[:60])
    settings = config(images, tmp_path / "out", Path("base"), class_prompt="shape", num_class_images=2, **values)
    with pytest.raises(wrong):
        list(train(settings, base=sd_base))
    assert not (tmp_path / "out" / "class_images").exists()
