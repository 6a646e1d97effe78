"""Text in pictures: every script that the machine has a font for, words for the rest, and labels that differ."""

from __future__ import annotations

import unicodedata
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont, ImageOps

from dora_diffusion.lettering.fonts import Lettering, clusters, note_on_missing, readable
from dora_diffusion.lettering.labels import distinct, named_apart, wrapped

fonttools = pytest.importorskip("fontTools", reason="fontTools is missing: pip install '.[test]'")
SIZE = 18
HAN, FOX = "漢", "🦊"


def drawn(text: str, lettering: Lettering) -> bytes:
    picture = Image.new("RGB", (200, 40), "white")
    lettering.write(ImageDraw.Draw(picture), (4, 4), text, "black")
    return picture.tobytes()


def box() -> bytes:
    """What Pillow's own font draws for everything that it lacks."""
    picture = Image.new("RGB", (200, 40), "white")
    ImageDraw.Draw(picture).text((4, 4), "\U0010fffe", "black", font=ImageFont.load_default(SIZE))
    return picture.tobytes()


@pytest.fixture(scope="module")
def font(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A font of a box for what it lacks, a square for the Han letter and a triangle for the fox."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    def shape(*points: tuple[int, int]) -> object:
        pen = TTGlyphPen(None)
        pen.moveTo(points[0])
        for point in points[1:]:
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    shapes = {
        ".notdef": shape((50, 0), (50, 700), (450, 700), (450, 0)),
        "han": shape((100, 0), (100, 900), (900, 900), (900, 0)),
        "fox": shape((100, 0), (500, 900), (900, 0)),
    }
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(shapes))
    builder.setupCharacterMap({ord(HAN): "han", ord(FOX): "fox"})
    builder.setupGlyf(shapes)
    builder.setupHorizontalMetrics({name: (500 if name == ".notdef" else 1000, 0) for name in shapes})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Few", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path = tmp_path_factory.mktemp("fonts") / "Few.ttf"
    builder.save(path)
    return path


def test_letters_that_pillows_own_font_lacks_are_drawn_with_another_and_none_is_a_box():
    lettering = Lettering(SIZE)  # Gradio, which is always there, brings Latin, Greek and Cyrillic
    letters = "éßüñłŁЖжёΩ€–"
    pictures = {letter: drawn(letter, lettering) for letter in letters}
    assert len(set(pictures.values())) == len(letters) and box() not in pictures.values()
    assert lettering.readable("Straße, café, рыжий кот") == "Straße, café, рыжий кот"


def test_what_a_font_has_is_what_its_own_table_says():
    from fontTools.ttLib import TTFont

    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        pytest.skip("matplotlib is missing: pip install '.[test]'")
    path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    table = TTFont(path).getBestCmap()
    own = TTFont(ImageFont.load_default(SIZE).path).getBestCmap()
    lettering = Lettering(SIZE, (path,))
    for code in range(0x21, 0x2300, 3):
        if unicodedata.category(chr(code))[0] in "LNPS":
            assert (not lettering.missing(chr(code))) == (code in table or code in own), f"U+{code:04X}"


def test_each_piece_of_a_text_takes_a_font_that_has_it(font):
    lettering = Lettering(SIZE, (font,))
    text = f"cat {HAN}{FOX}"
    assert lettering.readable(text) == text and not note_on_missing([text], (font,))
    assert lettering.length(text) == pytest.approx(lettering.length("cat i") - lettering.length("i") + 2 * SIZE, abs=1)
    assert len({drawn(each, lettering) for each in (HAN, FOX, "cat", text)} | {box()}) == 5


def test_what_no_font_has_is_written_by_its_number_and_said_with_the_way_out():
    assert readable(f"a {FOX}", ()) == "a [U+1F98A]"
    lettering = Lettering(SIZE, ())
    assert drawn(FOX, lettering) != drawn(HAN, lettering) and drawn(FOX, lettering) != box()
    note = note_on_missing([f"a {FOX}", f"{FOX}{HAN}"], ())
    assert "U+1F98A (fox face), U+6F22" in note and "Install a font" in note and note.count("1F98A") == 1
    assert note_on_missing(["plain"], ()) == ""


