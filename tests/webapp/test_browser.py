"""The web app in a real Chromium, with the embedded base: what a visitor does, and that no other host is asked."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import (
    CHROMIUM,
    FLAGS,
    NARROW,
    OVERFLOW,
    WIDE,
    choose_view,
    compare,
    grave_findings,
    opened,
    quick,
    served,
    set_number,
    train_tab,
    write,
)
from PIL import Image
from web_helpers import make_pair, sample_files, serving

from dora_diffusion.models.loading import load_base

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: install Debian's package chromium"),
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An outputs folder with one pair of adapters in it."""
    folder = tmp_path_factory.mktemp("outputs")
    make_pair(load_base("emoji", device="cpu"), folder / "pair")
    return folder


@pytest.fixture(scope="module")
def server(outputs: Path) -> Iterator[str]:
    with serving(outputs) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: pip install '.[test]'")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server: str) -> Iterator[object]:
    with opened(browser, server) as page:
        yield page


def upload_samples(page, pictures: int) -> None:
    train_tab(page)
    page.set_input_files("#pictures input[type=file]", [str(path) for path in sample_files(pictures)])
    page.wait_for_function("() => document.querySelector('#checks').innerText.includes('all readable')")
    page.wait_for_function("() => !document.querySelector('#train').disabled")


# Compare


def test_the_page_opens_with_a_precomputed_example_and_the_pair_is_preset(page):
    assert page.inner_text("#grid .dd-badge") == "precomputed example"
    assert page.locator("#grid img").count() == 6
    assert page.input_value("#first-adapter input") == "pair/lora"
    assert page.input_value("#second-adapter input") == "pair/dora"


def test_a_click_before_the_pickers_are_filled_draws_the_pair(page):
    opening = page.context.new_page()
    opening.goto(page.url, wait_until="commit")
    compare(opening, 6)
    assert [text.split("\n")[0] for text in opening.locator(".dd-head").all_inner_texts()] == ["Base", "LoRA", "DoRA"]


def test_three_live_pictures_after_one_click(page):
    quick(page)
    compare(page, 3)
    assert page.locator("#grid img").count() == 3 and page.locator("#grid .dd-badge").count() == 0
    assert [text.split("\n")[0] for text in page.locator(".dd-head").all_inner_texts()] == ["Base", "LoRA", "DoRA"]
    captions = page.locator("#grid figcaption").all_inner_texts()
    assert "LoRA · rank 4 · strength 1 · seed 1" in captions[1] and "mean |difference|" in captions[2]
    assert len({served(page, place) for place in range(3)}) == 3
    box = page.locator("#grid img").first.bounding_box()
    assert box["width"] > 250 and abs(box["width"] - box["height"]) < 2
    natural = page.locator("#grid img").first.evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert natural == [64, 64]


def test_a_downloaded_png_is_the_servers_own_carries_metadata_and_restores_the_request(page, tmp_path: Path):
    page.fill("#prompt textarea, #prompt input", "frog, openmoji style")
    quick(page, seeds="7")
    set_number(page, "#second-strength", "0.5")
    compare(page, 3)
    with page.expect_download() as saved:
        page.locator("#grid a").nth(2).click()
    data = Path(saved.value.path()).read_bytes()
    assert data == served(page, 2)
    record = json.loads(Image.open(io.BytesIO(data)).text["dora_diffusion"])
    assert record["prompts"] == ["frog, openmoji style"] and record["seeds"] == [7]
    picture = tmp_path / "picture.png"
    picture.write_bytes(data)
    page.fill("#prompt textarea, #prompt input", "something else")
    set_number(page, "#second-strength", "1")
    page.click("#restore > button")
    page.set_input_files("#restore-file input[type=file]", str(picture))
    page.wait_for_function("() => document.querySelector('#prompt textarea, #prompt input').value.startsWith('frog')")
    page.get_by_text("the picture's request is restored").wait_for()
    assert page.input_value("#second-strength input[type=number]") == "0.5"
    compare(page, 3)
    assert page.locator("#grid .dd-cached").count() == 3
    assert Image.open(io.BytesIO(served(page, 2))).tobytes() == Image.open(picture).tobytes()


