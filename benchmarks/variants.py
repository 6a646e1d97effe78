"""Who is timed: the frozen base, PEFT, LyCORIS and this project, each used as its own documentation says.

A variant adapts a copy of the model that shares every frozen parameter with the other copies, so that seven of them
cost the memory of one. All get the same A, B and m, layer by layer, with B away from zero.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.factors import ALPHA_PER_RANK, Factors, set_factors
from dora_diffusion.adapters.injection import Adapter, AdapterConfig, inject_adapter
from dora_diffusion.adapters.labels import Trained

__all__ = [
    "BY_INPUT",
    "KINDS",
    "VARIANTS",
    "Adapted",
    "Variant",
    "adapt",
    "available",
    "kernels_of",
    "preload",
    "shared_copy",
]

BY_INPUT = "dora by input"  # the kind whose norm runs over each input's column


@dataclass(frozen=True)
class Kind:
    """What variants of one kind compute: LyCORIS's name of the algorithm, this project's, and the magnitudes."""

    algorithm: str
    parametrisation: Trained
    magnitude: str | None = None

    def parameters(self, part: nn.Module) -> dict[str, nn.Parameter]:
        """Of a layer's module of LyCORIS, by this project's names."""
        if self.algorithm == "locon":
            found: dict[str, nn.Parameter] = {
                name: part.get_parameter(f"{theirs}.weight")
                for name, theirs in (("lora_A", "lora_down"), ("lora_B", "lora_up"))
            }
        else:
            found = {name: p for name, p in sorted(part.named_parameters()) if name.startswith(("lokr_", "hada_"))}
        return found | ({self.magnitude: part.dora_scale} if self.magnitude else {})  # type: ignore[dict-item, return-value]


KINDS = {
    "lora": Kind("locon", "lora"),
    "dora": Kind("locon", "lora", "magnitude"),
    BY_INPUT: Kind("locon", "lora", "input_magnitude"),
    "lokr": Kind("lokr", "lokr"),
    "dokr": Kind("lokr", "lokr", "magnitude"),
    "loha": Kind("loha", "loha"),
    "doha": Kind("loha", "loha", "magnitude"),
}


@dataclass
class Injected:
    """What a library's injection gives back: the factors by layer, and what has to be kept and switched with them."""

    factors: Mapping[str, Factors]
    network: nn.Module | None = None  # parameters that are not inside the model (LyCORIS)
    adapter: Adapter | None = None  # this project's handle


Inject = Callable[[nn.Module, tuple[str, ...], tuple[str, ...], int], Injected]


@dataclass(frozen=True)
class Variant:
    """One row of the tables. `kind` is what it computes; variants of one kind must give the same numbers."""

    name: str
    label: str
    kind: str
    inject: Inject | None = None
    needs: str = "torch"
    fused: bool = False
    other_gradients: bool = False  # by its own definition; its note says which
    note: str = ""


def _peft(kind: str) -> Inject:
    def inject(model: nn.Module, targets: tuple[str, ...], layers: tuple[str, ...], rank: int) -> Injected:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=rank, lora_alpha=ALPHA_PER_RANK * rank, target_modules=list(targets), use_dora=kind == "dora"
        )
        inject_adapter_in_model(config, model)
        return Injected({path: _peft_factors(model.get_submodule(path), kind) for path in layers})

    return inject


