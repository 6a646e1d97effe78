"""Where the time of one variant goes, by torch.profiler."""

from __future__ import annotations

from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from benchmarks.runner import Plan
from benchmarks.variants import Variant, adapt
from benchmarks.workload import prepare

__all__ = ["print_profile"]

STEPS = 3
OPERATORS = 25


def print_profile(plan: Plan, variant: Variant, console: Console) -> None:
    """The operators that take longest in the plan's first case, rank and timed mode."""
    case, rank = plan.cases[0], plan.ranks[0]
    mode = next((mode for mode in plan.modes if mode in ("training", "inference")), "training")
    workload = prepare(case, plan.device, plan.dtype)
    adapted = adapt(variant, workload.base, case.targets, workload.layers, rank)
    workload.enter(adapted, mode)
    for _ in range(2):
        workload.before(adapted, mode)
        workload.run(adapted, mode)
    on_cuda = plan.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            workload.before(adapted, mode)
            workload.run(adapted, mode)
    key = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
    console.print(f"{variant.label}: {case.name}, rank {rank}, {mode}, {STEPS} steps")
    console.print(profiler.key_averages().table(sort_by=key, row_limit=OPERATORS), markup=False, soft_wrap=True)