def test_strength_zero_serves_the_base_byte_for_byte(page):
    quick(page)
    set_number(page, "#first-strength", "0")
    set_number(page, "#second-strength", "0")
    compare(page, 3)
    pixels = [Image.open(io.BytesIO(served(page, place))).tobytes() for place in range(3)]
    assert pixels[0] == pixels[1] == pixels[2]
    assert "strength 0 is the base" in page.locator("#grid figcaption").nth(1).inner_text()


def test_a_prompt_that_is_too_long_shows_a_panel_and_keeps_the_form(page):
    prompt = "a very long prompt " * 40
    page.fill("#prompt textarea, #prompt input", prompt)
    quick(page, seeds="7, 8")
    page.click("#compare")
    panel = page.wait_for_selector("#compare-error .dd-error")
    assert "The prompt cannot be used" in panel.inner_text() and "Shorten it" in panel.inner_text()
    assert page.input_value("#prompt textarea, #prompt input") == prompt
    assert page.input_value("#seeds textarea, #seeds input") == "7, 8"
    assert page.input_value("#steps input[type=number]") == "3"
    page.wait_for_selector("#compare", state="visible")


def test_stop_ends_a_comparison(page):
    quick(page, seeds="1, 2, 3, 4, 5", steps="100")
    page.click("#compare")
    page.click("#stop-compare")
    page.wait_for_function("() => document.querySelector('#compare-status').innerText.includes('stopped')")
    page.wait_for_selector("#compare", state="visible")
    assert page.locator("#grid img").count() < 15


def test_the_handle_uncovers_without_moving_a_picture(page):
    quick(page)
    compare(page, 3)
    choose_view(page, "Slider")
    page.wait_for_selector(".dd-slide input")
    places = (
        "() => [...document.querySelectorAll('.dd-slide img')].map(i => [i.offsetLeft, i.offsetTop, i.offsetWidth])"
    )
    before = page.evaluate(places)
    assert before[0] == before[1] and before[0][2] > 250  # one lies on the other
    page.focus(".dd-slide input")
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    assert page.evaluate("() => document.querySelector('.dd-slide').style.getPropertyValue('--cut')") == "30%"
    assert page.evaluate(places) == before


def test_differences_have_a_fixed_scale_with_a_legend(page):
    quick(page)
    compare(page, 3)
    caption = page.locator("#grid figcaption").nth(1).inner_text()
    choose_view(page, "Difference")
    page.wait_for_selector(".dd-legend")
    assert page.inner_text(".dd-marks").split() == ["0", "32", "64", "96", "128+"]
    mean = caption.split("mean |difference| ")[1].split()[0]
    assert f"mean {mean} ·" in page.locator("#grid figcaption").first.inner_text()


def test_a_blind_vote_names_no_adapter_anywhere_before_the_vote(page):
    quick(page, seeds="21, 22")
    choose_view(page, "Blind vote")
    page.wait_for_selector("#blind-start")
    answers: list[object] = []
    page.on("response", lambda answer: answers.append(answer))
    compare(page, 6)
    assert page.locator("#grid img").count() == 0
    page.click("#blind-start")
    page.wait_for_function("() => [...document.querySelectorAll('#ballot img')].filter(i => i.complete).length === 2")
    told = page.inner_html("#blind") + page.inner_html("#grid") + page.inner_html("#compare-status")
    pictures = [answer for answer in answers if "/file=" in answer.url]
    assert len(pictures) == 2
    for picture in pictures:
        told += picture.url.rpartition("/")[2] + str(picture.all_headers()) + picture.body().decode("latin-1")
    for word in ("lora", "dora_", "rank", "strength", "pair/"):
        assert word not in told.lower(), word
    assert not page.is_visible("#command") and not page.is_visible("#links")
    page.click("#vote-left")
    page.wait_for_selector("#vote-result")
    result = page.inner_text("#vote-result")
    assert "LoRA, pair/lora, strength 1" in result and "n = 1" in result and "Wilson interval" in result
    page.click("#blind-next")
    page.get_by_text("Pair 2 of 2").wait_for()
    assert page.locator("#vote-result").count() == 0


