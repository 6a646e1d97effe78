"""Draws docs/screenshots/: each screen of the web app in a real Chromium, wide and as a telephone shows it.

python docs/make_screenshots.py     (some minutes; it trains a small pair on the way)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
SCREENSHOTS = ROOT / "docs" / "screenshots"
PORT = 7899
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SCREENS = (
    ("", {"width": 1280, "height": 900}, "light"),
    ("-phone", {"width": 390, "height": 844}, "dark"),
)
STEPS = "60"
PATIENCE = 600_000  # milliseconds


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(PORT), "--outputs", str(Path(folder) / "outputs")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env=dict(os.environ),
        )
        try:
            assert server.stdout is not None and b"open at" in server.stdout.readline()
            take()
        finally:
            server.terminate()
            server.wait(90)


def take() -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for suffix, size, scheme in SCREENS:
            page = chromium.new_page(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
            page.set_default_timeout(PATIENCE)
            page.goto(f"http://127.0.0.1:{PORT}")
            page.wait_for_selector("#second-adapter input")
            page.wait_for_function("() => document.querySelector('#second-adapter input').value.includes('Sample')")
            compare(page, suffix)
            train(page, suffix, start=not suffix)
            page.close()
        chromium.close()


def compare(page: Page, suffix: str) -> None:
    page.locator("#prompt textarea").fill("strawberry, openmoji style")
    page.click("#compare")
    page.get_by_text("6 pictures in").wait_for()
    shoot(page, f"compare{suffix}")
    for view in ("Slider", "Difference", "Blind vote"):
        page.click(f"#view label:has-text('{view}')")
        page.wait_for_timeout(1000)
        if view == "Blind vote":
            page.click("#blind-start")
            page.wait_for_selector("#ballot img")
        shoot(page, f"{view.split()[0].lower()}{suffix}")
    page.click("#view label:has-text('Grid')")


def train(page: Page, suffix: str, start: bool) -> None:
    page.get_by_role("tab", name="Train").click()
    page.click("#samples")
    page.get_by_text("measured warm-up").wait_for()
    if start:
        page.click("#preset label:has-text('Quick')")
        page.fill("#train-steps input[type=number]", STEPS)
        page.press("#train-steps input[type=number]", "Tab")
        page.click("#train")
        page.wait_for_function("() => document.querySelector('#job').innerText.includes('finished')")
    page.wait_for_timeout(1500)
    shoot(page, f"train{suffix}")
    page.get_by_role("tab", name="History").click()
    page.wait_for_timeout(2500)
    shoot(page, f"history{suffix}")


def shoot(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(700)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
    print(name, flush=True)


if __name__ == "__main__":
    main()
