"""Runs that end in the middle: killed, asked to stop, on a full disk, with files that were cut; all go on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training_helpers import HANGS, config, stop_after

from dora_diffusion.comparison.curves import read_curves
from dora_diffusion.errors import ConfigError, OutputError, TrainingError
from dora_diffusion.journal import append_entry
from dora_diffusion.models.loading import Base
from dora_diffusion.outputs import clear_left_overs, make_folder, whole_file
from dora_diffusion.stopping import stop_request
from dora_diffusion.training.config import TrainConfig, resolve_config
from dora_diffusion.training.events import Preparing, Previewed, Stopped
from dora_diffusion.training.run import train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")
MADE = ("lora.safetensors", "log.jsonl")


def bits(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in MADE]


@pytest.fixture
def whole(tmp_path: Path, pictures: Path, sd_base: Base) -> TrainConfig:
    """A run that was never interrupted, in the folder `whole`."""
    settings = config(pictures, tmp_path / "whole", Path("base"), kind="lora", checkpoint_every=2)
    list(train(settings, base=sd_base))
    return settings


def interrupted(whole: TrainConfig, base: Base, steps: int = 3) -> tuple[TrainConfig, Path]:
    out = Path(whole.out).with_name("parts")
    settings = whole.model_copy(update={"out": str(out)})
    assert isinstance(list(train(settings, base=base, should_stop=stop_after(steps)))[-1], Stopped)
    return settings, out


# Signals


def command(images: Path, base: Path, out: Path, *more: str) -> list[str]:
    program = [sys.executable, "-c", "from dora_diffusion.cli import main; main()", "train"]
    options = ["--images", str(images), "--instance-prompt", "disc", "--kind", "lora", "--base", str(base)]
    return [*program, *options, "--steps", "100", "--batch-size", "1", "--out", str(out), *more]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "times", "status"), [("SIGTERM", 1, 143), ("SIGHUP", 2, 129)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    name: str, times: int, status: int, tmp_path: Path, pictures: Path, sd_folder: Path
) -> None:
    """A terminal that closes sends SIGHUP twice: itself, and through the shell."""
    signal.signal(
        signal.Signals[name], signal.SIG_DFL
    )  # what is ignored here, as below nohup, is ignored by children too
    program = command(pictures, sd_folder, tmp_path / "out")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("LoRA 15/"):
            for _ in range(times):
                process.send_signal(getattr(signal, name))
            break
    said, errors = process.communicate(timeout=HANGS)
    assert process.returncode == status, errors
    assert "checkpoint saved" in said and "Traceback" not in errors
    assert (tmp_path / "out" / "checkpoints" / "lora.safetensors").exists()


ASKED = """
import os, signal, sys, time
from dora_diffusion.stopping import stop_request
with stop_request(lambda number: print("asked", number, flush=True)) as asked:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


def test_a_second_signal_ends_at_once_and_an_ignored_hang_up_stays_ignored() -> None:
    program = ["nohup", sys.executable, "-c", ASKED] if shutil.which("nohup") else [sys.executable, "-c", ASKED]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    if program[0] == "nohup":
        process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == b"asked 15\n"
    while process.poll() is None:  # until one comes that is no echo of the first
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    assert process.returncode == 130


def test_a_system_without_sighup_stops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP")  # as on Windows
    said: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with stop_request(said.append) as asked:
        assert not asked() and asked.exit_code == 130
        signal.raise_signal(signal.SIGTERM)
        assert asked() and asked.exit_code == 143 and said == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_one_goes_on(
    whole: TrainConfig, sd_base: Base
) -> None:
    settings = whole.model_copy(update={"out": str(Path(whole.out).with_name("shared"))})
    first = iter(train(settings, base=sd_base))
    next(first)
    for options in ({}, {"overwrite": True}):
        with pytest.raises(OutputError, match=r"another run is training into .*shared.*another folder"):
            list(train(settings, base=sd_base, **options))
    list(first)
    assert bits(Path(settings.out)) == bits(Path(whole.out))
    list(train(settings, base=sd_base, overwrite=True))  # nobody has it any more
    assert bits(Path(settings.out)) == bits(Path(whole.out))


# A disk that is full, a folder that vanishes

