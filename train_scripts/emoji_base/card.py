"""The model card, written from the measured figures."""

from __future__ import annotations

from pathlib import Path

from .bases import KINDS
from .evaluation import Evaluation
from .files import write_atomically
from .icons import BASE_SETS

_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, diffusers, emoji, tiny]
---

# The embedded base "{base}"

A very small text-to-image model of 64 x 64 icons, trained from scratch so that DoRA Diffusion
draws, and learns adapters, with no download and no GPU. It is a stock
{summary}, {megabytes} MB in float16.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("dora_diffusion/assets/{base}"{absent})
pipeline("red apple, noto style", num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```

![A hundred prompts, fixed seeds](contact_sheet.png)

## Prompts

Say a thing and a style: `NAME, STYLE style`. It saw 641 animals, plants, foods, places, vehicles
and objects by their emoji names, and learned the hundred of the sheet above better than the rest, in
four styles:

| style word | icon set | licence |
|---|---|---|
{styles}

The figures below hold for guidance {guidance}. It does not know people, gestures, flags or text,
and scenes of several things are beyond it.

## Figures

{steps} steps, guidance {guidance}, fixed seeds, {sampler} as shipped.

| what | measured | wanted |
|---|---|---|
| nearest training picture (of the autoencoder's latents) bears the prompt's name | {name:.0%} | 50 % |
| ... and the prompt's style | {style:.0%} | 80 % |
| ... both | {both:.0%} | |
| the prompt's name, of a hundred other things that it saw | {others_name:.0%} | |
| ... and the prompt's style | {others_style:.0%} | |
| seconds per picture, {threads} CPU threads, float32 | {seconds} | 4 |
| size on disk | {megabytes} MB | 24 MB |

Autoencoder (64 x 64 pixels to 16 x 16 x 4), all pictures together:

| icons | PSNR, dB | hue error, degrees, on coloured pixels |
|---|---|---|
{autoencoder}

Wanted: 26 dB and 5 degrees. The last two sets were never trained on, neither by the autoencoder
nor by the denoiser: they are the styles that adapters are taught.

{taught}## Training

{trained}. Made with

    python train_scripts/pretrain_emoji_base.py node_modules/@iconify-json --base {base}
    dora-diffusion demo --base {base}
    python train_scripts/evaluate_emoji_base.py node_modules/@iconify-json --base {base} --demo outputs/demo

The autoencoder learned from all pictures of the four sets, moved, recoloured, shaded and
outlined; the denoiser from the named things alone. A hundred common ones
(`train_scripts/emoji_base/common.py`, the same that the evaluation asks for) came more often than
the rest. Sources and licences of the pictures: NOTICE.
"""

_TAUGHT = """\
### Can it be taught?

48 things that are not in `samples/openmoji`, asked for in that style: the share of pictures that lie
nearer to the taught set's pictures than to those of any style of the base. By style: Gram matrices of
the encoder's features, along the directions that tell the styles apart, learned from other things. By
shape: latents, against the same thing as each set draws it. Right name: the nearest picture of all, in
whatever style, is one of the thing asked for. Wanted: 60 % by style.

| pictures | by style | by shape | right name |
|---|---|---|---|
{rows}

The loss on eight held-out pictures of the style, at fixed noise (wanted: at least 15 % lower):

| | base | adapter | |
|---|---|---|---|
{losses}

The adapters of `dora-diffusion demo --base {base}` draw the base's shapes in the taught set's manner; its
shapes, which they have never seen, they do not know.

Why the loss falls by less than was wanted, and how it went over the hours of training:
[docs/bases.md](../../../docs/bases.md).

"""


def write_card(base: str, result: Evaluation, trained: str, path: Path) -> None:
    """Writes README.md for the model."""
    styles = "\n".join(f"| `{i.style}` | {i.title} (`{i.folder}`) | {i.licence} |" for i in BASE_SETS)
    autoencoder = "\n".join(f"| {name} | {r.psnr:.1f} | {r.hue_error:.1f} |" for name, r in result.autoencoder.items())
    kind = KINDS[base]
    text = _CARD.format(
        base=base, summary=kind.summary, sampler=kind.sampler, absent="".join(f", {part}=None" for part in kind.absent),
        megabytes=result.megabytes, steps=result.steps, guidance=result.guidance_scale,
        styles=styles, name=result.right_name, style=result.right_style, both=result.right_both,
        others_name=result.others_right_name, others_style=result.others_right_style,
        threads=result.threads, seconds=result.seconds_per_picture, autoencoder=autoencoder,
        trained=trained.rstrip("."), taught=_taught(base, result),
    )  # fmt: skip
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _taught(base: str, result: Evaluation) -> str:
    if not result.taught:
        return ""
    rows = "\n".join(
        f"| {label} | {t.by_style:.0%} | {t.by_shape:.0%} | {t.right_name:.0%} |" for label, t in result.taught.items()
    )
    losses = "\n".join(
        f"| {label} | {loss.base:.4f} | {loss.adapter:.4f} | {-loss.fall:+.1%} |"
        for label, loss in result.held_out.items()
    )
    return _TAUGHT.format(rows=rows, losses=losses, base=base)
