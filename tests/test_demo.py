"""The demo, with few steps: everything it promises is there, and a second one goes on or starts over."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dora_diffusion.data.folder import read_folder
from dora_diffusion.demo import DEMO, PROMPTS, DemoSize, next_commands, run_demo, sample_folder
from dora_diffusion.errors import ConfigError
from dora_diffusion.screen import Screen
from dora_diffusion.stopping import StopRequest
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


def test_a_demo_that_was_stopped_says_a_way_on_that_the_command_has(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    @contextmanager
    def asked_already() -> Iterator[StopRequest]:
        request = StopRequest(lambda number: None)
        request.take(signal.SIGTERM)
        yield request

    monkeypatch.setattr("dora_diffusion.cli.training.stop_when_asked", asked_already)
    stopped = run("demo", "--quick", "--out", tmp_path / "demo")
    assert stopped.status == 143 and stopped.flat.endswith("Go on with the same command."), stopped.flat
    assert "--resume" not in stopped.flat


@pytest.mark.parametrize("name", ["dora.safetensors", "checkpoints/lora.safetensors"])
def test_a_demo_leaves_an_adapter_that_is_not_its_own(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ConfigError, match=f"holds {name}, which is of no earlier demo. Give another --out"):
        run_demo(tmp_path, SMALL, Screen(quiet=True), lambda: False)
    assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize("out", ["my folder's", "-dash", "[bold]$HOME"])
def test_the_commands_to_try_next_mean_the_demos_own_files(out: str) -> None:
    words = shlex.split(next_commands(Path(out), "emoji-dit")[0])
    files = words[words.index("--adapters") + 1 : words.index("--out")]
    assert [Path(file) for file in files] == [Path(out) / f"{kind}.safetensors" for kind in ("lora", "dora")]
    assert not any(file.startswith("-") for file in files)
    assert words[words.index("--base") + 1] == "emoji-dit"


def test_no_prompt_of_the_demo_is_in_its_training_or_held_out_pictures() -> None:
    folder = sample_folder()
    shown = {
        image.caption.split(",")[0] for path in (folder, folder / "held-out") for image in read_folder(path).images
    }
    assert len(shown) == 24 and not shown & set(PROMPTS) and DEMO.prompts <= len(PROMPTS)
