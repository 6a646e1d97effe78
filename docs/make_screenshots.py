"""Draws docs/screenshots/: the web app's tabs in a real Chromium, over an outputs folder that holds a demo.

dora-diffusion demo && python docs/make_screenshots.py outputs
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
SCREENSHOTS = ROOT / "docs" / "screenshots"
PORT = 7899
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SIZES = {"": {"width": 1280, "height": 1180}, "-phone": {"width": 390, "height": 844}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the screenshots that the README shows.")
    parser.add_argument("outputs", type=Path, help="the folder that holds demo/")
    demo = parser.parse_args().outputs / "demo"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("lora.safetensors", "dora.safetensors"):
            (Path(folder) / "demo").mkdir(exist_ok=True)
            shutil.copy(demo / name, Path(folder) / "demo" / name)
        server = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(PORT), "--outputs", folder], cwd=ROOT, stdout=subprocess.PIPE
        )
        try:
            assert server.stdout is not None and b"open at" in server.stdout.readline()
            take()
        finally:
            server.terminate()
            server.wait(30)


def take() -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        for name, size in SIZES.items():
            page = chromium.new_page(viewport=size)  # type: ignore[arg-type]
            page.set_default_timeout(120_000)
            page.goto(f"http://127.0.0.1:{PORT}")
            page.locator("#prompt textarea").fill("fox, openmoji style")
            page.locator("#compare").click()
            page.get_by_text("6 pictures in").wait_for()
            page.screenshot(path=SCREENSHOTS / f"compare{name}.png", full_page=bool(name))
            page.get_by_role("tab", name="Train").click()
            page.locator("#pictures input[type=file]").set_input_files(
                [str(path) for path in sorted((ROOT / "samples" / "blobby").glob("*.png"))]
            )
            page.get_by_text("all readable").wait_for()
            page.screenshot(path=SCREENSHOTS / f"train{name}.png", full_page=bool(name))
            page.close()
        chromium.close()


if __name__ == "__main__":
    main()
