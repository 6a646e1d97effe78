"""A stock CLIPTokenizer with a small vocabulary of its own.

Every word of the icon names, the style words and some hundred common English words are one
token each; anything else falls back to pieces and single bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 24
WORD_END = "</w>"

_COMMON_TEXT = """
a an the of in on at by to with without and or for from into over under behind between near
above below inside outside around across along up down left right front back top bottom middle
is are was be being it its this that these those my your his her our their one two three four
five six seven eight nine ten many few some several no not very all both each other another same
i you he she we they me him us them who what where when
red orange yellow green blue purple violet pink brown black white gray grey gold golden silver
teal cyan magenta turquoise beige cream navy maroon olive lime crimson scarlet indigo bronze
dark light bright pale deep pastel colorful colourful rainbow vivid muted neon
big small large little tiny huge giant tall short long wide narrow thin thick round square flat
sharp soft hard smooth rough shiny glossy matte glass metal metallic wooden wood stone paper
plastic clay fabric leather fur furry fluffy fuzzy wet dry hot cold warm cool frozen burning
new old young ancient modern fresh ripe rotten cute funny scary happy sad angry sleepy smiling
crying laughing sleeping running flying swimming jumping sitting standing walking eating drinking
dancing playing singing reading looking holding wearing fast slow loud quiet clean dirty broken
open closed empty full simple plain fancy beautiful pretty ugly strange magic magical royal
baby mother father king queen prince princess knight wizard witch robot monster ghost alien angel
man woman boy girl person people child kid farmer doctor teacher pirate ninja vampire zombie
picture photo image drawing painting sketch icon emoji sticker symbol logo cartoon illustration
render style styled art artwork vector outline outlined line lines shaded shading gradient shadow
background foreground pattern texture design poster card print close portrait view scene side
noto classic fluent twemoji openmoji glossy blob twitter google microsoft emojione
watercolor watercolour pencil ink crayon pixel pixelated clipart doodle engraved origami
sks toy ohwx zwx hat shirt coat shoes boots gloves scarf glasses sunglasses crown cape bag bow tie
head face eye eyes ear ears nose mouth teeth tongue hair beard tail wing wings leg legs arm arms
hand hands foot feet heart body skin bone horn horns claw claws paw paws beak feather feathers
leaf leaves flower flowers tree trees grass plant seed root branch fruit vegetable berry
animal pet bird fish insect reptile dinosaur puppy kitten cub pony calf lamb hen bunny
water river lake sea ocean beach island mountain hill valley forest jungle desert field garden
park city town village street road bridge house home building tower castle room door window wall
floor roof table chair bed lamp clock mirror sky cloud clouds sun moon star stars planet space
earth rain snow wind storm fire ice smoke night day morning evening spring summer autumn winter
food meal breakfast lunch dinner snack dessert cake pie bread butter cheese milk egg meat soup
rice salad sandwich burger fries noodles pasta sauce salt pepper sugar honey tea coffee juice
beer wine bottle cup mug plate bowl fork knife spoon pot pan box basket bucket
car truck bus train plane boat ship bike rocket wheel engine machine computer phone camera book
pen ball game music guitar drum piano sword shield bow arrow key lock ring gem jewel diamond coin
money gift candle balloon flag party birthday christmas halloween easter wedding love peace
pair piece slice bunch set group row pile half whole single double
"""
COMMON_WORDS = tuple(_COMMON_TEXT.split())


def _byte_alphabet() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte pair merges learned until each of the words is one token."""
    trained = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=50_000,
        min_frequency=1,
        show_progress=False,
        end_of_word_suffix=WORD_END,
    )
    trained.train_from_iterator(sorted(set(words)), trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]


def build_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """A tokenizer for which each of the words (lower case letters) is one token."""
    merges = _learn_merges(w for w in [*words, *COMMON_WORDS] if len(w) > 1)
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet)]
    tokens += [a + b for a, b in merges]
    tokens = [*dict.fromkeys(tokens), START, END]
    return CLIPTokenizer(
        vocab={token: k for k, token in enumerate(tokens)},
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_TOKENS,
    )


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes the tokenizer with the classic vocab.json and merges.txt beside it."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = json.dumps(model["vocab"], ensure_ascii=False)
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    pairs = (" ".join(m) if isinstance(m, list) else m for m in model["merges"])
    text = "#version: 0.2\n" + "\n".join(pairs) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")