def test_accents_are_composed_and_blanks_and_line_breaks_are_one_line():
    assert readable("cafe\u0301") == readable("café") == "café"
    assert drawn("cafe\u0301", Lettering(SIZE)) == drawn("café", Lettering(SIZE))
    assert readable("a\n b\t c") == "a b c" and readable("a\x07", ()) == "a[U+0007]"
    assert clusters("x\u0302y👩\u200d💻!") == ["x\u0302", "y", "👩\u200d💻", "!"]


def test_anchors_are_pillows():
    own, lettering = ImageFont.load_default(SIZE), Lettering(SIZE)
    for anchor in ("la", "ma", "rm"):
        pictures = [Image.new("RGB", (200, 60), "white") for _ in range(2)]
        ImageDraw.Draw(pictures[0]).text((100, 20), "plain text", "black", font=own, anchor=anchor)
        lettering.write(ImageDraw.Draw(pictures[1]), (100, 20), "plain text", "black", anchor)
        boxes = [ImageOps.invert(picture).getbbox() for picture in pictures]
        assert boxes[0] == pytest.approx(boxes[1], abs=1), anchor
        assert anchor == "rm" or pictures[0].tobytes() == pictures[1].tobytes(), anchor


SAME = "a photo of a very small and very old cat that sits in the green grass beside a house, painted in oil"


@pytest.mark.parametrize(
    "texts",
    [
        (f"{SAME}, blue", f"{SAME}, pink"),  # of one length, unlike at the end
        (f"{SAME}, blue {SAME}", f"{SAME}, pink {SAME}"),  # unlike in the middle, which is left out at first
        (f"{SAME} {SAME}, blue, {SAME}", f"{SAME} {SAME}, bluer, {SAME}"),
        (SAME, f"{SAME} {SAME}"),
        ("a" * 300, "a" * 301),
        tuple(f"{SAME} {i} {SAME}" for i in range(30)),
        ("café", "cafe\u0301"),
        ("a  b", "a b"),
        (FOX, "[U+1F98A]"),
    ],
)
def test_texts_that_differ_have_labels_that_differ(texts):
    labels = distinct(texts, lambda text: len(text) <= 30)
    assert len(set(labels)) == len(texts) and all(len(label) <= 30 for label in labels)


def test_a_label_shows_where_it_differs_and_one_that_fits_is_left_alone():
    blue, pink, short = distinct(
        [f"{SAME}, blue {SAME}", f"{SAME}, pink {SAME}", "short"], lambda text: len(text) <= 30
    )
    assert "blue" in blue and "pink" in pink and short == "short"
    assert distinct([SAME, SAME], lambda text: len(text) <= 9) == ["a ph… oil"] * 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab é漢\u0301🦊", max_size=40), max_size=6), st.integers(12, 30))
def test_no_two_labels_are_ever_alike(texts, most):
    labels = dict(zip(texts, distinct(texts, lambda text: len(text) <= most)))
    assert len(set(labels.values())) == len(labels)


def test_lines_are_no_wider_than_they_may_be_and_lose_nothing():
    lettering = Lettering(12)
    for text in (SAME, "word " * 30, "x" * 100, "ж" * 80 + " конец"):
        lines = wrapped(text, 120, lettering.length)
        assert all(lettering.length(line) <= 120 for line in lines) and len(lines) > 1
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_files_of_one_name_are_told_apart_by_as_many_folders_as_it_takes():
    paths = [Path("a/run/lora.safetensors"), Path("b/run/lora.safetensors"), Path("c/dora.safetensors")]
    assert named_apart(paths) == ["a/run/lora", "b/run/lora", "dora"]
    assert named_apart([paths[0], paths[0]]) == ["lora", "lora"]
