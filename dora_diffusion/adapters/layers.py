"""DoRA and LoRA on frozen linear and convolutional layers.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, sections 3 and 4.3:

    V  = W0 + s B A          direction, before normalising
    n  = ||V|| per output    a constant in the backward pass (section 4.3)
    W' = (m / n) V           row-wise
    y  = x W'^T + b          the bias is added last and never scaled

and LoRA: W' = W0 + s B A. Other programs take the norm of each input's column instead, W' = V (m / n) column-wise;
`InputAxisDoRAUpdate` is that. An adapter at strength w adds w (W' - W0), so several adapters add up in any order and
strength 0 is the base. The file goes from the formula to the modules: one adapter's update of one layer
(`LoRAUpdate`, `DoRAUpdate`), then the layer that carries them (`AdaptedLayer`). What they ask of the base is in
frozen.py; kernels.py has the norms, and the same numbers quicker for the case that counts most: a dense linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.frozen import FrozenLayer, FrozenLinear, device_of
from dora_diffusion.adapters.kernels import (
    adapted_linear,
    column_norms,
    linear_without_gradients,
    norm_ratio,
    row_norms,
)
from dora_diffusion.errors import AdapterStateError

__all__ = ["AdaptedLayer", "DoRAUpdate", "InputAxisDoRAUpdate", "LoRAUpdate", "bias_shift"]


class LoRAUpdate(nn.Module):
    """One adapter's change of one layer: W' - W0 = s B A (Hu et al. 2021).

    lora_A [r, in] (for a convolution [r, in, kh, kw]), lora_B [out, r] ([out, r, 1, 1]), both float32;
    B starts at zero. `strength` is w in W0 + w (W' - W0); the layer that carries the update heeds it.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    bias_difference: nn.Parameter | None  # [out], what files may add to the layer's bias; nothing trains it

    def __init__(
        self,
        frozen: FrozenLayer,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """With `tensors` the parameters have these values; without, those that training starts from."""
        super().__init__()
        self.frozen = frozen
        self.strength = 1.0
        self.dropout = nn.Dropout(dropout)
        self.register_parameter("bias_difference", None)
        device = device_of(frozen.module)
        for name, tensor in (self.start(frozen, rank, generator) if tensors is None else tensors).items():
            self.register_parameter(name, nn.Parameter(tensor.detach().to(device, torch.float32, copy=True)))
        self.scale = self.scaled_by(scale)

    def scaled_by(self, scale: float) -> float:
        """s of these parameters, where `scale` was asked for."""
        return scale

    @staticmethod
    def start(frozen: FrozenLayer, rank: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """The values that training starts from, drawn on the CPU so that a seed means the same on every device."""
        bound = 1 / math.sqrt(math.prod(frozen.in_shape))  # the usual start of a linear layer
        A = torch.empty(rank, *frozen.in_shape).uniform_(-bound, bound, generator=generator)
        return {"lora_A": A, "lora_B": torch.zeros(frozen.out_features, rank, *frozen.up_shape)}

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def strength(self) -> float:
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = value
        self.strength_tensor = torch.tensor(value)  # what compiled code reads: a float would compile it anew each time

    @property
    def drops(self) -> bool:
        return self.training and self.dropout.p > 0

    def low_rank(self, x: Tensor) -> Tensor:
        """s x A^T B^T: [..., in] to [..., out]."""
        return self.frozen.low_rank(x, self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)) * self.scale

    def forward(self, x: Tensor, y0: Tensor) -> Tensor:
        """x (W' - W0)^T, given y0 = x W0^T (not used by LoRA)."""
        return self.low_rank(self.dropout(x))

    def linear(self, x: Tensor, W0: Tensor, bias: Tensor | None) -> Tensor:
        """x W'^T + b for a linear layer with this update alone at strength 1, by the fused function."""
        return adapted_linear(x, W0, bias, self.lora_A, self.lora_B, self.scale)

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, w s g B and w (g - 1), as `linear_without_gradients` takes them; LoRA has g = 1."""
        return self.lora_A, self.strength * self.scale * self.lora_B, None

    def direction(self) -> Tensor:
        """s B A in the shape of the weight, float32 under autocast too."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            BA = self.lora_B.detach().float().flatten(1) @ self.lora_A.detach().float().flatten(1)
        return (self.scale * BA).reshape(self.frozen.out_features, *self.frozen.in_shape)

    def delta_weight(self) -> Tensor:
        """W' - W0, float32, in the shape of the weight."""
        return self.direction()

    def norms(self, base_squared: Tensor, by_input: bool) -> Tensor:
        """||W0 + s B A|| of every output [out] or input [in], float32, given ||W0||^2 of the same."""
        A, B = self.lora_A.detach().float(), self.lora_B.detach().float().flatten(1)
        if by_input:
            return column_norms(base_squared, self.frozen.transposed(B.T), A, B, self.scale)
        A = A.flatten(1)
        return row_norms(base_squared, self.frozen.times_weight(A), A, B, self.scale)


class DoRAUpdate(LoRAUpdate):
    """One adapter's change of one layer: W' - W0 = (m / n) (W0 + s B A) - W0 (Liu et al. 2024, equation 5).

    Beside lora_A and lora_B the magnitude m [out], which starts at ||W0||.
    """

    magnitude: nn.Parameter
    magnitude_name = "magnitude"  # of the parameter, as adapters and their files have it
    by_input = False

    def __init__(
        self,
        frozen: FrozenLayer,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(frozen, rank, scale, dropout, generator, tensors)
        # No buffer: model.half() would round a buffer, and the norm is float32 whatever the weights are.
        with torch.no_grad():
            self._base_squared = frozen.squared_norms(self.by_input)
        if self.magnitude_name not in self._parameters:
            self.register_parameter(self.magnitude_name, nn.Parameter(self._base_squared.sqrt()))
        self._norm_of: tuple[object, ...] | None = None
        self._norm: Tensor | None = None

    def train(self, mode: bool = True) -> DoRAUpdate:
        if mode != self.training:
            self._norm = None  # optimizers that write through .data (Prodigy, 8-bit Adam) change no version
        return super().train(mode)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """n = ||W0 + s B A|| per output, [out], float32 under autocast too; in eval mode kept until A or B change."""
        changing = [p for name, p in self.named_parameters() if name != self.magnitude_name]
        # Versions are not visible to the tracer, inference tensors have none, and not every optimizer changes them.
        if self.training or torch.compiler.is_compiling() or any(p.is_inference() for p in changing):
            return self._fresh_norm()
        state = tuple((p._version, p.data_ptr(), p.device, p.dtype) for p in changing)
        if self._norm is None or self._norm_of != state:
            with torch.inference_mode(False), torch.no_grad():  # what is kept must do for a later training step too
                self._norm, self._norm_of = self._fresh_norm(), state
        return self._norm

    def _fresh_norm(self) -> Tensor:
        m = self.get_parameter(self.magnitude_name)
        with torch.autocast(m.device.type, enabled=False):
            return self.norms(self._base_squared.to(m.device), self.by_input)

    def ratio(self) -> Tensor:
        """g = m / n; 0 for a row that is zero, never NaN."""
        return norm_ratio(self.get_parameter(self.magnitude_name), self.norm())

    def forward(self, x: Tensor, y0: Tensor) -> Tensor:
        """x (W' - W0)^T = g x V^T - y0, given y0 = x W0^T; written so that it is exactly zero at the start."""
        if self.drops:  # as the authors do: dropout on the input of both terms, which costs a second base product
            x = self.dropout(x)
            y0 = self.frozen.unbiased(x)
        low_rank = self.low_rank(x)
        excess = self.frozen.per_output(self.ratio() - 1).to(y0.dtype)
        return low_rank + excess * (y0 + low_rank)  # x V^T = y0 + s x A^T B^T

    def linear(self, x: Tensor, W0: Tensor, bias: Tensor | None) -> Tensor:
        if self.magnitude.device.type == "cpu" and not self.magnitude.all():
            # The fused backward cannot know the gradient of a magnitude that is exactly 0; this can.
            y = nn.functional.linear(x, W0, bias)
            return y + self(x, self.frozen.without_bias(y))
        squared = self._base_squared.to(x.device)
        return adapted_linear(x, W0, bias, self.lora_A, self.lora_B, self.scale, self.magnitude, squared)

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        g = self.ratio()
        B = (self.strength * self.scale * g)[:, None] * self.lora_B
        return self.lora_A, B, self.strength * (g - 1)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        W0 = self.frozen.dense_weight()
        g = self.ratio().reshape(-1, *(1,) * (W0.dim() - 1))
        return g * (W0 + self.direction()) - W0


class InputAxisDoRAUpdate(DoRAUpdate):
    """DoRA with the norm of every input's column: W' = V (m / n), V = W0 + s B A, n = ||V|| per input.

    Beside lora_A and lora_B input_magnitude [in], which starts at ||W0||. A convolution's norm runs over outputs and
    kernel; every group sees the whole magnitude. What OneTrainer and older LyCORIS train, and what ComfyUI, Forge,
    A1111 and InvokeAI compute.
    """

    magnitude_name = "input_magnitude"
    by_input = True

    def _stretched(self, x: Tensor, excess: Tensor) -> Tensor:
        """x (1 + excess), excess [in]; x's own bits where it is 0."""
        return torch.addcmul(x, x, self.frozen.per_input(excess).to(x.dtype))

    def forward(self, x: Tensor, y0: Tensor) -> Tensor:
        """x (W' - W0)^T = ((g - 1) x) W0^T + s (g x) A^T B^T: the columns' factors go to the input."""
        x = self.dropout(x)
        excess = self.ratio() - 1
        change = self.frozen.unbiased(self.frozen.per_input(excess).to(x.dtype) * x)
        return change + self.low_rank(self._stretched(x, excess))

    def alone(self, x: Tensor) -> Tensor:
        """y = x W0^T + w x (W' - W0)^T + b with one base product: that of the stretched input."""
        excess = self.ratio() - 1
        change = self.low_rank(self._stretched(x, excess))
        change = change if self.strength == 1 else self.strength * change
        return self.frozen.output(self._stretched(x, self.strength * excess)) + change

    def linear(self, x: Tensor, W0: Tensor, bias: Tensor | None) -> Tensor:
        return adapted_linear(self._stretched(x, self.ratio() - 1), W0, bias, self.lora_A, self.lora_B, self.scale)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        W0 = self.frozen.dense_weight()
        g = self.ratio().reshape(1, -1, *(1,) * (W0.dim() - 2))
        return g * (W0 + self.direction()) - W0


class AdaptedLayer(nn.Module):
    """A frozen layer and the updates that adapters make on it: y = base(x) + sum_k w_k x (W'_k - W0)^T.

    It stands in the base's place; `base` is the very same module, so putting it back undoes everything.
    """

    def __init__(self, base: nn.Module, frozen: FrozenLayer) -> None:
        super().__init__()
        self.base = base
        self.frozen = frozen
        self.updates = nn.ModuleDict()
        self.fused: tuple[str, ...] = ()
        self._original_bias: Tensor | None = None  # b while an adapter that changes it is fused into the base
        self.train(base.training)

    @property
    def weight(self) -> Tensor:  # models look at to_q.weight.dtype and the like
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        unfused: list[LoRAUpdate] = [u for name, u in self.updates.items() if name not in self.fused]  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return self._traced(x, unfused)
        # Strength 0 skips the update, so that the base's bits come out and no time is spent.
        active = [update for update in unfused if update.strength != 0]
        if not active:
            return self.base(x)
        shift = bias_shift(active)
        if self._has_quick_way(x, active):
            W0, bias = self.base.weight, self.base.bias
            by_input = any(isinstance(update, InputAxisDoRAUpdate) for update in active)
            if not torch.is_grad_enabled() and not by_input:
                return linear_without_gradients(x, W0, _shifted(bias, shift), [update.parts() for update in active])  # type: ignore[arg-type]
            if len(active) == 1 and active[0].strength == 1 and shift is None:
                return active[0].linear(x, W0, bias)  # type: ignore[arg-type]
        first = active[0]
        if isinstance(first, InputAxisDoRAUpdate) and len(active) == 1 and not (self.fused or first.drops):
            y = first.alone(x)
        else:
            y = self._plain(x, active)
        return y if shift is None else y + self.frozen.per_output(shift.to(y.dtype))

    def _plain(self, x: Tensor, active: list[LoRAUpdate]) -> Tensor:
        """The plain formula, without the changes of the bias."""
        y = self.frozen.output(x)
        y0 = self._unbiased(x, y)
        for update in active:
            change = update(x, y0)
            y = y + (change if update.strength == 1 else update.strength * change)
        return y

    def _traced(self, x: Tensor, updates: list[LoRAUpdate]) -> Tensor:
        """The plain formula with the strengths as tensors, so that no number is compiled in."""
        y = self.frozen.output(x)
        y0 = self._unbiased(x, y)
        for update in updates:
            w, change = update.strength_tensor, update(x, y0)
            if update.bias_difference is not None:
                change = change + self.frozen.per_output(update.bias_difference.to(y.dtype))
            y = torch.where(w == 0, y, y + w.to(y.dtype) * change)
        return y

    def _unbiased(self, x: Tensor, y: Tensor) -> Tensor:
        """x W0^T, given y = base(x), which is another product while something is fused."""
        return self.frozen.unbiased(x) if self.fused else self.frozen.without_bias(y)

    def _has_quick_way(self, x: Tensor, active: list[LoRAUpdate]) -> bool:
        """Whether kernels.py may read the base's weight itself: a linear layer as PyTorch made it, with nothing fused,
        hooked on to it or moved away, updates that it knows, and no dropout."""
        base = self.base
        return (
            type(base) is nn.Linear
            and isinstance(self.frozen, FrozenLinear)
            and self.frozen.is_dense
            and base.weight.device == x.device
            and (base.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type))
            and not self.fused
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
            and "forward" not in base.__dict__  # accelerate's offloading puts its own there
            and all(type(update) in QUICK and not update.drops for update in active)
        )

    @torch.no_grad()
    def merged_weight(self, names: tuple[str, ...] | None = None) -> Tensor:
        """W0 + sum_k w_k (W'_k - W0) over the named updates (all by default), in the base's dtype."""
        W0 = self.frozen.weight.detach()
        W = W0.float()
        for name in self.updates if names is None else names:
            update = self.updates[name]
            if update.strength != 0:
                W = W + update.strength * update.delta_weight()  # type: ignore[operator]
        return W.to(W0.dtype)

    @torch.no_grad()
    def merged_bias(self, names: tuple[str, ...]) -> Tensor | None:
        """b + sum_k w_k (b'_k - b) over the named updates, in the base's dtype; None for a layer without a bias."""
        bias = getattr(self.base, "bias", None) if self._original_bias is None else self._original_bias
        updates = [self.updates[name] for name in names]
        shift = bias_shift([update for update in updates if update.strength != 0])  # type: ignore[misc]
        return bias if bias is None or shift is None else _shifted(bias.detach(), shift)

    def check_can_fuse(self) -> None:
        """Raise AdapterStateError for a layer whose weight is packed, or that has no bias where one is changed."""
        self.frozen.weight  # noqa: B018 (raises for a packed one)
        if self._changes_bias(tuple(self.updates)) and getattr(self.base, "bias", None) is None:
            raise AdapterStateError(
                f"cannot fuse into a {type(self.base).__name__} without a bias: the adapter adds one (lora_B.bias). "
                "Keep the adapter unfused."
            )

    def _changes_bias(self, names: tuple[str, ...]) -> bool:
        return any(self.updates[name].bias_difference is not None for name in names)

    @torch.no_grad()
    def set_fused(self, names: tuple[str, ...]) -> None:
        """Write exactly these updates into the base's weight and bias; with none, the original bits come back."""
        if not names and not self.fused:
            return
        original = self.frozen.original
        if original is None:
            original = self.frozen.original = self.frozen.weight.detach().clone()
        if self._original_bias is None and self._changes_bias(names):
            self._original_bias = self.base.bias.detach().clone()  # type: ignore[union-attr, operator]
        # A requires-grad weight is written through .data: this is no step that autograd should see.
        self.base.weight.data.copy_(self.merged_weight(names) if names else original)  # type: ignore[union-attr, operator]
        if (bias := self._original_bias) is not None:
            self.base.bias.data.copy_(self.merged_bias(names) if names else bias)  # type: ignore[union-attr, operator, arg-type]
        self.fused = names
        if not names:
            self.keep_fused()

    def keep_fused(self) -> None:
        """Let go of the original weight: what is fused is the base's from now on."""
        self.fused, self.frozen.original, self._original_bias = (), None, None


def bias_shift(updates: Iterable[LoRAUpdate]) -> Tensor | None:
    """sum_k w_k (b'_k - b) [out], float32; None where no update changes the bias."""
    shifts = [update.strength * update.bias_difference for update in updates if update.bias_difference is not None]
    return torch.stack(shifts).sum(0) if shifts else None


def _shifted(bias: Tensor | None, shift: Tensor | None) -> Tensor | None:
    """The bias with what is added to it, in its own dtype."""
    if bias is None or shift is None:
        return shift if bias is None else bias
    return (bias.float() + shift).to(bias.dtype)


QUICK = (LoRAUpdate, DoRAUpdate, InputAxisDoRAUpdate)  # whose formulas kernels.py has
