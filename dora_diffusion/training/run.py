"""A whole run, from configuration to adapter files: `train` yields what happens, as it happens.

The command line, the web app and the tests all drive this generator. folder.py says what it writes where.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from dora_diffusion.adapters.injection import Adapter, Kind
from dora_diffusion.data.cache import Encoding
from dora_diffusion.data.folder import list_pictures
from dora_diffusion.data.store import Store
from dora_diffusion.errors import ConfigError, DataError, OutputError, TrainingError
from dora_diffusion.formats.files import read_adapter_file, save_adapter
from dora_diffusion.formats.reading import some
from dora_diffusion.generation import GenerationRequest, check_prompt, generate
from dora_diffusion.memory import not_enough, ran_out
from dora_diffusion.models.cautions import cautions
from dora_diffusion.models.loading import Base, load_base, pick_device
from dora_diffusion.outputs import held, make_folder, save_png, write_text, writing
from dora_diffusion.training.card import MADE_HERE, card_text
from dora_diffusion.training.checkpoint import checkpoint_path, kept_step, read_checkpoint, write_checkpoint
from dora_diffusion.training.class_images import class_images
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.divergence import diverged
from dora_diffusion.training.events import (
    Event,
    Finished,
    Measured,
    Preparing,
    Previewed,
    Resumed,
    Saved,
    Settled,
    Stopped,
)
from dora_diffusion.training.folder import Log, adapter_path, check_folder, cleared, preview_path, step_path
from dora_diffusion.training.loop import (
    Training,
    held_out_loss,
    make_accelerator,
    new_adapter,
    preparing,
    steps,
    with_class_images,
)
from dora_diffusion.training.start import Starts, describe_start, read_starts

__all__ = ["cautions_for", "train"]


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    base: Base | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train what config.kind says, LoRA before DoRA, and yield events.

    `base` is one that is loaded already; config.base only names it then, and config.quantise must be how it was packed.
    `should_stop` is asked after every step; when it says yes a checkpoint is written and Stopped is the last event.
    Raises the errors of each part, NotEnoughMemoryError among them; whatever was in the output folder is kept unless
    `overwrite` is given.
    """
    try:
        yield from _train(config, resume, overwrite, base, should_stop)
        return
    except Exception as error:
        if not ran_out(error):
            raise
    device = pick_device(config.device) if base is None else base.device
    raise not_enough("to train so", device, _ways_to_need_less(config, base, device))


def cautions_for(config: TrainConfig, device: torch.device) -> tuple[str, ...]:
    """What of this configuration costs more on this device than people expect of it."""
    return cautions(device, config.quantise, precision=config.mixed_precision, trains=True)


def _ways_to_need_less(config: TrainConfig, base: Base | None, device: torch.device) -> list[str]:
    """The keys that are left to set, those first that cost the least."""
    ways = [] if config.gradient_checkpointing else ["gradient_checkpointing = true"]
    if config.batch_size > 1:
        same = config.batch_size * config.gradient_accumulation_steps
        ways.append(f"batch_size = 1 with gradient_accumulation_steps = {same}")
    if device.type != "cpu":  # there is nowhere to put anything aside otherwise
        ways += ["offload = true"] * (not (config.offload or config.train_text_encoder))
    ways += ['quantise = "nf4"'] * ("nf4" not in (config.quantise, base and base.packing))
    ways.append(f"a resolution below {config.resolution}" if config.resolution else "a smaller resolution")
    return [*ways[:-1], f"{ways[-1]} (keys of the configuration, or --set KEY=VALUE)"]


def _train(
    config: TrainConfig, resume: bool, overwrite: bool, base: Base | None, should_stop: Callable[[], bool]
) -> Iterator[Event]:
    for folder in (config.images, config.validation_images):
        if folder is not None:
            list_pictures(folder)  # a mistyped folder or file is said before anything is loaded
    starts = read_starts(config)
    out = make_folder(config.out)
    if config.device != "auto":
        pick_device(config.device)  # says so if it is missing; accelerate would take another one
    accelerator = make_accelerator(config)
    with held(out) if accelerator.is_main_process else nullcontext():
        check_folder(out, config, resume, overwrite)
        yield from _train_into(out, config, starts, accelerator, resume, overwrite, base, should_stop)