def test_what_no_longer_fits_the_form_is_marked_however_it_was_changed(page):
    changed = "() => document.querySelector('#changed')?.innerText || ''"
    quick(page)
    compare(page, 3)
    page.wait_for_function(f"() => !({changed})()")
    page.fill("#second-strength input[type=number]", "0.5")  # typed, and the field not left: that draws again
    page.wait_for_function(f"() => ({changed})().includes('Settings changed (strength)')")
    page.fill("#second-strength input[type=number]", "1")
    page.wait_for_function(f"() => !({changed})()")
    page.focus("#first-strength input[type=range]")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"() => ({changed})().includes('strength')")
    write(page, "#seeds textarea, #seeds input", "1, 2")
    page.wait_for_function(f"() => ({changed})().includes('seeds')")
    compare(page, 6)
    page.wait_for_function(f"() => !({changed})()")
    choose_view(page, "Slider")
    page.wait_for_selector(".dd-slide input")
    assert page.input_value("#pair input") == "LoRA | DoRA"
    write(page, "#prompt textarea, #prompt input", "crown, openmoji style")
    page.wait_for_function(f"() => ({changed})().includes('prompt')")


def test_a_sweep_says_its_size_and_draws_a_labelled_grid(page):
    quick(page, steps="1")
    compare(page, 3)  # the time is measured now
    page.click("#sweep > button")
    page.get_by_text("28 pictures, about").wait_for()  # as the form is preset
    write(page, "#sweep-prompts textarea", "panda, openmoji style")
    write(page, "#sweep-seeds textarea, #sweep-seeds input", "1")
    write(page, "#sweep-strengths textarea, #sweep-strengths input", "0.5, 1")
    page.get_by_text("5 pictures, about").wait_for()
    page.click("#sweep-go")
    page.get_by_text("5 pictures in").wait_for()
    assert page.locator("#grid img").count() == 5
    heads = [text.split("\n")[0] for text in page.locator(".dd-head").all_inner_texts()]
    assert heads == ["Base", "LoRA 0.5", "LoRA 1", "DoRA 0.5", "DoRA 1"]


def test_the_keyboard_alone_is_enough(page):
    quick(page)
    page.focus("#prompt textarea, #prompt input")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.id") == "compare":
            break
    page.keyboard.press("Enter")
    page.get_by_text("3 pictures in").wait_for()
    page.focus("[role=tab]")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#instance-prompt", state="visible")


def test_two_browsers_see_nothing_of_each_other(browser, server: str):
    with opened(browser, server) as first, opened(browser, server) as second:
        for page, prompt in ((first, "fox, openmoji style"), (second, "crown, openmoji style")):
            page.fill("#prompt textarea, #prompt input", prompt)
            quick(page)
            page.click("#compare")
        for page in (first, second):
            page.get_by_text("3 pictures in").wait_for()
        assert "fox" in first.locator("#grid img").first.get_attribute("alt")
        assert "crown" in second.locator("#grid img").first.get_attribute("alt")


# Train


def test_train_both_survives_a_reload_and_ends_in_compare(browser, server: str):
    with opened(browser, server) as page, opened(browser, server) as stranger:
        upload_samples(page, 3)
        set_number(page, "#train-steps", "6")
        page.click("#advanced > button")
        set_number(page, "#batch", "2")
        page.click("#train")
        page.wait_for_function(
            "() => /(LoRA|DoRA) \\d+\\/6, \\d+:\\d\\d left/.test(document.querySelector('#chip').innerText)"
        )
        page.reload()
        page.wait_for_selector("#job-chip")
        train_tab(page)
        page.wait_for_function("() => /\\d+\\/6|finished/.test(document.querySelector('#job').innerText)")
        page.wait_for_function(
            "() => document.querySelector('#job').innerText.includes('finished: LoRA and DoRA, 6 steps')"
        )
        assert page.locator("#curves polyline").count() >= 4 and page.locator("#previews img").count() >= 2
        assert "config.toml" in page.input_value("#train-command textarea, #train-command input")
        page.click("#compare-these")
        page.wait_for_function("() => document.querySelector('#second-adapter input').value.startsWith('DoRA trained')")
        quick(page)
        compare(page, 3)
        assert stranger.locator("#job-chip").count() == 0
        page.get_by_role("tab", name="History").click()
        page.wait_for_selector("#run input")
        page.wait_for_function("() => document.querySelector('#run input').value.includes('finished')")
        stranger.get_by_role("tab", name="History").click()
        stranger.get_by_text("There are no runs yet").wait_for()


