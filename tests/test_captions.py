"""Whose caption is whose: one table of files, for a folder on the command line and for the page."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.data.folder import read_folder
from dora_diffusion.errors import DataError
from dora_diffusion.webapp.uploads import read_uploads, sort_files

E_ACUTE = unicodedata.normalize("NFC", "é")
E_AND_ACCENT = unicodedata.normalize("NFD", "é")


def folder_of(path: Path, files: dict[str, str | bytes]) -> Path:
    """A folder with these files; pictures need no content."""
    path.mkdir(exist_ok=True)
    for i, (name, content) in enumerate(files.items()):
        (path / name).parent.mkdir(exist_ok=True)
        if content == "" and name.endswith((".png", ".jpg", ".PNG")):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(path / name)
        else:
            (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(*rows: object) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


# The files of a folder, and the caption of each picture; None where it takes the instance prompt.
CASES: dict[str, tuple[dict[str, str | bytes], dict[str, str | None]]] = {
    "text file": ({"a.png": "", "a.txt": "a cat\n"}, {"a.png": "a cat"}),
    "capital suffix": ({"a.png": "", "a.TXT": "a cat"}, {"a.png": "a cat"}),
    "capital everything": ({"A.PNG": "", "a.txt": "a cat"}, {"A.PNG": "a cat"}),
    "sd-scripts' suffix": ({"a.png": "", "a.caption": "a cat"}, {"a.png": "a cat"}),
    "the whole name": ({"a.png": "", "a.png.txt": "a cat"}, {"a.png": "a cat"}),
    "one stem, whole names": (
        {"a.png": "", "a.jpg": "", "a.png.txt": "a cat", "a.jpg.txt": "a dog"},
        {"a.jpg": "a dog", "a.png": "a cat"},
    ),
    "one stem, one whole name": (
        {"a.png": "", "a.jpg": "", "a.png.txt": "a cat", "a.txt": "a dog"},
        {"a.jpg": "a dog", "a.png": "a cat"},
    ),
    "dots in the name": ({"a.b.png": "", "a.b.txt": "a cat", "a.png": ""}, {"a.b.png": "a cat", "a.png": None}),
    "composed and not": (
        {f"caf{E_AND_ACCENT}.png": "", f"caf{E_ACUTE}.txt": "a cat"},
        {f"caf{E_AND_ACCENT}.png": "a cat"},
    ),
    "composed and not, in a table": (
        {f"caf{E_ACUTE}.png": "", "metadata.jsonl": jsonl({"file_name": f"caf{E_AND_ACCENT}.png", "text": "a cat"})},
        {f"caf{E_ACUTE}.png": "a cat"},
    ),
    "mark, line ends and blank lines": (
        {"a.png": "", "metadata.jsonl": "\ufeff\r\n" + jsonl({"file_name": "a.png", "text": " a cat "}) + "\r\n\r\n"},
        {"a.png": "a cat"},
    ),
    "a line separator in a text": (
        {"a.png": "", "metadata.jsonl": jsonl({"file_name": "a.png", "text": "a\u2028cat\x85\x0b!"})},
        {"a.png": "a\u2028cat\x85\x0b!"},
    ),
    "other columns": (
        {"a.png": "", "b.png": "", "metadata.jsonl": jsonl(
            {"file_name": "a.png", "prompt": "a cat", "size": 3}, {"file_name": "./b.png", "caption": "a dog"}
        )},
        {"a.png": "a cat", "b.png": "a dog"},
    ),
    "a table": (
        {"a.png": "", "b.png": "", "metadata.csv": '\ufefffile_name,text\r\na.png,"a cat, big"\r\n\r\nb.png,a dog\r\n'},
        {"a.png": "a cat, big", "b.png": "a dog"},
    ),
    "a table with semicolons and lines in it": (
        {"a.png": "", "metadata.csv": 'text;file_name\n"a cat\nsitting";a.png\n'},
        {"a.png": "a cat\nsitting"},
    ),
    "text files before tables": (
        {
            "a.png": "",
            "b.png": "",
            "a.txt": "first",
            "metadata.jsonl": jsonl({"file_name": "a.png", "text": "second"}, {"file_name": "b.png", "text": "third"}),
            "metadata.csv": "file_name,text\na.png,first\n",
        },
        {"a.png": "first", "b.png": "third"},
    ),
    "what systems leave": (
        {
            "a.png": "",
            "a.txt": "a cat",
            "._a.png": b"\0\5\26\7",
            "._a.txt": b"\0\5\26\7",
            ".DS_Store": b"\0\0\0\1Bud1",
            "Thumbs.db": b"\xd0\xcf",
            "desktop.ini": "[.ShellClassInfo]",
        },
        {"a.png": "a cat"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_command_line_and_the_page_give_the_same_captions(tmp_path: Path, case: str) -> None:
    files, expected = CASES[case]
    folder = folder_of(tmp_path / "f", files)
    read = read_folder(folder, "the instance prompt")
    assert {i.path.name: i.caption for i in read.images} == {
        name: text or "the instance prompt" for name, text in expected.items()
    }
    sent = sort_files(sorted(folder.iterdir()))
    assert {upload.label: upload.caption for upload in sent.uploads} == {k: v or "" for k, v in expected.items()}
    assert sent.problems == () and read.ignored == () and read.notes == sent.notes
    assert bool(read.notes) == (case in ("text files before tables", "a table with semicolons and lines in it"))


# The files, and what is said; the page goes on without these captions, and the command line stops.
PROBLEMS: dict[str, tuple[dict[str, str | bytes], str]] = {
    "null": ({"metadata.jsonl": jsonl({"file_name": "a.png", "text": None})}, "line 1: the text of 'a.png' is null"),
    "a list": ({"metadata.jsonl": jsonl({"file_name": "a.png", "text": ["x", "y"]})}, "is a list of 2"),
    "a number": ({"metadata.jsonl": jsonl({"file_name": "a.png", "text": 7})}, "is 7; write the caption"),
    "blank": ({"metadata.jsonl": jsonl({"file_name": "a.png", "text": " "})}, "is empty"),
    "no text": ({"metadata.jsonl": jsonl({"file_name": "a.png"})}, "'a.png' has no text"),
    "no name": ({"metadata.jsonl": jsonl({"image": "a.png", "text": "x"})}, "no file_name (it has: image, text)"),
    "no object": ({"metadata.jsonl": '"a.png"'}, "is not like"),
    "no JSON": ({"metadata.jsonl": "\n{not json}"}, "line 2: '{not json}' is no JSON"),
    "nested without end": ({"metadata.jsonl": "[" * 100_000}, "is no JSON"),
    "half of a character": (
        {"metadata.jsonl": '{"file_name": "a.png", "text": "\\ud83d"}'},
        "half of a character",
    ),
    "no such picture": ({"metadata.jsonl": jsonl({"file_name": "z.png", "text": "x"})}, "no picture 'z.png'"),
    "a name that is too long": ({"metadata.jsonl": jsonl({"file_name": f"m/{'z' * 999}", "text": "x"})}, "no picture"),
    "twice": (
        {"metadata.jsonl": jsonl({"file_name": "a.png", "text": "x"}, {"file_name": "a.png", "text": "y"})},
        "a.png has more than one caption (metadata.jsonl, line 1, metadata.jsonl, line 2)",
    ),
    "comma without quotes": ({"metadata.csv": "file_name,text\na.png,a cat, sitting\n"}, "line 2: 3 cells under 2"),
    "empty cell": ({"metadata.csv": "file_name,text\na.png,\n"}, "is empty"),
    "other header": ({"metadata.csv": "image,text\na.png,x\n"}, "no file_name (it has: image, text)"),
    "two suffixes": ({"a.txt": "x", "a.TXT": "y"}, "a.png has more than one caption (a.TXT, a.txt)"),
    "two pictures of one stem": ({"a.jpg": "", "a.txt": "x"}, "a.txt: it fits a.jpg, a.png"),
    "empty file": ({"a.txt": " \n"}, "a.txt is empty"),
    "UTF-16 without its mark": ({"a.txt": "a cat".encode("utf-16-le")}, "a.txt is no text in UTF-8"),
    "ISO-2022-JP": ({"a.txt": "\u732b".encode("iso2022_jp")}, "the control character '\\x1b'"),
    "a NUL in a row": ({"metadata.jsonl": jsonl({"file_name": "a.png", "text": "a\0cat"})}, "'\\x00' in it"),
    "nothing that can be seen": ({"a.txt": "\ufeff\u200b \u2060"}, "a.txt is empty"),
    "a quote without end": (
        {"b.png": "", "metadata.csv": 'file_name,text\na.png,"x\nb.png,y\n'},
        "is no row of a table",
    ),
    "one column twice": ({"metadata.csv": "file_name,text,text\na.png,x,y\n"}, "more than one column text"),
    "a name that is a number": ({"metadata.jsonl": jsonl({"file_name": 1, "text": "x"})}, "its file_name is 1"),
    "latin-1": ({"a.caption": "caf\xe9".encode("latin-1")}, "a.caption is not UTF-8 text"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_cannot_be_told_is_said_and_guessed_by_neither(tmp_path: Path, case: str) -> None:
    files, said = PROBLEMS[case]
    folder = folder_of(tmp_path / "f", {"a.png": "", **files})
    with pytest.raises(DataError) as refused:
        read_folder(folder, "the instance prompt")
    assert said in str(refused.value), str(refused.value)
    files_sent = sorted(folder.iterdir())
    sent = sort_files(files_sent)
    assert {upload.caption for upload in sent.uploads} == {""}
    assert any(said in problem for problem in sent.problems)
    with pytest.raises(DataError) as refused:
        read_uploads(files_sent)
    assert said in str(refused.value)


def test_captions_that_are_there_and_not_used_are_said(tmp_path: Path) -> None:
    rows = jsonl({"file_name": "a.png", "text": "other"}, {"file_name": "more/b.png", "text": "x"})
    files = {"a.png": "", "a.txt": "one", "cat.txt": "two", "more/b.png": "", "metadata.jsonl": rows, "notes.md": "x"}
    read = read_folder(folder_of(tmp_path / "f", files))
    assert [image.caption for image in read.images] == ["one"] and read.ignored == ("notes.md",)
    assert read.notes == (
        "captions that differ, of which the first is taken: a.png (a.txt, not metadata.jsonl, line 1)",
        "captions not used, as no picture has their name: cat.txt",
        "captions not used, of pictures in subfolders, which are not read: more/b.png",
        "pictures in subfolders are not read: more/",
    )


def test_pictures_of_one_name_from_two_folders_never_get_each_others_caption(tmp_path: Path) -> None:
    """A browser's files lie in no folder any more."""
    files = {"a.png": "", "a.txt": "one"}
    first, second = folder_of(tmp_path / "first", files), folder_of(tmp_path / "second", files | {"a.txt": "two"})
    sent = sort_files([*sorted(first.iterdir()), *sorted(second.iterdir())])
    assert [(upload.label, upload.caption) for upload in sent.uploads] == [("a.png", ""), ("a.png (2)", "")]
    assert len(sent.problems) == 2 and all("2 pictures are called a.png" in problem for problem in sent.problems)


