"""Names and prompts with what rich, Markdown, YAML and a terminal would act on: shown as they are, in real runs."""

from __future__ import annotations

import ast
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from rich.table import Table

from dora_diffusion.markdown import code, plain
from dora_diffusion.screen import Screen, printable, shell_line, styled

PACKAGE = Path(__file__).parents[2] / "dora_diffusion"
ODD = "[bold]a[-red] :smile: `b` \x1b[31m\u202e"
SHOWN = "[bold]a[-red] :smile: `b` \\x1b[31m\\u202e"
PROMPT = 'a [red]"b"[/c] :s: `x` <b>'


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é → 🙂 日本語\u3000\u00a0", "plain é → 🙂 日本語\u3000\u00a0"),
        ("a\x1b[2J\x07\x9b1m", "a\\x1b[2J\\x07\\x9b1m"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        (os.fsdecode(b"a\xffb"), "a\\xffb"),
        ("\u202etxt.exe\u2066\u2028", "\\u202etxt.exe\\u2066\\u2028"),
        ("👨\u200d👩", "👨\u200d👩"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_would_act_on_a_terminal_is_written_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode("utf-8")


@pytest.mark.skipif(shutil.which("bash") is None, reason="a shell")
def test_a_command_that_is_pasted_means_the_same_words_and_shows_all_of_them() -> None:
    words = [
        "a b",
        "it's",
        '"$HOME" `x` !',
        "~",
        "*",
        "",
        "-a",
        "a\\n'\n\t\x1b[31m",
        "שלום\u200f",
        "\x85",
        ODD,
        PROMPT,
        "🙂",
    ]
    line = shell_line(words)
    assert printable(line) == line
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, env=environment, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words


def test_a_screen_shows_text_in_lines_and_tables_as_it_is() -> None:
    screen = Screen()
    screen.file, screen._force_terminal = io.StringIO(), True
    table = Table()
    table.add_column(no_wrap=True)
    table.add_row(ODD)
    table.add_row(styled((ODD, "red")))
    screen.print(table, soft_wrap=True)
    screen.say((ODD, "green"), ODD)
    screen.print(ODD, soft_wrap=True)
    assert screen.file.getvalue().count(SHOWN) == 5 and "\u202e" not in screen.file.getvalue()


def test_no_part_writes_to_a_terminal_past_the_screen() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        past = {"rich.console.Console", "rich.markup.escape", "rich.progress.TextColumn"} & names
        assert not past or path.name == "screen.py", f"{path}: use dora_diffusion.screen instead of {past}"


@pytest.mark.parametrize(
    "text", [PROMPT, ODD, "| ![y](z) \\\\ {0}", "`", "``", " ", "a\n# b", "*a* _b_ ~~c~~ [d](e) &amp; <script>", "a#"]
)
def test_markdown_shows_the_text_it_was_given(text: str) -> None:
    markdown = MarkdownIt("commonmark")
    (inline,) = [token for token in markdown.parse(f"# {plain(text)}") if token.type == "inline"]
    assert "".join(part.content for part in inline.children or []) == printable(text).strip()
    assert {part.type for part in inline.children or []} <= {"text", "text_special"}
    (inline,) = [token for token in markdown.parse(f"x {code(text)} y") if token.type == "inline"]
    assert [part.content for part in inline.children or [] if part.type == "code_inline"] == [printable(text)]


def test_runs_with_odd_names_and_prompts_end_well(run, tmp_path, pictures, sd_folder) -> None:  # type: ignore[no-untyped-def]
    name = "[bold]a[-red] :smile: `b`"
    images, out = tmp_path / f"{name} images", tmp_path / name
    shutil.copytree(pictures, images)
    trained = run(
        *("train", "--images", images, "--instance-prompt", PROMPT, "--preview-prompt", PROMPT, "--out", out),
        *("--steps", 1, "--batch-size", 1, "--rank", 2, "--base", sd_folder, "--set", "held_out=1"),
    )
    assert trained.status == 0, trained.err
    made = out / "dora.safetensors"
    assert str(made) in trained.flat and str(out / "config.toml") in trained.flat
    card = ModelCard.load(out / "README.md")
    assert card.data.instance_prompt == PROMPT and card.data.widget[0]["text"] == PROMPT
    ast.parse(card.text.partition("```python\n")[2].partition("```")[0])
    for command, shown in (
        (("inspect", made), str(made)),
        (
            ("generate", "--prompt", PROMPT, "--adapter", made, "--out", out, "--steps", 1, "--base", sd_folder),
            out.name,
        ),
        (("compare", "--prompt", PROMPT, "--adapters", made, "--out", out, "--steps", 1, "--base", sd_folder), PROMPT),
        (("convert", made, "--to", "kohya", "--out", out / f"k {name}.safetensors"), f"k {name}.safetensors"),
        (("merge", made, "--out", out / f"merged {name}", "--base", sd_folder), f"merged {name}"),
        (("inspect", tmp_path / name / "none.safetensors"), "none.safetensors"),
    ):
        ran = run(*command)
        assert ran.status == int("none" in shown) and shown in ran.flat, (command, ran.out, ran.err)


@pytest.mark.slow
@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}])
def test_any_locale_can_show_any_name(locale: dict[str, str], tmp_path: Path) -> None:
    for name in ("é→🙂.safetensors".encode(), b"\xff.safetensors", b"[/red].safetensors"):
        command = [sys.executable, "-c", "from dora_diffusion.cli import main; main()", "inspect"]
        done = subprocess.run(
            [*map(os.fsencode, command), os.fsencode(tmp_path) + b"/" + name],
            capture_output=True,
            env={**os.environ, **locale},
        )
        assert done.returncode in (1, 2) and done.stderr and b"Traceback" not in done.stderr, done.stderr


def test_a_name_of_255_bytes_is_written_and_a_link_is_followed(run, tmp_path, adapter_file) -> None:  # type: ignore[no-untyped-def]
    longest = tmp_path / ("é" * 121 + ".safetensors")
    assert len(os.fsencode(longest.name)) == 254
    assert run("convert", adapter_file, "--to", "kohya", "--out", longest).status == 0 and longest.is_file()
    link, target = tmp_path / "link.safetensors", tmp_path / "target.safetensors"
    link.symlink_to(target)
    assert run("convert", adapter_file, "--to", "kohya", "--out", link).status == 0
    assert link.is_symlink() and target.read_bytes() == longest.read_bytes()


def test_nothing_that_is_read_or_is_no_file_is_replaced(run, tmp_path, adapter_file) -> None:  # type: ignore[no-untyped-def]
    before = adapter_file.read_bytes()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "same").hardlink_to(adapter_file)
    for out in (adapter_file, tmp_path / "same", tmp_path / "pipe", tmp_path, Path("/dev/null")):
        ran = run("convert", adapter_file, "--to", "kohya", "--out", out)
        assert ran.status == 1 and str(out) in ran.flat
    assert adapter_file.read_bytes() == before and (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    "name", ["config.toml", "log.jsonl", "README.md", "dora.safetensors", "previews", "checkpoints"]
)
def test_what_is_in_the_way_of_a_run_is_said_before_the_base_is_loaded(name, run, tmp_path, pictures) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    out.mkdir()
    (out / name).mkdir() if "." in name else (out / name).write_text("mine")
    ran = run("train", "--images", pictures, "--instance-prompt", "x", "--base", "nothing-here", "--out", out)
    assert ran.status == 1 and str(out / name) in ran.flat and "nothing-here" not in ran.flat