def _train_into(
    out: Path,
    config: TrainConfig,
    starts: Starts,
    accelerator: Accelerator,
    resume: bool,
    overwrite: bool,
    base: Base | None,
    should_stop: Callable[[], bool],
) -> Iterator[Event]:
    yield Preparing("loading the base model")
    for caution in cautions_for(config, accelerator.device):
        yield Preparing(f"note: {caution}")
    base = base or load_base(config.base, device=accelerator.device, packing=config.quantise)
    _check_packing(config, base)
    for prompt in config.preview_prompts:
        check_prompt(base.pipe, prompt)
    yield Preparing("reading and encoding the pictures")
    store = Store()
    training = yield from _telling(preparing(config, base, accelerator, store, starts))
    config = training.config  # with all that was left to the base
    yield Settled(config)
    with accelerator.main_process_first():
        prior = yield from class_images(config, base, out)
    training = yield from _telling(with_class_images(training, prior, store))
    if store.unwritten:
        yield Preparing(f"note: encodings are kept in memory, not on disk: {store.unwritten}")
    for kind, file in training.starts.items():
        yield Preparing(describe_start(file, base, kind))
    if len(training.instances) > 1:
        yield Preparing(_sizes(training))
    if training.ignored:
        yield Preparing(f"passed over: {', '.join(training.ignored)}")
    for note in training.notes:
        yield Preparing(note)
    if training.cut:
        yield Preparing(f"read as far as the base can, {len(training.cut)} captions: {some(list(training.cut))}")
    if accelerator.is_main_process:
        if overwrite and not resume:
            for path in cleared(out, config):
                with writing(path):
                    path.unlink(missing_ok=True)
        write_text(out / "config.toml", config.to_toml())
    accelerator.wait_for_everyone()
    if config.offload:
        base.put_aside()
    try:
        for kind in config.kinds:
            if resume and adapter_path(out, kind).exists():
                yield Preparing(f"{adapter_path(out, kind)} is finished already")
            elif (yield from _train_one(training, kind, out, resume, should_stop)) is not None:
                return
    finally:
        if config.offload:
            base.bring_back()
    accelerator.wait_for_everyone()
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if accelerator.is_main_process:
        yield from _write_card(training, out)


def _telling(encoding: Generator[Encoding, None, Training]) -> Generator[Event, None, Training]:
    """How far the encoding is, with the time left, once a second; of what is done within one, nothing."""
    began = said = time.monotonic()
    while True:
        try:
            at = next(encoding)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        now = time.monotonic()
        if at.done == 0:
            began = said = now
        elif now - said > 1 or (said > began and at.done == at.total):
            yield Preparing(
                f"encoding the {at.what}", at.done, at.total, (now - began) / at.done * (at.total - at.done)
            )
            said = now


def _train_one(
    training: Training, kind: Kind, out: Path, resume: bool, should_stop: Callable[[], bool]
) -> Generator[Event, None, Stopped | None]:
    adapter, optimizer = new_adapter(training, kind)
    try:
        base_loss, start = _base_loss(training, kind, adapter), 0
        if resume and checkpoint_path(out, kind).exists():
            checkpoint = read_checkpoint(checkpoint_path(out, kind), training.config, training.digest)
            checkpoint.restore(adapter, optimizer)
            start = checkpoint.step
            yield Resumed(kind, start, training.config.steps)
        with _saying_what_is_kept(out, kind):
            log = None
            if training.accelerator.is_main_process:  # the one that writes, where there are several
                log = Log(out / "log.jsonl", kind, start)
                if log.note:
                    yield Preparing(log.note)
            if base_loss is not None:
                if log:
                    log.begin(base_loss)
                yield Measured(kind, 0, base_loss)
            if kind in training.starts and base_loss is not None and start == 0:
                loss = _measure(training, kind, 0)
                yield Preparing(f"{training.config.label(kind)}: held-out loss of what it goes on from {loss:.4f}")
            return (yield from _go_through(training, kind, adapter, optimizer, start, base_loss, out, log, should_stop))
    finally:
        adapter.eject()


def _go_through(
    training: Training,
    kind: Kind,
    adapter: Adapter,
    optimizer: Optimizer,
    start: int,
    base_loss: float | None,
    out: Path,
    log: Log | None,
    should_stop: Callable[[], bool],
) -> Generator[Event, None, Stopped | None]:
    """The steps from `start` on, and what is measured, shown and kept between them; `log` is the main process's."""
    config, loss = training.config, base_loss
    for step in steps(training, kind, adapter, optimizer, start):
        last = step.step == config.steps
        saving = config.save_every is not None and step.step % config.save_every == 0 and not last
        measured = last or saving or step.step % config.validate_every == 0
        loss = _measure(training, kind, step.step) if measured else loss
        if log:
            log.write(step, loss if measured else None)
        yield step
        if measured and loss is not None:
            yield Measured(kind, step.step, loss)
        if log and saving:
            path = _save(training, adapter, step_path(out, kind, step.step), step.step, base_loss, loss)
            yield Saved(kind, step.step, path)
        if log and config.preview_prompts and (last or step.step % config.preview_every == 0):
            yield _preview(training, kind, step.step, out)
        stopping = not last and _anywhere(training, should_stop())
        if stopping or (step.step % config.checkpoint_every == 0 and not last):
            path = checkpoint_path(out, kind)
            if log:
                write_checkpoint(path, step.step, adapter, optimizer, config, training.digest)
            if stopping:
                stopped = Stopped(kind, step.step, config.steps, path)
                yield stopped
                return stopped
    path = _save(training, adapter, adapter_path(out, kind), config.steps, base_loss, loss)
    yield Finished(kind, path, base_loss, loss)
    return None


