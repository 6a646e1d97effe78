"""The command line: what the README says works, and every mistake is a message with a way out, never a traceback."""

from __future__ import annotations

import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import bases
import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import HANGS

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.formats.files import save_adapter


def test_a_run_whose_pictures_have_gone_meanwhile_ends_well(run, tmp_path, pictures, sd_folder) -> None:  # type: ignore[no-untyped-def]
    images, log = tmp_path / "images", tmp_path / "-run" / "log.jsonl"
    shutil.copytree(pictures, images)

    def take_away() -> None:
        while not log.exists():  # written once the pictures are encoded
            time.sleep(0.01)
        shutil.rmtree(images)

    thread = threading.Thread(target=take_away, daemon=True)
    thread.start()
    options = ("--steps", 3, "--batch-size", 1, "--rank", 2, "--base", sd_folder, "--instance-prompt", "a 'disc'")
    trained = run("train", "--images", images, "--out", log.parent, *options)
    thread.join()
    assert trained.status == 0, trained.err
    assert """--prompt 'a '"'"'disc'"'"''""" in trained.out and not images.exists()


def test_train_generate_and_compare_work_from_the_command_line(run, tmp_path, pictures, sd_folder) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "run"
    options = ("--steps", 2, "--batch-size", 2, "--rank", 2, "--base", sd_folder, "--set", "held_out=1")
    trained = run("train", "--images", pictures, "--instance-prompt", "disc", "--kind", "both", "--out", out, *options)
    assert trained.status == 0, trained.err
    assert "DoRA 2/2" in trained.out and "left" in trained.out and "held-out loss" in trained.out
    for command in (shlex.split(line) for line in trained.out.partition("Try next")[2].splitlines() if line):
        tried = run(*command[1:], *(["--steps", 2] if command[1] == "compare" else []))
        assert tried.status == 0, (command, tried.err)
    assert (out / "compare" / "comparison.png").exists() and "ComfyUI" in tried.out
    repeated = run("train", out / "config.toml", "--out", tmp_path / "again")
    assert repeated.status == 0, repeated.err
    for name in ("lora.safetensors", "dora.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    compared = run(
        *("compare", "--prompt", "disc", "--seeds", "1,2", "--steps", 2, "--base", sd_folder),
        *("--adapters", out / "lora.safetensors", out / "dora.safetensors", "--out", tmp_path / "c"),
    )
    assert compared.status == 0, compared.err
    assert (tmp_path / "c" / "comparison.png").exists() and (tmp_path / "c" / "report.html").exists()
    assert len(list((tmp_path / "c" / "pictures").glob("*.png"))) == 6
    drawn = run(
        *("generate", "--prompt", "disc", "--seeds", "5", "--steps", 2, "--base", sd_folder),
        *("--adapter", out / "dora.safetensors", "--strength", 0.5, "--size", "24x16", "--out", tmp_path / "g"),
    )
    assert drawn.status == 0, drawn.err
    picture = Image.open(tmp_path / "g" / "seed-5.png")
    assert picture.text["prompt"] == "disc" and picture.size == (24, 16)


def test_libraries_notes_stay_off_the_screen(tmp_path, sd_folder) -> None:  # type: ignore[no-untyped-def]
    """Whatever optional packages are here and not here: the file is all that a process of its own says."""
    options = ("--prompt", "disc", "--steps", "1", "--base", str(sd_folder), "--out", str(tmp_path))
    command = [sys.executable, "-c", "from dora_diffusion.cli import main; main()", "generate", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'seed-1.png'}\n", "")


def test_a_packed_base_draws_other_pictures_and_says_so(run, tmp_path, sd_folder, adapter_file) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("torchao")
    pictures = {}
    for name, packing in (("plain", ()), ("packed", ("--quantise", "int8"))):
        options = ("--base", sd_folder, "--steps", 2, "--out", tmp_path / name, *packing)
        drawn = run("generate", "--prompt", "disc", "--adapter", adapter_file, *options)
        compared = run("compare", "--prompt", "disc", "--adapters", adapter_file, *options)
        assert (drawn.status, compared.status) == (0, 0), (drawn.err, compared.err)
        pictures[name] = Image.open(tmp_path / name / "seed-1.png")
        side = next((tmp_path / name / "pictures").glob("1-*.png"))
        assert Image.open(side).tobytes() == pictures[name].tobytes()
        assert Image.open(side).text["base"] == pictures[name].text["base"]
    assert pictures["packed"].text["base"] == f"{sd_folder} (int8)" and pictures["plain"].text["base"] == str(sd_folder)
    off = np.abs(np.asarray(pictures["packed"], int) - np.asarray(pictures["plain"], int))
    assert 0 < off.mean() < 8


def bad_folder(folder: Path) -> Path:
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "good.png")
    return folder


def missing(folder: Path) -> Path:
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def truncated(folder: Path) -> Path:
    bad_folder(folder)
    data = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    return folder


def tiny(folder: Path) -> Path:
    Image.new("RGB", (1, 1)).save(bad_folder(folder) / "dot.png")
    return folder


def latin(folder: Path) -> Path:
    (bad_folder(folder) / "good.txt").write_bytes(b"caf\xe9")
    return folder


