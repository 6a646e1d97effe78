"""The training loop: `prepare` encodes the data once, `steps` is a generator of typed Steps, `held_out_loss` measures.

Every random number of a step follows from the seed and the step's number, so an interrupted run goes on with the same
bits, and a LoRA and a DoRA of one seed see the same pictures, noise and timesteps.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from dora_diffusion.adapters.injection import Adapter, Kind, inject_adapter
from dora_diffusion.data.buckets import bucket_sizes
from dora_diffusion.data.cache import EncodedImages, Encoding, drained, encoding, long_captions
from dora_diffusion.data.captions import named
from dora_diffusion.data.folder import ImageFolder, TrainingImage, alike_in, read_folder, smallest_side
from dora_diffusion.data.store import Store
from dora_diffusion.errors import ConfigError, DataError
from dora_diffusion.formats.files import attach_trainable
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.loading import Base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.divergence import all_finite, diverged
from dora_diffusion.training.objectives import Objective, objective_of
from dora_diffusion.training.optimizers import make_optimizer, step_size
from dora_diffusion.training.start import Starts, config_from, read_starts

__all__ = [
    "Step",
    "Training",
    "conditioning_for",
    "held_out_count",
    "held_out_loss",
    "learning_rate_of",
    "make_accelerator",
    "new_adapter",
    "prepare",
    "preparing",
    "squared_error",
    "steps",
    "with_class_images",
]

HELD_OUT_TIMESTEPS = 8
HELD_OUT_SEED = 20240209  # fixed, so that the figure compares between runs of any seed


Buckets = tuple[EncodedImages, ...]


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number (from 1), the loss averaged over the batch, and the seconds left of this kind."""

    kind: Kind
    step: int
    total: int
    loss: float
    learning_rate: float
    seconds_left: float


@dataclass(frozen=True)
class Training:
    """What a run works on: the base, its objective, and the encoded pictures, one group for each size."""

    config: TrainConfig
    base: Base
    objective: Objective
    accelerator: Accelerator
    instances: Buckets
    held_out: Buckets
    class_images: Buckets
    images: tuple[TrainingImage, ...]  # trained on and measured on; class images are none of them
    ignored: tuple[str, ...]
    notes: tuple[str, ...]  # what is to be said of pictures and captions
    cut: tuple[str, ...]  # files whose captions the base does not read whole
    starts: Starts
    digest: str

    @property
    def pictures(self) -> int:
        """How many are trained on."""
        return sum(len(images) for images in self.instances)

    @property
    def learning_rate(self) -> float:
        return learning_rate_of(self.config, self.base)


