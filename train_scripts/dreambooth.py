"""DreamBooth-style training under accelerate: the same options and the same code as `dora-diffusion train`.

accelerate launch train_scripts/dreambooth.py --images FOLDER --instance-prompt "..." --kind dora --out DIR
accelerate launch --num_processes 2 train_scripts/dreambooth.py CONFIG.toml
"""

from __future__ import annotations

import sys

from dora_diffusion.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
