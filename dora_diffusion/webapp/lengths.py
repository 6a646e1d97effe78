"""Captions and prompts that are too long for the server's base, known before a run starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from dora_diffusion.data.captions import named
from dora_diffusion.errors import PromptError
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.train_form import TrainForm
from dora_diffusion.webapp.uploads import Upload

if TYPE_CHECKING:
    from dora_diffusion.webapp.studio import Studio

__all__ = ["refuse_long", "too_long"]


def too_long(studio: Studio, texts: Iterable[str]) -> Mapping[str, str]:
    """Those that the base would cut, and what would be lost: as the run finds it.

    Empty where it cannot be known yet: of a base in a single file that is not loaded.
    """
    ready()
    from dora_diffusion.data.cache import too_long as long_for

    pipe = studio.painter.reader()
    return {} if pipe is None else long_for(pipe, [text.strip() for text in texts])


def refuse_long(studio: Studio, uploads: Sequence[Upload], form: TrainForm) -> Mapping[str, str]:
    """The captions that are cut, as the form allows it. Raises PromptError where it doesn't, or for the preview's."""
    captions = {upload.label: (upload.caption.strip() or form.prompt.strip()) for upload in uploads}
    long = too_long(studio, [*captions.values(), form.preview])
    cut = [label for label, caption in captions.items() if caption in long]
    if cut and not form.cuts:
        raise PromptError(
            f"{len(cut)} of {len(captions)} captions are too long for this base ({named(cut)}). "
            f"Shorten them, or have them cut (cut_captions). {cut[0]}: {long[captions[cut[0]]]}"
        )
    if form.preview.strip() in long:
        raise PromptError(f"the preview prompt is too long. {long[form.preview.strip()]}")
    return long
