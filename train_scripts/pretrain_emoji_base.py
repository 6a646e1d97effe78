"""Trains an embedded emoji base: the autoencoder, then text encoder and denoiser together.

    npm install @iconify-json/{noto,noto-v1,fluent-emoji-flat,twemoji,openmoji,fluent-emoji}
    python train_scripts/pretrain_emoji_base.py node_modules/@iconify-json --work runs/emoji
    python train_scripts/pretrain_emoji_base.py node_modules/@iconify-json --work runs/emoji --base emoji-dit

The bases share the autoencoder, which is trained once.
Stopped at any time, the same command goes on from its last checkpoint. `--stage export` writes
the averaged weights of the newest checkpoint while a run is under way.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from emoji_base.autoencoder import AutoencoderPlan
from emoji_base.bases import KINDS
from emoji_base.denoiser import DenoiserPlan
from emoji_base.speed import pick_device
from emoji_base.stages import (
    Paths,
    finished_autoencoder,
    run_autoencoder,
    run_denoiser,
    run_export,
    run_polish,
    start_from,
)

from dora_diffusion.errors import DoraDiffusionError

REPOSITORY = Path(__file__).resolve().parent.parent


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("icons", type=Path, help="folder that holds the @iconify-json packages")
    parser.add_argument("--base", choices=tuple(KINDS), default="emoji", help="a UNet, or a diffusion transformer")
    parser.add_argument("--out", type=Path, help="default: dora_diffusion/assets/BASE")
    parser.add_argument("--work", type=Path, default=Path("runs/emoji"), help="checkpoints, logs")
    parser.add_argument("--stage", choices=("all", "autoencoder", "polish", "denoiser", "export"),
                        default="all")  # fmt: skip
    parser.add_argument("--start-from", type=Path, metavar="BASE",
                        help="an earlier base, whose autoencoder, tokenizer and weights it takes")  # fmt: skip
    parser.add_argument("--autoencoder-steps", type=int, default=AutoencoderPlan.steps)
    parser.add_argument("--polish-steps", type=int, default=800, help="of the decoder alone")
    parser.add_argument("--steps", type=int, default=DenoiserPlan.steps)
    parser.add_argument("--decay-steps", type=int, default=DenoiserPlan.decay_steps,
                        help="over how many of the last steps the learning rate falls")  # fmt: skip
    parser.add_argument("--batch", type=int, default=DenoiserPlan.batch)
    parser.add_argument("--learning-rate", type=float, default=DenoiserPlan.learning_rate)
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    given = read_arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = pick_device(given.device)
    out = given.out or REPOSITORY / "dora_diffusion/assets" / given.base
    paths = Paths(given.icons, given.work, out, given.base)
    paths.work.mkdir(parents=True, exist_ok=True)
    if given.start_from is not None:
        start_from(paths, given.start_from)
    if given.stage == "export":
        run_export(paths, device)
        return
    missing = given.stage == "all" and finished_autoencoder(paths) is None
    if given.stage == "autoencoder" or missing:
        run_autoencoder(paths, AutoencoderPlan(steps=given.autoencoder_steps), device, given.seed)
    if given.stage == "polish" or missing:
        run_polish(paths, given.polish_steps, device, given.seed)
    if given.stage in ("all", "denoiser"):
        plan = DenoiserPlan(
            steps=given.steps,
            decay_steps=given.decay_steps,
            batch=given.batch,
            learning_rate=given.learning_rate,
            compile=given.compile,
        )
        run_denoiser(paths, plan, device, given.seed, given.start_from)


if __name__ == "__main__":
    try:
        main()
    except DoraDiffusionError as error:
        sys.exit(str(error))