def long_caption(folder: Path) -> Path:
    (bad_folder(folder) / "good.txt").write_text("red apple " * 30)
    return folder


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (missing, "no folder at"),
        (empty, "has no pictures"),
        (truncated, "cut.png: is damaged"),
        (tiny, "1 x 1 is too small"),
        (latin, "not UTF-8 text"),
        (long_caption, "would be lost. Shorten it"),
    ],
)
def test_a_bad_training_folder_is_a_message(make, expected, run, tmp_path, sd_folder) -> None:  # type: ignore[no-untyped-def]
    images = make(tmp_path / "images")
    ran = run(
        *("train", "--images", images, "--instance-prompt", "x", "--base", sd_folder),
        *("--out", tmp_path / "out", "--set", "held_out=0"),
    )
    assert ran.status == 1 and expected in ran.flat and "Traceback" not in ran.flat
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--set", "rankk=3"], "unknown key 'rankk': did you mean 'rank'?"),
        (["--set", "target_modules=['to_quack']"], "'to_quack' matches no layer"),
        (["--base", "nothing-here"], "no base model at 'nothing-here'"),
        (["--resume"], "nothing to resume"),
        (["--steps", "0"], "steps"),
        (["--kind", "doora"], "doora"),
    ],
)
def test_a_bad_option_is_a_message(options, expected, run, tmp_path, pictures, sd_folder) -> None:  # type: ignore[no-untyped-def]
    given = ["--base", sd_folder, "--instance-prompt", "x", "--out", tmp_path / "out"]
    ran = run("train", "--images", pictures, *given, *options)
    assert ran.status in (1, 2) and expected in ran.flat and "Traceback" not in ran.flat


def test_an_output_folder_that_cannot_be_written_is_a_message(run, tmp_path, pictures, sd_folder) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "out"
    for command in (
        ("train", "--images", pictures, "--instance-prompt", "x", "--base", sd_folder, "--out", out),
        ("generate", "--prompt", "x", "--base", sd_folder, "--steps", 1, "--out", out),
    ):
        ran = run(*command)
        assert ran.status == 1 and "cannot write to" in ran.flat and "--out" in ran.flat
    assert (tmp_path / "file").read_text() == "kept"


class Boom:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (Path.write_text, (Path("boom.txt"), "ran"))


def broken(path: Path, good: Path) -> Path:
    path.write_bytes(good.read_bytes()[:-100])
    return path


def pickled(path: Path, good: Path) -> Path:
    path.write_bytes(pickle.dumps(Boom()))
    return path


def torch_saved(path: Path, good: Path) -> Path:
    torch.save({"unet.x.lora_A.weight": torch.zeros(1)}, path)
    return path


def other_base(path: Path, good: Path) -> Path:
    adapter = inject_adapter(bases.unet(cross_attention_dim=48), AdapterConfig(rank=2, alpha=2.0))
    return save_adapter(adapter, path)


def absent(path: Path, good: Path) -> Path:
    return path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (broken, "no sound safetensors file"),
        (pickled, "is a pickle"),
        (torch_saved, "is a pickle"),
        (other_base, "does not fit this base"),
        (absent, "no adapter file at"),
    ],
)
def test_a_bad_adapter_is_a_message(  # type: ignore[no-untyped-def]
    make, expected, run, tmp_path, adapter_file, sd_folder, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "bad.safetensors", adapter_file)
    for command in (("compare", "--adapters"), ("generate", "--adapter")):
        ran = run(*command, path, "--prompt", "x", "--steps", 1, "--base", sd_folder, "--out", tmp_path / "out")
        assert ran.status == 1 and expected in ran.flat and "bad.safetensors" in ran.flat
        assert "Traceback" not in ran.flat
    assert not Path("boom.txt").exists() and not list(tmp_path.glob("out/*.png"))


def test_a_prompt_longer_than_the_tokenizer_takes_is_a_message(run, tmp_path, sd_folder) -> None:  # type: ignore[no-untyped-def]
    ran = run("generate", "--prompt", "red apple " * 40, "--base", sd_folder, "--out", tmp_path)
    assert ran.status == 1 and "Shorten it" in ran.flat


@pytest.mark.parametrize("seeds", ["1,x", "-1", ""])
def test_bad_seeds_are_a_message(seeds, run, tmp_path, sd_folder, adapter_file) -> None:  # type: ignore[no-untyped-def]
    ran = run(
        *("compare", "--prompt", "x", "--adapters", adapter_file, f"--seeds={seeds}"),
        *("--base", sd_folder, "--steps", 1, "--out", tmp_path / "out"),
    )
    assert ran.status == 1 and "seed" in ran.flat


def test_ctrl_c_saves_a_checkpoint_and_resume_ends_with_the_same_bits(tmp_path, pictures, sd_folder) -> None:  # type: ignore[no-untyped-def]
    def command(out: str, *more: str) -> list[str]:
        program = [sys.executable, "-c", "from dora_diffusion.cli import main; main()", "train"]
        options = ["--images", str(pictures), "--instance-prompt", "disc", "--kind", "lora", "--base", str(sd_folder)]
        return [*program, *options, "--steps", "60", "--batch-size", "1", "--out", str(tmp_path / out), *more]

    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command("stopped"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("LoRA 3/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 130, err
    assert "checkpoint saved" in out and "--resume" in out and "Traceback" not in err
    assert (tmp_path / "stopped" / "checkpoints" / "lora.safetensors").exists()
    for name, more in (("stopped", ("--resume",)), ("whole", ())):
        done = subprocess.run(command(name, *more), capture_output=True, text=True, env=environment, timeout=HANGS)
        assert done.returncode == 0, done.stderr
    files = [tmp_path / name / "lora.safetensors" for name in ("stopped", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
