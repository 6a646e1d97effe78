"""Measures an embedded emoji base and writes its figures, contact sheet and model card.

    dora-diffusion demo --base emoji
    python train_scripts/evaluate_emoji_base.py node_modules/@iconify-json --base emoji --demo outputs/demo

Exits with 1 when a figure is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from emoji_base.bases import KINDS
from emoji_base.card import write_card
from emoji_base.evaluation import Goals, evaluate, save_json

from dora_diffusion.errors import DataError, DoraDiffusionError

REPOSITORY = Path(__file__).resolve().parent.parent


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("icons", type=Path, help="folder that holds the @iconify-json packages")
    parser.add_argument("--base", choices=tuple(KINDS), default="emoji")
    parser.add_argument("--folder", type=Path, help="where it lies; default: dora_diffusion/assets/BASE")
    parser.add_argument("--demo", type=Path, help="the demo's output folder, to measure whether the base can be taught")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--trained", help='for the model card: "2 CPU cores, 1.5 hours"')
    return parser.parse_args()


def main() -> None:
    given = read_arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    adapters = {kind: given.demo / f"{kind.lower()}.safetensors" for kind in ("LoRA", "DoRA")} if given.demo else {}
    folder = given.folder or REPOSITORY / "dora_diffusion/assets" / given.base
    for path in (folder / "model_index.json", *adapters.values()):
        if not path.exists():
            raise DataError(f"{path} is missing: --folder takes a pipeline's folder, --demo the demo's output folder.")
    result = evaluate(folder, given.icons, REPOSITORY / "samples/openmoji", adapters)
    save_json(result, folder / "evaluation.json")
    if given.trained:
        write_card(given.base, result, given.trained, folder / "README.md")
    print(json.dumps(asdict(result), indent=2))
    missed = result.missed(Goals())
    for text in missed:
        print("missed:", text, file=sys.stderr)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    try:
        main()
    except DoraDiffusionError as error:
        sys.exit(str(error))
