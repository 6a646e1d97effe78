"""What lies in the output folder of a run, and what of it stands in the way of another one.

config.toml                  the resolved configuration; `dora-diffusion train config.toml` repeats the run
dora.safetensors, lora...    the adapters
steps/                       the adapters as they were on the way, every `save_every` steps
log.jsonl                    a line for every step; the held-out loss where it was measured, at step 0 the base's
previews/                    pictures at fixed seeds on the way
README.md                    what the adapters are and how to load them, as the hub shows it
checkpoints/                 what --resume goes on from; removed when the run is complete
class_images/                prior preservation's pictures
"""

from __future__ import annotations

import json
from pathlib import Path

from dora_diffusion.adapters.injection import Kind
from dora_diffusion.errors import TrainingError
from dora_diffusion.journal import append_entry, read_log
from dora_diffusion.outputs import check_places, write_text
from dora_diffusion.training.checkpoint import checkpoint_path
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.loop import Step
from dora_diffusion.training.start import start_path

__all__ = ["Log", "adapter_path", "check_folder", "cleared", "preview_path", "step_path"]


FOLDERS = ("steps", "previews", "checkpoints", "class_images")


def adapter_path(out: Path, kind: Kind) -> Path:
    return out / f"{kind}.safetensors"


def step_path(out: Path, kind: Kind, step: int) -> Path:
    return out / "steps" / f"{kind}-{step:05d}.safetensors"


def preview_path(out: Path, kind: Kind, step: int, prompt: int, seed: int) -> Path:
    return out / "previews" / f"{kind}-{step:05d}-prompt{prompt + 1}-seed{seed}.png"


def check_folder(out: Path, config: TrainConfig, resume: bool, overwrite: bool) -> None:
    adapters = [adapter_path(out, kind).name for kind in config.kinds]
    check_places(out, [*adapters, "config.toml", "log.jsonl", "README.md"], FOLDERS)
    if config.start_from and overwrite and not resume:
        starts = {Path(start_path(config, kind)).resolve() for kind in config.kinds}
        if replaced := starts & {path.resolve() for path in cleared(out, config)}:
            raise TrainingError(
                f"start_from is {replaced.pop()}, which --overwrite replaces. Train into another folder with --out."
            )
    finished = [adapter_path(out, kind) for kind in config.kinds if adapter_path(out, kind).exists()]
    begun = [checkpoint_path(out, kind) for kind in config.kinds if checkpoint_path(out, kind).exists()]
    if resume:
        if not finished and not begun:
            raise TrainingError(f"nothing to resume in {out}: it has no checkpoint. Start without --resume.")
    elif (finished or begun) and not overwrite:
        what = "a finished adapter" if finished else "the checkpoint of a run that was stopped"
        way = "another --out or --overwrite" if finished else "--resume to go on, another --out, or --overwrite"
        raise TrainingError(f"{out} holds {what} ({(finished or begun)[0].name}). Give {way}.")


def cleared(out: Path, config: TrainConfig) -> list[Path]:
    """What another run's files are that --overwrite takes away."""
    per_kind = [
        (
            adapter_path(out, kind),
            checkpoint_path(out, kind),
            *(out / "steps").glob(f"{kind}-*.safetensors"),
            *(out / "previews").glob(f"{kind}-*.png"),
        )
        for kind in config.kinds
    ]
    return [path for paths in per_kind for path in paths] + [out / "log.jsonl"]


class Log:
    """log.jsonl: one line a step. Lines of steps that a resumed run does again are dropped first.

    `note` says what of an earlier file was not sound. Raises OutputError.
    """

    def __init__(self, path: Path, kind: Kind, start: int) -> None:
        self.path, self.kind = path, kind
        log = read_log(path)
        kept = [entry for entry in log.entries if entry.kind != kind or entry.step <= start]
        write_text(path, "".join(json.dumps(entry.written) + "\n" for entry in kept))
        done = {entry.step for entry in kept if entry.kind == kind}
        self._begun = 0 in done
        self.note = _what_is_missing(path, log.unsound, start - len(done & set(range(1, start + 1))))

    def begin(self, base_loss: float) -> None:
        if not self._begun:
            append_entry(self.path, {"kind": self.kind, "step": 0, "held_out_loss": base_loss})

    def write(self, step: Step, held_out: float | None) -> None:
        entry: dict[str, object] = {
            "kind": step.kind,
            "step": step.step,
            "loss": step.loss,
            "learning_rate": step.learning_rate,
        }
        if held_out is not None:
            entry["held_out_loss"] = held_out
        append_entry(self.path, entry)


def _what_is_missing(path: Path, unsound: int, missing: int) -> str:
    said = [f"{unsound} lines of it could not be read and were left out"] if unsound else []
    said += [f"it lacks {missing} of the steps that are done, which the curves lack too"] if missing else []
    return f"{path.name}: {'; '.join(said)}" if said else ""
