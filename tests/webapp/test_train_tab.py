"""The Train and History tabs without a browser, and how a training job lives and ends."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path

import bases
import gradio as gr
import pytest
import torch
from PIL import Image
from web_helpers import HANGS, sample_files
from web_pages import ME, OTHER, PAGE, Tabs, draw, shown_in, start_job, until

from dora_diffusion.comparison.curves import Curve, draw_curves
from dora_diffusion.data.cache import long_captions
from dora_diffusion.data.folder import TrainingImage
from dora_diffusion.errors import ConfigError, DataError, TrainingError
from dora_diffusion.formats.files import read_adapter_file
from dora_diffusion.memory import not_enough
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run import _ways_to_need_less
from dora_diffusion.webapp import jobs, parts, uploads
from dora_diffusion.webapp.jobs import JobState
from dora_diffusion.webapp.train_form import PRESETS, Pictures, TrainForm, checks
from dora_diffusion.webapp.visitors import visitor_of
from dora_diffusion.webapp.wording import FIELDS, MORE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:gradio")  # toasts, which no page is there to show


def test_a_job_trains_both_and_tells_how_it_ended(studio, few_pictures):
    job = start_job(studio, few_pictures, preview_prompts=["cat"], preview_every=2)
    assert job.wait(HANGS)
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
    assert whole.wait(HANGS)
    job = start_job(studio, few_pictures, kind="dora", steps=6)
    until(lambda: job.state.step >= 2)
    job.stop()
    assert job.wait(HANGS)
    state = job.snapshot()
    if state.phase == "stopped":  # a quick machine may have finished before it was asked
        assert state.text == f"stopped at {state.step} of 6 (DoRA), checkpoint saved"
        shutil.copytree(few_pictures, Path(job.config.out) / "images")
        assert studio.runs.find(job.name, ME).can_resume
        job = studio.resume(job.name, ME)
        assert job.wait(HANGS) and job.snapshot().phase == "finished", job.snapshot()
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
        assert job.wait(HANGS) and job.snapshot().phase == "finished", job.snapshot()
    assert shown_in(drawn).is_whole


def test_stop_comes_within_two_steps(studio, few_pictures):
    job = start_job(studio, few_pictures, kind="dora", steps=5000)
    until(lambda: job.state.step >= 2)
    job.stop()
    asked_at = job.state.step  # read after asking: however long this thread had to wait before
    assert job.wait(HANGS)
    assert job.snapshot().step <= asked_at + 2


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
    assert studio.jobs.of(ME).wait(HANGS) and studio.jobs.of(ME).snapshot().phase == "finished"


def test_who_sees_that_a_job_is_over_finds_in_its_folder_how_it_ended(studio, few_pictures, monkeypatch):
    order: list[tuple[str, bool]] = []
    write = jobs.write_status

    def noted(folder: Path, phase: str, *rest: object) -> None:
        write(folder, phase, *rest)
        order.append((phase, bool(job) and job[0].state.is_over))

    job: list[jobs.TrainingJob] = []
    monkeypatch.setattr(jobs, "write_status", noted)
    job.append(start_job(studio, few_pictures))
    assert job[0].wait(HANGS) and job[0].snapshot().phase == "finished"
    assert order[-1] == ("finished", False)


def test_a_failed_job_is_called_failed_with_its_reason(tabs, studio, tmp_path):
    job = start_job(studio, tmp_path / "nowhere")
    assert job.wait(HANGS)
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
    assert first.wait(HANGS) and first.snapshot().phase == "finished"
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
    assert second is not first and second.wait(HANGS) and second.snapshot().phase == "finished", second.state
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
    assert third.wait(HANGS) and "is a DoRA, and a LoRA is to be trained" in str(third.snapshot().error)
    assert "no longer there" in start(tabs, files, rows_of_files(files), prompt="disc", start="mine/x/dora")[0]["value"]


def test_a_dokr_is_called_so_everywhere_and_is_gone_on_from(tabs, studio):
    files, page = sample_files(3), tabs.train.layout
    kind, norm, lokr = tabs.train.parametrise("lokr")
    assert kind["choices"] == [("Train both", "both"), ("LoKr", "lora"), ("DoKR", "dora")] and lokr["visible"]
    assert [says for says, _ in norm["choices"]] == ["by output: LyCORIS", "by input: ComfyUI"]
    kind, norm, lokr = tabs.train.parametrise("lora")
    assert kind["choices"] == page.kind.choices and norm["choices"] == page.norm_axis.choices and not lokr["visible"]

    start(tabs, files, rows_of_files(files), prompt="disc", parametrisation="lokr", factor="4", norm_axis="input")
    first = studio.jobs.of(ME)
    assert first.wait(HANGS) and first.snapshot().phase == "finished", first.state
    assert "finished: LoKr and DoKR" in first.snapshot().text and any("DoKR 2/2" in line for line in first.log)
    file = read_adapter_file(Path(first.config.out) / "dora.safetensors")
    assert (file.config.kind_label, file.config.factor, file.norm_axis) == ("DoKR", 4, "input")
    shown = dict(zip([component.elem_id for component in tabs.watch.outputs], tabs.watch.look((), PAGE)))
    assert ">DoKR</text>" in shown["curves"] and "<b>DoKR</b>" in shown["previews"]
    labels = {each.key.rpartition("/")[2]: each.label for each in studio.shelf.all(ME) if "mine/" in each.key}
    assert labels["lora"].startswith("LoKr trained ") and labels["dora"].startswith("DoKR trained ")
    (offered,) = tabs.history.list(None, PAGE)[3]["choices"]
    assert "LoKr and DoKR" in offered[0]
    studio.runs.share(first.name, ME, True)
    strangers = [each.label for each in studio.shelf.all(visitor_of(OTHER)) if each.is_strangers]
    assert sorted(label.split()[0] for label in strangers) == ["DoKR", "LoKr"]

    # Another parametrisation in the form does not count: the adapter's own is kept, and its name with it.
    start(tabs, files, rows_of_files(files), prompt="disc", start=f"mine/{first.name}/dora", parametrisation="loha")
    second = studio.jobs.of(ME)
    assert second is not first and second.wait(HANGS) and second.snapshot().phase == "finished", second.state
    assert "finished: LoKr and DoKR" in second.snapshot().text
    run = studio.runs.find(second.name, ME)
    assert run.parametrisation == "lokr" and run.differences(studio.runs.find(first.name, ME)).keys() >= {"start_from"}


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
    assert waiting.wait(HANGS) and waiting.snapshot().phase == "finished"


def rows_of_files(files: list[Path]) -> list[list[str]]:
    return [["", path.name, ""] for path in files if path.suffix != ".txt"]


def start(tabs: Tabs, files: list[Path], rows: list[list[str]], **changes: object) -> tuple:
    form = {"prompt": "", "kind": "both", "steps": 2, "rank": 2, "batch": 2, "rate": "", "preview": "", "seed": 0}
    form |= {"more": [], "norm_axis": "output", "start": "", "keep": False}
    form |= {"parametrisation": "lora", "factor": "", "full_matrix": False}
    return tabs.train.start(PAGE, [str(path) for path in files], rows, *{**form, **changes}.values())


def test_from_upload_to_adapters_chosen_in_compare(tabs, studio):
    train, form = tabs.train, ("", "both", 2, 2, 2, "", "", 0)
    files = sample_files(3)
    kept, table, found, _ = train.take_pictures([str(path) for path in files])
    rows = table["value"]
    checks, button = train.check(PAGE, rows, found, *form)
    assert not found.trouble and not found.notes and button["interactive"] and "3 pictures, all readable" in checks
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


def test_the_table_is_the_list_of_what_is_trained_on(tabs, studio):
    """A row that is deleted is no picture of the run; the rest keep their captions however the table is sorted."""
    files = sample_files(3)
    form = ("", "both", 2, 2, 2, "", "", 0)
    kept, table, found, _ = tabs.train.take_pictures([str(path) for path in files])
    rows = table["value"][::-1]
    del rows[1]
    rows[1][2] = "a red car"
    checks, button = tabs.train.check(PAGE, rows, found, *form)
    assert "2 of 3 pictures, all readable" in checks and button["interactive"]
    assert not start(tabs, kept, rows)[0]["visible"]
    job = studio.jobs.of(ME)
    assert job.wait(120) and job.snapshot().phase == "finished", job.state
    trained = sorted(Path(job.config.images).iterdir())
    assert [path.name for path in trained if path.suffix == ".png"] == ["picture-001.png", "picture-002.png"]
    assert [path.read_bytes() for path in trained if path.suffix == ".png"] == [files[i].read_bytes() for i in (0, 2)]
    assert [path.read_text().strip() for path in trained if path.suffix == ".txt"] == ["a red car", rows[0][2]]
    assert read_adapter_file(Path(job.config.out) / "lora.safetensors").description.training["images"] == 2


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([["", "automobile.png", "a"], ["", "automobile.png", "b"]], "automobile.png more than once"),
        ([["", "automobile.png", "a"], ["", "other.png", "b"]], "names 'other.png', which is none of the pictures"),
        ([["", "automobile.png", "a"], ["", "", "a caption alone"]], "a caption and no picture ('a caption alone')"),
        ([["", "", ""]], "no pictures"),
    ],
)
def test_rows_that_fit_no_picture_are_said_before_and_at_the_start(tabs, studio, rows, said):
    files = sample_files(2)
    _, _, found, _ = tabs.train.take_pictures([str(path) for path in files])
    checks, button = tabs.train.check(PAGE, rows, found, "x", "both", 2, 2, 2, "", "", 0)
    assert not button["interactive"]
    panel, _ = start(tabs, files, rows, prompt="x")
    assert panel["visible"] and html.escape(said) in panel["value"] and studio.jobs.of(ME) is None
    assert said == "no pictures" or html.escape(said) in checks


def test_a_broken_picture_whose_row_is_deleted_stops_nothing(tabs, studio, tmp_path):
    broken = tmp_path / "holiday.png"
    broken.write_bytes(sample_files(1)[0].read_bytes()[:300])
    files = [broken, *sample_files(2)]
    kept, table, found, panel = tabs.train.take_pictures([str(path) for path in files])
    form = ("x", "lora", 2, 2, 2, "", "", 0)
    assert "holiday.png: is damaged" in panel["value"] and "delete their rows" in panel["value"]
    assert not tabs.train.check(PAGE, table["value"], found, *form)[1]["interactive"]
    rows = [row for row in table["value"] if row[1] != "holiday.png"]
    checks, button = tabs.train.check(PAGE, rows, found, *form)
    assert button["interactive"] and "holiday.png" not in checks and "2 of 3 pictures" in checks
    tabs.train.measure(kept, rows, found, *form)
    assert tabs.train.costing.of(TrainForm(*form)) is not None
    assert not start(tabs, kept, rows, kind="lora", steps=1)[0]["visible"]
    assert studio.jobs.of(ME).wait(120) and studio.jobs.of(ME).snapshot().phase == "finished"


def test_what_a_folder_holds_beside_its_pictures_is_said_and_stops_nothing(tabs, tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"Bud1")
    (tmp_path / "._automobile.png").write_bytes(b"no picture")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "birthday-cake.txt").write_bytes(b"caf\xe9")
    files = [*tmp_path.iterdir(), *sample_files(2, captions=False)]
    _, table, found, panel = tabs.train.take_pictures([str(path) for path in files if path.is_file()])
    assert not panel["visible"] and [row[1:] for row in table["value"]] == [
        ["automobile.png", ""],
        ["birthday-cake.png", ""],
    ]
    checks, button = tabs.train.check(PAGE, table["value"], found, "x", "both", 2, 2, 2, "", "", 0)
    assert button["interactive"]
    assert "passed over: notes.md" in checks and "birthday-cake.txt is not UTF-8" in checks


LONG = "a red apple on a green table, " * 30


@pytest.mark.parametrize("loaded", [False, True])
def test_captions_that_are_too_long_are_found_before_the_start_as_the_run_finds_them(tabs, studio, loaded):
    if loaded:
        with studio.painter.turn(lambda _: None):
            pass
    files = sample_files(3)
    kept, table, found, _ = tabs.train.take_pictures([str(path) for path in files])
    rows = table["value"]
    rows[1][2] = LONG
    form = ("", "lora", 1, 2, 2, "", "", 0)
    checks, button = tabs.train.check(PAGE, rows, found, *form, [])
    assert not button["interactive"] and "1 caption too long for this base (birthday-cake.png)" in checks
    panel, _ = start(tabs, kept, rows)
    assert "1 of 3 captions are too long for this base (birthday-cake.png)" in panel["value"]
    assert (studio.painter._base is not None) == loaded and studio.jobs.of(ME) is None
    with studio.painter.turn(lambda _: None) as base:
        problem = html.escape(long_captions(base, [TrainingImage(Path("a.png"), LONG.strip())])["a.png"])
    assert problem in checks and problem in panel["value"]

    checks, button = tabs.train.check(PAGE, rows, found, *form, ["cut_captions"])
    assert button["interactive"] and "does not read them whole: birthday-cake.png" in checks
    checks, button = tabs.train.check(PAGE, rows[:1], found, *form[:-2], LONG, 0, ["cut_captions"])
    assert not button["interactive"] and "the preview prompt is too long" in checks
    assert "preview prompt is too long" in start(tabs, kept, rows[:1], preview=LONG)[0]["value"]


def test_a_run_that_cuts_captions_is_previewed_with_one_that_is_read_whole(tabs, studio):
    files = sample_files(2)
    kept, table, _, _ = tabs.train.take_pictures([str(path) for path in files])
    rows = table["value"]
    rows[0][2] = LONG
    assert not start(tabs, kept, rows, kind="lora", steps=1, more=["cut_captions"])[0]["visible"]
    job = studio.jobs.of(ME)
    assert job.wait(120) and job.snapshot().phase == "finished", job.state
    assert job.config.preview_prompts == [rows[1][2]]


def test_pictures_too_small_for_the_base_are_found_before_the_start(tabs, studio, tmp_path, monkeypatch):
    """A quarter of the side that the base was made for is the least, here as in the run."""
    monkeypatch.setattr(type(studio.painter), "size", property(lambda _: 512))
    Image.new("RGB", (100, 200)).save(tmp_path / "small.png")
    _, _, found, _ = tabs.train.take_pictures([str(tmp_path / "small.png")])
    assert "small.png: 100 x 200 is too small; the shorter side must have at least 128 pixels" in found.trouble


def test_duplicates_are_named(tabs, tmp_path):
    copy = tmp_path / "again.png"
    shutil.copy(sample_files(1)[0], copy)
    _, table, found, _ = tabs.train.take_pictures([str(sample_files(1)[0]), str(copy)])
    checks, _ = tabs.train.check(PAGE, table["value"], found, "x", "both", 2, 2, 2, "", "", 0)
    assert "1 duplicate: again.png is automobile.png again" in checks


def test_a_start_that_is_refused_leaves_nothing_behind(tabs, studio):
    for changes, said in (
        ({}, "have no caption"),
        ({"rank": 0, "prompt": "x"}, "“Rank” is 0"),
        ({"steps": 10**9}, "“Steps of each” is 1000000000"),
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


def test_history_lists_tells_apart_shares_and_deletes(tabs, studio, few_pictures):
    first, second = start_job(studio, few_pictures, steps=1), None
    assert first.wait(HANGS)
    second = start_job(studio, few_pictures, steps=2, kind="dora")
    assert second.wait(HANGS)
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


SIX = [(f"{number}.png", "a cat") for number in range(6)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rate": "-1"}, "“Learning rate” is '-1'; give a number above 0"),
        ({"rate": "much"}, "“Learning rate” is 'much'"),
        ({"rate": "nan"}, "“Learning rate” is 'nan'"),
        ({"rate": "1e999"}, "“Learning rate” is '1e999'"),
        ({"steps": None}, "“Steps of each” is None; it must be between 1 and 4000"),
        ({"steps": 0.5}, "“Steps of each” is 0.5"),
        ({"rank": float("nan")}, "“Rank” is nan"),
        ({"batch_size": 99}, "“Batch size” is 99; it must be between 1 and 16"),
        ({"seed": -3}, "“Seed” is -3"),
        ({"seed": 1e30}, "“Seed” is 1e+30"),
        ({"kind": "x"}, "“Adapters” is 'x'"),
        ({"norm_axis": "x"}, "“DoRA's norm” is 'x'"),
        ({"parametrisation": "x"}, "“Parametrisation” is 'x'"),
        ({"parametrisation": "lokr", "factor": "0"}, "“Factor” is '0'; give a whole number from 1 to 4096"),
        ({"parametrisation": "lokr", "factor": "-1"}, "“Factor” is '-1'"),
        ({"parametrisation": "lokr", "factor": "two"}, "“Factor” is 'two'"),
        ({"more": ("x",)}, "'x' is none of the choices: Mirror pictures"),
    ],
)
def test_a_value_that_cannot_be_is_said_by_its_field_before_the_start(values, said):
    form = TrainForm(**values)
    with pytest.raises(ConfigError) as raised:
        form.config(Path("images"), Path("out"), "emoji")
    assert said in str(raised.value) and not any(key in str(raised.value) for key in FIELDS if "_" in key)
    lines = checks(SIX, form, Pictures(), None)
    assert lines[str(raised.value)] is False and [good for good in lines.values()].count(False) == 1


def test_a_form_that_has_all_it_needs_can_be_started():
    unused = {"parametrisation": "loha", "factor": "nonsense", "full_matrix": True}  # LoKr's own, which are not shown
    for values in (
        {},
        unused,
        {"parametrisation": "lokr", "factor": "8"},
        {"prompt": "a cat", "preview": "a dog", "rate": "1e-4", "keep": True},
        {"start": "sample/dora"},
    ):
        lines = checks(SIX, TrainForm(**values), Pictures(), None)
        assert [line for line, good in lines.items() if good is False] == []


def test_errors_on_the_page_speak_of_fields_and_list_no_keys():
    config = TrainConfig(images="i", out="o", rank=4)
    here, there = (_ways_to_need_less(config, None, torch.device(name)) for name in ("cpu", "cuda"))
    short = not_enough("to train so", torch.device("cpu"), here)
    assert "nf4" in parts.error_panel(not_enough("to train so", torch.device("cpu"), there))
    with pytest.raises(ConfigError) as unknown:
        TrainConfig.from_values({"images": "i", "out": "o", "zzzz": 1}, "a run")
    keys = [key for key in TrainConfig.model_fields if "_" in key]
    for error in (
        short,
        unknown.value,
        TrainingError("the configuration changed:\n  batch_size: was 4, is 2\n  rank: was 4, is 8"),
        ConfigError("train_text_encoder: emoji-dit has no text encoder that can be trained. Leave it out."),
        ConfigError("start_from: x.safetensors is a DoRA, and a LoRA is to be trained: set kind to dora."),
    ):
        html = parts.error_panel(error)
        assert not [key for key in keys if key in html], html
    assert "not enough memory on this machine to train so." in parts.error_panel(short)
    assert "a smaller “Batch size”" in parts.error_panel(short) and "nf4" in parts.error_panel(short)
    assert "“Text encoder too”: emoji-dit has no text encoder" in parts.error_panel(
        ConfigError("train_text_encoder: emoji-dit has no text encoder that can be trained.")
    )


def test_the_forms_words_are_those_of_its_fields(tabs):
    labels = " ".join(str(field.label) for field in tabs.train.layout.settings)
    labels += " ".join(text for text, _ in tabs.train.layout.more.choices)
    assert all(label in labels for label in FIELDS.values()) and set(MORE) <= set(FIELDS) <= set(
        TrainConfig.model_fields
    )
