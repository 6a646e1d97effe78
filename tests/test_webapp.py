"""The web app without a browser: what its callbacks show, and how its training job lives and ends."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import bases
import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from web_helpers import make_pair, page_of, sample_files

from dora_diffusion.comparison.curves import Curve, draw_curves
from dora_diffusion.errors import AdapterFileError, ConfigError, DataError, PromptError, TrainingError
from dora_diffusion.formats.files import read_adapter_file
from dora_diffusion.models.loading import Base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.webapp import parts, uploads
from dora_diffusion.webapp.app import _hosts, _login, build
from dora_diffusion.webapp.ballots import first_ballot, show_ballot, vote_of
from dora_diffusion.webapp.blind import BlindVote
from dora_diffusion.webapp.compare import CompareTab
from dora_diffusion.webapp.forms import parse_seeds, parse_strengths
from dora_diffusion.webapp.header import Header
from dora_diffusion.webapp.history import HistoryTab
from dora_diffusion.webapp.jobs import JobState, TrainingJob, TrainingJobs
from dora_diffusion.webapp.shown import Shown, packaged_example
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.train import TrainTab
from dora_diffusion.webapp.train_form import MORE, PRESETS, Pictures, TrainForm
from dora_diffusion.webapp.turns import QueueFullError, Turns
from dora_diffusion.webapp.views import BLIND, GRID
from dora_diffusion.webapp.visitors import visitor_of
from dora_diffusion.webapp.watch import Watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:gradio")  # toasts, which no page is there to show

PAGE = page_of("a")
OTHER = page_of("b")
ME = visitor_of(PAGE)


@pytest.fixture
def studio(tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    studio = Studio.open(tmp_path / "outputs", str(sd_folder))
    yield studio
    assert studio.jobs.close(60)


class Tabs:
    def __init__(self, studio: Studio) -> None:
        header, self.compare, self.train = Header(studio), CompareTab(studio), TrainTab(studio)
        self.history = HistoryTab(studio, self.compare, self.train)
        with gr.Blocks(analytics_enabled=False):
            header.build()
            with gr.Tabs() as shown:
                with gr.Tab("Compare"):
                    self.compare.build()
                with gr.Tab("Train"):
                    self.train.build()
                with gr.Tab("History") as tab:
                    self.history.build()
            self.history.connect(tab, shown)
            self.watch = Watch(studio, header, self.train.layout, self.compare)


@pytest.fixture
def tabs(studio: Studio) -> Tabs:
    return Tabs(studio)


@pytest.fixture
def pair(studio: Studio) -> tuple[str, str]:
    """The keys of two adapters that do something, made on the command line and so everybody's."""
    make_pair(Base("small", bases.stable_diffusion()), studio.outputs / "run")
    return "run/lora", "run/dora"


def draw(tabs: Tabs, page: gr.Request = PAGE, **changes: object) -> list[tuple]:
    form = {"prompt": "cat face", "seeds": "1", "first": "", "first_strength": 1.0, "second": ""}
    form |= {"second_strength": 1.0, "steps": 2, "guidance": "2", "negative_prompt": "", "size": ""}
    form |= {"view": GRID, "pair": ""}
    return list(tabs.compare.draw(**{**form, **changes}, page=page))


def shown_in(updates: list[tuple]) -> Shown:
    return next(u[5] for u in reversed(updates) if isinstance(u[5], Shown))


def last_html(updates: list[tuple], place: int) -> str:
    """The last HTML that was sent to the output at `place`."""
    texts = [u[place] for u in updates if isinstance(u[place], str)]
    texts += [u[place]["value"] for u in updates if isinstance(u[place], dict) and "value" in u[place]]
    return texts[-1]