LIMITED = """
import resource, sys
from pathlib import Path
from training_helpers import config
from dora_diffusion.errors import OutputError
from dora_diffusion.training.run import train
images, out, base, kilobytes, path = sys.argv[1:6]
settings = config(Path(images), Path(out), Path(base), kind="lora", steps=8, checkpoint_every=2)
limited = False
try:
    for event in train(settings):
        if not limited and type(event).__name__ == "Step" and event.step == 5:
            limited = True
            size = (Path(out) / path).stat().st_size if path else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + int(kilobytes), resource.RLIM_INFINITY))
except OutputError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "room", "said"),
    [
        ("log.jsonl", 20, "cannot write {out}/log.jsonl: File too large"),
        ("", 4000, "cannot write {out}/checkpoints/"),
    ],
    ids=["log", "checkpoint"],
)
def test_a_disk_that_fills_leaves_a_run_that_goes_on_to_the_same_bits(
    path: str, room: int, said: str, tmp_path: Path, pictures: Path, sd_folder: Path
) -> None:
    """By a limit on the size of files: a write stops in its middle then, as on a full disk."""
    program = [sys.executable, "-c", LIMITED, *map(str, (pictures, tmp_path / "out", sd_folder, room, path))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert said.format(out=tmp_path / "out") in done.stdout, done.stdout
    kept = "The checkpoint after step 4 is whole: when there is room again, the same command goes on"
    assert f"{kept} (train with --resume)." in done.stdout
    assert all(json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    assert not list((tmp_path / "out").rglob("*.tmp*"))
    settings = config(pictures, tmp_path / "out", sd_folder, kind="lora", steps=8, checkpoint_every=2)
    list(train(settings, resume=True))
    list(train(settings.model_copy(update={"out": str(tmp_path / "whole")})))
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")


@pytest.mark.parametrize("replaced", [False, True], ids=["vanishes", "is a file now"])
def test_an_output_folder_that_goes_away_is_said(replaced: bool, whole: TrainConfig, sd_base: Base) -> None:
    out = Path(whole.out).with_name("gone")
    with pytest.raises(OutputError, match=r"cannot write .*gone.*No checkpoint was written before"):
        for event in train(whole.model_copy(update={"out": str(out)}), base=sd_base):
            if getattr(event, "step", 0) == 3 and out.is_dir():
                shutil.rmtree(out)
                if replaced:
                    out.write_text("")
    assert not any("lora" in name for name, _ in sd_base.denoiser.named_modules())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device for a full disk")
def test_a_line_that_does_not_fit_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left on device"):
        append_entry(tmp_path / "log", {"a": 1})


# Files that were cut, lost or edited


def cut(data: bytes) -> bytes:
    return data[: len(data) - 25]


def blank(data: bytes) -> bytes:
    return data.replace(b"\n", b"\n\n  \n")


def zeros(data: bytes) -> bytes:
    return data[:-60] + bytes(60)


def glued(data: bytes) -> bytes:
    return bytes(40) + data + b'{"kind": "lora", "st\n[1]\n{"kind": 3}\n\xff\xfe\n'


@pytest.mark.parametrize("damage", [cut, blank, zeros, glued])
def test_a_log_that_was_cut_does_not_stop_a_resume_to_the_same_bits(
    damage: Callable[[bytes], bytes], whole: TrainConfig, sd_base: Base
) -> None:
    settings, out = interrupted(whole, sd_base)
    log = out / "log.jsonl"
    with log.open("a") as file:  # a step that came after the checkpoint
        file.write('{"kind": "lora", "step": 4, "loss": 0.123456789012345678901234567890, "learning_rate": 0.01}\n')
    log.write_bytes(damage(log.read_bytes()))
    assert len(read_curves(log)["lora"].loss) >= 3
    events = list(train(settings, base=sd_base, resume=True))
    notes = [event.text for event in events if isinstance(event, Preparing) and event.text.startswith("log.jsonl")]
    assert len(notes) == (damage is not blank), notes
    assert bits(out) == bits(Path(whole.out))


def test_a_log_that_lacks_steps_says_so(whole: TrainConfig, sd_base: Base) -> None:
    settings, out = interrupted(whole, sd_base)
    (out / "log.jsonl").write_bytes(b"")
    notes = [event.text for event in train(settings, base=sd_base, resume=True) if isinstance(event, Preparing)]
    assert any("it lacks 3 of the steps that are done" in note for note in notes)
    assert bits(out)[0] == bits(Path(whole.out))[0]


@pytest.mark.parametrize("part", ["cut", "empty", "zeros", "numbers", "step", "config"])
def test_a_checkpoint_that_is_not_as_it_was_written_is_refused(part: str, whole: TrainConfig, sd_base: Base) -> None:
    settings, out = interrupted(whole, sd_base)
    path = out / "checkpoints" / "lora.safetensors"
    data = path.read_bytes()
    damaged = {
        "cut": data[:-10],
        "empty": b"",
        "zeros": bytes(len(data)),
        "numbers": data[:-4096] + bytes(4096),
        "step": data.replace(b'"step":"3"', b'"step":"4"'),
        "config": data.replace(b'"config":"{', b'"config":"['),
    }[part]
    assert damaged != data
    path.write_bytes(damaged)
    with pytest.raises(TrainingError, match=r"cannot resume from .*lora\.safetensors: .*--overwrite, or with another"):
        list(train(settings, base=sd_base, resume=True))
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [None, b"", bytes(200), b'images = "a'])
def test_a_lost_config_is_taken_from_the_checkpoint(content: bytes | None, whole: TrainConfig, sd_base: Base) -> None:
    _, out = interrupted(whole, sd_base)
    path = out / "config.toml"
    before = resolve_config(None, {"out": str(out)}, resume=True)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    if content == b"":  # sound, and says nothing
        with pytest.raises(ConfigError, match="'images' is missing"):
            resolve_config(None, {"out": str(out)}, resume=True)
        return
    with pytest.warns(UserWarning, match="is missing or damaged; the configuration in .*lora.safetensors is taken"):
        assert resolve_config(None, {"out": str(out)}, resume=True) == before


# What killed processes leave


def test_what_a_killed_process_was_writing_is_cleared_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    (tmp_path / "previews").mkdir()
    writer = (
        "import sys, time; from pathlib import Path; from dora_diffusion.outputs import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as path:\n"
        "    path.write_text('half'); print('ready', flush=True); time.sleep(10 ** 6)"
    )
    paths = [tmp_path / "lora.safetensors", tmp_path / "previews" / "a.png"]
    processes = [
        subprocess.Popen([sys.executable, "-c", writer, str(path)], stdout=subprocess.PIPE)
        for path in (*paths, paths[0])
    ]
    try:
        assert all(process.stdout.readline() == b"ready\n" for process in processes)  # type: ignore[union-attr]
        assert len(list(tmp_path.rglob("*.tmp"))) == 3
        for process in processes[:2]:
            process.kill()
            process.wait()
        (tmp_path / ".log.abcd_123.tmp.jsonl").write_text("of an earlier version")
        (tmp_path / ".mine.tmp.txt").write_text("mine")
        with whole_file(tmp_path / "ours") as ours:
            ours.write_text("whole")
            make_folder(tmp_path)
        assert (tmp_path / "ours").read_text() == "whole"
        (left,) = tmp_path.rglob("*.tmp")
        assert left.parent == tmp_path and (left / "file.safetensors").read_text() == "half"
        assert {path.name for path in tmp_path.iterdir()} == {left.name, "previews", "ours", ".mine.tmp.txt"}
    finally:
        for process in processes:
            process.kill()
            process.wait()
    clear_left_overs(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_is_said_before_a_run_starts(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from dora_diffusion.outputs import make_folder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)); make_folder(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert "OutputError: cannot write to" in done.stderr and "File too large" in done.stderr


def test_previews_from_before_a_resume_stay_and_those_of_a_replaced_run_go(whole: TrainConfig, sd_base: Base) -> None:
    settings = whole.model_copy(update={"preview_prompts": ["disc"], "preview_every": 2})
    _, out = interrupted(settings, sd_base)
    list(train(settings.model_copy(update={"out": str(out)}), base=sd_base, resume=True))
    drawn = sorted(path.name for path in (out / "previews").iterdir())
    assert drawn == [f"lora-0000{step}-prompt1-seed1.png" for step in (2, 4, 6)]
    assert "previews/lora-00006-prompt1-seed1.png" in (out / "README.md").read_text()
    again = settings.model_copy(update={"out": str(out), "steps": 1})
    events = list(train(again, base=sd_base, overwrite=True))
    assert [event.step for event in events if isinstance(event, Previewed)] == [1]
    assert [path.name for path in (out / "previews").iterdir()] == ["lora-00001-prompt1-seed1.png"]
