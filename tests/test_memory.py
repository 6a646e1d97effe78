"""Memory that does not suffice: what is recognised, what is said, and that it happens with memory that really ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dora_diffusion.demo import sample_folder
from dora_diffusion.memory import not_enough, ran_out


def test_what_pytorch_says_of_memory_is_told_from_its_other_errors() -> None:
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**60)
    assert ran_out(cpu.value)
    assert ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert ran_out(MemoryError())
    with pytest.raises(RuntimeError) as shapes:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not ran_out(shapes.value) and not ran_out(ValueError("out of memory"))


def test_the_error_says_where_and_what_needs_less() -> None:
    error = not_enough("to draw", torch.device("cpu"), ["a smaller picture", "other programs closed"])
    assert str(error) == (
        "not enough memory on this machine to draw. What needs less: a smaller picture; other programs closed."
    )


# The process may have no more address space than it has taken already and some: what is asked for then is not there.
LIMITED = """
import resource, sys, torch
from pathlib import Path
from dora_diffusion import cli
from dora_diffusion.models.loading import load_base
load = load_base
def then_limited(*args, **kwargs):
    base = load(*args, **kwargs)
    torch.set_num_threads(1)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 300 * 2**20,) * 2)
    return base
import dora_diffusion.models.loading, dora_diffusion.training.run
dora_diffusion.models.loading.load_base = dora_diffusion.training.run.load_base = then_limited
sys.argv[0] = "dora-diffusion"
cli.main()
"""


def run_limited(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_the_commands_say_what_needs_less_memory(tmp_path: Path) -> None:
    drawn = run_limited("generate", "--prompt", "a cat", "--size", "4096x4096", "--out", tmp_path / "drawn")
    said = " ".join(drawn.stderr.split())
    assert drawn.returncode == 1 and "Traceback" not in drawn.stderr
    assert "not enough memory on this machine to draw" in said and "smaller picture than 4096 x 4096" in said
    options = ("--set", "gradient_checkpointing=true", "--resolution", 256, "--batch-size", 512)
    trained = run_limited("train", "--images", sample_folder(), "--out", tmp_path / "trained", *options)
    said = " ".join(trained.stderr.split())
    assert trained.returncode == 1 and "Traceback" not in trained.stderr
    assert "not enough memory on this machine to train so" in said and 'quantise = "nf4"' in said
    assert "batch_size = 1 with gradient_accumulation_steps = 512" in said and "below 256" in said
    assert "gradient_checkpointing" not in said