@contextmanager
def _saying_what_is_kept(out: Path, kind: Kind) -> Iterator[None]:
    """Of a run that ends in an error: the checkpoint to go on from, or the adapters kept before it diverged."""
    try:
        yield
    except OutputError as error:
        step = kept_step(out, kind)
        way = "No checkpoint was written before." if step is None else f"The checkpoint after step {step} is whole: "
        way += "" if step is None else "when there is room again, the same command goes on (train with --resume)."
        raise OutputError(f"{error} {way}") from error
    except DataError as error:  # an encoding is gone
        step = kept_step(out, kind)
        way = f" The checkpoint after step {step} is whole: train with --resume." * (step is not None)
        raise DataError(f"{error}{way}") from error
    except TrainingError as error:
        kept = sorted(path.name for path in (out / "steps").glob(f"{kind}-*.safetensors"))
        step = kept_step(out, kind)
        found = [f"the checkpoint after step {step}"] if step else []
        found += [f"steps/{kept[-1]}"] if kept else []
        raise TrainingError(f"{error} {f'Kept from before: {some(found)}.' if found else ''}".strip()) from error


def _measure(training: Training, kind: Kind, step: int) -> float | None:
    """The held-out loss after `step` steps. Raises TrainingError when it is no number."""
    loss = held_out_loss(training)
    if loss is not None and not math.isfinite(loss):
        precision = training.accelerator.mixed_precision
        raise diverged(training.config, precision, kind, step, f"the held-out loss is {loss}")
    return loss


def _base_loss(training: Training, kind: Kind, adapter: Adapter) -> float | None:
    """The held-out loss of the base alone."""
    adapter.strength = 0.0
    try:
        return _measure(training, kind, 0)
    finally:
        adapter.strength = 1.0


def _write_card(training: Training, out: Path) -> Iterator[Event]:
    """README.md, unless there is one that somebody wrote."""
    config, card = training.config, out / "README.md"
    if card.exists() and MADE_HERE not in card.read_text(encoding="utf-8", errors="replace"):
        yield Preparing(f"{card} is yours and stays; no model card is written")
        return
    files = [read_adapter_file(adapter_path(out, kind)) for kind in config.kinds]
    shown = {
        prompt: preview_path(Path(), config.kinds[-1], config.steps, i, seed)
        for i, prompt in enumerate(config.preview_prompts)
        for seed in config.preview_seeds[:1]
    }
    shown = {prompt: path for prompt, path in shown.items() if (out / path).exists()}
    prompt = next(iter(shown), training.instances[0].captions[0])
    write_text(card, card_text(config, training.base, files, prompt, shown))


def _anywhere(training: Training, flag: bool) -> bool:
    """Whether any process says yes: all of them must stop after the same step."""
    flags = torch.tensor(float(flag), device=training.accelerator.device)
    return bool(training.accelerator.reduce(flags, reduction="sum").item())


def _preview(training: Training, kind: Kind, step: int, out: Path) -> Previewed:
    config = training.config
    paths = []
    if config.offload:
        training.base.bring_back()
    for i, prompt in enumerate(config.preview_prompts):
        for seed in config.preview_seeds:
            image = generate(training.base, GenerationRequest(prompt, seed))
            path = preview_path(out, kind, step, i, seed)
            paths.append(save_png(image, path, {"prompt": prompt, "seed": str(seed)}))
    if config.offload:
        training.base.put_aside()
    return Previewed(kind, step, tuple(paths))


def _save(
    training: Training, adapter: Adapter, path: Path, step: int, base_loss: float | None, loss: float | None
) -> Path:
    """Write the adapter as it is after `step` steps, with what it was trained on."""
    config = training.config
    start = next((file for kind, file in training.starts.items() if kind == adapter.config.kind), None)
    summary: dict[str, str | int | float | None] = {
        "instance_prompt": config.instance_prompt,
        "images": training.pictures,
        "steps": step,
        "batch_size": config.batch_size * config.gradient_accumulation_steps,
        "optimizer": config.optimizer,
        "learning_rate": training.learning_rate,
        "seed": config.seed,
        "started_from": start.path.name if start else None,
        "resolution": config.resolution,
        "objective": training.objective.name,
        "held_out_loss_base": base_loss,
        "held_out_loss": loss,
    }
    return save_adapter(adapter, path, training=summary, base_name=config.base)


def _sizes(training: Training) -> str:
    """How many pictures are trained in which size."""
    most_first = sorted(training.instances, key=lambda images: -len(images))
    return "pictures by shape: " + ", ".join(
        f"{len(images)} of {' x '.join(map(str, images.size))}" for images in most_first
    )


def _check_packing(config: TrainConfig, base: Base) -> None:
    if config.quantise not in (None, base.packing):
        loaded = "without packing" if base.packing is None else f"with packing={base.packing!r}"
        raise ConfigError(
            f"quantise = {config.quantise!r}, but the base that was given was loaded {loaded}: "
            f"give load_base({base.name!r}, packing={config.quantise!r}), or leave the base to train()."
        )
