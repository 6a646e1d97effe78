"""Files of every form that LyCORIS trains, written by LyCORIS itself over small models of the real classes."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

lycoris = pytest.importorskip("lycoris")
logging.getLogger("LyCORIS").setLevel(logging.ERROR)

ALGORITHMS: dict[str, dict[str, object]] = {
    "loha": {"algo": "loha"},
    "loha tucker": {"algo": "loha", "use_tucker": True},
    "loha, alpha by the root": {"algo": "loha", "rs_lora": True},
    "loha, trained scalar": {"algo": "loha", "use_scalar": True},
    "loha dora": {"algo": "loha", "dora_wd": True},
    "loha dora by input": {"algo": "loha", "dora_wd": True, "wd_on_output": False},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr, closest factors": {"algo": "lokr"},
    "lokr, both low-rank": {"algo": "lokr", "decompose_both": True, "factor": 16, "linear_dim": 2, "conv_dim": 2},
    "lokr tucker": {"algo": "lokr", "use_tucker": True, "factor": 2},
    "lokr, alpha by the root": {"algo": "lokr", "factor": 4, "rs_lora": True},
    "lokr whole": {"algo": "lokr", "full_matrix": True, "factor": 8},
    "lokr, unbalanced": {"algo": "lokr", "factor": 4, "unbalanced_factorization": True},
    "lokr dora": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "lokr dora by input": {"algo": "lokr", "factor": 4, "dora_wd": True, "wd_on_output": False},
    "glora": {"algo": "glora"},
    "oft": {"algo": "diag-oft"},
    "oft, constrained and rescaled": {"algo": "diag-oft", "constraint": 0.001, "rescaled": True},
    "boft": {"algo": "boft"},
    "boft, rescaled": {"algo": "boft", "rescaled": True},
    "ia3": {"algo": "ia3"},
    "ia3 by input": {"algo": "ia3", "train_on_input": True},
    "locon dora by input": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
}

WITH_NORMS: dict[str, dict[str, object]] = {
    "locon, norms": {"algo": "locon", "train_norm": True},
    "lokr dora, norms": {"algo": "lokr", "factor": 4, "dora_wd": True, "train_norm": True},
    "full, norms": {"algo": "full", "train_norm": True},
}


@dataclass
class Written:
    """A file, and what its writer computes: W' - W0 of each layer of the model, in its own words."""

    path: Path
    deltas: dict[str, Tensor]


ITS_OWN = {name: value for name, value in vars(lycoris.LycorisNetwork).items() if name.isupper()}


def preset(changes: dict[str, object]) -> None:
    """What LyCORIS names and wraps from here on: it keeps this for the process, whoever said it last."""
    for name, value in ITS_OWN.items():
        setattr(lycoris.LycorisNetwork, name, copy.copy(value))
    lycoris.LycorisNetwork.apply_preset(changes)


def wrapped(model: nn.Module, algorithm: str, seed: int = 0) -> nn.Module:
    """LyCORIS's own network over all layers of the model, with random values everywhere."""
    preset({"enable_conv": True, "target_module": [type(model).__name__]})
    options = {
        "linear_dim": 4,
        "linear_alpha": 3.0,
        "conv_dim": 4,
        "conv_alpha": 3.0,
        **(ALGORITHMS | WITH_NORMS)[algorithm],
    }
    torch.manual_seed(seed)
    network = lycoris.create_lycoris(model, 1.0, **options)
    network.apply_to()  # which makes its modules known to it; it stays out of the model's way
    network.restore()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("dora_scale"):
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
            elif parameter.dim() == 0:
                parameter.fill_(0.7)
            elif name.endswith("rescale"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@torch.no_grad()
def write(model: nn.Module, algorithm: str, path: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Written:
    """LyCORIS's file of this algorithm over the model, which is left as it was."""
    network = wrapped(model, algorithm, seed)
    network.save_weights(str(path), dtype, {})
    named = {id(module): name for name, module in model.named_modules()}
    return Written(path, {named[id(module.org_module[0])]: delta_of(module) for module in network.loras})


def delta_of(module: nn.Module) -> Tensor:
    """W' - W0 of one of LyCORIS's modules: the weight that its own forward adds to the base's output.

    (Its `get_merged_weight` applies the scale of LoHa and LoKr twice.)
    """
    seen: list[Tensor] = []
    op = module.op

    def remember(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: object) -> Tensor:
        seen.append(weight)
        return op(x, weight, bias, **options)

    module.op = remember
    layer = module.org_module[0]
    sizes = (layer.in_features,) if isinstance(layer, nn.Linear) else (layer.in_channels, 8, 8)
    module(torch.zeros(1, *sizes))
    module.op = op
    [delta] = seen
    return delta.reshape(layer.weight.shape)
