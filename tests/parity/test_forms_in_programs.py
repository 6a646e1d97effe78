"""What programs make of the forms that are not B A: LyCORIS's own files, and what LyCORIS itself computes from them.

ComfyUI computes them itself in test_comfyui.py.
"""

from __future__ import annotations

import bases
import pytest
from lycoris_files import ALGORITHMS, write
from stock_diffusers import pipeline_around

from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.inspection.parity import RIGHT, compare_programs
from dora_diffusion.inspection.programs import PROGRAMS
from dora_diffusion.models.loading import Base

BY_OUTPUT = {"loha dora", "lokr dora"}
BY_INPUT = {"loha dora by input", "lokr dora by input", "locon dora by input"}
PLAIN = {name for name in ALGORITHMS if name.startswith(("loha", "lokr")) and "dora" not in name}
CONSTRAINED = "oft, constrained and rescaled"
TURNS = {"oft", CONSTRAINED, "boft", "boft, rescaled"}
# The files that come out right in each program; the same as docs/parity.md says in a table.
RIGHT_IN = {
    "diffusers": set(),
    "peft": set(),
    "comfyui": PLAIN - {"lokr tucker"} | BY_INPUT | {"glora", "oft", "boft", "boft, rescaled"},
    "forge": PLAIN - {"lokr tucker"} | BY_INPUT | {"glora"},
    "forge-neo": PLAIN - {"lokr tucker"} | BY_INPUT | {"glora", "oft", "boft", "boft, rescaled"},
    "a1111": PLAIN | BY_INPUT | TURNS,
    "invokeai": PLAIN | {"locon dora by input"},
    "stable-diffusion.cpp": PLAIN - {"lokr tucker"},
    "sdnext": PLAIN | BY_OUTPUT | BY_INPUT | {"boft", "boft, rescaled"},
    "lycoris": PLAIN | BY_OUTPUT | TURNS | {"glora", "ia3", "ia3 by input"},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_program_gets_the_forms_right_that_the_page_says(tmp_path, algorithm):
    base = Base("small", pipeline_around(bases.unet()))  # type: ignore[arg-type]
    written = write(base.denoiser, algorithm, tmp_path / "lycoris.safetensors")
    path = convert_adapter(written.path, tmp_path / "a.safetensors", "kohya", base=base).path
    assert RIGHT_IN.keys() == {program.name for program in PROGRAMS}
    rules = tuple(program for program in PROGRAMS if not program.asked or algorithm == "loha")
    for parity in compare_programs(path, base, 1.0, rules):
        program = parity.program
        said = (program.name, [layer for layer in parity.layers if layer.error > RIGHT][:2], parity.stopped)
        assert parity.right == (algorithm in RIGHT_IN[program.name]), said
        assert parity.right or parity.stopped or parity.reasons, said
        assert {layer.layer for layer in parity.layers} == written.deltas.keys() or program.asked
