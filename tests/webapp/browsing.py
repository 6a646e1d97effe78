"""A real Chromium for the web app's tests: pages that fail on a foreign host, a console error or a page error."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SLOW = 900_000  # milliseconds; a machine that trains something else at the same time still gets there
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
# What a page calls an error that is left, or loaded again, in the middle of an answer; on a busy machine in many.
LEFT = ("AbortError", "Connection errored out")
# Of axe-core's findings, those that keep somebody from using the page.
GRAVE = ("serious", "critical")


@contextmanager
def opened(browser, server: str, viewport: dict[str, int] = WIDE, scheme: str = "light") -> Iterator[object]:
    """A page of its own context; at the end, nothing may have gone wrong in it and no other host been asked."""
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    context.set_default_timeout(SLOW)  # every page that is opened in it, too
    page = context.new_page()
    wrong: list[str] = []

    def only_our_server(route) -> None:
        if route.request.url.startswith((server, "data:", "blob:")):
            route.continue_()
        else:
            wrong.append(f"asked a foreign host: {route.request.url}")
            route.abort()

    context.route("**/*", only_our_server)
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: None if LEFT[0] in str(error) else wrong.append(str(error)))

    def forget_what_was_left(_frame) -> None:
        wrong[:] = [text for text in wrong if not any(each in text for each in LEFT)]

    page.on("framenavigated", forget_what_was_left)
    page.goto(server)
    page.wait_for_selector("#compare")
    page.wait_for_selector("#second-adapter input")
    page.wait_for_function(
        "() => [...document.querySelectorAll('#first-adapter input, #second-adapter input')].every((i) => i.value)"
    )
    yield page
    context.close()
    assert not wrong, wrong


def write(page, field: str, text: str) -> None:
    """Fill a field until the text stays: one that just came onto the page may be given its first value once more."""
    for _ in range(50):
        page.fill(field, text)
        page.wait_for_timeout(100)
        if page.input_value(field) == text:
            return
    raise AssertionError(f"{field} does not keep {text!r}")


def set_number(page, element: str, value: str) -> None:
    field = f"{element} input[type=number]"
    write(page, field, value)
    page.press(field, "Tab")


def quick(page, seeds: str = "1", steps: str = "3") -> None:
    """Few steps: what the pictures show does not matter here."""
    page.fill("#seeds textarea, #seeds input", seeds)
    if not page.is_visible("#steps"):
        page.click("#settings > button")
    set_number(page, "#steps", steps)


def compare(page, pictures: int) -> None:
    """Press Compare and wait for so many live pictures."""
    page.click("#compare")
    page.wait_for_function(
        "n => document.querySelector('#compare-status').innerText.startsWith(n + ' pictures in')", arg=str(pictures)
    )
    page.wait_for_function("() => [...document.querySelectorAll('#grid img')].every(i => i.complete)")


def choose_view(page, name: str) -> None:
    page.click(f"#view label:has-text('{name}')")


def served(page, place: int) -> bytes:
    """The bytes that the server gives for the picture at this place."""
    return page.request.get(page.locator("#grid img").nth(place).evaluate("i => i.src")).body()


def train_tab(page) -> None:
    page.get_by_role("tab", name="Train").click()
    page.wait_for_selector("#instance-prompt")


def grave_findings(page) -> list[str]:
    """What axe-core finds serious or worse on the page as it is, with where."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']} ({each['impact']}): {[node['target'] for node in each['nodes'][:4]]}"
        for each in found
        if each["impact"] in GRAVE
    ]
