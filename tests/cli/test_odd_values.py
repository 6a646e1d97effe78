"""Every option of every command with values that nobody means: an error that says so, before any work, no traceback.

The commands and their options are read from the application, so that new ones are in this table by themselves. The base
that is given does not exist: whatever gets as far as asking for it has let a bad value pass.
"""

from __future__ import annotations

import inspect
import os
import shutil
import socket
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
import typer

from dora_diffusion.cli import app

NOTHING = "nothing-here"
REACHED = f"no base model at '{NOTHING}'"
NO_UTF8 = os.fsdecode(b"\xff")
MARKUP = "[red]a[/blue] :smile: [link=x]"

NO_TEXT = [f"a{NO_UTF8}"]
NO_WHOLE_NUMBER = ["x", "", "1.5", "9" * 30, "-" + "9" * 30, "9" * 5000, MARKUP, "nan"]
NO_NUMBER = ["x", "", "nan", "inf", "-inf", "1e400", MARKUP]
NO_CHOICE = ["x", "", MARKUP]
# Options of text that is not free, by their name.
NO_SUCH_TEXT = {
    "base": ["", " ", "a" * 300, MARKUP, "/dev/zero", "/dev/null/x", "~nobody-of-this-name/x", "a/b/c"],
    "seeds": ["", ",", "x", "1,x", "-1", "1.5", "9" * 5000, "9" * 30, MARKUP],
    "size": ["x", "0x0", "7x7", "99999x99999", "16", "-16x16", MARKUP],
    "host": ["a" * 300, "no such host", "..", MARKUP],
    "auth": ["", ":", "a", "a:", ":b"],
    "repair": ["", "x", MARKUP],
    "form": ["", "x", MARKUP],
    "set_": ["", "=", "x", "=1", "a.b=1", "rank=", "rank=x", "rank=true", f"rank={MARKUP}", "out=", "images=/dev/zero"],
    "file": ["", "a" * 300, "/dev/zero", "/dev/null/x", "~nobody-of-this-name/x", MARKUP],
}
# Numbers that the machine could hold and the option cannot.
OUT_OF_RANGE = {
    "port": ["0", "-1", "65536", "99999"],
    "steps": ["0", "-1"],
    "batch_size": ["0", "-1"],
    "rank": ["0", "-1"],
    "alpha": ["0", "-1"],
    "learning_rate": ["0", "-1"],
    "resolution": ["0", "-1", "99999"],
    "seed": ["-1"],
    "guidance": ["-1"],
}
PATHS = {"images", "out", "start_from", "validation_images"}  # of `train`, whose type there is text
# What makes an option mean something.
BESIDE = {
    ("parity", "out"): ["--repair", "comfyui"],
    ("parity", "repair"): ["--out", "{out}"],
    ("parity", "form"): ["--repair", "comfyui", "--out", "{out}"],
    ("convert", "rank"): ["--to", "lora"],
    ("app", "host"): ["--auth", "a:b"],
}


@dataclass(frozen=True)
class Option:
    """One parameter of a command; `kind` is the plain type of its values."""

    command: str
    name: str
    flag: str | None  # None for an argument
    kind: type
    required: bool


def options() -> Iterator[Option]:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for registered in app.registered_commands:
        assert registered.callback is not None
        signature = inspect.signature(registered.callback, eval_str=True)
        name = registered.name or registered.callback.__name__
        for parameter in commands[name].params:
            if parameter.name in signature.parameters:
                annotation = signature.parameters[parameter.name].annotation
                flag = parameter.opts[-1] if parameter.param_type_name == "option" else None
                yield Option(name, parameter.name, flag, plain_type(annotation), parameter.required)


def plain_type(annotation: object) -> type:
    """int of Annotated[list[int] | None, ...]"""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation
    inner = [each for each in typing.get_args(annotation) if each is not type(None)]
    return plain_type(inner[0])


OPTIONS = list(options())


