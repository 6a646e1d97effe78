"""What a visitor shares is offered to others, chosen for nobody, and tells nothing of whose it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import bases
import pytest
from PIL import Image
from web_helpers import make_pair
from web_pages import ME, OTHER, PAGE, Tabs, draw, last_html, shown_in

from dora_diffusion.errors import AdapterFileError, TrainingError
from dora_diffusion.models.loading import Base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.webapp import api, parts
from dora_diffusion.webapp.cards import full_card
from dora_diffusion.webapp.exports import command_line, export_files
from dora_diffusion.webapp.forms import Chosen
from dora_diffusion.webapp.runs import write_status
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.visitors import visitor_of

STRANGER = visitor_of(OTHER)


@pytest.fixture
def shared(studio: Studio) -> Path:
    """A finished run of ME with both twins, shared."""
    folder = studio.runs.new(ME)
    make_pair(Base("small", bases.stable_diffusion()), folder)
    config = TrainConfig(images=str(folder / "images"), out=str(folder), base=studio.base_name, kind="both", steps=1)
    write_status(folder, "finished", "finished", "", config)
    studio.runs.share(folder.name, ME, True)
    return folder


def _keys(studio: Studio) -> dict[str, str]:
    offered = [each for each in studio.shelf.all(STRANGER) if each.key.startswith("shared/")]
    return {each.path.stem: each.key for each in offered}


def test_a_shared_run_is_offered_and_chosen_for_nobody_else(tabs: Tabs, studio: Studio, shared: Path) -> None:
    assert set(_keys(studio)) == {"lora", "dora"}
    assert studio.shelf.pair(STRANGER) == (None, None)
    for picker in tabs.compare.preset(OTHER)[:2]:
        assert picker["value"] == "" and len(picker["choices"]) == 3
    assert studio.shelf.pair(ME) == (f"mine/{shared.name}/lora", f"mine/{shared.name}/dora")


def test_a_shared_run_tells_its_owner_nowhere(tabs: Tabs, studio: Studio, shared: Path) -> None:
    """Everything that a stranger is given of it: page, terminal line, report, metadata, card, API, errors."""
    keys = _keys(studio)
    updates = draw(tabs, OTHER, first=keys["lora"], second=keys["dora"])
    shown = shown_in(updates)
    grid, report, _ = export_files(shown, studio.albums.new(), studio)
    told = [json.dumps(updates, default=str), report.read_text(encoding="utf-8"), command_line(shown.request, studio)]
    for path in (grid, *(cell.path for cell in shown.cells)):
        with Image.open(path) as image:
            told.append(json.dumps(image.text))
    told += [full_card(studio.shelf.find(key, STRANGER), studio) for key in keys.values()]
    told.append(str(tabs.compare.show_facts(keys["lora"], keys["dora"], OTHER)))
    told.append(str(tabs.train.starts(keys["dora"], OTHER)))
    chosen = [Chosen(key, 1.0) for key in keys.values()]
    told.append(api._compare(studio, OTHER, "cat", [1], chosen, 1, "", False).model_dump_json())
    for text in told:
        assert ME not in text and "visitors" not in text
    assert "dora-diffusion compare" in last_html(updates, 7)
    for path in re.findall(r"--adapters (\S+)", command_line(shown.request, studio)):
        assert (studio.outputs.parent / path).is_file()  # the line works in a terminal


def test_errors_about_a_shared_file_do_not_tell_its_owner(tabs: Tabs, studio: Studio, shared: Path) -> None:
    keys = _keys(studio)
    (shared / "lora.safetensors").write_bytes(b"no adapter")
    error = last_html(draw(tabs, OTHER, first=keys["lora"]), 2)
    card = tabs.compare.show_card(keys["lora"], OTHER)[1]["value"]
    facts = tabs.compare.show_facts(keys["lora"], None, OTHER)
    for text in (error, card, facts):
        assert "lora.safetensors" in text and ME not in text and "visitors" not in text


def test_what_is_shared_follows_the_run_and_ends_with_it(studio: Studio, shared: Path) -> None:
    keys = _keys(studio)
    found = studio.shelf.find(keys["lora"], STRANGER).path
    assert found.read_bytes() == (shared / "lora.safetensors").read_bytes() and not found.is_relative_to(shared)
    (shared / "lora.safetensors").write_bytes((shared / "dora.safetensors").read_bytes())
    studio.shelf.all(STRANGER)
    assert found.read_bytes() == (shared / "dora.safetensors").read_bytes()
    studio.runs.share(shared.name, ME, False)
    assert not _keys(studio) and not found.exists()
    with pytest.raises(AdapterFileError, match="no longer there"):
        studio.shelf.find(keys["lora"], STRANGER)
    studio.runs.share(shared.name, ME, True)
    assert _keys(studio) != keys  # a new code: who knew the old one is not let in again
    studio.runs.delete(shared.name, ME)
    assert not _keys(studio) and not list(studio.runs.shared.iterdir())


def test_nobody_else_shares_or_deletes_a_run(studio: Studio, shared: Path) -> None:
    for change in (
        lambda: studio.runs.share(shared.name, STRANGER, False),
        lambda: studio.runs.delete(shared.name, STRANGER),
    ):
        with pytest.raises(TrainingError):
            change()
    assert set(_keys(studio)) == {"lora", "dora"}


def test_a_report_of_ones_own_run_may_be_handed_on(tabs: Tabs, studio: Studio, shared: Path) -> None:
    shown = shown_in(draw(tabs, PAGE, first=f"mine/{shared.name}/lora"))
    report = export_files(shown, studio.albums.new(), studio)[1].read_text(encoding="utf-8")
    assert ME not in report and f"runs/{shared.name}/lora.safetensors" in report
    assert str(studio.outputs) not in report


def test_words_that_leave_the_server_name_files_as_visitors_know_them() -> None:
    cached = "/srv/o/web/cache/" + 64 * "a" + "/cat.png"
    error = TrainingError(f"/srv/o/web/visitors/{ME}/runs/x/lora.safetensors and '{cached}' are damaged")
    assert parts.said(error) == "runs/x/lora.safetensors and 'cat.png' are damaged"
    assert ME not in parts.error_panel(error) and ME not in str(parts.panel(error))


def test_a_downloaded_configuration_tells_no_place_on_the_server(studio: Studio, few_pictures: Path) -> None:
    from web_pages import start_job

    job = start_job(studio, few_pictures, steps=1)
    assert job.wait(120) and job.config_file is not None
    text = job.config_file.read_text(encoding="utf-8")
    assert ME not in text and str(few_pictures) not in text and 'images = "images"' in text
