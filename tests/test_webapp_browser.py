"""The web app in a real Chromium, with the embedded base: what a visitor does, and that no other host is asked."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from web_helpers import make_pair, sample_files

from dora_diffusion.models.loading import load_base

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
ROOT = Path(__file__).parent.parent
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SLOW = 90_000  # milliseconds; a machine that trains something else at the same time still gets there

pytestmark = [
    pytest.mark.browser,
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "app.py", "--port", str(port), "--outputs", str(outputs)]
    log = outputs.parent / "server.log"
    with log.open("w") as written:
        process = subprocess.Popen(command, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        deadline = time.monotonic() + 120
        while "open at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: pip install '.[test]'")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@contextmanager
def opened(browser, server: str, viewport: dict[str, int] = WIDE) -> Iterator[object]:
    """A page of its own context; at the end, nothing may have gone wrong in it and no other host been asked."""
    context = browser.new_context(viewport=viewport)
    page = context.new_page()
    page.set_default_timeout(SLOW)
    wrong: list[str] = []

    def only_our_server(route) -> None:
        if route.request.url.startswith((server, "data:", "blob:")):
            route.continue_()
        else:
            wrong.append(f"asked a foreign host: {route.request.url}")
            route.abort()

    context.route("**/*", only_our_server)
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(server)
    page.wait_for_selector("#compare")
    yield page
    context.close()
    assert not wrong, wrong


@pytest.fixture
def page(browser, server: str) -> Iterator[object]:
    with opened(browser, server) as page:
        yield page


def set_number(page, element: str, value: str) -> None:
    page.fill(f"{element} input[type=number]", value)
    page.press(f"{element} input[type=number]", "Tab")


def quick(page, seeds: str = "1") -> None:
    """Few steps: what the pictures show does not matter here."""
    page.fill("#seeds textarea, #seeds input", seeds)
    set_number(page, "#steps", "3")


def wait_for_pictures(page, count: int) -> None:
    page.wait_for_function("n => document.querySelectorAll('#grid img').length === n", arg=count)
    page.wait_for_function("() => [...document.querySelectorAll('#grid img')].every(i => i.complete)")


def pixel_data(page, place: int) -> bytes:
    """The decompressed pixel data of the PNG that the server serves for the picture at `place`."""
    data = page.request.get(page.locator("#grid img").nth(place).evaluate("i => i.src")).body()
    assert data.startswith(b"\x89PNG")
    position, pixels = 8, b""
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"IDAT":
            pixels += data[position + 8 : position + 8 + length]
        position += 12 + length
    return zlib.decompress(pixels)


def upload_samples(page, pictures: int) -> None:
    page.get_by_role("tab", name="Train").click()
    page.set_input_files("#pictures input[type=file]", [str(path) for path in sample_files(pictures)])
    page.wait_for_function("() => document.querySelector('#checks').innerText.includes('all readable')")
    page.wait_for_function("() => !document.querySelector('#train').disabled")


def test_three_live_pictures_after_one_click(page):
    quick(page)
    page.click("#compare")
    wait_for_pictures(page, 3)
    page.wait_for_function("() => document.querySelector('#compare-status').innerText.includes('3 pictures in')")
    assert [text.split("\n")[0] for text in page.locator(".dd-head").all_inner_texts()] == ["Base", "LoRA", "DoRA"]
    captions = page.locator("#grid figcaption").all_inner_texts()
    assert "LoRA · rank 4 · strength 1 · seed 1" in captions[1] and "mean |difference|" in captions[2]
    assert len({pixel_data(page, place) for place in range(3)}) == 3
    box = page.locator("#grid img").first.bounding_box()
    assert box["width"] > 250 and abs(box["width"] - box["height"]) < 2
    natural = page.locator("#grid img").first.evaluate("i => [i.naturalWidth, i.naturalHeight]")
    assert natural == [64, 64]


def test_strength_zero_serves_the_base_byte_for_byte(page):
    quick(page)
    set_number(page, "#first-strength", "0")
    set_number(page, "#second-strength", "0")
    page.click("#compare")
    wait_for_pictures(page, 3)
    assert pixel_data(page, 0) == pixel_data(page, 1) == pixel_data(page, 2)
    assert page.locator("#grid figcaption").nth(1).inner_text().endswith("strength 0 is the base")


def test_a_prompt_that_is_too_long_shows_a_panel_and_keeps_the_form(page):
    prompt = "a very long prompt " * 40
    page.fill("#prompt textarea, #prompt input", prompt)
    quick(page, seeds="7, 8")
    page.click("#compare")
    panel = page.wait_for_selector("#compare-error .dd-error")
    assert "The prompt is too long" in panel.inner_text() and "Shorten it" in panel.inner_text()
    assert page.input_value("#prompt textarea, #prompt input") == prompt
    assert page.input_value("#seeds textarea, #seeds input") == "7, 8"
    assert page.input_value("#steps input[type=number]") == "3"
    assert page.is_visible("#compare")


def test_stop_ends_a_comparison(page):
    page.fill("#seeds textarea, #seeds input", "1, 2, 3, 4, 5")
    set_number(page, "#steps", "100")
    page.click("#compare")
    page.click("#stop-compare")
    page.wait_for_function("() => document.querySelector('#compare-status').innerText.includes('stopped')")
    page.wait_for_selector("#compare", state="visible")
    assert page.locator("#grid img").count() < 15


def test_train_both_survives_a_reload_and_ends_in_compare(page):
    upload_samples(page, 3)
    set_number(page, "#train-steps", "8")
    page.click("#train")
    page.wait_for_function(
        "() => /(LoRA|DoRA) \\d+\\/8, \\d+:\\d\\d left/.test(document.querySelector('#chip').innerText)"
    )
    page.reload()
    page.wait_for_selector("#job-chip")
    page.get_by_role("tab", name="Train").click()
    page.wait_for_function("() => /\\d+\\/8|finished/.test(document.querySelector('#job').innerText)")
    page.wait_for_function(
        "() => document.querySelector('#job').innerText.includes('finished: LoRA and DoRA, 8 steps')"
    )
    assert page.locator("#curves polyline").count() >= 4
    page.click("#compare-these")
    page.wait_for_function("() => document.querySelector('#second-adapter input').value.endsWith('/dora')")
    quick(page)
    page.click("#compare")
    wait_for_pictures(page, 3)


def test_stop_saves_a_checkpoint_and_says_so(page, outputs: Path):
    upload_samples(page, 2)
    page.click("#kind label:has-text('DoRA')")
    page.click("#train")
    page.wait_for_function("() => /DoRA \\d+\\/200/.test(document.querySelector('#job').innerText)")
    page.click("#stop-train")
    page.wait_for_function("() => /stopped at step \\d+ of 200/.test(document.querySelector('#job').innerText)")
    assert "checkpoint saved" in page.inner_text("#job")
    assert list(outputs.glob("web/*/checkpoints/dora.safetensors"))
    page.wait_for_selector("#train", state="visible")


def test_a_broken_picture_is_named_and_train_stays_disabled(page, tmp_path: Path):
    broken = tmp_path / "holiday.png"
    broken.write_bytes(sample_files(1)[0].read_bytes()[:300])
    page.get_by_role("tab", name="Train").click()
    page.fill("#instance-prompt textarea, #instance-prompt input", "openmoji style")
    page.set_input_files("#pictures input[type=file]", [str(broken)])
    page.wait_for_selector("#train-error .dd-error")
    assert "holiday.png: is damaged" in page.inner_text("#train-error")
    assert page.is_disabled("#train")
    assert page.input_value("#instance-prompt textarea, #instance-prompt input") == "openmoji style"


def test_nothing_scrolls_sideways_on_a_telephone(browser, server: str):
    overflow = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    with opened(browser, server, NARROW) as page:
        quick(page)
        page.click("#compare")
        wait_for_pictures(page, 3)
        assert page.evaluate(overflow) <= 0
        tops = {round(box["y"]) for box in (img.bounding_box() for img in page.locator("#grid img").all())}
        assert len(tops) == 1  # still side by side
        upload_samples(page, 2)
        page.wait_for_selector("#captions img", state="attached")
        page.wait_for_timeout(1500)  # the table is laid out again some time after it is filled
        assert page.evaluate(overflow) <= 0


def test_a_foreign_host_header_is_refused(server: str):
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(server, headers={"Host": "evil.example"}))
    assert refused.value.code == 400
