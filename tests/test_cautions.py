"""What is said before the start about packing and bf16 on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dora_diffusion.models.cautions import bf16_is_emulated, cautions

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "emulated"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", False),  # Zen 4, Cooper Lake
        ("flags\t\t: fpu avx2 avx512f amx_bf16 amx_tile", False),  # Sapphire Rapids
        ("Features\t: fp asimd sve i8mm bf16", False),  # Neoverse V1
        ("flags\t\t: fpu avx2 avx512f avx512vl", True),  # Skylake
        ("Features\t: fp asimd", True),
    ],
)
def test_a_cpu_says_whether_it_has_units_for_bf16(flags: str, emulated: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: x\n{flags}\n")
    assert bf16_is_emulated(tmp_path / "cpuinfo") is emulated


def test_packing_is_cautioned_of_where_it_spares_nothing() -> None:
    assert cautions(CPU, None) == cautions(CPU, "nf4", trains=True) == cautions(CPU, "int8") == ()
    (int8,) = cautions(CPU, "int8", trains=True)
    assert "no less memory" in int8 and "nf4 needs" in int8
    assert cautions(torch.device("mps"), "int8", trains=True) == ()
    assert any("emulates it" in each for each in cautions(CPU, None, precision="bf16")) is bf16_is_emulated()
