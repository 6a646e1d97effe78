"""DoRA and LoRA on frozen layers of every kind: half precision, packed by a library, offloaded, and of unknown types.

The oracle unpacks each weight by arithmetic of its own in float64 (the formats' published definitions), and applies the
plain formula to it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from oracles import BY_INPUT, adapted_weight, config_of, formula_weight, perturb, perturb_update, relative_error
from test_layers import UPDATES, kinds
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dora_diffusion import AdapterConfig, inject_adapter
from dora_diffusion.adapters.frozen import FrozenLinear, freeze_view
from dora_diffusion.adapters.layers import AdaptedLayer, LoRAUpdate
from dora_diffusion.adapters.variants import update_of
from dora_diffusion.errors import AdapterStateError, TargetError

IN, OUT, RANK, ALPHA = 128, 96, 4, 6.0  # 128 x 96 values: no other tensor of these tests has so many

# Dettmers et al., "QLoRA", 2023, appendix E.
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float64,
)


def dense(dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(IN, OUT).to(dtype).requires_grad_(False)


def own_weight(layer: nn.Module) -> Tensor:
    return layer.weight.double()


def nf4(compute_dtype: torch.dtype, double_quant: bool = False, of: torch.dtype = torch.float32) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(IN, OUT, True, compute_dtype, double_quant, "nf4").to(of)
    return layer.to("cpu").requires_grad_(False)


def nf4_weight(layer: nn.Module) -> Tensor:
    state, codes = layer.weight.quant_state, layer.weight.data.flatten()
    absmax = state.absmax.double()
    if state.nested:
        inner = state.state2
        absmax = (
            inner.code.double()[state.absmax.int()].view(-1)
            * inner.absmax.double().repeat_interleave(inner.blocksize)[: len(absmax)]
        )
        absmax = absmax + state.offset.double()
    values = NF4[torch.stack((codes >> 4, codes & 15), 1).flatten().int()]
    return (values.view(-1, state.blocksize) * absmax[:, None]).view(OUT, IN)


def int8(threshold: float) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=threshold)
    return layer.to("cpu").requires_grad_(False)


def int8_weight(layer: nn.Module) -> Tensor:
    held = layer.weight if layer.weight.CB is not None else layer.state
    return held.CB.double() * held.SCB.double()[:, None] / 127


def torchao(config: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    layer = dense(dtype)
    quantization.quantize_(layer, getattr(quantization, config)())
    return layer


def torchao_weight(layer: nn.Module) -> Tensor:
    return layer.weight.qdata.double() * layer.weight.scale.double()


@dataclass(frozen=True)
class Base:
    make: Callable[[], nn.Module]
    weight: Callable[[nn.Module], Tensor]  # W0 in float64, by arithmetic of the test's own
    x_dtype: torch.dtype = torch.float32
    rounding: float = 2e-6  # of the dtype the layer computes in while training
    in_eval: float | None = None  # where a layer computes otherwise then


HALF = {torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
ROUGH = 2.5e-2  # the layer rounds its input to 8 bits
BASES = {
    "float32": Base(lambda: dense(torch.float32), own_weight),
    "bfloat16": Base(lambda: dense(torch.bfloat16), own_weight, torch.bfloat16, HALF[torch.bfloat16]),
    "float16": Base(lambda: dense(torch.float16), own_weight, torch.float16, HALF[torch.float16]),
    # In eval mode bitsandbytes computes in bfloat16 on CPUs that can.
    "NF4": Base(lambda: nf4(torch.float32), nf4_weight, in_eval=HALF[torch.bfloat16]),
    "NF4 with double quantisation": Base(lambda: nf4(torch.float32, True), nf4_weight, in_eval=HALF[torch.bfloat16]),
    "NF4 of a bfloat16 weight, computing in bfloat16": Base(
        lambda: nf4(torch.bfloat16, True, torch.bfloat16), nf4_weight, torch.bfloat16, HALF[torch.bfloat16]
    ),
    "LLM.int8": Base(lambda: int8(0.0), int8_weight, in_eval=ROUGH),
    "LLM.int8 with outliers": Base(lambda: int8(6.0), int8_weight, in_eval=ROUGH),
    "LLM.int8 in float16": Base(lambda: int8(0.0), int8_weight, torch.float16, HALF[torch.float16], ROUGH),
    "torchao int8": Base(lambda: torchao("Int8WeightOnlyConfig"), torchao_weight),
    "torchao int8 of a bfloat16 weight": Base(
        lambda: torchao("Int8WeightOnlyConfig", torch.bfloat16), torchao_weight, torch.bfloat16, HALF[torch.bfloat16]
    ),
    "torchao float8": Base(lambda: torchao("Float8WeightOnlyConfig"), lambda layer: layer.weight.dequantize().double()),
    "torchao dynamic int8": Base(
        lambda: torchao("Int8DynamicActivationInt8WeightConfig"), torchao_weight, rounding=ROUGH
    ),
}
every_base = pytest.mark.parametrize("name", BASES)
packed = pytest.mark.parametrize("name", [name for name in BASES if "float" not in name or " " in name])


def adapt(module: nn.Module, kind: str, rank: int = RANK) -> tuple[AdaptedLayer, LoRAUpdate]:
    """The layer with one update as if trained: B away from zero, magnitudes away from the norms."""
    frozen = freeze_view(module)
    assert frozen is not None
    g = torch.Generator().manual_seed(0)
    update = UPDATES[kind](frozen, rank, ALPHA / rank, generator=g)
    perturb_update(update, g, 0.02)
    layer = AdaptedLayer(module, frozen)
    layer.updates["0"] = update
    return layer, update


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows with an outlier each, as language models have them: LLM.int8 keeps what is above its threshold."""
    x = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(9))
    x[..., 7] = 8
    return x.to(dtype)


