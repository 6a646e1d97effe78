"""What the denoiser is told beside the noisy latents and the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Conditioning"]


@dataclass(frozen=True)
class Conditioning:
    """Tensors by the denoiser's own names for them; every one's first axis is the batch.

    Embeddings [batch, tokens, features] of texts of different lengths are filled up with zeros; families that must
    know which are real have a `mask` [batch, tokens] of ones and zeros beside them.
    """

    tensors: Mapping[str, Tensor]

    def __getitem__(self, index: Tensor | list[int]) -> Conditioning:
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        return Conditioning({name: tensor.to(device, dtype) for name, tensor in self.tensors.items()})

    @staticmethod
    def stack(parts: list[Conditioning]) -> Conditioning:
        return Conditioning({name: _stack([p.tensors[name] for p in parts]) for name in parts[0].tensors})


def _stack(rows: list[Tensor]) -> Tensor:
    longest = max(row.shape[1] for row in rows)
    return torch.cat([F.pad(row, (0, 0) * (row.dim() - 2) + (0, longest - row.shape[1])) for row in rows])
