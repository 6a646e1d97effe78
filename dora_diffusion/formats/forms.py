"""The forms of update that files hold: which tensors each has, whether they go together, and what they say of a layer.

One row of `FORMS` for each. A form of another program's files is a row here, its endings in leaves.py, and its
mathematics in adapters/.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from dora_diffusion.adapters.injection import Parametrisation
from dora_diffusion.adapters.input_rotation import size_of
from dora_diffusion.adapters.variants import LOHA, LOKR_W1, LOKR_W2

__all__ = [
    "BIASES",
    "BY_CHANNEL",
    "FORMS",
    "MAGNITUDES",
    "Form",
    "Held",
    "Sizes",
    "bias_problems",
    "form_of",
    "forms_in",
    "magnitude_problem",
    "name_of",
    "with_axes",
]

BIASES = ("bias_difference", "lora_bias")  # which any form may have beside it, and LoRA alone
MAGNITUDES = ("magnitude", "unscaled_magnitude", "input_magnitude", "shared_magnitude", "dora_scale")
# A number for each output, or for each input.
BY_CHANNEL = (*MAGNITUDES, *BIASES, "rescale", "output_factor", "input_factor")
Held = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """What a form's tensors say of its layer: 0 and None where they do not say it.

    `columns` are the inputs times a convolution's kernel, `inputs` those without it; `block` is what
    the columns are a multiple of, `divisor` what the inputs are.
    """

    outputs: int
    columns: int = 0
    kernel: tuple[int, ...] | None = None
    inputs: int = 0
    block: int = 0
    divisor: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, where all is known."""
        kernel = self.kernel or ()
        return (self.outputs, self.columns // math.prod(kernel), *kernel)

    def cannot_be(self, out_features: int, in_shape: tuple[int, ...]) -> str:
        """Why no layer of this shape has it; empty where one may."""
        wrong = self.outputs not in (0, out_features)
        wrong |= self.columns not in (0, math.prod(in_shape)) or self.inputs not in (0, in_shape[0])
        wrong |= bool(self.block and math.prod(in_shape) % self.block) or in_shape[0] % self.divisor != 0
        wrong |= self.kernel is not None and set(in_shape[1:]) | set(self.kernel) != {1} and self.kernel != in_shape[1:]
        if not wrong:
            return ""
        kernel = f", kernel {list(self.kernel)}" if self.kernel else ""
        inputs = f"{self.inputs or 'any'} inputs"
        if self.columns or self.block:
            inputs = f"{self.columns or f'a multiple of {self.block}'} inputs (times their kernel)"
        own = f"{self.outputs or 'any'} outputs x {inputs}{kernel}"
        return f"adapter for {own}, this layer has {out_features} x {list(in_shape)}"


@dataclass(frozen=True)
class Form:
    """A form of update.

    `sets` are the parameters that a module of it has, beside a magnitude and an alpha; `problem` says why those of one
    set do not go together. `rank_of` is what alpha is divided by, where `is_scaled`; `cut` gives some of its output
    rows, None where they are no update of this form.
    """

    name: Parametrisation
    label: str
    sets: tuple[frozenset[str], ...]
    problem: Callable[[Held], str]
    sizes: Callable[[Held], Sizes]
    rank_of: Callable[[Held], int]
    is_scaled: Callable[[Held], bool] = lambda held: True
    by_row: tuple[str, ...] = ()  # the parameters that have a row for each output
    takes_magnitude: bool = True
    optional: frozenset[str] = frozenset()

    @property
    def parameters(self) -> frozenset[str]:
        return frozenset().union(*self.sets)

    def missing_and_beside(self, held: Held) -> tuple[list[str], list[str]]:
        """What a module lacks of the set that is nearest to it, and what it has beside that set."""
        own = held.keys() & self.parameters
        nearest = min(self.sets, key=lambda wanted: (len(wanted - own), len(own - wanted)))
        return sorted(nearest - own), sorted(own - nearest - self.optional)


def _shape(held: Held, name: str) -> list[int]:
    return list(held[name].shape)


def _all_of(held: Held, dims: Mapping[str, Iterable[int]]) -> str:
    """Which of these tensors has another number of axes, or none of one; empty where all are sound."""
    for name, wanted in dims.items():
        if name in held and (held[name].dim() not in wanted or not held[name].numel()):
            return f"{name} of shape {_shape(held, name)}"
    return ""


def _chain(held: Held, a: str, b: str, core: str = "") -> str:
    """Why a [n, r] and b [r, m], or with a core [r, r, ...] a [r, n] and b [r, m], have no rank in common."""
    ranks = {held[a].shape[0 if core else 1], held[b].shape[0]} | (set(held[core].shape[:2]) if core else set())
    if len(ranks) == 1:
        return ""
    shown = ", ".join(f"{name} {_shape(held, name)}" for name in (a, b, *filter(None, (core,))))
    return f"no rank in common: {shown}"


# LoRA


def _lora_problem(held: Held) -> str:
    A, B, mid = held["lora_A"], held["lora_B"], held.get("lora_mid")
    if not _pair_up(A, B, mid):
        shown = f", lora_mid {list(mid.shape)}" if mid is not None else ""
        return f"no rank in common: lora_A {list(A.shape)}, lora_B {list(B.shape)}{shown}"
    return ""


def _pair_up(A: Tensor, B: Tensor, mid: Tensor | None) -> bool:
    """Whether A is [r, in, ...] and B [out, r, ...] for one r of at least 1; between them a core [r, r, ...]."""
    # LyCORIS's DyLoRA writes a convolution's B without its ones.
    if B.dim() not in (2, A.dim()) or A.dim() not in (2, 4) or min(*A.shape, *B.shape) < 1 or set(B.shape[2:]) - {1}:
        return False
    if mid is None:
        return A.shape[0] == B.shape[1]
    core = mid.dim() == 4 and A.dim() == 4 and set(A.shape[2:]) == {1} and min(mid.shape) > 0
    return core and mid.shape[:2] == (B.shape[1], A.shape[0])


def _lora_sizes(held: Held) -> Sizes:
    A = held["lora_A"]
    return Sizes(held["lora_B"].shape[0], A[0].numel(), tuple(A.shape[2:]))


# A whole difference


def _difference_problem(held: Held) -> str:
    return _all_of(held, dict.fromkeys(("difference", "replacement"), (1, 2, 4)))  # one axis: of a norm


def _difference_sizes(held: Held) -> Sizes:
    D = _whole(held)
    return Sizes(D.shape[0], D[0].numel(), tuple(D.shape[2:]))


def _difference_rank(held: Held) -> int:
    D = _whole(held)
    return 1 if D.dim() == 1 else min(D.flatten(1).shape)


def _whole(held: Held) -> Tensor:
    return held["difference"] if "difference" in held else held["replacement"]


# A change of the bias alone


def _bias_problem(held: Held) -> str:
    return _all_of(held, {"bias_difference": (1,)})


# LoHa

_CORES = ("hada_t1", "hada_t2")


def _loha_problem(held: Held) -> str:
    # OneTrainer writes a convolution's factors with the kernel's axes.
    axes = (2,) if "hada_t1" in held else (2, 4)
    if wrong := _all_of(held, {**dict.fromkeys(LOHA, axes), **dict.fromkeys(_CORES, (4,))}):
        return wrong
    if any(set(held[name].shape[2:]) - {1} for name in ("hada_w1_a", "hada_w2_a")):
        return f"hada_w1_a of shape {_shape(held, 'hada_w1_a')}"
    cores = _CORES if "hada_t1" in held else ("", "")
    for which, core in zip("12", cores):
        if wrong := _chain(held, f"hada_w{which}_a", f"hada_w{which}_b", core):
            return wrong
    for first, second in (("hada_w1_a", "hada_w2_a"), ("hada_w1_b", "hada_w2_b"), *((_CORES,) if cores[0] else ())):
        if held[first].shape != held[second].shape:
            return f"two products of other sizes: {first} {_shape(held, first)}, {second} {_shape(held, second)}"
    return ""


def _loha_sizes(held: Held) -> Sizes:
    a, b, core = held["hada_w1_a"], held["hada_w1_b"], held.get("hada_t1")
    if core is None:
        return Sizes(a.shape[0], b[0].numel())
    kernel = tuple(core.shape[2:])
    return Sizes(a.shape[1], b.shape[1] * math.prod(kernel), kernel)


# LoKr


def _lokr_problem(held: Held) -> str:
    axes = {name: (2,) for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")}
    if wrong := _all_of(held, {**axes, "lokr_w2": (2, 4), "lokr_t2": (4,)}):
        return wrong
    if "lokr_w1_a" in held and (wrong := _chain(held, "lokr_w1_a", "lokr_w1_b")):
        return wrong
    if "lokr_w2_a" in held and (
        wrong := _chain(held, "lokr_w2_a", "lokr_w2_b", "lokr_t2" if "lokr_t2" in held else "")
    ):
        return wrong
    ranks = {held[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in held}
    return f"two ranks, {' and '.join(map(str, sorted(ranks)))}, in its two factors" if len(ranks) > 1 else ""


def _lokr_sizes(held: Held) -> Sizes:
    w1 = held.get("lokr_w1")
    out_1, in_1 = w1.shape if w1 is not None else (held["lokr_w1_a"].shape[0], held["lokr_w1_b"].shape[1])
    w2, core = held.get("lokr_w2"), held.get("lokr_t2")
    if w2 is not None:
        # A whole factor of a linear layer has two axes, of a 1 x 1 convolution four.
        return Sizes(out_1 * w2.shape[0], in_1 * w2[0].numel(), tuple(w2.shape[2:]))
    a, b = held["lokr_w2_a"], held["lokr_w2_b"]
    if core is None:
        return Sizes(out_1 * a.shape[0], in_1 * b.shape[1], divisor=in_1)
    kernel = tuple(core.shape[2:])
    return Sizes(out_1 * a.shape[1], in_1 * b.shape[1] * math.prod(kernel), kernel)


def _lokr_rank(held: Held) -> int:
    factor = next((held[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in held), None)
    if factor is not None:
        return int(factor.shape[0])
    # LyCORIS writes as alpha the rank that it was told, which two whole factors have no use for.
    sizes, said = _lokr_sizes(held), float(held["alpha"]) if "alpha" in held else 0.0
    most = min(sizes.outputs, sizes.columns)
    return int(said) if said in range(1, most + 1) else most


def _lokr_is_scaled(held: Held) -> bool:
    """With both factors whole there is no rank to divide alpha by, and the scale is 1 whatever alpha says."""
    return not {"lokr_w1", "lokr_w2"} <= held.keys()


# GLoRA


def _glora_problem(held: Held) -> str:
    if wrong := _all_of(held, dict.fromkeys(("a1", "a2", "b1", "b2"), (2, 4))):
        return wrong
    wrong = _chain(held, "a1", "a2") or _chain(held, "b1", "b2")
    if not wrong and (held["a1"].shape[0], held["a2"].shape[1]) != (held["b2"].shape[1],) * 2:
        return f"a1 {_shape(held, 'a1')} and a2 {_shape(held, 'a2')} for {held['b2'].shape[1]} inputs"
    if not wrong and held["a2"].shape[0] != held["b2"].shape[0]:
        return f"two ranks, {held['a2'].shape[0]} and {held['b2'].shape[0]}"
    pointwise = all(held[name][0, 0].numel() == 1 for name in ("a1", "a2", "b1"))
    return wrong or ("" if pointwise else "a kernel beside that of b2")


def _glora_sizes(held: Held) -> Sizes:
    b2 = held["b2"]
    return Sizes(held["b1"].shape[0], b2[0].numel(), tuple(b2.shape[2:]))


# OFT and BOFT


def _oft_problem(held: Held) -> str:
    P = held["oft_blocks"]
    if wrong := _all_of(held, {"oft_blocks": (3, 4)}) or _of_one(held, "constraint"):
        return wrong
    outputs, size = P.shape[-3] * P.shape[-1], P.shape[-1]
    if P.shape[-2] != size:
        return f"oft_blocks of shape {list(P.shape)}, whose blocks are not square"
    if P.dim() == 4 and (size % 2 or any(outputs % (2**i * size) for i in range(len(P)))):
        return f"oft_blocks of shape {list(P.shape)}, which is no butterfly"
    rescale = held.get("rescale")
    if rescale is not None and (rescale.numel() != outputs or rescale.shape[0] != outputs):
        return f"rescale of shape {list(rescale.shape)} for {outputs} outputs"
    return ""


def _of_one(held: Held, name: str) -> str:
    return f"{name} of shape {_shape(held, name)}" if name in held and held[name].numel() != 1 else ""


def _oft_sizes(held: Held) -> Sizes:
    P = held["oft_blocks"]
    return Sizes(P.shape[-3] * P.shape[-1])


# OFT of the inputs


def _rotation_problem(held: Held) -> str:
    R = held["oft_R"]
    if wrong := _all_of(held, {"oft_R": (2,)}) or _of_one(held, "oft_scaled"):
        return wrong
    return "" if size_of(R.shape[1]) else f"oft_R of shape {list(R.shape)}: {R.shape[1]} are no triangle"


def _rotation_sizes(held: Held) -> Sizes:
    """One row is shared by all blocks, however many; or there is one block."""
    blocks, size = len(held["oft_R"]), size_of(held["oft_R"].shape[1])
    return Sizes(0, blocks * size if blocks > 1 else 0, block=size)


# IA3


def _factor_problem(held: Held) -> str:
    [name] = held.keys() & {"output_factor", "input_factor"}
    w = held[name]
    ones = set(w.shape) - {w.numel()} <= {1}
    return "" if w.dim() in (1, 2, 4) and w.numel() and ones else f"weight of shape {list(w.shape)}"


def _never(held: Held) -> bool:
    return False


LORA = Form(
    "lora",
    "LoRA",
    (frozenset({"lora_A", "lora_B"}), frozenset({"lora_A", "lora_B", "lora_mid"})),
    _lora_problem,
    _lora_sizes,
    lambda held: held["lora_A"].shape[0],
    by_row=("lora_B",),
)
DIFFERENCE = Form(
    "difference",
    "whole difference",
    (frozenset({"difference"}),),
    _difference_problem,
    _difference_sizes,
    _difference_rank,
    _never,
    by_row=("difference",),
    takes_magnitude=False,
)
REPLACEMENT = replace(DIFFERENCE, label="whole weight", sets=(frozenset({"replacement"}),), by_row=("replacement",))
BIAS = Form(
    "difference",
    "difference of a bias",
    (frozenset({"bias_difference"}),),
    _bias_problem,
    lambda held: Sizes(held["bias_difference"].shape[0]),
    lambda held: 1,
    _never,
    by_row=("bias_difference",),
    takes_magnitude=False,
)
FORMS = (
    LORA,
    DIFFERENCE,
    REPLACEMENT,
    Form(
        "loha",
        "LoHa",
        (frozenset(LOHA), frozenset({*LOHA, *_CORES})),
        _loha_problem,
        _loha_sizes,
        lambda held: held["hada_w1_b"].shape[0],
        by_row=("hada_w1_a", "hada_w2_a"),
    ),
    Form(
        "lokr",
        "LoKr",
        tuple(frozenset(w1 + w2) for w1, w2 in itertools.product(LOKR_W1, LOKR_W2)),
        _lokr_problem,
        _lokr_sizes,
        _lokr_rank,
        _lokr_is_scaled,
    ),
    Form(
        "glora",
        "GLoRA",
        (frozenset({"a1", "a2", "b1", "b2"}),),
        _glora_problem,
        _glora_sizes,
        lambda held: held["b2"].shape[0],
        by_row=("b1",),
    ),
    Form(
        "oft",
        "OFT",
        (frozenset({"oft_blocks"}), frozenset({"oft_blocks", "rescale", "constraint"})),
        _oft_problem,
        _oft_sizes,
        lambda held: held["oft_blocks"].shape[-1],
        _never,
        optional=frozenset({"rescale", "constraint"}),
        takes_magnitude=False,
    ),
    Form(
        "oft",
        "OFT of the inputs",
        (frozenset({"oft_R"}), frozenset({"oft_R", "oft_scaled"})),
        _rotation_problem,
        _rotation_sizes,
        lambda held: size_of(held["oft_R"].shape[1]),
        _never,
        takes_magnitude=False,
    ),
    Form(
        "ia3",
        "IA3",
        (frozenset({"output_factor"}),),
        _factor_problem,
        lambda held: Sizes(held["output_factor"].numel()),
        lambda held: 1,
        _never,
        by_row=("output_factor",),
        takes_magnitude=False,
    ),
    Form(
        "ia3",
        "IA3",
        (frozenset({"input_factor"}),),
        _factor_problem,
        lambda held: Sizes(0, inputs=held["input_factor"].numel()),
        lambda held: 1,
        _never,
        takes_magnitude=False,
    ),
)


def forms_in(held: Iterable[str]) -> list[Form]:
    """The forms of which there is a tensor; a change of the bias is one where it stands alone."""
    names = set(held)
    return [form for form in FORMS if form.parameters & names] or [BIAS] * ("bias_difference" in names)


def form_of(held: Held) -> Form:
    """The form of a module that was checked."""
    [form] = forms_in(held)
    return form


def bias_problems(held: Held, form: Form) -> list[str]:
    """Why what is to be added to the bias does not go with the rest; none where it does."""
    wrong = []
    outputs = form.sizes(held).outputs
    for name in held.keys() & {*BIASES}:
        b = held[name]
        if b.dim() != 1 or len(b) != (outputs or len(b)):
            wrong.append(f"{name} of shape {list(b.shape)} for {outputs} outputs")
    if "lora_bias" in held:
        beside = [p for p in ("bias_difference", *MAGNITUDES) if p in held]
        if form.name != "lora" or beside:
            wrong.append(f"lora_B.bias beside {beside[0] if beside else form.label}, which no program computes")
    return wrong


def magnitude_problem(held: Held, sizes: Sizes) -> str:
    """Why a magnitude of a form other than LoRA has another shape than the layer; empty where it fits."""
    for name in MAGNITUDES:
        m = held.get(name)
        if m is None:
            continue
        if not m.numel():
            return f"{name} of shape {list(m.shape)}"
        by_output = m.shape[:1] == (sizes.outputs,) and m.numel() == sizes.outputs
        by_input = m.dim() >= 2 and m.shape[0] == 1 and m.numel() == m.shape[1] and not sizes.columns % m.shape[1]
        if not (by_output or by_input):
            return f"{name} of shape {list(m.shape)} for {sizes.outputs} outputs and {sizes.columns} columns"
    return ""


def name_of(held: Held) -> Parametrisation:
    """The name of a module's form; BOFT has OFT's tensors with an axis more."""
    boft = "oft_blocks" in held and held["oft_blocks"].dim() == 4
    return "boft" if boft else form_of(held).name


def with_axes(held: Held, in_shape: tuple[int, ...]) -> dict[str, Tensor]:
    """A module's tensors, with what has a number for each channel in the shape that LyCORIS writes: with as many axes
    as the weight, which not every form's other tensors tell."""
    tensors, ones = dict(held), (1,) * (len(in_shape) - 1)
    if "lora_A" in tensors:
        return tensors
    by_output, by_input = (-1, 1, *ones), (1, -1, *ones)
    shapes = {"magnitude": by_output, "rescale": by_output}
    shapes |= dict.fromkeys(("input_magnitude", "shared_magnitude"), by_input)
    shapes |= dict.fromkeys(("output_factor", "input_factor"), by_input if ones else (-1,))
    return {name: t.reshape(shapes[name]) if name in shapes else t for name, t in tensors.items()}