def formula(W0: Tensor, update: LoRAUpdate) -> tuple[Tensor, dict[str, Tensor]]:
    """W' by the plain formula in float64, and the leaves to take gradients of."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in update.named_parameters()}
    return formula_weight(W0, leaves, update.scale), leaves


# Known kinds: numbers.


@every_base
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_norms_and_products_are_those_of_the_unpacked_weight(name, training):
    """In eval mode too, where LLM.int8 rounds its input."""
    base = BASES[name]
    module = base.make().train(training)
    W0, view, A, B = base.weight(module), freeze_view(module), torch.randn(RANK, IN), torch.randn(RANK, OUT)
    # torchao's own dequantised weight is in the dtype of the weight it was made of.
    rounding = 2e-3 if "torchao int8 of" in name else 1e-6
    assert relative_error(view.squared_norms(), W0.square().sum(1)) < rounding
    assert relative_error(view.squared_norms(by_input=True), W0.square().sum(0)) < 2 * rounding
    assert relative_error(view.times_weight(A), W0 @ A.double().T) < 2 * rounding
    assert relative_error(view.transposed(B), B.double() @ W0) < 2 * rounding
    assert relative_error(view.dense_weight(), W0) < 2 * rounding
    assert view.squared_norms().dtype == view.times_weight(A).dtype == view.dense_weight().dtype == torch.float32


@pytest.mark.parametrize("shape", [(48, 192), (33, 100), (64, 4096)], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_4bit_weight_read_in_several_chunks_is_whole(shape, double_quant, quant_type, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("dora_diffusion.adapters.packed.CHUNK", 2000)  # a few rows, or less than one
    out_features, in_features = shape
    layer = bnb.nn.Linear4bit(in_features, out_features, True, torch.float32, double_quant, quant_type).to("cpu")
    whole = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    parts = list(freeze_view(layer).rows())
    assert len(parts) > 1 or in_features == 100
    assert torch.equal(torch.cat(parts), whole)


@kinds
@every_base
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_output_and_gradients_are_the_plain_formulas(name, kind, training):
    base = BASES[name]
    module = base.make()
    W0, bias = base.weight(module), module.bias.double()
    layer, update = adapt(module, kind)
    layer.train(training)
    x, x64 = example(base.x_dtype).requires_grad_(), example(base.x_dtype).double().requires_grad_()
    W, leaves = formula(W0, update)
    assert relative_error(W, W0) > 0.1, "the adapter must change something for this test to mean anything"
    y, y64 = layer(x), F.linear(x64, W, bias)
    assert y.dtype == base.x_dtype
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y.backward(dy)
    y64.backward(dy.double())

    allowed = base.rounding if training or base.in_eval is None else base.in_eval
    assert relative_error(y, y64) < allowed
    assert relative_error(x.grad, x64.grad) < allowed
    for leaf, parameter in update.named_parameters():
        assert relative_error(parameter.grad, leaves[leaf].grad) < 2 * allowed, leaf


@kinds
@every_base
def test_ten_steps_lower_the_loss(name, kind):
    base = BASES[name]
    module = base.make()
    layer, update = adapt(module, kind)
    x = example(base.x_dtype)
    target = F.linear(x, (base.weight(module) * 1.3).to(x.dtype))
    optimizer = torch.optim.AdamW(update.parameters(), lr=1e-2)
    losses = []
    for _ in range(11):
        loss = F.mse_loss(layer(x).float(), target.float())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[10] < 0.9 * losses[0]


# Known kinds: nothing is unpacked for good, nothing is changed.


@pytest.fixture
def tensors_of_weight_size() -> Iterator[Callable[[], int]]:
    """Counts the floating-point tensors that were made in this test, live, and are as large as the weight."""

    def count() -> int:
        gc.collect()
        # Some objects lie about their class, or import a library to tell it.
        tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
        return sum(t.is_floating_point() and t.numel() >= IN * OUT for t in tensors)

    gc.freeze()  # what is there already is not looked at
    yield count
    gc.unfreeze()


def weights_kept_for_backward(layer: nn.Module, x: Tensor) -> int:
    """How many floating-point tensors of the weight's size the graph of one call holds."""
    kept = []

    def note(t: Tensor) -> Tensor:
        kept.append(t.is_floating_point() and t.numel() >= IN * OUT and type(t) in (Tensor, nn.Parameter))
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(x.detach().requires_grad_())
    return sum(kept)