def learning_rate_of(config: TrainConfig, base: Base) -> float:
    """The run's, or what suits the base; Prodigy's is a factor to the size of step that it finds."""
    return config.learning_rate or (1.0 if config.optimizer == "prodigy" else base.learning_rate)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Devices, processes and mixed precision are accelerate's; "auto" is bf16 on a GPU that has it.

    Raises ConfigError for a precision that the device does not have.
    """
    precision = config.mixed_precision
    if precision == "auto":
        on_gpu = config.device in ("auto", "cuda") and torch.cuda.is_available()
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no"
    # accelerate keeps the first precision of a process for good; a second run may want another one.
    AcceleratorState._reset_state(reset_partial_state=False)
    try:
        return Accelerator(mixed_precision=precision, cpu=config.device == "cpu")
    except ValueError as error:  # fp16 on a CPU, bf16 on a GPU that is too old for it
        raise ConfigError(f"mixed_precision = {precision!r} cannot be had here: {error} Leave it at 'auto'.") from error


def prepare(
    config: TrainConfig,
    base: Base,
    accelerator: Accelerator,
    starts: Starts | None = None,
) -> Training:
    """Read, check and encode the pictures, and settle what the configuration leaves to the base or to `start_from`.

    `starts` is what `read_starts` gave, if it was read already. Raises DataError, PromptError, ConfigError,
    AdapterFileError and BaseModelError.
    """
    return drained(preparing(config, base, accelerator, Store(), starts))


def preparing(
    config: TrainConfig,
    base: Base,
    accelerator: Accelerator,
    store: Store,
    starts: Starts | None = None,
) -> Generator[Encoding, None, Training]:
    """`prepare`, which says how far it is; what `store` has is not encoded again."""
    starts = read_starts(config) if starts is None else starts
    config = _settled(config, base, starts)
    objective = objective_of(base.pipe.scheduler, config.timestep_sampling)
    size = config.resolution or base.size
    base.check_side("resolution", size)
    if config.train_text_encoder and not base.text_encoders:
        raise ConfigError(f"train_text_encoder: {base.name} has no text encoder that can be trained. Leave it out.")
    if config.train_convolutions and not base.family.convolutions:
        raise ConfigError(f"train_convolutions: {base.family.name} has no convolutions to adapt. Leave it out.")
    if config.text_encoder_learning_rate and config.optimizer == "prodigy":
        raise ConfigError("text_encoder_learning_rate is given, but Prodigy has one rate for all: leave it out.")
    if config.text_encoder_learning_rate and not config.train_text_encoder:
        raise ConfigError("text_encoder_learning_rate is given, but train_text_encoder is false: set it to true.")
    if config.offload and config.train_text_encoder:
        raise ConfigError("offload puts the text encoders aside, and train_text_encoder trains them: leave one out.")
    folder = read_folder(config.images, config.instance_prompt, smallest=smallest_side(size))
    measured = _measured_on(config, smallest_side(size))
    kept, held_out = split_held_out(config, list(folder.images), measured)
    buckets = bucket_sizes(size, base.multiple, base.largest) if config.aspect_ratio_bucketing else [(size, size)]
    instances = yield from encoding(
        base,
        kept,
        buckets,
        store,
        mirrored=config.random_flip,
        cut_captions=config.cut_captions,
        shuffle_tags_after=config.shuffle_tags_after,
    )
    measured_on = yield from encoding(base, held_out, buckets, store, cut_captions=config.cut_captions)
    cropped = list(dict.fromkeys(name for group in (*instances, *measured_on) for name in group.cropped))
    return Training(
        config=config,
        base=base,
        objective=objective,
        accelerator=accelerator,
        instances=instances,
        held_out=measured_on,
        class_images=(),
        images=(*kept, *held_out),
        ignored=folder.ignored + (measured.ignored if measured else ()),
        notes=(
            *folder.notes,
            *(measured.notes if measured else ()),
            *alike_in(kept, held_out),
            *([f"more than half of each is cropped, to a shape that is trained: {named(cropped)}"] if cropped else []),
        ),
        cut=tuple(long_captions(base, [*kept, *held_out])) if config.cut_captions else (),  # else encoding refused them
        starts=starts,
        digest=_digest([*kept, *held_out], starts),
    )


def with_class_images(training: Training, paths: list[Path], store: Store) -> Generator[Encoding, None, Training]:
    """The same with prior preservation's pictures, encoded; it says how far it is."""
    config, base = training.config, training.base
    if not paths:
        return training
    images = [TrainingImage(path, config.class_prompt or "") for path in paths]
    size = config.resolution or base.size
    return replace(
        training,
        class_images=(yield from encoding(base, images, [(size, size)], store, mirrored=config.random_flip)),
        digest=_digest([*training.images, *images], training.starts),
    )


def _settled(config: TrainConfig, base: Base, starts: Starts) -> TrainConfig:
    """Fill in what was left to the base, so that config.toml says all of it."""
    if starts:
        config = config_from(config, starts, base)
    targets = None if starts else config.target_modules or list(base.family.target_modules)
    return config.model_copy(
        update={
            "learning_rate": learning_rate_of(config, base),
            "resolution": config.resolution or base.size,
            "target_modules": targets,
            "warmup_steps": config.warm_up,
            "quantise": base.packing,
        }
    )


def _measured_on(config: TrainConfig, smallest: int) -> ImageFolder | None:
    """The folder of pictures to measure on, if they have one of their own."""
    if config.validation_images is None:
        return None
    return read_folder(config.validation_images, config.instance_prompt, smallest=smallest)


def split_held_out(
    config: TrainConfig, images: list[TrainingImage], measured: ImageFolder | None
) -> tuple[list[TrainingImage], list[TrainingImage]]:
    """Pictures to train on and pictures to measure on: a folder of its own, or a few of the images, by the seed."""
    if measured is not None:
        return images, list(measured.images)
    count = held_out_count(config, len(images))
    if count >= len(images):
        raise DataError(
            f"held_out is {count}, but {config.images} has only {len(images)} pictures: "
            "hold out fewer, or add pictures."
        )
    order = torch.randperm(len(images), generator=_generator(config.seed, "held out")).tolist()
    aside = set(order[:count])
    kept = [image for i, image in enumerate(images) if i not in aside]
    return kept, [image for i, image in enumerate(images) if i in aside]


