"""Which names of layers ComfyUI finds, said by the rules and by ComfyUI itself, for every layer of every family."""

from __future__ import annotations

import json

import pytest
from comfyui_families import FAMILIES
from spellings import spellings
from test_comfyui import COMFYUI, run_comfyui

from dora_diffusion.adapters.injection import adaptable_layers
from dora_diffusion.formats.anatomy import anatomy_of
from dora_diffusion.inspection.programs import program_named
from dora_diffusion.inspection.spelling import Names

pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PYTHON names no Python that has ComfyUI")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rules_find_the_names_that_comfyui_finds(name, tmp_path):
    family = FAMILIES[name]
    (tmp_path / "models.json").write_text(json.dumps({name: family.comfyui}))
    run_comfyui(tmp_path, "names")
    theirs = set(json.loads((tmp_path / f"{name}.json").read_text()))
    model = family.model()
    anatomy = anatomy_of(model, adaptable_layers(model))
    names, rules = Names(anatomy), program_named("comfyui").spellings
    ours = {spelling: any(rule.finds(spelling, names) for rule in rules) for spelling in spellings(anatomy)}
    assert any(ours.values())
    assert [s for s, found in ours.items() if found and s not in theirs] == []
    assert [s for s, found in ours.items() if not found and s in theirs] == []
