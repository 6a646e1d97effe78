"""The web app without a browser: what its callbacks show, and how its training job lives and ends."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import bases
import gradio as gr
import pytest
from PIL import Image
from web_helpers import make_pair, sample_files

from dora_diffusion.comparison.curves import Curve, draw_curves
from dora_diffusion.errors import AdapterFileError, ConfigError, DataError, PromptError, TrainingError
from dora_diffusion.models.loading import Base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.webapp import parts, uploads
from dora_diffusion.webapp.app import _hosts, _login, build
from dora_diffusion.webapp.compare import CompareTab, parse_seeds
from dora_diffusion.webapp.jobs import JobState, TrainingJob, TrainingJobs
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.train import TrainTab

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:gradio")  # toasts, which no page is there to show


@pytest.fixture
def studio(tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    studio = Studio.open(tmp_path / "outputs", str(sd_folder))
    yield studio
    assert studio.jobs.close(60)


@pytest.fixture
def tabs(studio: Studio) -> tuple[CompareTab, TrainTab]:
    compare = CompareTab(studio)
    train = TrainTab(studio, compare)
    with gr.Blocks(analytics_enabled=False):
        compare.build()
        chip = gr.HTML()
        with gr.Tabs() as shown, gr.Tab("Train"):
            train.build(chip, shown)
    return compare, train


@pytest.fixture
def pair(studio: Studio) -> tuple[str, str]:
    """The keys of two adapters that do something."""
    make_pair(Base("small", bases.stable_diffusion()), studio.outputs / "run")
    return "run/lora", "run/dora"


PAGE = gr.Request(session_hash="one page")


def draw(tab: CompareTab, **changes: object) -> list[tuple]:
    form = {"prompt": "cat face", "seeds": "1", "steps": 2, "guidance": 2.0, "first": "", "first_strength": 1.0}
    form |= {"second": "", "second_strength": 1.0, "page": PAGE}
    return list(tab.draw(**{**form, **changes}))


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


def config(studio: Studio, folder: Path, **changes: object) -> TrainConfig:
    values = {"images": str(folder), "out": str(studio.web / "run"), "base": studio.base_name, "kind": "both"}
    values |= {"steps": 3, "batch_size": 2, "rank": 2, "instance_prompt": "openmoji style"}
    return TrainConfig(**{**values, **changes})


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
    updates = draw(tabs[0], seeds="1, 2", first=first, second=second)
    grids = [u[0] for u in updates if isinstance(u[0], str)]
    assert [html.count("<img") for html in grids] == [0, 1, 2, 3, 4, 5, 6]
    assert "LoRA · rank 4 · strength 1 · seed 1" in grids[-1] and "DoRA · rank 4 · strength 1 · seed 2" in grids[-1]
    assert grids[-1].count("mean |difference|") == 4
    files = sorted(studio.pictures.rglob("*.png"))
    assert len(files) == 6
    picture = Image.open(files[0])
    assert picture.size == (16, 16) and picture.text["prompt"] == "cat face"
    assert studio.painter._base.denoiser.training is False
    assert not any("lora" in name for name, _ in studio.painter._base.denoiser.named_modules())


def test_strength_zero_is_the_base_byte_for_byte(tabs, pair, studio):
    updates = draw(tabs[0], first=pair[0], first_strength=0.0, second=pair[1], second_strength=0.0)
    pixels = [Image.open(path).tobytes() for path in sorted(studio.pictures.rglob("*.png"))]
    assert len(pixels) == 3 and pixels[0] == pixels[1] == pixels[2]
    assert last_html(updates, 0).count("strength 0 is the base") == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "word " * 200}, "The prompt is too long"),
        ({"prompt": "  "}, "there is no prompt"),
        ({"seeds": "one"}, "give whole numbers"),
        ({"seeds": "1 2 3 4 5 6 7 8 9"}, "more than the 8"),
        ({"first": "../../etc/passwd"}, "no longer there"),
    ],
)
def test_a_mistake_fills_the_panel_and_gives_the_button_back(tabs, changes, said):
    updates = draw(tabs[0], **changes)
    assert said in last_html(updates, 2)
    assert updates[-1][2]["visible"] and updates[-1][3]["visible"] and not updates[-1][4]["visible"]


def test_one_drawing_at_a_time_and_a_page_that_closes_lets_the_next_one_draw(tabs, pair):
    form = ("cat", "1,2,3", 30, 2.0, pair[0], 1.0, pair[1], 1.0)
    abandoned = tabs[0].draw(*form, gr.Request(session_hash="closed page"))
    for update in abandoned:
        if isinstance(update[0], str) and "<img" in update[0]:
            break
    abandoned.close()
    assert last_html(draw(tabs[0]), 0).count("<img") == 1


def test_stop_ends_the_drawing_and_says_so(tabs, pair):
    updates = []
    for update in tabs[0].draw("cat", "1,2,3", 50, 2.0, pair[0], 1.0, pair[1], 1.0, PAGE):
        updates.append(update)
        if isinstance(update[0], str) and "<img" in update[0]:
            tabs[0].stop(PAGE)
    assert "stopped" in last_html(updates, 1)
    assert last_html(updates, 0).count("<img") < 9


def test_two_drawings_wait_for_each_other(tabs, pair):
    def in_a_thread() -> None:
        list(tabs[0].draw("cat", "1", 20, 2.0, pair[0], 1.0, "", 1.0, gr.Request(session_hash="other page")))

    other = threading.Thread(target=in_a_thread)
    other.start()
    alone = last_html(draw(tabs[0], first=pair[0]), 0)
    other.join()
    assert alone.count("<img") == 2 and "difference| 0.0" not in alone


def test_seeds_are_read_leniently():
    assert parse_seeds("1, 2 2;3") == (1, 2, 3)
    with pytest.raises(ConfigError):
        parse_seeds("-1")


def test_the_newest_pair_is_preset_and_cards_name_the_kind(tabs, pair, studio):
    assert studio.shelf.pair() == pair
    assert [update["value"] for update in tabs[0].preset()[:2]] == list(pair)
    assert "DoRA · rank 4" in tabs[0].show_card(pair[1])[0]


def test_an_uploaded_adapter_gets_a_name_of_its_own(tabs, pair, studio, tmp_path):
    upload = tmp_path / "my ~style.safetensors"
    shutil.copy(studio.shelf.find(pair[0]).path, upload)
    chosen, _ = tabs[0].take_in(str(upload))
    shelved = studio.shelf.find(chosen["value"])
    assert shelved.label == "my ~style (uploaded)" and "style" not in shelved.path.name


def test_an_upload_that_is_no_adapter_is_refused_by_its_own_name(tabs, studio, tmp_path):
    upload = tmp_path / "broken.safetensors"
    upload.write_bytes(b"not at all a safetensors file, and long enough")
    _, panel = tabs[0].take_in(str(upload))
    assert "broken.safetensors is no sound safetensors file" in panel["value"] and str(tmp_path) not in panel["value"]
    assert not list(studio.shelf.uploaded.iterdir())


def test_a_broken_file_among_the_adapters_does_not_keep_the_page_from_opening(studio):
    for kind in ("lora", "dora"):
        (studio.outputs / f"{kind}.safetensors").write_bytes(b"broken, and long enough to be read as a header")
    assert studio.shelf.pair() == ("lora", "dora")
    build(studio)


def test_what_nobody_foresaw_is_shown_and_the_base_given_back(tabs, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("dora_diffusion.webapp.drawing.compare", fail)
    assert "RuntimeError: out of memory" in last_html(draw(tabs[0]), 2)
    monkeypatch.undo()
    assert last_html(draw(tabs[0]), 0).count("<img") == 1


def test_texts_from_outside_are_escaped():
    assert "<b>&lt;script&gt;" not in parts.error_panel(PromptError("<script>"))
    assert "<script>" not in parts.error_panel(PromptError("<script>"))
    assert "<script>" not in parts.checklist({"<script>": False})
    assert "<script>" not in parts.header("<script>", "cpu")


# Train


def test_a_job_trains_both_and_tells_how_it_ended(studio, few_pictures):
    job = studio.jobs.start("run", config(studio, few_pictures))
    assert job.wait(120)
    state = job.snapshot()
    assert state.phase == "finished", state
    assert state.text.startswith("finished: LoRA and DoRA, 3 steps each")
    assert [path.name for path in state.adapters] == ["lora.safetensors", "dora.safetensors"]
    assert [len(job.curves[kind].loss) for kind in ("lora", "dora")] == [3, 3]
    assert studio.painter._base is None  # training has a base of its own


def test_a_stopped_job_keeps_a_checkpoint_and_says_where(studio, few_pictures):
    job = studio.jobs.start("run", config(studio, few_pictures, steps=5000))
    until(lambda: job.state.step >= 2)
    job.stop()
    assert job.wait(60)
    state = job.snapshot()
    assert state.phase == "stopped" and state.text == f"stopped at step {state.step} of 5000 (LoRA), checkpoint saved"
    assert (studio.web / "run" / "checkpoints" / "lora.safetensors").is_file()


def test_a_failed_job_is_called_failed(studio, tmp_path):
    job = studio.jobs.start("run", config(studio, tmp_path / "nowhere"))
    assert job.wait(60)
    assert job.snapshot().phase == "failed" and isinstance(job.snapshot().error, DataError)


def test_only_one_job_at_a_time(studio, few_pictures):
    job = studio.jobs.start("run", config(studio, few_pictures, steps=5000))
    with pytest.raises(TrainingError, match="another training is running"):
        studio.jobs.start("second", config(studio, few_pictures))
    assert studio.jobs.last is job


def start(tab: TrainTab, files: list[Path], rows: list[list[str]], **changes: object) -> tuple:
    form = {"prompt": "", "kind": "both", "steps": 2, "rank": 2, "rate": None}
    return tab.start(files=[str(path) for path in files], table=rows, **{**form, **changes})


def test_from_upload_to_adapters_chosen_in_compare(tabs, studio):
    train = tabs[1]
    files = sample_files(3)
    table, trouble, _, checks, button = train.take_pictures([str(path) for path in files], "")
    rows = table["value"]
    assert trouble == "" and button["interactive"] and "3 pictures, all readable" in checks
    assert rows[0][1:] == ["automobile.png", "automobile, openmoji style"] and "data:image/png" in rows[0][0]
    rows[0][2] = "a red car"
    assert start(train, files, rows)[0]["visible"] is False
    until(lambda: studio.jobs.last.state.is_over)
    assert studio.jobs.last.state.phase == "finished", studio.jobs.last.state
    folder = Path(studio.jobs.last.config.images)
    assert sorted(path.name for path in folder.iterdir())[:2] == ["picture-001.png", "picture-001.txt"]
    assert (folder / "picture-001.txt").read_text() == "a red car\n"
    shown = dict(zip([component.elem_id for component in train.watched], train.watch(("", -1), "", rows, "")))
    assert shown["first-adapter"]["value"].endswith("/lora") and shown["second-adapter"]["value"].endswith("/dora")
    assert "finished: LoRA and DoRA" in shown["job"] and "<polyline" in shown["curves"]
    seen = (studio.jobs.last.name, 2 * studio.jobs.last.state.version)
    assert all(update == gr.skip() for update in train.watch(seen, "", rows, ""))


def test_train_stays_disabled_with_its_reasons(tabs):
    train = tabs[1]
    _, _, _, checks, button = train.take_pictures([str(path) for path in sample_files(2, captions=False)], "")
    assert not button["interactive"] and "2 without a caption" in checks
    checks, button = train.check([["", "a.png", ""]], "openmoji style", "")
    assert button["interactive"]
    assert not train.check([["", "", ""]], "", "")[1]["interactive"]


def test_a_broken_picture_is_named_as_the_visitor_knows_it(tabs, tmp_path):
    broken = tmp_path / "holiday.png"
    broken.write_bytes(sample_files(1)[0].read_bytes()[:300])
    _, trouble, panel, checks, button = tabs[1].take_pictures([str(broken)], "a style")
    assert "holiday.png: is damaged" in trouble and "holiday.png" in panel["value"] and "holiday.png" in checks
    assert not button["interactive"] and "picture-001" not in trouble and str(tmp_path) not in trouble


def test_a_start_that_is_refused_leaves_nothing_behind(tabs, studio):
    for changes, said in (({}, "have no caption"), ({"rank": 0, "prompt": "x"}, "rank = 0")):
        panel, _ = start(tabs[1], sample_files(1, captions=False), [["", "automobile.png", ""]], **changes)
        assert panel["visible"] and said in panel["value"]
    assert studio.jobs.last is None
    assert sorted(path.name for path in studio.web.iterdir()) == ["adapters"]


def test_uploads_are_capped(monkeypatch):
    files = sample_files(2)
    monkeypatch.setattr(uploads, "MOST_PICTURES", 1)
    with pytest.raises(DataError, match="more than the 1"):
        uploads.read_uploads(files)
    monkeypatch.setattr(uploads, "MOST_PICTURES", 5)
    monkeypatch.setattr(uploads, "MOST_BYTES", 100)
    with pytest.raises(DataError, match=r"automobile\.png has"):
        uploads.read_uploads(files)


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


def test_keys_never_leave_the_outputs_folder(studio):
    for key in ("/etc/passwd", "../x", "web/adapters/../../x", ""):
        with pytest.raises(AdapterFileError):
            studio.shelf.find(key)


def test_a_job_that_is_not_started_can_be_closed():
    jobs = TrainingJobs()
    assert jobs.close(0.1)
    assert isinstance(TrainingJob("a", TrainConfig(images="a", out="b")).snapshot(), JobState)
