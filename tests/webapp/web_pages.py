"""The tabs as a page has them, without a browser: what a test presses, and what it is shown."""

from __future__ import annotations

import time
from pathlib import Path

import gradio as gr
from web_helpers import HANGS, page_of

from dora_diffusion.training.config import TrainConfig
from dora_diffusion.webapp.compare import CompareTab
from dora_diffusion.webapp.header import Header
from dora_diffusion.webapp.history import HistoryTab
from dora_diffusion.webapp.jobs import TrainingJob
from dora_diffusion.webapp.shown import Shown
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.train import TrainTab
from dora_diffusion.webapp.views import GRID
from dora_diffusion.webapp.visitors import visitor_of
from dora_diffusion.webapp.watch import Watch

PAGE = page_of("a")
OTHER = page_of("b")
ME = visitor_of(PAGE)


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


def draw(tabs: Tabs, page: gr.Request = PAGE, **changes: object) -> list[tuple]:
    form = {"prompt": "cat face", "seeds": "1", "first": "", "first_strength": 1.0, "second": ""}
    form |= {"second_strength": 1.0, "steps": 2, "guidance": "2", "negative_prompt": "", "size": "", "partial": False}
    form |= {"view": GRID, "pair": ""}
    return list(tabs.compare.draw(**{**form, **changes}, page=page))


def shown_in(updates: list[tuple]) -> Shown:
    return next(u[5] for u in reversed(updates) if isinstance(u[5], Shown))


def last_html(updates: list[tuple], place: int) -> str:
    """The last HTML that was sent to the output at `place`."""
    texts = [u[place] for u in updates if isinstance(u[place], str)]
    texts += [u[place]["value"] for u in updates if isinstance(u[place], dict) and "value" in u[place]]
    return texts[-1]


def until(condition: object, seconds: float = HANGS) -> None:
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