def held_out_count(config: TrainConfig, pictures: int) -> int:
    """How many of a folder's pictures are held out."""
    # A subject's five pictures are too few to spare any.
    return config.held_out if config.held_out is not None else (pictures // 8 if pictures >= 8 else 0)


def new_adapter(training: Training, kind: Kind) -> tuple[Adapter, Optimizer]:
    """An adapter in the base, in training mode, and its optimizer: a fresh one, or what `start_from` names.

    Fresh twins start from the same A.
    """
    config, denoiser = training.config, training.base.denoiser
    encoders = training.base.text_encoders if config.train_text_encoder else {}
    fresh = config.adapter_config(kind, training.base.family)
    if kind in training.starts:
        adapter = attach_trainable(
            training.base,
            training.starts[kind],
            kind,
            norm_axis=fresh.norm_axis,
            dropout=config.dropout,
            name=kind,
        )
    else:
        adapter = inject_adapter(denoiser, fresh, name=kind, seed=_seed(config.seed, "adapter"), text_encoders=encoders)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    groups: dict[float, list[nn.Parameter]] = {training.learning_rate: []}
    for path, update in adapter.updates().items():
        in_encoder = path.partition(".")[0] in encoders
        rate = (config.text_encoder_learning_rate if in_encoder else None) or training.learning_rate
        groups.setdefault(rate, []).extend(update.parameters())
    try:
        return adapter, make_optimizer(config.optimizer, groups, config.weight_decay, config.warm_up > 0)
    except ConfigError:
        adapter.eject()
        raise


def steps(training: Training, kind: Kind, adapter: Adapter, optimizer: Optimizer, start: int = 0) -> Iterator[Step]:
    """Train from step `start` to the end, yielding after each optimizer step; the caller may stop at any of them.

    Raises TrainingError when the loss, the gradient or the weights are no longer numbers.
    """
    config, accelerator = training.config, training.accelerator
    wrapped = accelerator.prepare(optimizer)
    # The schedule as a function of the step alone, so that a resumed run needs no scheduler's state.
    schedule, *_ = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.warm_up, num_training_steps=config.steps
    ).lr_lambdas
    parameters = list(adapter.parameters())
    began = time.monotonic()
    for step in range(start, config.steps):
        for update in adapter.updates().values():  # a preview may have left them in evaluation mode
            update.train()
        loss = torch.zeros(())
        for micro in range(config.gradient_accumulation_steps):
            part = _batch_loss(training, step * config.gradient_accumulation_steps + micro)
            accelerator.backward(part / config.gradient_accumulation_steps)
            loss += part.detach().float().cpu() / config.gradient_accumulation_steps
        if not torch.isfinite(loss):
            raise diverged(config, accelerator.mixed_precision, kind, step, f"the loss is {loss.item()}")
        if accelerator.num_processes > 1:
            for parameter in (parameter for parameter in parameters if parameter.grad is not None):
                parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")
        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        if accelerator.scaler is None and not torch.isfinite(norm):  # fp16's scaler passes such a step over
            raise diverged(config, accelerator.mixed_precision, kind, step, f"the gradient's norm is {norm.item()}")
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step)
        wrapped.step()
        wrapped.zero_grad()
        loss = accelerator.reduce(loss.to(accelerator.device), reduction="mean").cpu()
        done = step + 1
        if not all_finite(parameters):
            raise diverged(config, accelerator.mixed_precision, kind, done, "weights are no numbers any more")
        left = (time.monotonic() - began) / (done - start) * (config.steps - done)
        yield Step(kind, done, config.steps, loss.item(), step_size(optimizer), left)


def _batch_loss(training: Training, batch: int) -> Tensor:
    """The loss of batch number `batch`, with prior preservation's share when there are class images."""
    config, accelerator = training.config, training.accelerator
    number = batch * accelerator.num_processes + accelerator.process_index
    loss = _images_loss(training, training.instances, number, "instances")
    if training.class_images:
        loss = loss + config.prior_loss_weight * _images_loss(training, training.class_images, number, "class")
    return loss


def _images_loss(training: Training, buckets: Buckets, number: int, stream: str) -> Tensor:
    config = training.config
    generator = _generator(config.seed, stream, number)
    bucket, turn = _bucket(config, [len(images) for images in buckets], number, stream)
    images = buckets[bucket]
    index = _indices(config, len(images), turn, stream)
    shape = (len(index), *images.shape)
    noise, eps = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    t = training.objective.timesteps(len(index), generator)
    dropped = torch.rand(len(index), generator=generator) < config.caption_dropout
    view = torch.randint(images.views, (len(index),), generator=generator)
    order = torch.randint(len(images.caption_of), (len(index),), generator=generator)
    x0 = images.latents(index, noise, view)
    if config.dropout > 0:
        torch.manual_seed(_seed(config.seed, "dropout", number))
    error = squared_error(training, x0, eps, t, conditioning_for(training, images, index, dropped, order))
    return (error * training.objective.weight(t, config.snr_gamma).to(error.device)).mean()


