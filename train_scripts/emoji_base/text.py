"""Small CLIP text encoders whose token embeddings start far apart."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer

from .tokenizer import MAX_TOKENS

Encoder = TypeVar("Encoder", bound=nn.Module)


def text_config(tokenizer: CLIPTokenizer, width: int, heads: int) -> CLIPTextConfig:
    """Three layers of this width."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def spread_embeddings(encoder: Encoder) -> Encoder:
    """Draws the embeddings anew, wide enough that words are told apart from the first step."""
    for name, parameter in encoder.named_parameters():
        if "token_embedding" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "position_embedding" in name:
            nn.init.normal_(parameter, std=0.2)
    return encoder