def test_a_lora_is_trained_on_as_a_dora_and_then_once_more_from_the_history(page):
    upload_samples(page, 2)
    page.click("#kind label:has-text('DoRA')")
    set_number(page, "#train-steps", "2")
    page.click("#advanced > button")
    page.click("#start-from input")
    page.get_by_role("option", name="pair/lora", exact=True).click()
    page.get_by_text("its rank and layers are kept").wait_for()
    for kind in ("LoRA", "DoRA"):
        page.click("#train")
        page.wait_for_function(
            "kind => document.querySelector('#log textarea')?.value.includes(`.safetensors, a ${kind} of rank 4`)"
            " && document.querySelector('#job').innerText.includes('finished: DoRA, 2 steps')",
            arg=kind,
        )
        page.get_by_role("tab", name="History").click()
        page.wait_for_function("() => document.querySelector('#run input')?.value.includes('finished')")
        page.click("#run-train-on")
        page.wait_for_function("() => document.querySelector('#start-from input').value.startsWith('DoRA trained')")


def test_stop_comes_within_two_steps_and_saves_a_checkpoint(page, outputs: Path):
    upload_samples(page, 2)
    page.click("#kind label:has-text('DoRA')")
    page.click("#train")
    page.wait_for_function("() => /DoRA \\d+\\/300/.test(document.querySelector('#job').innerText)")
    page.click("#stop-train")
    page.wait_for_function("() => /stopped at \\d+ of 300/.test(document.querySelector('#job').innerText)")
    assert "checkpoint saved" in page.inner_text("#job")
    assert list(outputs.glob("web/visitors/*/runs/*/checkpoints/dora.safetensors"))
    page.wait_for_selector("#train", state="visible")
    assert page.is_visible("#resume") and not page.is_visible("#compare-these")


def test_a_bad_folder_is_named_and_keeps_every_form_value(page, tmp_path: Path):
    broken = tmp_path / "mine" / "holiday.png"
    broken.parent.mkdir()
    broken.write_bytes(sample_files(1)[0].read_bytes()[:300])
    train_tab(page)
    write(page, "#instance-prompt textarea, #instance-prompt input", "openmoji style")
    page.click("#kind label:has-text('DoRA')")
    set_number(page, "#train-steps", "33")
    page.set_input_files("input[webkitdirectory]", str(broken.parent))
    page.wait_for_selector("#train-error .dd-error")
    assert "holiday.png: is damaged" in page.inner_text("#train-error")
    page.wait_for_function("() => document.querySelector('#checks').innerText.includes('holiday.png')")
    assert page.is_disabled("#train")
    assert page.input_value("#instance-prompt textarea, #instance-prompt input") == "openmoji style"
    assert page.input_value("#train-steps input[type=number]") == "33"
    assert page.is_checked("#kind label:has-text('DoRA') input")


def test_a_deleted_row_is_a_picture_less(page):
    upload_samples(page, 3)
    page.get_by_text("birthday cake, openmoji style", exact=True).last.click(button="right")
    page.get_by_text("Delete row").first.click()
    page.wait_for_function(
        "() => document.querySelector('#checks').innerText.includes('2 of 3 pictures, all readable')"
    )


# Everywhere


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_no_sideways_scrolling_and_nothing_grave_for_axe(browser, server: str, size, scheme: str):
    pytest.importorskip("axe_playwright_python", reason="pip install '.[test]'")
    findings = []
    with opened(browser, server, size, scheme) as page:
        quick(page)
        compare(page, 3)
        tops = {round(box["y"]) for box in (img.bounding_box() for img in page.locator("#grid img").all())}
        assert len(tops) == 1  # side by side, on a telephone too
        page.click("#facts > button")
        page.wait_for_selector(".dd-facts code")
        for view in ("Grid", "Slider", "Difference"):
            choose_view(page, view)
            page.wait_for_timeout(1500)
            assert page.evaluate(OVERFLOW) <= 0, view
            findings += [f"{view}: {each}" for each in grave_findings(page)]
        upload_samples(page, 2)
        page.wait_for_selector("#captions img", state="attached")
        page.wait_for_timeout(1500)  # the table is laid out again some time after it is filled
        assert page.evaluate(OVERFLOW) <= 0
        findings += [f"Train: {each}" for each in grave_findings(page)]
        page.get_by_role("tab", name="History").click()
        page.wait_for_timeout(1500)
        assert page.evaluate(OVERFLOW) <= 0
        findings += [f"History: {each}" for each in grave_findings(page)]
    assert not findings, "\n".join(findings)
