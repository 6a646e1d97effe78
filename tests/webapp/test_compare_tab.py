"""The Compare tab without a browser: what its callbacks draw and show."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import bases
import numpy as np
import pytest
import torch
from PIL import Image
from web_helpers import HANGS, make_pair, page_of
from web_pages import ME, OTHER, PAGE, Tabs, draw, last_html, shown_in, until

from dora_diffusion.errors import AdapterFileError, ConfigError, PromptError
from dora_diffusion.formats.files import read_adapter_file
from dora_diffusion.models.loading import Base
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.app import build
from dora_diffusion.webapp.ballots import first_ballot, show_ballot, vote_of
from dora_diffusion.webapp.blind import BlindVote
from dora_diffusion.webapp.forms import parse_seeds, parse_strengths
from dora_diffusion.webapp.shown import packaged_example
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.turns import QueueFullError, Turns
from dora_diffusion.webapp.views import BLIND, GRID
from dora_diffusion.webapp.visitors import visitor_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:gradio")  # toasts, which no page is there to show


def test_cells_stream_in_one_by_one_with_captions_and_lossless_files(tabs, pair, studio):
    first, second = pair
    updates = draw(tabs, seeds="1, 2", first=first, second=second)
    grids = [u[0] for u in updates if isinstance(u[0], str)]
    assert [html.count("<img") for html in dict.fromkeys(grids)] == [0, 1, 2, 3, 4, 5, 6]
    assert "LoRA · rank 4 · strength 1 · seed 1" in grids[-1] and "DoRA · rank 4 · strength 1 · seed 2" in grids[-1]
    assert grids[-1].count("mean |difference|") == 4
    cells = shown_in(updates).cells
    picture = Image.open(cells[0].path)
    assert picture.size == (16, 16) and picture.text["prompt"] == "cat face"
    apart = [
        np.abs(np.asarray(Image.open(c.path), float) - np.asarray(Image.open(b.path), float)).mean()
        for c, b in zip(cells, [cells[0]] * 3 + [cells[3]] * 3)
    ]
    assert [cell.difference for cell in cells] == pytest.approx(apart, abs=1e-4) and apart[2] > 0
    assert not any("lora" in name for name, _ in studio.painter._base.denoiser.named_modules())


def test_strength_zero_is_the_base_byte_for_byte(tabs, pair):
    updates = draw(tabs, first=pair[0], first_strength=0.0, second=pair[1], second_strength=0.0)
    pixels = [Image.open(cell.path).tobytes() for cell in shown_in(updates).cells]
    assert len(pixels) == 3 and pixels[0] == pixels[1] == pixels[2]
    assert last_html(updates, 0).count("strength 0 is the base") == 2


def test_a_new_strength_draws_only_its_own_column_on_the_base_that_is_there(tabs, pair, studio, monkeypatch):
    first = draw(tabs, seeds="1, 2", first=pair[0], second=pair[1])
    monkeypatch.setattr("dora_diffusion.models.loading.load_base", None)  # a second load would fail
    form = ("cat face", "1, 2", pair[0], 1.0, pair[1], 0.5, 2, "2", "", "", False, GRID, "")
    again = list(tabs.compare.draw_again(PAGE, shown_in(first), *form))
    cells = shown_in(again).cells
    assert [cell.cached for cell in cells] == [True, True, False] * 2
    assert last_html(again, 0).count("from the cache") == 4 and "4 of them from the cache" in last_html(again, 1)
    for before, after in zip(shown_in(first).cells, cells):
        same = Image.open(before.path).tobytes() == Image.open(after.path).tobytes()
        assert same == after.cached
    assert not any(cell.cached for cell in shown_in(draw(tabs, OTHER, seeds="1", first=pair[0])).cells)  # another's


def test_an_adapter_that_matches_nothing_says_so_on_its_cell(tabs, studio):
    other = bases.stable_diffusion()
    path, _ = make_pair(Base("other", other), studio.outputs / "other")
    from safetensors.torch import load_file, save_file

    renamed = {key.replace("unet.", "unet.elsewhere."): value for key, value in load_file(path).items()}
    save_file(renamed, studio.outputs / "other" / "strange.safetensors")
    updates = draw(tabs, first="other/strange")
    cell = shown_in(updates).cells[1]
    layers = len([key for key in renamed if key.endswith("lora_A.weight")])
    assert not cell.fits and cell.note.startswith(f"0 of {layers} keys matched")
    assert f"<span class='dd-nothing'>0 of {layers} keys matched" in last_html(updates, 0)


def test_an_adapter_for_other_weights_is_noted_on_its_cell(tabs, studio):
    import torch

    pipe = bases.stable_diffusion()
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(2.0)
    make_pair(Base("doubled", pipe), studio.outputs / "other")
    updates = draw(tabs, first="other/lora")
    assert "trained on doubled with other weights" in last_html(updates, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "word " * 200}, "The prompt cannot be used"),
        ({"prompt": "word " * 2000}, "longer than any base reads"),
        ({"prompt": "  "}, "there is no prompt"),
        ({"seeds": "one"}, "give whole numbers"),
        ({"seeds": "1 2 3 4 5 6 7 8 9"}, "more than the 8"),
        ({"steps": 5000}, "between 1 and 100"),
        ({"steps": float("nan")}, "between 1 and 100"),
        ({"guidance": "much"}, "give a number"),
        ({"first": "run/lora", "first_strength": 99}, "between 0 and 1.5"),
        ({"first": "../../etc/passwd"}, "no longer there"),
        ({"size": "large"}, "give width x height in pixels"),
        ({"size": "9999x64"}, "at most 2048 pixels a side"),
        ({"size": "17x16"}, "width is 17; this base wants a multiple of 2, such as 16"),
    ],
)
def test_a_mistake_fills_the_panel_and_gives_the_button_back(tabs, pair, changes, said):
    updates = draw(tabs, **changes)
    assert said in last_html(updates, 2)
    assert updates[-1][2]["visible"] and updates[-1][3]["visible"] and not updates[-1][4]["visible"]


def test_one_drawing_at_a_time_and_a_page_that_closes_lets_the_next_one_draw(tabs, pair):
    form = ("cat", "1,2,3", pair[0], 1.0, pair[1], 1.0, 30, "2", "", "", False, GRID, "")
    abandoned = tabs.compare.draw(*form, page_of("closed"))
    for update in abandoned:
        if isinstance(update[0], str) and "<img" in update[0]:
            break
    abandoned.close()
    assert last_html(draw(tabs), 0).count("<img") == 1


def test_stop_ends_the_drawing_and_says_so(tabs, pair):
    updates = []
    for update in tabs.compare.draw("cat", "1,2,3", pair[0], 1.0, pair[1], 1.0, 50, "2", "", "", False, GRID, "", PAGE):
        updates.append(update)
        if isinstance(update[0], str) and "<img" in update[0]:
            tabs.compare.stop(PAGE)
    assert "stopped" in last_html(updates, 1)
    assert last_html(updates, 0).count("<img") < 9


def test_two_drawings_wait_for_each_other(tabs, pair):
    def in_a_thread() -> None:
        draw(tabs, page_of("c"), steps=20, first=pair[0])

    other = threading.Thread(target=in_a_thread)
    other.start()
    alone = last_html(draw(tabs, first=pair[0]), 0)
    other.join()
    assert alone.count("<img") == 2 and "difference| 0.0" not in alone


def test_a_line_tells_everybody_their_place_and_refuses_when_it_is_full():
    turns, places, order = Turns(most=2), {"b": [], "c": []}, []
    begun = threading.Event()

    def stand(name: str) -> None:
        with turns.turn(places[name].append):
            order.append(name)

    with turns.turn(lambda _: None):
        threads = []
        for name in ("b", "c"):
            threads.append(threading.Thread(target=stand, args=(name,)))
            threads[-1].start()
            until(lambda: turns.length == len(threads) + 1)
        until(lambda: places["b"] and places["c"])
        with pytest.raises(QueueFullError, match="queue full: 2 are waiting"), turns.turn(lambda _: None):
            begun.set()
        with turns.turn_if_free() as free:
            assert not free
    for thread in threads:
        thread.join(HANGS)
    assert set(places["b"]) == {1} and places["c"][0] == 2 and order == ["b", "c"] and not begun.is_set()
    with turns.turn_if_free() as free:
        assert free and turns.length == 1
    assert turns.length == 0


def test_seeds_and_strengths_are_read_leniently():
    assert parse_seeds("1, 2 2;3") == (1, 2, 3)
    assert parse_strengths("0.5, 1 1.0;1.5") == (0.5, 1.0, 1.5)
    for wrong in ("-1", "٣", ""):
        with pytest.raises(ConfigError):
            parse_seeds(wrong)
    with pytest.raises(ConfigError):
        parse_strengths("2")


def test_the_newest_pair_is_preset_and_cards_name_the_kind(tabs, pair, studio):
    assert studio.shelf.pair(ME) == pair
    assert [update["value"] for update in tabs.compare.preset(PAGE)[:2]] == list(pair)
    assert "<b>DoRA</b> · rank 4" in tabs.compare.show_card(pair[1], PAGE)[0]


def test_pickers_that_the_page_has_not_filled_yet_stand_for_the_pair(tabs, pair):
    columns = [column.label for column in shown_in(draw(tabs, first=None, second=None)).request.columns]
    assert columns == [column.label for column in shown_in(draw(tabs, first=pair[0], second=pair[1])).request.columns]
    assert len(columns) == 3 and len(shown_in(draw(tabs)).request.columns) == 1


def test_the_card_counts_from_the_file_itself(tabs, pair, studio):
    import hashlib

    from safetensors import safe_open

    path = studio.shelf.find(pair[1], ME).path
    with safe_open(path, "pt") as file:
        parameters = sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys())  # noqa: SIM118
    draw(tabs)  # loads the base
    card = tabs.compare.show_facts(None, pair[1], PAGE)
    assert f"<td>{parameters:,}</td>" in card and hashlib.sha256(path.read_bytes()).hexdigest() in card
    assert "the weights it was trained on" in card and "not in it" not in card


def test_an_uploaded_adapter_gets_a_name_of_its_own_and_is_nobody_elses(tabs, pair, studio, tmp_path):
    upload = tmp_path / "my ~style.safetensors"
    shutil.copy(studio.shelf.find(pair[0], ME).path, upload)
    chosen, _ = tabs.compare.take_in(str(upload), PAGE)
    shelved = studio.shelf.find(chosen["value"], ME)
    assert shelved.label == "my ~style (uploaded)" and "style" not in shelved.path.name
    with pytest.raises(AdapterFileError):
        studio.shelf.find(chosen["value"], visitor_of(OTHER))
    assert "my ~style" not in str(tabs.compare.choices(None, OTHER))


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.ckpt"])
def test_an_upload_that_is_no_adapter_is_refused_by_its_own_name(tabs, studio, tmp_path, name):
    upload = tmp_path / name
    upload.write_bytes(b"not at all a safetensors file, and long enough")
    _, panel = tabs.compare.take_in(str(upload), PAGE)
    assert f"{name} is no" in panel["value"] and str(tmp_path) not in panel["value"]
    assert not list(studio.outputs.rglob("web/visitors/*/adapters/*"))


def test_a_broken_file_among_the_adapters_does_not_keep_the_page_from_opening(studio):
    for kind in ("lora", "dora"):
        (studio.outputs / f"{kind}.safetensors").write_bytes(b"broken, and long enough to be read as a header")
    assert studio.shelf.pair(ME) == ("lora", "dora")
    build(studio)


def test_what_nobody_foresaw_is_shown_and_the_base_given_back(tabs, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("dora_diffusion.comparison.compare.compare", fail)
    assert "RuntimeError: out of memory" in last_html(draw(tabs), 2)
    monkeypatch.undo()
    assert last_html(draw(tabs), 0).count("<img") == 1


def test_a_picture_restores_the_request_it_was_made_by(tabs, pair, studio):
    more = {"negative_prompt": "dog", "size": "24 x 16"}
    updates = draw(tabs, seeds="3, 4", first=pair[0], first_strength=0.5, second=pair[1], **more)
    prompt, seeds, first, at, second, _, steps, guidance, negative, size, partial, _, error = tabs.compare.restore(
        str(shown_in(updates).cells[4].path), PAGE
    )
    assert (prompt, seeds, at, steps, guidance) == ("cat face", "3, 4", 0.5, 2, "2")
    assert (negative, size, partial) == ("dog", "24x16", False)
    assert (first["value"], second["value"]) == pair and not error["visible"]
    form = {"seeds": seeds, "first": first["value"], "first_strength": at, "second": second["value"], "size": size}
    again = shown_in(draw(tabs, OTHER, prompt=prompt, negative_prompt=negative, **form)).cells
    for before, after in zip(shown_in(updates).cells, again):
        assert Image.open(before.path).tobytes() == Image.open(after.path).tobytes() and not after.cached
        assert Image.open(before.path).size == (24, 16)


def test_a_packed_base_is_drawn_with_trained_on_and_said(tabs, sd_folder, tmp_path):
    pytest.importorskip("torchao")
    packed = Studio.open(tmp_path / "packed", str(sd_folder), "int8")
    theirs = Tabs(packed)
    updates = draw(theirs)
    assert "--quantise int8" in last_html(updates, 7)
    base = packed.painter.copy(lambda _: None)
    layer = base.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert base.packing == "int8" and type(layer.weight) is not torch.nn.Parameter
    picture = str(shown_in(updates).cells[0].path)
    assert not theirs.compare.restore(picture, PAGE)[-1]["visible"]
    note = tabs.compare.restore(picture, PAGE)[-2]
    assert f"was drawn with the base {sd_folder} (int8), this server draws with {sd_folder}" in note


def test_a_picture_from_elsewhere_cannot_restore_and_says_so(tabs, tmp_path):
    path = tmp_path / "cat.png"
    Image.new("RGB", (8, 8)).save(path)
    assert "does not say how it was made" in tabs.compare.restore(str(path), PAGE)[-1]["value"]
    path.write_bytes(b"no picture")
    assert "no PNG that can be read" in tabs.compare.restore(str(path), PAGE)[-1]["value"]


def test_the_whole_comparison_can_be_taken_away(tabs, pair, studio):
    updates = draw(tabs, first=pair[0], second=pair[1], size="16x24")
    links, command = last_html(updates, 6), last_html(updates, 7)
    album = shown_in(updates).cells[0].path.parent
    report = next(album.glob("*.html")).read_text()
    assert report.count("data:image/png;base64,") == 3 and "http" not in report and links.count("download=") == 2
    assert command.startswith("dora-diffusion compare --prompt 'cat face' --seeds 1 --adapters outputs/run/lora")
    assert "--size 16x24" in command


def test_a_sweep_says_its_size_first_and_labels_every_column(tabs, pair):
    form = ("cat\ndog", "1, 2", "0.5, 1", pair[0], pair[1], 2, "", "", "", False)
    assert "20 pictures, time not measured yet" in tabs.compare.sweep_size(*form, PAGE)
    updates = list(tabs.compare.sweep(*form, PAGE))
    html = last_html(updates, 0)
    assert html.count("<img") == 20
    for label in ("LoRA 0.5", "LoRA 1", "DoRA 0.5", "DoRA 1", "cat", "dog"):
        assert f">{label}<" in html
    assert "20 pictures, about 0:" in tabs.compare.sweep_size(*form, PAGE)
    assert "more than the 300" in tabs.compare.sweep_size(
        "a\n" * 60, "1", "0.5, 1, 1.5", pair[0], pair[1], 2, "", "", "", False, PAGE
    )


def test_every_view_shows_the_pictures_that_were_drawn(tabs, pair):
    shown = shown_in(draw(tabs, seeds="1, 2", first=pair[0], second=pair[1]))
    slider = tabs.compare.look(shown, "Slider", "Base | DoRA", PAGE)[0]
    assert slider.count("type='range'") == 2 and slider.count("<img") == 4 and "LoRA" not in slider
    difference = tabs.compare.look(shown, "Difference", "", PAGE)[0]
    assert difference.count("<img") == 6 and "128+" in difference
    assert f"mean {shown.cells[1].difference:.1f}" in difference


def test_the_blind_vote_says_nothing_before_and_everything_after(tabs, pair, studio):
    updates = draw(tabs, seeds="1, 2", first=pair[0], second=pair[1], view=BLIND)
    assert "<img" not in "".join(u[0] for u in updates if isinstance(u[0], str))
    blind: BlindVote = tabs.compare.layout.votes
    ballot, html, *_ = blind.begin(shown_in(updates), PAGE)
    assert html.count("<img") == 2
    for word in ("lora", "dora", "rank", "strength", "run/"):
        assert word not in html.lower()
    for path in (Path(part.split("'")[0]) for part in html.split("gradio_api/file=")[1:]):
        assert not Image.open(path).text and path.stat().st_mtime == 0
    _, _, _, result, *_ = blind.vote(ballot, "left", PAGE)
    left = "DoRA" if ballot.swapped else "LoRA"
    assert f"Left was <b>{left}" in result and "n = 1" in result and "Wilson interval" in result
    assert studio.votes(ME).path.read_text().count("\n") == 1


def test_left_and_right_are_put_down_for_the_column_that_drew_them(tabs, pair, studio):
    shown = shown_in(draw(tabs, first=pair[0], second=pair[1]))
    seen = set()
    for _ in range(40):
        ballot = first_ballot(shown)
        html = show_ballot(ballot, studio.albums.new())
        left = Path(html.split("gradio_api/file=")[1].split("'")[0])
        column = 1 if Image.open(left).tobytes() == Image.open(shown.cells[1].path).tobytes() else 2
        assert vote_of(ballot, "left").choice == ("first" if column == 1 else "second")
        assert vote_of(ballot, "right").choice == ("second" if column == 1 else "first")
        seen.add(column)
    assert seen == {1, 2}  # both sides come up: 40 of one side is one chance in 10^12


def test_the_packaged_example_fits_the_embedded_base():
    from dora_diffusion.formats.files import fit_of
    from dora_diffusion.models.loading import load_base

    shown = packaged_example()
    base = load_base("emoji", device="cpu")
    for column in shown.request.adapters:
        fit = fit_of(base, read_adapter_file(column.path))
        assert fit.unmatched == () and fit.same_weights, "the base changed: python docs/make_example.py"
    assert [cell.difference > 5 for cell in shown.cells] == [False, True, True] * 2


def test_texts_from_outside_are_escaped():
    assert "<b>&lt;script&gt;" not in parts.error_panel(PromptError("<script>"))
    assert "<script>" not in parts.error_panel(PromptError("<script>"))
    assert "<script>" not in parts.checklist({"<script>": False})
    assert "<script>" not in parts.header("<script>", "cpu")


def test_the_adapters_are_looked_into_and_said_what_other_programs_make_of_them(tabs, pair, studio):
    html = tabs.compare.look_inside(*pair, PAGE)
    plot = Path(html.split("gradio_api/file=")[1].split("'")[0])
    assert Image.open(plot).width > 600
    from dora_diffusion.inspection.parity import compare_programs
    from dora_diffusion.models.loading import load_base

    found = compare_programs(studio.shelf.find(pair[1], ME).path, load_base(studio.base_name, device="cpu"))
    dora = html.split("in other programs</h3>")[2]
    assert dora.count("<tr>") == 1 + len(found) and dora.count("<td>right</td>") == sum(each.right for each in found)