def until(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def start_job(studio: Studio, images: Path, resume: bool = False, **changes: object) -> TrainingJob:
    out = studio.runs.new(ME)
    values = {"images": str(images), "out": str(out), "base": studio.base_name, "kind": "both"}
    values |= {"steps": 3, "batch_size": 2, "rank": 2, "instance_prompt": "openmoji style"}
    config = TrainConfig(**{**values, **changes})
    return studio.jobs.start(out.name, config, ME, studio.albums.new(), resume)


@pytest.fixture
def few_pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "few"
    folder.mkdir()
    for path in sample_files(3):
        shutil.copy(path, folder)
    return folder


# Compare


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
    form = ("cat face", "1, 2", pair[0], 1.0, pair[1], 0.5, 2, "2", "", "", GRID, "")
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
    form = ("cat", "1,2,3", pair[0], 1.0, pair[1], 1.0, 30, "2", "", "", GRID, "")
    abandoned = tabs.compare.draw(*form, page_of("closed"))
    for update in abandoned:
        if isinstance(update[0], str) and "<img" in update[0]:
            break
    abandoned.close()
    assert last_html(draw(tabs), 0).count("<img") == 1


def test_stop_ends_the_drawing_and_says_so(tabs, pair):
    updates = []
    for update in tabs.compare.draw("cat", "1,2,3", pair[0], 1.0, pair[1], 1.0, 50, "2", "", "", GRID, "", PAGE):
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
        thread.join(10)
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
    prompt, seeds, first, at, second, _, steps, guidance, negative, size, _, error = tabs.compare.restore(
        str(shown_in(updates).cells[4].path), PAGE
    )
    assert (prompt, seeds, at, steps, guidance) == ("cat face", "3, 4", 0.5, 2, "2")
    assert (negative, size) == ("dog", "24x16")
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
    form = ("cat\ndog", "1, 2", "0.5, 1", pair[0], pair[1], 2)
    assert "20 pictures, time not measured yet" in tabs.compare.sweep_size(*form, PAGE)
    updates = list(tabs.compare.sweep(*form, PAGE))
    html = last_html(updates, 0)
    assert html.count("<img") == 20
    for label in ("LoRA 0.5", "LoRA 1", "DoRA 0.5", "DoRA 1", "cat", "dog"):
        assert f">{label}<" in html
    assert "20 pictures, about 0:" in tabs.compare.sweep_size(*form, PAGE)
    assert "more than the 300" in tabs.compare.sweep_size("a\n" * 60, "1", "0.5, 1, 1.5", pair[0], pair[1], 2, PAGE)


def test_every_view_shows_the_pictures_that_were_drawn(tabs, pair):
    shown = shown_in(draw(tabs, seeds="1, 2", first=pair[0], second=pair[1]))
    slider = tabs.compare.look(shown, "Slider", "Base | DoRA")[0]
    assert slider.count("type='range'") == 2 and slider.count("<img") == 4 and "LoRA" not in slider
    difference = tabs.compare.look(shown, "Difference", "")[0]
    assert difference.count("<img") == 6 and "128+" in difference
    assert f"mean {shown.cells[1].difference:.1f}" in difference


def test_the_blind_vote_says_nothing_before_and_everything_after(tabs, pair, studio):
    updates = draw(tabs, seeds="1, 2", first=pair[0], second=pair[1], view=BLIND)
    assert "<img" not in "".join(u[0] for u in updates if isinstance(u[0], str))
    blind: BlindVote = tabs.compare.layout.votes
    ballot, html, *_ = blind.begin(shown_in(updates))
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


# Train


def test_a_job_trains_both_and_tells_how_it_ended(studio, few_pictures):
    job = start_job(studio, few_pictures, preview_prompts=["cat"], preview_every=2)
    assert job.wait(120)
    state = job.snapshot()
    assert state.phase == "finished", state
    assert state.text.startswith("finished: LoRA and DoRA, 3 steps each")
    assert [path.name for path in state.adapters] == ["lora.safetensors", "dora.safetensors"]
    assert [len(job.curves[kind].loss) for kind in ("lora", "dora")] == [3, 3]
    assert [(kind, step) for kind, step, _ in job.previews] == [("lora", 2), ("lora", 3), ("dora", 2), ("dora", 3)]
    assert not any("lora" in name for name, _ in studio.painter._base.denoiser.named_modules())
    assert studio.runs.find(job.name, ME).phase == "finished"


def test_a_stopped_job_keeps_a_checkpoint_and_goes_on_to_the_same_bits(studio, few_pictures):
    whole = start_job(studio, few_pictures, kind="dora", steps=6)
    assert whole.wait(120)
    job = start_job(studio, few_pictures, kind="dora", steps=6)
    until(lambda: job.state.step >= 2)
    job.stop()
    assert job.wait(60)
    state = job.snapshot()
    if state.phase == "stopped":  # a quick machine may have finished before it was asked
        assert state.text == f"stopped at {state.step} of 6 (DoRA), checkpoint saved"
        shutil.copytree(few_pictures, Path(job.config.out) / "images")
        assert studio.runs.find(job.name, ME).can_resume
        job = studio.resume(job.name, ME)
        assert job.wait(120) and job.snapshot().phase == "finished", job.snapshot()
    assert len(job.curves["dora"].loss) == 6
    files = [(Path(each.config.out) / "dora.safetensors").read_bytes() for each in (whole, job)]
    assert files[0] == files[1]


def test_a_training_that_begins_while_the_server_warms_up_has_a_whole_base(studio, few_pictures):
    """Loading in two threads at once puts modules on the meta device; so there is one load, and the rest are copies."""
    studio.painter.warm_up()
    jobs = [start_job(studio, few_pictures, steps=1)]
    other = visitor_of(OTHER)
    config = jobs[0].config.model_copy(update={"out": str(studio.runs.new(other))})
    jobs.append(studio.jobs.start("second", config, other, studio.albums.new()))
    drawn = draw(Tabs(studio))
    for job in jobs:
        assert job.wait(120) and job.snapshot().phase == "finished", job.snapshot()
    assert shown_in(drawn).is_whole


def test_stop_comes_within_two_steps(studio, few_pictures):
    job = start_job(studio, few_pictures, kind="dora", steps=5000)
    until(lambda: job.state.step >= 2)
    before = job.state.step
    job.stop()
    assert job.wait(60)
    assert job.snapshot().step <= before + 2


def test_a_run_that_the_server_left_is_called_interrupted_and_can_be_resumed(tabs, studio, few_pictures):
    folder = studio.runs.new(ME)
    shutil.copytree(few_pictures, folder / "images")
    config = TrainForm("openmoji style", "lora", 2, 2, 2).config(folder / "images", folder, studio.base_name)
    status = {"phase": "training", "text": "LoRA 1/2, 0:01 left", "error": "", "config": config.model_dump()}
    (folder / "status.json").write_text(json.dumps(status))
    shown = dict(zip([component.elem_id for component in tabs.watch.outputs], tabs.watch.look((), PAGE)))
    assert "training interrupted" in shown["chip"] and shown["resume"]["visible"]
    assert all(update == gr.skip() for update in tabs.watch.look(("x", 0), OTHER)[2:])
    panel, _ = tabs.train.resume((folder.name,), PAGE)
    assert not panel["visible"]
    assert studio.jobs.of(ME).wait(120) and studio.jobs.of(ME).snapshot().phase == "finished"


def test_a_failed_job_is_called_failed_with_its_reason(tabs, studio, tmp_path):
    job = start_job(studio, tmp_path / "nowhere")
    assert job.wait(60)
    assert job.snapshot().phase == "failed" and isinstance(job.snapshot().error, DataError)
    run = studio.runs.find(job.name, ME)
    assert run.phase == "failed" and "no folder at" in run.error
    shown = dict(zip([component.elem_id for component in tabs.watch.outputs], tabs.watch.look((), PAGE)))
    assert "training failed" in shown["chip"] and "no folder at" in shown["job-error"]["value"]
    assert "finished" not in shown["job"]


def test_training_goes_on_from_an_earlier_run_and_offers_the_adapters_on_the_way(tabs, studio):
    files = sample_files(3)
    start(tabs, files, rows_of_files(files), prompt="disc", steps=12, keep=True)
    first = studio.jobs.of(ME)
    assert first.wait(120) and first.snapshot().phase == "finished"
    labels = {each.key.rpartition("/")[2]: each.label for each in studio.shelf.all(ME) if "mine/" in each.key}
    assert sorted(labels) == ["dora", "dora-00010", "lora", "lora-00010"]
    assert labels["lora-00010"].startswith("LoRA trained ") and labels["lora-00010"].endswith(", after 10 steps")

    chosen, tab = tabs.history.choose_start(first.name, PAGE)
    assert chosen["value"] == f"mine/{first.name}/dora" and tab.selected == "train"
    form = ("disc", "both", 2, 16, 2, "", "", 0, ["train_feed_forward"], "output", chosen["value"])
    checks, button = tabs.train.check(PAGE, rows_of_files(files), Pictures(), *form)
    assert "its rank and layers are kept" in checks and "eed-forward" not in checks and button["interactive"]
    start(tabs, files, rows_of_files(files), prompt="disc", rank=16, more=["train_feed_forward"], start=chosen["value"])
    second = studio.jobs.of(ME)
    assert second is not first and second.wait(120) and second.snapshot().phase == "finished", second.state
    assert sum("goes on from" in line for line in second.log) == 2  # each twin from its own
    for kind in ("lora", "dora"):
        copied = Path(second.config.out) / "start" / f"{kind}.safetensors"
        assert copied.read_bytes() == (Path(first.config.out) / f"{kind}.safetensors").read_bytes()
        assert read_adapter_file(Path(second.config.out) / f"{kind}.safetensors").config.rank == 2
    runs = [studio.runs.find(job.name, ME) for job in (second, first)]
    assert runs[0].differences(runs[1])["start_from"] == ("an earlier adapter", None)

    # A DoRA alone, as a LoRA: said before anything is trained.
    start(tabs, files, rows_of_files(files), prompt="disc", kind="lora", start=chosen["value"])
    third = studio.jobs.of(ME)
    assert third.wait(60) and "is a DoRA, and a LoRA is to be trained" in str(third.snapshot().error)
    assert "no longer there" in start(tabs, files, rows_of_files(files), prompt="disc", start="mine/x/dora")[0]["value"]


def test_each_visitor_has_one_job_and_the_jobs_wait_for_each_other(studio, few_pictures):
    job = start_job(studio, few_pictures, steps=5000)
    with pytest.raises(TrainingError, match="your other training is not over"):
        start_job(studio, few_pictures)
    until(lambda: job.state.step >= 1)
    other = visitor_of(OTHER)
    config = job.config.model_copy(update={"steps": 1, "out": str(studio.runs.new(other))})
    waiting = studio.jobs.start("second", config, other, studio.albums.new())
    until(lambda: waiting.state.text == "waiting: 1 training before this one")
    assert studio.jobs.of(ME) is job and studio.jobs.of(other) is waiting
    studio.jobs.stop(ME)
    assert waiting.wait(120) and waiting.snapshot().phase == "finished"


def rows_of_files(files: list[Path]) -> list[list[str]]:
    return [["", path.name, ""] for path in files if path.suffix != ".txt"]


def start(tabs: Tabs, files: list[Path], rows: list[list[str]], **changes: object) -> tuple:
    form = {"prompt": "", "kind": "both", "steps": 2, "rank": 2, "batch": 2, "rate": "", "preview": "", "seed": 0}
    form |= {"more": [], "norm_axis": "output", "start": "", "keep": False}
    return tabs.train.start(PAGE, [str(path) for path in files], rows, *{**form, **changes}.values())


def test_from_upload_to_adapters_chosen_in_compare(tabs, studio):
    train, form = tabs.train, ("", "both", 2, 2, 2, "", "", 0)
    files = sample_files(3)
    kept, table, found, _ = train.take_pictures([str(path) for path in files])
    rows = table["value"]
    checks, button = train.check(PAGE, rows, found, *form)
    assert found == Pictures() and button["interactive"] and "3 pictures, all readable" in checks
    assert rows[0][1:] == ["automobile.png", "automobile, openmoji style"] and "data:image/png" in rows[0][0]
    train.measure(kept, rows, found, *form)
    checks, _ = train.check(PAGE, rows, found, *form)
    assert "trainable parameters: LoRA" in checks and "by a measured warm-up" in checks
    rows[0][2] = "a red car"
    assert start(tabs, files, rows)[0]["visible"] is False
    job = studio.jobs.of(ME)
    until(lambda: job.state.is_over)
    assert job.state.phase == "finished", job.state
    folder = Path(job.config.images)
    assert sorted(path.name for path in folder.iterdir())[:2] == ["picture-001.png", "picture-001.txt"]
    assert (folder / "picture-001.txt").read_text() == "a red car\n"
    shown = dict(zip([component.elem_id for component in tabs.watch.outputs], tabs.watch.look((), PAGE)))
    assert shown["first-adapter"]["value"].endswith("/lora") and shown["second-adapter"]["value"].endswith("/dora")
    assert "finished: LoRA and DoRA" in shown["job"] and "<polyline" in shown["curves"]
    assert "<img" in shown["previews"] and "config.toml" in shown["train-command"]["value"]
    seen = (job.name, job.state.version, False, studio.painter.device)
    assert all(update == gr.skip() for update in tabs.watch.look(seen, PAGE))
    other = dict(zip([component.elem_id for component in tabs.watch.outputs], tabs.watch.look((), OTHER)))
    assert other["chip"] == gr.skip() and job.name not in str(other)


def test_the_estimate_counts_what_training_trains(tabs, studio, few_pictures):
    form = TrainForm("x", "both", 10, 3, 2)
    estimate = tabs.train.costing.measure(form, uploads.read_uploads(sorted(few_pictures.iterdir())))
    from dora_diffusion import AdapterConfig, inject_adapter

    for kind in ("lora", "dora"):
        adapter = inject_adapter(bases.unet(), AdapterConfig(kind=kind, rank=3))
        assert estimate.costs[kind].parameters == sum(p.numel() for p in adapter.parameters())
    for cost in estimate.costs.values():
        assert all(0 < seconds < 60 for seconds in (cost.step, cost.preview, cost.held_out))
    # Ten steps, previews and measurements every ten; one picture of eight is held out, and measured at the start too.
    config = form.config(few_pictures, studio.outputs, "emoji", ["a"] * 8)
    whole = sum(10 * cost.step + cost.preview + 2 * cost.held_out for cost in estimate.costs.values())
    assert estimate.seconds(config, 8) == pytest.approx(whole)
    assert estimate.memory > 50 * 1024**2
    assert not any("lora" in name for name, _ in studio.painter._base.denoiser.named_modules())


def test_nothing_is_measured_while_something_trains(tabs, studio, few_pictures):
    job = start_job(studio, few_pictures, steps=5000)
    until(lambda: job.state.step >= 1)
    assert tabs.train.costing.measure(TrainForm("x"), uploads.read_uploads(sorted(few_pictures.iterdir()))) is None


def test_train_stays_disabled_with_its_reasons(tabs):
    train, form = tabs.train, ("", "both", 2, 2, 2, "", "", 0)
    _, table, found, _ = train.take_pictures([str(path) for path in sample_files(2, captions=False)])
    checks, button = train.check(PAGE, table["value"], found, *form)
    assert not button["interactive"] and "2 without a caption" in checks
    checks, button = train.check(PAGE, [["", "a.png", ""]], Pictures(), "openmoji style", *form[1:])
    assert button["interactive"]
    assert not train.check(PAGE, [["", "", ""]], Pictures(), *form)[1]["interactive"]


def test_a_preset_chooses_what_suits_its_purpose_and_the_checklist_says_so(tabs, tmp_path):
    for name, preset in PRESETS.items():
        steps, rank, batch, rate, more = tabs.train.choose(name)
        form = TrainForm("x", "dora", steps, rank, batch, rate, more=more, norm_axis="input")
        config = form.config(tmp_path, tmp_path, "emoji-dit")
        assert config.learning_rate == (float(preset.rate) if preset.rate else None)
        assert {key for key in MORE if getattr(config, key)} == set(preset.more)
        checks, _ = tabs.train.check(
            PAGE, [["", "a.png", "a"]], Pictures(), "x", "dora", steps, rank, batch, rate, "", 0, more
        )
        assert all((MORE[key].lower() in checks.lower()) == (key in preset.more) for key in MORE)
    assert PRESETS["Subject"].more == ("train_feed_forward",)


def test_the_sample_pictures_need_no_upload(tabs):
    _, table, found, error = tabs.train.take_samples()
    assert len(table["value"]) == 16 and not error["visible"]
    _, button = tabs.train.check(PAGE, table["value"], found, "", "both", 2, 2, 2, "", "", 0)
    assert button["interactive"]


def test_a_broken_picture_is_named_as_the_visitor_knows_it(tabs, tmp_path):
    broken = tmp_path / "holiday.png"
    broken.write_bytes(sample_files(1)[0].read_bytes()[:300])
    _, _, found, panel = tabs.train.take_pictures([str(broken)])
    checks, button = tabs.train.check(PAGE, [["", "holiday.png", ""]], found, "x", "both", 2, 2, 2, "", "", 0)
    assert "holiday.png: is damaged" in found.trouble and "holiday.png" in panel["value"] and "holiday.png" in checks
    assert not button["interactive"] and "picture-001" not in found.trouble and str(tmp_path) not in found.trouble


def test_duplicates_are_named(tabs, tmp_path):
    copy = tmp_path / "again.png"
    shutil.copy(sample_files(1)[0], copy)
    _, table, found, _ = tabs.train.take_pictures([str(sample_files(1)[0]), str(copy)])
    checks, _ = tabs.train.check(PAGE, table["value"], found, "x", "both", 2, 2, 2, "", "", 0)
    assert "1 duplicate: again.png is automobile.png again" in checks


def test_a_start_that_is_refused_leaves_nothing_behind(tabs, studio):
    for changes, said in (
        ({}, "have no caption"),
        ({"rank": 0, "prompt": "x"}, "rank is 0"),
        ({"steps": 10**9}, "steps"),
    ):
        panel, _ = start(tabs, sample_files(1, captions=False), [["", "automobile.png", ""]], **changes)
        assert panel["visible"] and said in panel["value"]
    assert studio.jobs.of(ME) is None and studio.runs.all(ME) == []
    assert not list((studio.outputs / "web" / "visitors" / ME / "runs").iterdir())


def test_uploads_are_capped(monkeypatch):
    files = sample_files(2)
    monkeypatch.setattr(uploads, "MOST_PICTURES", 1)
    with pytest.raises(DataError, match="more than the 1"):
        uploads.read_uploads(files)
    monkeypatch.setattr(uploads, "MOST_PICTURES", 5)
    monkeypatch.setattr(uploads, "MOST_BYTES", 100)
    with pytest.raises(DataError, match=r"automobile\.png has"):
        uploads.read_uploads(files)


def test_a_small_file_that_claims_a_hundred_million_pixels_is_refused(tabs, tmp_path):
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(bomb)
    assert bomb.stat().st_size < 100_000
    _, _, found, _ = tabs.train.take_pictures([str(bomb)])
    assert "bomb.png" in found.trouble and "million pixels" in found.trouble


def test_two_pictures_of_one_name_are_told_apart(tmp_path):
    other = tmp_path / "automobile.png"
    shutil.copy(sample_files(1)[0], other)
    labels = [upload.label for upload in uploads.read_uploads([sample_files(1)[0], other])]
    assert labels == ["automobile.png", "automobile.png (2)"]


def test_the_chip_says_how_far_and_how_it_ended():
    assert "DoRA 42/200, 0:31 left" in parts.chip(JobState("a", "training", "DoRA 42/200, 0:31 left"))
    assert "training failed" in parts.chip(JobState("a", "failed", "failed at step 3"))
    assert parts.chip(None) == ""


def test_curves_of_nothing_and_of_one_step_draw():
    assert draw_curves({}, 10) == ""
    assert "<svg" in draw_curves({"lora": Curve([0.5], [(0, 0.5)])}, 10)


# History


def test_history_lists_tells_apart_shares_and_deletes(tabs, studio, few_pictures):
    first, second = start_job(studio, few_pictures, steps=1), None
    assert first.wait(120)
    second = start_job(studio, few_pictures, steps=2, kind="dora")
    assert second.wait(120)
    *_, runs, other = tabs.history.list(None, PAGE)
    assert runs["value"] == second.name and other["value"] == first.name and "finished" in runs["choices"][0][0]
    facts = tabs.history.show(second.name, first.name, PAGE)[0]
    assert "<th scope='row'>steps</th><td>2</td><td>1</td>" in facts and "<th scope='row'>rank" not in facts
    stranger = visitor_of(OTHER)
    assert tabs.history.list(None, OTHER)[3]["choices"] == []
    assert not [each for each in studio.shelf.all(stranger) if "trained" in each.label]
    tabs.history.toggle_share(second.name, PAGE)
    shared = [each for each in studio.shelf.all(stranger) if each.key.startswith("shared/")]
    assert len(shared) == 1 and ME not in shared[0].key and second.name not in shared[0].key
    tabs.history.toggle_share(second.name, PAGE)
    assert not [each for each in studio.shelf.all(stranger) if each.key.startswith("shared/")]
    assert "no longer there" in tabs.history.remove(second.name, OTHER)["value"]
    assert not tabs.history.remove(second.name, PAGE)["visible"]
    assert [run.name for run in studio.runs.all(ME)] == [first.name]


# The server


def test_other_hosts_need_a_login():
    assert _login("127.0.0.1", None) is None
    with pytest.raises(ConfigError, match="--auth USER:PASSWORD"):
        _login("0.0.0.0", None)
    with pytest.raises(ConfigError, match="neither of them empty"):
        _login("0.0.0.0", "user:")
    assert _login("0.0.0.0", "me:secret") == ("me", "secret")
    assert _hosts("127.0.0.1") == ["127.0.0.1", "localhost", "127.0.0.1"] and _hosts("0.0.0.0") == ["*"]


def test_the_whole_page_builds_and_keeps_its_cache_private(studio):
    page = build(studio)
    assert page.title == "DoRA Diffusion"
    assert studio.cache.stat().st_mode & 0o077 == 0


def test_the_server_starts_without_torch():
    import subprocess
    import sys

    heavy = "{'torch', 'diffusers', 'transformers'}"
    code = f"import dora_diffusion.webapp.app, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_keys_never_leave_the_outputs_folder(studio):
    for key in ("/etc/passwd", "../x", "web/adapters/../../x", ""):
        with pytest.raises(AdapterFileError):
            studio.shelf.find(key, ME)
        with pytest.raises(TrainingError):
            studio.runs.find(key, ME)


def test_a_visitor_is_a_hash_whatever_the_browser_sends():
    for strange in ("../../x", "a" * 5000, "", "' OR 1=1"):
        name = visitor_of(page_of("a", cookie=strange))
        assert len(name) == 16 and name.isalnum()
        assert name == visitor_of(page_of("a", cookie=strange + "?"))  # known by the session alone
    assert visitor_of(page_of("a", cookie="x" * 32)) == visitor_of(page_of("b", cookie="x" * 32)) != ME


def test_a_job_that_is_not_started_can_be_closed():
    jobs = TrainingJobs(lambda _: None)
    assert jobs.close(0.1)


def test_the_adapters_are_looked_into_and_said_what_other_programs_make_of_them(tabs, pair, studio):
    html = tabs.compare.look_inside(*pair, PAGE)
    plot = Path(html.split("gradio_api/file=")[1].split("'")[0])
    assert Image.open(plot).width > 600
    from dora_diffusion.inspection.parity import compare_programs
    from dora_diffusion.models.loading import load_base

    found = compare_programs(studio.shelf.find(pair[1], ME).path, load_base(studio.base_name, device="cpu"))
    dora = html.split("in other programs</h3>")[2]
    assert dora.count("<tr>") == 1 + len(found) and dora.count("<td>right</td>") == sum(each.right for each in found)