@kinds
@packed
def test_no_dense_copy_is_kept(name, kind, tensors_of_weight_size):
    module = BASES[name].make()
    x = example(BASES[name].x_dtype)
    before = tensors_of_weight_size()
    kept_alone = weights_kept_for_backward(module, x)  # a first call, in which bitsandbytes casts the bias
    size = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    layer, update = adapt(module, kind)
    assert weights_kept_for_backward(layer, x) <= kept_alone
    layer(x.requires_grad_()).sum().backward()
    assert tensors_of_weight_size() <= before
    adapter = 4 * (RANK * (IN + OUT) + {"dora": OUT, BY_INPUT: IN, "lora": 0}[kind])
    assert sum(p.nbytes for p in update.parameters()) == adapter
    assert sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) == size + adapter


@kinds
@packed
def test_fusing_into_a_packed_layer_is_refused(name, kind):
    module = BASES[name].make()
    layer, _ = adapt(module, kind)
    with pytest.raises(AdapterStateError, match=f"cannot fuse into a {type(module).__name__}: its weight is packed"):
        layer.set_fused(("0",))
    assert layer.fused == ()


@kinds
@every_base
def test_ejecting_gives_back_the_same_module_and_bits(name, kind):
    base = BASES[name]
    model = nn.Sequential(base.make(), nn.ReLU()).train()
    module, W0, x = model[0], base.weight(model[0]), example(base.x_dtype)
    y = model(x)
    adapter = perturb(inject_adapter(model, config_of(kind, rank=RANK, target_modules=("0",))))
    assert not torch.equal(model(x), y)
    adapter.eject()
    assert model[0] is module
    assert torch.equal(base.weight(module), W0)
    assert torch.equal(model(x), y)