def odd_paths(folder: Path) -> list[str]:
    """Paths that are neither a file nor a folder to read from or to write to."""
    (folder / "file").write_text("no folder")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket")[-100:] if len(str(folder)) > 90 else str(folder / "socket"))
    named = [str(folder / name) for name in ("loop", "pipe", "socket", "file/inside", "loop/inside", "a" * 300)]
    return ["", " ", NO_UTF8, "a\nb", "a\x1b[31m", "/dev/zero", "~nobody-of-this-name/x", *named]


def bad_values(option: Option, folder: Path) -> list[str]:
    if option.kind is Path or (option.command == "train" and option.name in PATHS):
        return odd_paths(folder)
    more = OUT_OF_RANGE.get(option.name, []) if option.kind in (int, float) else NO_SUCH_TEXT.get(option.name, [])
    if option.kind is int:
        return NO_WHOLE_NUMBER + more
    if option.kind is float:
        return NO_NUMBER + more
    if issubclass(option.kind, Enum):
        return NO_CHOICE
    return NO_TEXT + more


@pytest.fixture
def words(tmp_path: Path, pictures: Path, adapter_file: Path):  # type: ignore[no-untyped-def]
    """A whole command line with one option as it is said."""
    good = {
        "prompt": "x",
        "adapters": adapter_file,
        "files": adapter_file,
        "file": adapter_file,
        "to": "diffusers",
        "images": pictures,
        "instance_prompt": "x",
        "base": NOTHING,
        "outputs": tmp_path / "outputs",
    }

    def words(option: Option, *value: str) -> list[str]:
        there = [other for other in OPTIONS if other.command == option.command and other.name != option.name]
        arguments, flags = [option.command], []
        for other in there:
            if other.name in good and (other.required or other.flag is not None):
                said = str(good[other.name])
                flags += [said] if other.flag is None else [f"{other.flag}={said}"]
            elif other.name == "out" and option.command != "parity":
                flags.append(f"--out={tmp_path / option.command}-out")
        beside = [word.format(out=tmp_path / "out") for word in BESIDE.get((option.command, option.name), [])]
        mine = [f"{option.flag}={one}" for one in value] if option.flag else ["--", *value]
        return [*arguments, *flags, *beside, *mine]

    return words


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.command}-{option.name}")
def test_a_value_that_cannot_be_is_refused_before_any_work(option: Option, run, words, tmp_path) -> None:  # type: ignore[no-untyped-def]
    values = ["x"] if option.kind is bool else bad_values(option, tmp_path)
    for value in values:
        ran = run(*words(option, value))
        assert ran.status in (1, 2), (value[:80], ran.out, ran.err)
        assert REACHED not in ran.flat, f"{value[:80]!r} was let pass"
        assert ran.err.strip() and "Traceback" not in ran.flat


@pytest.mark.slow
@pytest.mark.parametrize("option", [o for o in OPTIONS if o.kind is str], ids=lambda o: f"{o.command}-{o.name}")
def test_text_with_markup_and_escapes_is_no_markup(option: Option, run, words) -> None:  # type: ignore[no-untyped-def]
    for value in (MARKUP, "\x1b[31mred\x1b[0m", "a\u202eb", "a\nb", "x" * 5000, "~", "é→🙂"):
        ran = run(*words(option, value))
        assert ran.status in (1, 2) and "Traceback" not in ran.flat, (value[:80], ran.out, ran.err)
        assert not set("\x1b\u202e") & set(ran.out + ran.err)


def test_the_table_reaches_the_base_where_nothing_is_wrong(run, words, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Else the tests above would pass whatever the commands did."""
    for command in {option.command for option in OPTIONS if option.name == "base"}:
        base = next(option for option in OPTIONS if option.command == command and option.name == "base")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)  # what is a folder for one is a file for another
        ran = run(*words(base, NOTHING))
        assert ran.status == 1 and REACHED in ran.flat, (command, ran.out, ran.err)


@pytest.mark.parametrize("arguments", [[], [MARKUP], [f"--{MARKUP}"], ["--help", MARKUP], [NO_UTF8], ["train", "--x"]])
def test_a_line_that_is_no_command_is_a_message(arguments: list[str], run) -> None:  # type: ignore[no-untyped-def]
    ran = run(*arguments)
    assert ran.status in (0, 2) and ran.flat and "Traceback" not in ran.flat