def _peft_factors(layer: nn.Module, kind: str) -> Factors:
    part = {name: getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B")}
    if kind == "dora":
        part["magnitude"] = layer.lora_magnitude_vector["default"].weight  # type: ignore[index, union-attr]
    return part


def _lycoris(kind: str, **options: object) -> Inject:
    def inject(model: nn.Module, targets: tuple[str, ...], layers: tuple[str, ...], rank: int) -> Injected:
        from lycoris import LycorisNetwork
        from lycoris.logging import logger

        logger.setLevel(logging.ERROR)

        paths = {id(model.get_submodule(path)): path for path in layers}
        # Its presets are class attributes; its patterns are matched from the start of a name, so they get an end.
        names = [rf"(.*\.)?{re.escape(target)}$" for target in targets]
        LycorisNetwork.apply_preset({"enable_conv": True, "target_module": [], "target_name": names})
        alpha = ALPHA_PER_RANK * rank
        network = LycorisNetwork(
            model,
            lora_dim=rank,
            conv_lora_dim=rank,
            alpha=alpha,
            conv_alpha=alpha,
            network_module=KINDS[kind].algorithm,
            weight_decompose=KINDS[kind].magnitude is not None,
            wd_on_out=kind != BY_INPUT,
            warn_on_unmatched=False,
            **options,
        )
        network.apply_to()
        network.to(next(model.parameters()).device)
        found = {paths[id(part.org_module[0])]: part for part in network.loras}
        return Injected({path: KINDS[kind].parameters(part) for path, part in found.items()}, network=network)

    return inject


def _own(kind: str) -> Inject:
    def inject(model: nn.Module, targets: tuple[str, ...], layers: tuple[str, ...], rank: int) -> Injected:
        config = AdapterConfig(
            kind="dora" if KINDS[kind].magnitude else "lora",
            parametrisation=KINDS[kind].parametrisation,
            rank=rank,
            alpha=ALPHA_PER_RANK * rank,
            target_modules=targets,
            norm_axis="input" if kind == BY_INPUT else "output",
        )
        adapter = inject_adapter(model, config, seed=0)
        factors = {path: dict(update.named_parameters()) for path, update in adapter.updates().items()}
        return Injected(factors, adapter=adapter)

    return inject


NORM_IN_GRAPH = "as with LoCon's dora_wd, the norm is not a constant in the backward pass."

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("base", "frozen base alone", "base"),
        Variant("peft-lora", "PEFT LoRA", "lora", _peft("lora"), "peft"),
        Variant("peft-dora", "PEFT DoRA", "dora", _peft("dora"), "peft"),
        Variant("lycoris-locon", "LyCORIS LoCon", "lora", _lycoris("lora"), "lycoris"),
        Variant(
            "lycoris-bypass",
            "LyCORIS LoCon, bypass_mode",
            "lora",
            _lycoris("lora", bypass_mode=True),
            "lycoris",
            note="its option that keeps the low-rank product apart; it has none for dora_wd. Only when asked for.",
        ),
        Variant(
            "lycoris-dora",
            "LyCORIS LoCon dora_wd",
            "dora",
            _lycoris("dora"),
            "lycoris",
            other_gradients=True,
            note="the norm runs over the output axis (wd_on_out, its default) as in the paper, but it is not a "
            "constant in the backward pass, so the gradients of A and B are others than the paper's; at strengths "
            "other than 1 it interpolates m/n and keeps s B A whole.",
        ),
        Variant(
            "lycoris-dora-in",
            "LyCORIS LoCon dora_wd by input",
            BY_INPUT,
            _lycoris(BY_INPUT),
            "lycoris",
            other_gradients=True,
            note="wd_on_out=False; as dora_wd, the norm is not a constant in the backward pass.",
        ),
        Variant("lora", "LoRA here", "lora", _own("lora")),
        Variant("dora", "DoRA here", "dora", _own("dora")),
        Variant("dora-in", "DoRA here, by input", BY_INPUT, _own(BY_INPUT)),
        Variant("dora-fused", "DoRA here, fused", "dora", _own("dora"), fused=True),
        *(
            Variant(
                f"lycoris-{kind}",
                f"LyCORIS {label}",
                kind,
                _lycoris(kind),
                "lycoris",
                other_gradients=decomposed,
                note=note,
            )
            for kind, label, decomposed, note in (
                ("lokr", "LoKr", False, ""),
                ("dokr", "LoKr dora_wd", True, NORM_IN_GRAPH),
                ("loha", "LoHa", False, ""),
                ("doha", "LoHa dora_wd", True, NORM_IN_GRAPH),
            )
        ),
        Variant("lokr", "LoKr here", "lokr", _own("lokr")),
        Variant("dokr", "DoKR here", "dokr", _own("dokr")),
        Variant("loha", "LoHa here", "loha", _own("loha")),
        Variant("doha", "DoHa here", "doha", _own("doha")),
    )
}


@dataclass
class Adapted:
    """A variant in a model, ready to run."""

    variant: Variant
    model: nn.Module
    injected: Injected = field(default_factory=lambda: Injected({}))

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for factors in self.injected.factors.values() for parameter in factors.values()]

    def train(self, mode: bool) -> None:
        self.model.train(mode)
        if self.injected.network is not None:
            self.injected.network.train(mode)

    def cast(self, dtype: torch.dtype) -> None:
        """The adapter's own tensors in this dtype; this project's stay float32, as its users have them."""
        if self.injected.adapter is None:
            for parameter in self.trainable:
                parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def touch(self) -> None:
        """Write to the adapter as an optimizer would, so that nothing kept from one step can serve the next."""
        for parameter in self.trainable:
            parameter.mul_(1)


def available(names: Iterable[str]) -> list[str]:
    """Those of the named variants whose library is installed."""
    return [name for name in names if importlib.util.find_spec(VARIANTS[name].needs) is not None]


def kernels_of(adapted: Adapted) -> str:
    """The backend that LyCORIS chooses for these tensors: "triton", "tilelang", "compile" or plain "torch"."""
    from lycoris.kernels.select import choose

    factors = next(iter(adapted.injected.factors.values()))
    return str(choose(tuple(factor.detach() for factor in factors.values())))


def preload() -> None:
    """Import every library that is installed."""
    for name in {VARIANTS[name].needs for name in available(VARIANTS)}:
        importlib.import_module(name)


def shared_copy(model: nn.Module, private: Iterable[str] = ()) -> nn.Module:
    """The model's structure anew, on the very same parameters and buffers; layers in `private` get weights of their
    own."""
    own = {id(t) for path in private for t in model.get_submodule(path).parameters()}
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors if id(t) not in own})


def adapt(variant: Variant, base: nn.Module, targets: tuple[str, ...], layers: tuple[str, ...], rank: int) -> Adapted:
    """The variant in a shared copy of the base, its factors set to the common values."""
    if variant.inject is None:
        return Adapted(variant, shared_copy(base))
    model = shared_copy(base, private=layers if variant.fused else ())
    injected = variant.inject(model, targets, layers, rank)
    if set(injected.factors) != set(layers):
        raise AssertionError(f"{variant.label} adapts {len(injected.factors)} layers and not these {len(layers)}")
    adapted = Adapted(variant, model, injected)
    adapted.cast(torch.float32)
    set_factors(injected.factors, base)
    return adapted
