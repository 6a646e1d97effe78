"""Words that come with an adapter: embeddings (textual inversion) in its file, and in a pipeline while it is in.

OneTrainer and kohya's programs write `bundle_emb.<word>.<encoder>` beside the layers. A word is no change of a layer:
the tokenizer learns it, and the text encoder has a vector, or several, for it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dora_diffusion.formats.anatomy import Model
from dora_diffusion.formats.names import encoder_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Vocabulary", "Word", "split_off", "vocabulary_of"]

_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\.\*|[a-z0-9_]+?)(_out)?")
# Of embeddings and their training, what stands in a file beside layers and is of none of them.
_LOOSE = re.compile(
    r"bundle_emb\..+|emb_params|string_to_(?:param|token)(?:\..+)?|(?:clip_[lgh]|t5|t5xxl|llama)(?:_out)?"
)
_REGISTRY = "_dora_diffusion_words"  # a pipeline's attribute: what its encoders were before they learned words


@dataclass(frozen=True)
class Word:
    """A word with its vectors [n, width] for one text encoder, by the name that the file has for that."""

    key: str
    text: str
    encoder: str
    vectors: Tensor

    def __str__(self) -> str:
        return f"the embedding {self.text!r} ({self.encoder}, {self.vectors.shape[0]} vectors)"


def split_off(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Word, ...], list[str]]:
    """The tensors of layers, the words beside them, and for each other key of an embedding what it is."""
    rest, words, notes = {}, [], []
    for key, tensor in tensors.items():
        if not _LOOSE.fullmatch(key):
            rest[key] = tensor
            continue
        found = _BUNDLED.fullmatch(key)
        vectors = tensor[None] if tensor.dim() == 1 else tensor
        if found and not found[3] and vectors.dim() == 2 and vectors.numel():
            encoder = "clip_l" if found[2].startswith("string_to_param") else found[2]
            words.append(Word(key, found[1], encoder, vectors))
        elif found and found[3]:
            notes.append(f"{key} is an embedding of OneTrainer behind the text encoder, and is not loaded")
        else:
            notes.append(f"{key} is an embedding without its word, and is not loaded: it belongs to no layer")
    return rest, tuple(words), notes


@dataclass
class _Encoder:
    """A text encoder as it was, and the words it has learned since, of each vocabulary."""

    tokenizer_name: str
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    weight: nn.Parameter  # [tokens, width]
    vocab_size: int
    words: dict[int, list[Word]] = field(default_factory=dict)

    def modules(self, weight: nn.Parameter) -> list[nn.Module]:
        """Those that share this embedding."""
        return [m for m in self.model.modules() if getattr(m, "weight", None) is weight]


class Vocabulary:
    """The words of one adapter in a pipeline: there while its strength is not 0, gone without a trace with it."""

    def __init__(self, pipe: object, words: Mapping[str, list[Word]]) -> None:
        self._pipe = pipe
        self._words = words  # by the encoder's name in the pipeline
        self._is_shown = False

    def follow(self, strength: float) -> None:
        """Show the words at any strength but 0: a word is there or not."""
        if bool(strength) == self._is_shown:
            return
        self._is_shown = bool(strength)
        for encoder, words in self._words.items():
            _set(self._pipe, encoder, id(self), words if self._is_shown else [])

    def leave(self) -> None:
        self.follow(0.0)


def vocabulary_of(pipe: object, words: Iterable[Word], model: Model) -> tuple[Vocabulary | None, list[str]]:
    """The words that this pipeline can learn, not shown yet, and for each other one why it cannot."""
    fitting: dict[str, list[Word]] = {}
    problems = []
    for word in words:
        encoder = encoder_named(word.encoder, model)
        if problem := _problem(pipe, encoder, word):
            problems.append(f"{word} is not loaded: {problem}")
        else:
            fitting.setdefault(encoder, []).append(word)
    return (Vocabulary(pipe, fitting) if fitting else None), problems


def _problem(pipe: object, encoder: str, word: Word) -> str:
    model, tokenizer = getattr(pipe, encoder, None), getattr(pipe, _tokenizer_of(encoder), None)
    if isinstance(pipe, nn.Module) or model is None or tokenizer is None or not hasattr(model, "get_input_embeddings"):
        return f"there is no {encoder} with a tokenizer; load it into the whole pipeline"
    width = model.get_input_embeddings().weight.shape[1]
    if word.vectors.shape[1] != width:
        return f"its vectors have {word.vectors.shape[1]} numbers, this {encoder} has {width}"
    if word.vectors.shape[0] > 1 and not hasattr(pipe, "maybe_convert_prompt"):
        return f"{type(pipe).__name__} reads no word that has several vectors"
    if word.text in tokenizer.get_added_vocab():
        return "there is a word of this name already, of another adapter or of the base"
    if re.search(r"\s", word.text):
        return "it has spaces in it, which no tokenizer takes for one word"
    return ""


def _tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


@torch.no_grad()
def _set(pipe: object, encoder: str, owner: int, words: list[Word]) -> None:
    """Make these the words of `owner` in an encoder, beside those of others."""
    registry: dict[str, _Encoder] = pipe.__dict__.setdefault(_REGISTRY, {})
    if encoder not in registry:
        model, name = getattr(pipe, encoder), _tokenizer_of(encoder)
        weight = model.get_input_embeddings().weight
        registry[encoder] = _Encoder(
            name, getattr(pipe, name), model, weight, model.config.get_text_config().vocab_size
        )
    before = registry[encoder]
    before.words = {**{o: w for o, w in before.words.items() if o != owner}, **({owner: words} if words else {})}
    learned = {word.text: word for own in before.words.values() for word in own}  # the last one counts, whole
    tokenizer, weight, vocab_size = before.tokenizer, before.weight, before.vocab_size
    if learned:
        tokenizer = copy.deepcopy(before.tokenizer)
        rows = {token: v for word in learned.values() for token, v in zip(_tokens(word), word.vectors)}
        tokenizer.add_tokens(list(rows))
        ids = [tokenizer.convert_tokens_to_ids(token) for token in rows]
        vocab_size = max(vocab_size, *(i + 1 for i in ids))
        more = max(0, vocab_size - len(weight))
        grown = torch.cat([weight, weight.new_zeros(more, weight.shape[1])])  # [tokens, width]
        for i, vector in zip(ids, rows.values()):
            grown[i] = vector.to(grown)
        weight = nn.Parameter(grown, requires_grad=False)
    for module in before.modules(before.model.get_input_embeddings().weight):
        module.weight = weight
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(weight)
    before.model.config.get_text_config().vocab_size = vocab_size
    setattr(pipe, before.tokenizer_name, tokenizer)
    if not learned:
        del registry[encoder]
        if not registry:
            delattr(pipe, _REGISTRY)


def _tokens(word: Word) -> list[str]:
    """As diffusers names the vectors of one word."""
    return [word.text if i == 0 else f"{word.text}_{i}" for i in range(len(word.vectors))]
