"""The demo, with few steps: everything it promises is there, and a second one goes on or starts over."""

from __future__ import annotations

from pathlib import Path

from dora_diffusion.data.folder import read_folder
from dora_diffusion.demo import DEMO, PROMPTS, DemoSize, run_demo, sample_folder
from dora_diffusion.screen import Screen
from dora_diffusion.training.config import read_config

SMALL = DemoSize(steps=2, batch_size=2, prompts=1, seeds=(1,), num_inference_steps=2)


def test_the_demo_writes_adapters_grid_report_and_configuration(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    console = Screen(file=(tmp_path / "screen.txt").open("w"))
    made = run_demo(out, SMALL, console, lambda: False)
    names = ["lora.safetensors", "dora.safetensors", "comparison.png", "report.html"]
    assert [path.name for path in made] == names and all(path.exists() for path in made)
    assert "Held-out loss" in (out / "report.html").read_text()
    config = read_config(out / "config.toml")
    assert config.kind == "both" and config.steps == 2
    bits = (out / "dora.safetensors").read_bytes()
    run_demo(out, SMALL, console, lambda: False)  # again, over the finished one
    assert (out / "dora.safetensors").read_bytes() == bits


def test_a_stopped_demo_goes_on_where_it_was(tmp_path: Path) -> None:
    console = Screen(file=(tmp_path / "screen.txt").open("w"))
    assert run_demo(tmp_path / "demo", SMALL, console, lambda: True) == []
    run_demo(tmp_path / "demo", SMALL, console, lambda: False)
    assert "going on after step 1 of 2" in (tmp_path / "screen.txt").read_text()


def test_no_prompt_of_the_demo_is_in_its_training_or_held_out_pictures() -> None:
    folder = sample_folder()
    shown = {
        image.caption.split(",")[0] for path in (folder, folder / "held-out") for image in read_folder(path).images
    }
    assert len(shown) == 24 and not shown & set(PROMPTS) and DEMO.prompts <= len(PROMPTS)