def conditioning_for(
    training: Training, images: EncodedImages, index: Tensor, dropped: Tensor | None = None, order: Tensor | int = 0
) -> Conditioning:
    """What the denoiser is told of these pictures' captions: encoded once, or anew by a text encoder in training."""
    rows = images.caption_rows(index, dropped, order)
    if not training.config.train_text_encoder:
        return images.conditioning[rows]
    different, places = rows.unique(return_inverse=True)
    captions, family, pipe = [images.captions[row] for row in different], training.base.family, training.base.pipe
    with _autocast(training, next(iter(training.base.text_encoders.values()))):
        if family.encode_trained is not None:
            found = family.encode_trained(pipe, captions, images.conditioning[different])
        else:
            found = family.encode(pipe, captions)
    return found[places.to(training.base.device)]


def _autocast(training: Training, model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Mixed precision where the model's own is float32."""
    return training.accelerator.autocast() if _dtype(model) == torch.float32 else contextlib.nullcontext()


def _dtype(model: nn.Module) -> torch.dtype:
    """What the model computes in; a packed weight is uint8."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def squared_error(training: Training, x0: Tensor, eps: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Mean squared error of the denoiser's prediction for each picture, [batch], float32."""
    denoiser, objective = training.base.denoiser, training.objective
    dtype, device = _dtype(denoiser), training.base.device
    noisy = objective.noisy(x0, eps, t).to(device, dtype)
    with _autocast(training, denoiser):
        prediction = training.base.family.predict(denoiser, noisy, t.to(device), conditioning.to(device, dtype))
    target = objective.target(x0, eps, t).to(device)
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


@torch.no_grad()
def held_out_loss(training: Training) -> float | None:
    """The loss on the held-out pictures at fixed noise and evenly spread timesteps; None when none are held out."""
    if not training.held_out:
        return None
    for module in (training.base.denoiser, *training.base.text_encoders.values()):
        module.eval()
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    errors = []
    for images in training.held_out:
        index = torch.arange(len(images)).repeat_interleave(HELD_OUT_TIMESTEPS)
        t = training.objective.even_timesteps(HELD_OUT_TIMESTEPS).repeat(len(images))
        eps = torch.randn(len(index), *images.shape, generator=generator)
        errors += [
            squared_error(
                training, images.mean(index[part]), eps[part], t[part], conditioning_for(training, images, index[part])
            )
            for part in torch.arange(len(index)).split(training.config.batch_size)
        ]
    return torch.cat(errors).mean().item()


def _bucket(config: TrainConfig, counts: list[int], number: int, stream: str) -> tuple[int, int]:
    """Which bucket batch number `number` is taken from, and how many batches that bucket gave before.

    In as many batches as there are pictures, each bucket has one for each of its pictures, in an order drawn anew each
    time: so every picture is seen equally often, whatever its shape.
    """
    cycle, place = divmod(number, sum(counts))
    turns = torch.repeat_interleave(torch.tensor(counts))
    turns = turns[torch.randperm(len(turns), generator=_generator(config.seed, stream + " buckets", cycle))]
    bucket = int(turns[place])
    return bucket, cycle * counts[bucket] + int((turns[:place] == bucket).sum())


def _indices(config: TrainConfig, count: int, number: int, stream: str) -> Tensor:
    """Which of a bucket's `count` pictures its batch `number` shows: each once an epoch, in an order drawn anew."""
    positions = range(number * config.batch_size, (number + 1) * config.batch_size)
    orders = {
        epoch: torch.randperm(count, generator=_generator(config.seed, stream + " order", epoch))
        for epoch in {position // count for position in positions}
    }
    return torch.stack([orders[position // count][position % count] for position in positions])


def _seed(seed: int, *what: str | int) -> int:
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _generator(seed: int, *what: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, *what))


def _digest(images: list[TrainingImage], starts: Starts) -> str:
    """A hash of all pictures' bytes and captions and of what is gone on from, so that no run is resumed on others."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.path.read_bytes())
        digest.update(image.caption.encode())
    for file in starts.values():
        digest.update(file.path.read_bytes())
    return digest.hexdigest()