def test_a_4bit_layer_that_was_never_moved_is_refused_with_the_way_out():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(IN, OUT))
    with pytest.raises(TargetError, match=r"Linear4bit that is not quantised yet.*Call model.to\(device\) first"):
        inject_adapter(model, AdapterConfig(target_modules=("0",)))


@kinds
@pytest.mark.slow
@pytest.mark.parametrize("name", ["NF4", "LLM.int8", "torchao int8"])
def test_a_packed_layer_compiles_to_the_same_numbers(name, kind):
    torch._dynamo.reset()
    layer, update = adapt(BASES[name].make(), kind)

    def numbers(call: nn.Module) -> list[Tensor]:
        x = example().requires_grad_()
        update.zero_grad()
        y = call(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad.clone() for p in update.parameters())]

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(numbers(compiled), numbers(layer), strict=True))


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(monkeypatch, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    root = Path(__file__).parent.parent
    code = (root / "docs" / "quantised.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert "steps=40" in code
    (tmp_path / "samples").symlink_to(root / "samples")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("steps=40", "steps=2"), {})
    assert "Finished(kind='dora'" in capsys.readouterr().out


# bitsandbytes repacks a 4-bit weight for inference on CPUs with AVX512-BF16, and has no gradient for it afterwards.


def repacked(double_quant: bool) -> tuple[nn.Module, Tensor]:
    module = nf4(torch.float32, double_quant)
    W0 = nf4_weight(module)
    with torch.no_grad():
        module.eval()(torch.randn(2, IN))
    if not getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU's inference leaves the weight as it was")
    return module, W0


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_repacked_for_the_cpu_is_still_read(double_quant):
    module, W0 = repacked(double_quant)
    view, A = freeze_view(module), torch.randn(RANK, IN)
    one_rounding = 2**-8  # of the block's largest value
    assert relative_error(torch.cat(list(view.rows())), W0) < one_rounding
    assert relative_error(view.times_weight(A), W0 @ A.double().T) < one_rounding
    assert relative_error(view.squared_norms(), W0.square().sum(1)) < 2 * one_rounding


def test_a_layer_without_a_gradient_of_its_own_passes_one_on():
    module, W0 = repacked(False)
    view, x = freeze_view(module), example().requires_grad_()
    module.train()
    y = view.output(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    with torch.no_grad():
        assert torch.equal(y, module(x))
    assert relative_error(x.grad, dy.double() @ W0) < 2**-8


@kinds
def test_training_goes_on_after_a_preview_repacked_the_weight(kind):
    module, _ = repacked(True)
    layer, update = adapt(module.train(), kind)
    W, leaves = formula(torch.cat(list(freeze_view(module).rows())), update)
    x, x64 = example().requires_grad_(), example().double().requires_grad_()
    y, y64 = layer(x), F.linear(x64, W, module.bias.double())
    dy = torch.randn_like(y)
    y.backward(dy)
    y64.backward(dy.double())
    assert relative_error(y, y64) < HALF[torch.bfloat16]
    assert relative_error(x.grad, x64.grad) < 2e-6
    for leaf, parameter in update.named_parameters():
        assert relative_error(parameter.grad, leaves[leaf].grad) < 2 * HALF[torch.bfloat16], leaf


def test_a_layer_with_a_gradient_of_its_own_keeps_it():
    x = example().requires_grad_()
    module = BASES["NF4"].make()
    assert freeze_view(module).output(x).grad_fn.name() == module(x).grad_fn.name()


# Layers of unknown types.


class Factors(nn.Module):
    """A product of two factors, with the bias where nobody looks for it."""

    in_features, out_features = IN, OUT

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, 24, bias=False), nn.Linear(24, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def matrix(self) -> Tensor:
        return self.second.weight.double() @ self.first.weight.double()

    def offset(self) -> Tensor:
        return self.second.bias.double()


class BlockCirculant(nn.Module):
    """Square circulant blocks, each kept as its first column and multiplied by Fourier transforms."""

    in_features, out_features, block = IN, OUT, 32

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first_columns", torch.randn(OUT // 32, IN // 32, 32) / IN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x.unflatten(-1, (-1, self.block)))
        y = torch.einsum("oif,...if->...of", torch.fft.rfft(self.first_columns), spectrum)
        return torch.fft.irfft(y, n=self.block).flatten(-2)

    def matrix(self) -> Tensor:
        i = torch.arange(self.block)
        blocks = self.first_columns.double()[:, :, (i[:, None] - i) % self.block]  # [out, in, row, column]
        return blocks.permute(0, 2, 1, 3).reshape(OUT, IN)

    def offset(self) -> Tensor:
        return torch.zeros(OUT, dtype=torch.float64)


class LookUp(nn.Module):
    """4-bit codes into a table, in bfloat16 only, with a bias in that dtype."""

    in_features, out_features = IN, OUT

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(16, (OUT, IN), dtype=torch.uint8))
        self.register_buffer("table", (torch.randn(16) / IN**0.5).bfloat16())
        self.bias = nn.Parameter(torch.randn(OUT).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.table[self.codes.int()], self.bias)

    def matrix(self) -> Tensor:
        return self.table.double()[self.codes.int()]

    def offset(self) -> Tensor:
        return self.bias.double()


class Equalised(nn.Linear):
    """StyleGAN's linear layer: the matrix that counts is not the one in `weight`."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 1.7, self.bias * 0.5)

    def matrix(self) -> Tensor:
        return self.weight.double() * 1.7

    def offset(self) -> Tensor:
        return self.bias.double() * 0.5


UNKNOWN = {cls.__name__: cls for cls in (Factors, BlockCirculant, LookUp, Equalised)}
unknown = pytest.mark.parametrize("name", UNKNOWN)


@kinds
@unknown
def test_an_unknown_layers_output_and_gradients_are_the_plain_formulas(name, kind):
    module = UNKNOWN[name]().requires_grad_(False)
    layer, update = adapt(module, kind)
    half = name == "LookUp"
    allowed = HALF[torch.bfloat16] if half else 5e-6
    x = example(torch.bfloat16 if half else torch.float32)
    x, x64 = x.requires_grad_(), x.detach().double().requires_grad_()
    W, leaves = formula(module.matrix(), update)
    y, y64 = layer(x), F.linear(x64, W, module.offset())
    dy = torch.randn(y.shape).to(y.dtype)
    y.backward(dy)
    y64.backward(dy.double())
    assert relative_error(y, y64) < allowed
    assert relative_error(x.grad, x64.grad) < allowed
    for leaf, parameter in update.named_parameters():
        assert relative_error(parameter.grad, leaves[leaf].grad) < 2 * allowed, leaf


@unknown
def test_an_unknown_layers_norms_leave_out_its_bias_wherever_it_is(name):
    module = UNKNOWN[name]().requires_grad_(False)
    view = freeze_view(module)
    assert relative_error(view.squared_norms(), module.matrix().square().sum(1)) < 2e-6
    dtype, rounding = (torch.bfloat16, 4e-3) if name == "LookUp" else (torch.float32, 4e-6)
    A = 0.01 * torch.randn(RANK, IN)
    assert relative_error(view.times_weight(A), module.matrix() @ A.double().T) < rounding
    y0 = view.unbiased(example(dtype))
    assert relative_error(y0, example(dtype).double() @ module.matrix().T) < rounding


@unknown
def test_an_unknown_layer_is_not_fused_and_ejects(name):
    model = nn.Sequential(UNKNOWN[name]().requires_grad_(False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = perturb(inject_adapter(model, AdapterConfig(rank=RANK, target_modules=("0",))))
    with pytest.raises(AdapterStateError, match=f"cannot fuse into a {name}"):
        adapter.fuse()
    adapter.eject()
    assert type(model[0]).__name__ == name
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_parametrized_weight_is_not_written_to():
    """Its `weight` is computed for every call, so what is written there is lost."""
    module = parametrizations.weight_norm(nn.Linear(IN, OUT)).requires_grad_(False)
    layer, update = adapt(module, "dora")
    x = example()
    assert (
        relative_error(layer(x), F.linear(x.double(), adapted_weight(module.weight, update), module.bias.double()))
        < 5e-6
    )
    with pytest.raises(AdapterStateError, match="cannot fuse into"):
        layer.set_fused(("0",))


def test_an_offloaded_layer_is_asked_for_products():
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh()).requires_grad_(False)
    W0, bias = model[0].weight.double(), model[0].bias.double()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].weight.is_meta
    adapter = perturb(inject_adapter(model, AdapterConfig(rank=RANK, target_modules=("0",))), size=0.02)
    update = adapter.updates()["0"]
    x = example()
    W, leaves = formula(W0, update)
    expected = torch.tanh(F.linear(x.double(), W, bias))
    y = model(x)
    y.sum().backward()
    expected.sum().backward()
    assert relative_error(y, expected) < 5e-6
    assert relative_error(update.lora_A.grad, leaves["lora_A"].grad) < 1e-5
    assert model[0].base.weight.is_meta


def test_a_layer_without_a_gradient_and_without_a_known_packing_passes_one_on():
    class Detached(Factors):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    module, x = Detached().requires_grad_(False), example().requires_grad_()
    y = freeze_view(module).output(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert relative_error(x.grad, dy.double() @ module.matrix()) < 2e-6


# What is no frozen linear map, or would never be called.


class Perceptron(Factors):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class TwoInputs(Factors):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x * scale)


class Pooled(Factors):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0)


@pytest.mark.parametrize(
    "module, word",
    [
        (Perceptron, "cannot put DoRA on a Perceptron: it is no linear map"),
        (TwoInputs, "cannot adapt a TwoInputs: .*missing 1 required positional argument"),
        (Pooled, "cannot adapt a Pooled: its output has another shape"),
    ],
)
def test_a_module_that_is_no_linear_map_is_refused(module, word):
    with pytest.raises(TargetError, match=word + ".*Leave it out of target_modules"):
        inject_adapter(nn.Sequential(module()), AdapterConfig(target_modules=("0",)))


def test_the_attention_module_whose_projection_is_never_called_is_left_alone():
    """nn.MultiheadAttention reads out_proj.weight and never calls out_proj: an adapter there would do nothing."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "out": nn.Linear(32, 32)})
    calls = []
    model.attention.out_proj.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(5, 2, 32)
    model.attention(x, x, x)
    assert not calls
    assert freeze_view(model.attention.out_proj) is None
    with pytest.raises(TargetError, match="'out_proj' matches no layer"):
        inject_adapter(model, AdapterConfig(target_modules=("out_proj",)))


def test_sizes_that_are_no_numbers_make_no_linear_layer():
    assert freeze_view(nn.LazyLinear(4)) is None
    assert isinstance(freeze_view(nn.Linear(3, 4)), FrozenLinear)


LOW_RANK = {"lora_A": 0.1 * torch.ones(RANK, IN), "lora_B": 0.1 * torch.ones(OUT, RANK)}
BESIDE = {"alone": {}, "B A": LOW_RANK, "a magnitude": {**LOW_RANK, "magnitude": torch.linspace(0.5, 2, OUT)}}


@every_base
@pytest.mark.parametrize("beside", BESIDE)
def test_a_change_of_the_bias_is_added_to_the_output_of_any_layer(name, beside):
    """Packed ones add their bias themselves: the change comes after it, and no magnitude touches it."""
    base = BASES[name]
    module, b = base.make(), torch.randn(OUT, generator=torch.Generator().manual_seed(2))
    found = []
    for change in (torch.zeros(OUT), b):
        held = {**BESIDE[beside], "bias_difference": change}
        layer = AdaptedLayer(module, freeze_view(module))
        layer.updates["0"] = update_of(held)(layer.frozen, RANK, 1.0, tensors=held)
        layer.updates["0"].strength = 0.7
        with torch.no_grad():
            found.append(layer(example(base.x_dtype)).double())
    added = found[1] - found[0] - 0.7 * b.double()
    assert added.abs().max() <= base.rounding * found[1].abs().max()
