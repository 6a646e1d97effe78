"""One benchmark from its plan to its entries: memory first, then injection and strength, then the timed modes."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.agreement import Agreement, check
from benchmarks.cases import Case
from benchmarks.measure import OtherPrograms, in_turns, repeats_for, seconds_of
from benchmarks.memory import peak_in_own_process
from benchmarks.reporter import Reporter
from benchmarks.results import Entry, Row, describe_machine, save, today
from benchmarks.variants import VARIANTS, Adapted, Variant, adapt, kernels_of, shared_copy
from benchmarks.workload import Workload, drop_gradients, prepare
from dora_diffusion.adapters.injection import Adapter

__all__ = ["MODES", "Mode", "Plan", "run"]

Mode = Literal["memory", "handling", "training", "inference"]
MODES: tuple[Mode, ...] = ("memory", "handling", "training", "inference")
HANDLING_ROUNDS = 5
STRENGTH_CHANGES = 50


@dataclass(frozen=True)
class Plan:
    """What to measure. `variants` holds the base; the entries go to `path`."""

    cases: tuple[Case, ...]
    ranks: tuple[int, ...]
    modes: tuple[Mode, ...]
    variants: tuple[Variant, ...]
    rounds: int
    device: torch.device
    dtype: torch.dtype
    quick: bool
    path: Path

    def entry(
        self,
        case: Case,
        rank: int,
        mode: Mode,
        rows: Mapping[str, Row],
        rounds: int,
        others: float | None = None,
        notes: Sequence[str] = (),
    ) -> Entry:
        return Entry(
            case=case.name,
            about=case.about,
            rank=rank,
            mode=mode,
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            rounds=rounds,
            reference=self.reference(mode),
            quick=self.quick,
            date=today(),
            machine=describe_machine(self.device),
            rows=rows,
            others=others,
            notes=tuple(notes),
        )

    def reference(self, mode: Mode) -> str:
        """What the ratios of this mode are to: PEFT LoRA in training, the base otherwise."""
        names = [variant.name for variant in self.variants]
        return "peft-lora" if mode in ("training", "handling") and "peft-lora" in names else "base"


def run(plan: Plan, report: Reporter) -> list[Entry]:
    """All entries of the plan, each saved as soon as it is measured."""
    entries = []
    for case in plan.cases:
        for entry in _entries_of(plan, case, report):
            save(plan.path, [entry])
            entries.append(entry)
    return entries


def _entries_of(plan: Plan, case: Case, report: Reporter) -> Iterator[Entry]:
    # While this process holds no model, all of the machine's memory is free for the others.
    if "memory" in plan.modes:
        for rank in plan.ranks:
            yield _memory(plan, case, rank, report)
    timed = [mode for mode in plan.modes if mode in ("training", "inference")]
    if not timed and "handling" not in plan.modes:
        return
    with report.steps(f"{case.name}: building the model", 1) as step:
        workload = prepare(case, plan.device, plan.dtype)
        step()
    if "handling" in plan.modes:
        yield _handling(plan, workload, plan.ranks[0], report)
    for rank in plan.ranks if timed else ():
        variants = _adapt_all(plan, workload, rank, report)
        for mode in timed:
            yield _timed(plan, workload, variants, rank, mode, report)
        del variants
        gc.collect()


def _memory(plan: Plan, case: Case, rank: int, report: Reporter) -> Entry:
    variants = [variant for variant in plan.variants if not variant.fused]
    rows = {}
    with report.steps(f"{case.name}, rank {rank}: peak memory, one process for each variant", len(variants)) as step:
        for variant in variants:
            dtype = str(plan.dtype).removeprefix("torch.")
            threads = torch.get_num_threads()
            peak = peak_in_own_process(case.name, variant.name, rank, "training", str(plan.device), dtype, threads)
            rows[variant.name] = Row(peak_mb=peak)
            step()
    return plan.entry(case, rank, "memory", rows, rounds=1)


def _adapt_all(plan: Plan, workload: Workload, rank: int, report: Reporter) -> list[Adapted]:
    what = f"{workload.case.name}, rank {rank}: injecting into {len(workload.layers)} layers"
    variants = []
    with report.steps(what, len(plan.variants)) as step:
        for variant in plan.variants:
            variants.append(adapt(variant, workload.base, workload.case.targets, workload.layers, rank))
            step()
    return variants


def _timed(
    plan: Plan, workload: Workload, variants: Sequence[Adapted], rank: int, mode: Mode, report: Reporter
) -> Entry:
    """Every variant once to compare the numbers, which warms up too; then the rounds."""
    running = {a.variant.name: a for a in variants if mode == "inference" or not a.variant.fused}
    what = f"{workload.case.name}, rank {rank}, {mode}"
    for adapted in running.values():
        workload.enter(adapted, mode)
    start = time.perf_counter()
    with report.steps(f"{what}: comparing the numbers", 1) as step:
        agreement = check(workload, list(running.values()), mode)
        step()
    estimate = (time.perf_counter() - start) * plan.rounds
    report.say(f"{what}: {plan.rounds} rounds of {len(running)} variants, about {_duration(estimate)}")
    others = OtherPrograms()
    seconds = _rounds(plan, workload, running, mode, what, report)
    busy = others.busy()
    rows = {name: Row(seconds=seconds[name], agreement=agreement.get(name)) for name in running}
    notes = _notes(running, agreement)
    return plan.entry(workload.case, rank, mode, rows, plan.rounds, busy, notes)


def _rounds(
    plan: Plan, workload: Workload, running: Mapping[str, Adapted], mode: Mode, what: str, report: Reporter
) -> dict[str, list[float]]:
    def measure(adapted: Adapted, repeats: int) -> float:
        elapsed = seconds_of(
            lambda: workload.run(adapted, mode),
            plan.device,
            before=lambda: workload.before(adapted, mode),
            repeats=repeats,
        )
        drop_gradients(adapted)
        return elapsed

    # The second run of each is still warming up on an accelerator, where kernels are compiled and chosen.
    second = [measure(adapted, 1) for adapted in running.values()] if plan.device.type == "cuda" else None
    repeats = repeats_for(min(second) if second else measure(running["base"], 1))
    seconds: dict[str, list[float]] = {name: [] for name in running}
    with report.steps(what, plan.rounds * len(running)) as step:
        for order in in_turns(list(running), plan.rounds):
            for name in order:
                seconds[name].append(measure(running[name], repeats))
                step()
    return seconds


def _notes(running: Mapping[str, Adapted], agreement: Mapping[str, Agreement]) -> list[str]:
    notes = [f"{a.variant.label}: {a.variant.note}" for a in running.values() if a.variant.note]
    for name, adapted in running.items():
        if adapted.injected.network is not None:
            notes.append(f"{adapted.variant.label} runs on its {kernels_of(adapted)!r} backend.")
        found = agreement.get(name)
        if found is not None and not found.is_same(adapted.variant.other_gradients):
            notes.append(
                f"{adapted.variant.label} DOES NOT COMPUTE WHAT {VARIANTS[found.reference].label} DOES: "
                "its times are those of other mathematics."
            )
    return notes


def _handling(plan: Plan, workload: Workload, rank: int, report: Reporter) -> Entry:
    """How long it takes to inject, and to change the strength of all layers."""
    case = workload.case
    variants = [variant for variant in plan.variants if variant.inject is not None and not variant.fused]
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    strength: dict[str, Row] = {}
    others = OtherPrograms()
    by_name = {variant.name: variant for variant in variants}
    with report.steps(f"{case.name}, rank {rank}: injecting", HANDLING_ROUNDS * len(variants)) as step:
        for order in in_turns(list(by_name), HANDLING_ROUNDS):
            for name in order:
                model = shared_copy(workload.base)
                inject = by_name[name].inject
                assert inject is not None
                gc.collect()
                start = time.perf_counter()
                injected = inject(model, case.targets, workload.layers, rank)
                if plan.device.type == "cuda":
                    torch.cuda.synchronize(plan.device)
                seconds[name].append(time.perf_counter() - start)
                if name not in strength and injected.adapter is not None:
                    strength[name] = _strength(injected.adapter, workload)
                step()
    rows = {name: Row(seconds=seconds[name]) for name in seconds}
    for name, row in strength.items():
        rows[name] = dataclasses.replace(row, seconds=seconds[name])
    return plan.entry(case, rank, "handling", rows, HANDLING_ROUNDS, others.busy())


def _strength(adapter: Adapter, workload: Workload) -> Row:
    weights = [p for path in workload.layers for p in workload.base.get_submodule(path).parameters()]
    versions = [weight._version for weight in weights]
    times = []
    for i in range(STRENGTH_CHANGES):
        start = time.perf_counter()
        adapter.strength = 0.3 + 0.01 * i
        times.append(time.perf_counter() - start)
    touched = versions != [weight._version for weight in weights]
    return Row(strength_ms=1000 * statistics.median(times), strength_touches_weights=touched)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