def test_a_table_names_pictures_as_they_were_before_a_browser_sent_them(tmp_path: Path) -> None:
    """Gradio keeps no folder of a name, and drops what may harm: train/a!.png comes as a.png."""
    rows = jsonl({"file_name": "train/a!.png", "text": "one"}, {"file_name": "train/b (1).png", "text": "two"})
    folder = folder_of(tmp_path / "f", {"a.png": "", "b (1).png": "", "metadata.jsonl": rows})
    assert [upload.caption for upload in read_uploads(sorted(folder.iterdir()))] == ["one", "two"]


def test_other_files_are_said_and_stop_nothing(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", {"a.png": "", "notes.md": "x"})
    sent = sort_files(sorted(folder.iterdir()))
    assert len(sent.uploads) == 1 and sent.notes == ("passed over: notes.md",)
    with pytest.raises(DataError, match=r"notes\.md is no picture"):
        sort_files([folder / "notes.md"])
    assert sort_files([]).uploads == ()


# Files beside a.png, and what is said of them by both.
REMARKS: dict[str, tuple[dict[str, str | bytes], str, str]] = {
    "several lines": ({"a.txt": "a cat\na dog"}, "a cat\na dog", "captions of several lines, each taken whole: a.png"),
    "None": ({"a.txt": "None\n"}, "None", "where there is none (None, nan): a.png"),
    "nan": ({"metadata.csv": "file_name,text\na.png,nan\n"}, "nan", "where there is none (None, nan): a.png"),
    "a table without a row": ({"metadata.csv": "file_name,text\n"}, "", "without a row: metadata.csv"),
    "sd-scripts' JSON": (
        {"meta_cap.json": '{"a": {"caption": "a cat"}}'},
        "",
        "may hold captions (only metadata.jsonl",
    ),
    "a table of another name": ({"captions.csv": "file_name,text\na.png,a cat\n"}, "", "are): captions.csv"),
}


@pytest.mark.parametrize("case", REMARKS)
def test_captions_that_are_odd_or_not_read_are_said_by_both(tmp_path: Path, case: str) -> None:
    files, caption, said = REMARKS[case]
    folder = folder_of(tmp_path / "f", {"a.png": "", **files})
    read, sent = read_folder(folder, "x"), sort_files(sorted(folder.iterdir()))
    assert read.images[0].caption == (caption or "x") and sent.uploads[0].caption == caption
    assert read.ignored == () and read.notes == sent.notes and len(read.notes) == 1 and said in read.notes[0]
    if not caption:
        with pytest.raises(DataError) as refused:
            read_folder(folder)
        assert said in str(refused.value)


def test_masks_of_other_programs_are_no_pictures(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", {"a.jpg": "", "a-masklabel.png": "", "b-masklabel.png": ""})
    assert [i.path.name for i in read_folder(folder, "x").images] == ["a.jpg", "b-masklabel.png"]
    assert read_folder(folder, "x").ignored == ("a-masklabel.png",)
    sent = sort_files(sorted(folder.iterdir()))
    assert [u.label for u in sent.uploads] == ["a.jpg", "b-masklabel.png"]
    assert sent.notes == ("passed over: a-masklabel.png",)


def test_pictures_are_known_by_the_suffixes_that_browsers_and_cameras_give(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", {})
    for suffix in (".jfif", ".jpe", ".JPEG"):
        Image.new("RGB", (20, 20)).save(folder / f"a{suffix}", "JPEG")
    assert len(read_folder(folder, "x").images) == 3
