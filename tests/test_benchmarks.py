"""The benchmarks: their real commands on tiny cases, that they compare the same mathematics, and their arithmetic.

Times are not tested: on a shared machine they mean nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import formula_weight
from typer.testing import CliRunner, Result

from benchmarks.cases import FLUX, LAYER_CASES, STEP_CASES
from benchmarks.command import FORMS, OPTIONAL_VARIANTS, command_of
from benchmarks.layers import LAYERS
from benchmarks.measure import in_turns, ratios, repeats_for, spread
from benchmarks.memory import peak_in_own_process
from benchmarks.quality import Pair, difference
from benchmarks.results import load
from benchmarks.step import STEP
from benchmarks.targets import outcomes
from benchmarks.variants import VARIANTS, Adapted, adapt, available, shared_copy
from benchmarks.workload import Workload, adapted_layers, drop_gradients, prepare

ROOT = Path(__file__).parent.parent
INSTALLED = available(VARIANTS)
CPU = torch.device("cpu")


def command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def step_here(*arguments: str) -> Result:
    """The same command in this process, which saves the imports."""
    return CliRunner().invoke(command_of(STEP), arguments)


@pytest.fixture(scope="module")
def layer() -> Workload:
    return prepare(LAYER_CASES["tiny-16x32"], CPU, torch.float32)


def adapted(workload: Workload, name: str, rank: int = 4) -> Adapted:
    return adapt(VARIANTS[name], workload.base, workload.case.targets, workload.layers, rank)


def test_step_measures_compares_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    options = ("--cases", "tiny-8", "--ranks", "4", "--rounds", "2", "--device", "cpu", "--json", str(path))
    done = command("step", *options)
    assert done.returncode == 0, done.stderr  # 1 where a variant computes something else
    stored = json.loads(path.read_text())
    assert list(stored) == [f"tiny-8, rank 4, float32, {mode}" for mode in ("handling", "inference", "training")]
    training = stored["tiny-8, rank 4, float32, training"]
    assert set(training["rows"]) == set(INSTALLED) - {"dora-fused", *OPTIONAL_VARIANTS}
    assert training["reference"] == "peft-lora" and training["machine"]["versions"]["torch"] == torch.__version__
    for name, row in training["rows"].items():
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        if name != "base":
            assert row["agreement"]["output_error"] < 1e-4
        if name in ("lora", "dora", "peft-dora"):
            assert row["agreement"]["gradient_error"] < 1e-4
    assert stored["tiny-8, rank 4, float32, inference"]["rows"]["dora-fused"]["agreement"]["output_error"] < 1e-4
    handling = stored["tiny-8, rank 4, float32, handling"]["rows"]["dora"]
    assert handling["strength_ms"] > 0 and handling["strength_touches_weights"] is False
    # What was not measured again stays, and --show prints it without measuring.
    assert step_here(*options, "--modes", "inference", "--variants", "dora-fused", "--rounds", "3").exit_code == 0
    again = {entry.mode: entry.rounds for entry in load(path)}
    assert again["inference"] == 3 and again["training"] == 2
    shown = step_here("--show", "--json", str(path))
    assert "DoRA here, fused" in shown.stdout and "3 interleaved rounds" in shown.stdout


@pytest.mark.slow
@pytest.mark.skipif("lycoris-lokr" not in INSTALLED, reason="LyCORIS is in the bench extra")
def test_the_other_forms_are_measured_beside_lycoris_with_the_same_numbers(tmp_path: Path) -> None:
    path, names = tmp_path / "forms.json", [*FORMS, *(f"lycoris-{form}" for form in FORMS)]
    options = ["--cases", "tiny-16x32", "--ranks", "2", "--rounds", "1", "--device", "cpu", "--json", str(path)]
    options += ["--variants", ",".join(["peft-lora", *names]), "--modes", "training,inference"]
    done = CliRunner().invoke(command_of(LAYERS), options)
    assert done.exit_code == 0, done.output  # 1 where a variant computes something else
    entries = {entry.mode: entry.rows for entry in load(path)}
    assert entries["training"].keys() == entries["inference"].keys() == {"base", "peft-lora", *names}
    for name in names:
        found = entries["training"][name].agreement
        assert found is not None and found.output_error < 1e-4 and found.reference == name.removeprefix("lycoris-")
        assert found.gradients_agree or name in ("lycoris-dokr", "lycoris-doha")
    assert "DoKR here" in done.output and "LyCORIS LoKr dora_wd" in done.output


def test_layers_in_half_precision(tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    options = ("--ranks", "4", "--rounds", "1", "--dtype", "bf16", "--device", "cpu", "--json", str(path))
    done = command("layers", "--cases", "tiny-16x32", *options)
    assert done.returncode == 0, done.stderr
    assert {entry.mode for entry in load(path)} == {"training", "inference"}
    assert "ratio to PEFT LoRA" in done.stdout


def test_profile_prints_operators() -> None:
    done = command("layers", "--cases", "tiny-16x32", "--ranks", "4", "--device", "cpu", "--profile", "dora")
    assert done.returncode == 0, done.stderr
    assert "aten::mm" in done.stdout or "aten::addmm" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--cases", "sd15-33"), ("'sd15-33'", "sd15-32")),
        (("--ranks", "0"), ("'0'", "at least 1")),
        (("--modes", "trainin"), ("'trainin'", "training")),
    ],
)
def test_mistakes_are_named(options: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = step_here(*options)
    assert done.exit_code == 2
    assert all(word in done.output for word in words), done.output


@pytest.mark.slow
def test_quality_trains_twins_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, plot = tmp_path / "quality.json", tmp_path / "quality.png"
    options = ["--styles", "openmoji", "--steps", "2", "--json", str(path), "--work", str(tmp_path / "work")]
    done = command("quality", *options, "--ranks", "1", "--seeds", "1")
    assert done.returncode == 0, done.stderr
    (first,) = json.loads(path.read_text())["pairs"].values()
    log = [json.loads(line) for line in (tmp_path / "work/emoji/twins/log.jsonl").read_text().splitlines()]
    held_out = {line["kind"]: line["held_out_loss"] for line in log if "held_out_loss" in line}
    whole = {kind: held_out[kind] / (1 + first["learned"][kind] / 100) for kind in ("lora", "dora")}
    assert whole["lora"] == pytest.approx(whole["dora"], rel=1e-5)  # both are told as a change of the base's loss
    done = command("quality", *options, "--ranks", "1,2", "--seeds", "1", "--plot", str(plot))
    assert "1 pairs of twins" in done.stdout, done.stderr  # the first is not trained again
    pairs = json.loads(path.read_text())["pairs"]
    assert [pair["rank"] for pair in pairs.values()] == [1, 2] and first in pairs.values()
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert "DoRA - LoRA" in command("quality", "--show", "--json", str(path)).stdout


def test_differences_are_taken_within_the_pairs() -> None:
    losses = np.array([[-3.0, -3.5], [-1.0, -1.2], [-2.0, -1.9]])
    pairs = [
        Pair(
            "emoji",
            "openmoji",
            4,
            seed,
            200,
            3e-4,
            learned={"lora": lora, "dora": dora},
            forgotten={"lora": 0.0, "dora": 0.0},
        )
        for seed, (lora, dora) in enumerate(losses.tolist())
    ]
    found, each = difference(pairs, "learned"), losses[:, 1] - losses[:, 0]
    assert found.mean == pytest.approx(each.mean()) and found.error == pytest.approx(each.std(ddof=1) / 3**0.5)
    assert (found.below, found.pairs) == (2, 3)


def test_peak_memory_is_that_of_the_process_itself() -> None:
    hoard = torch.ones(2**28)  # 1 GB here must not show in the other process
    peak = peak_in_own_process("tiny-16x32", "dora", 4, "training", "cpu", "float32", 1)
    assert hoard.sum() == 2**28
    assert 100 < peak < 1000


def test_every_variant_computes_the_formula(layer: Workload) -> None:
    x, W0, b = layer.inputs["x"].double(), layer.base.layer.weight, layer.base.layer.bias.double()
    for name in INSTALLED:
        variant = adapted(layer, name)
        layer.enter(variant, "inference")
        found = layer.inference(variant).double()
        if name == "base":
            W = W0.double()
        else:
            (factors,) = variant.injected.factors.values()
            parameters = {
                name: p.detach().flatten() if "magnitude" in name else p.detach() for name, p in factors.items()
            }
            W = formula_weight(W0, parameters, 2.0)
        torch.testing.assert_close(
            found, x @ W.T + b, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.skipif("lycoris-dora" not in INSTALLED, reason="LyCORIS is in the bench extra")
def test_what_the_note_says_of_the_gradients_of_lycoris_is_so(layer: Workload) -> None:
    """They are those of the formula with the norm in the graph, and not those with a constant norm."""
    variant = adapted(layer, "lycoris-dora")
    layer.enter(variant, "training")
    drop_gradients(variant)
    layer.training_step(variant)
    (factors,) = variant.injected.factors.values()
    W0, x = layer.base.layer.weight.double(), layer.inputs["x"].double()

    def gradient_of_A(constant_norm: bool) -> torch.Tensor:
        A, B, m = (p.detach().double().requires_grad_() for p in factors.values())
        V = W0 + 2.0 * B @ A
        n = V.norm(dim=1)
        W = (m.flatten() / (n.detach() if constant_norm else n))[:, None] * V
        (x @ W.T + layer.base.layer.bias.double() - layer.wanted.double()).square().mean().backward()
        return A.grad

    found = factors["lora_A"].grad.double()
    torch.testing.assert_close(found, gradient_of_A(constant_norm=False), rtol=1e-4, atol=1e-7)
    assert (found - gradient_of_A(constant_norm=True)).norm() > 0.05 * found.norm()


def test_variants_share_the_frozen_weights_and_fusing_leaves_them_alone(layer: Workload) -> None:
    before = layer.base.layer.weight.clone()
    plain, fused = adapted(layer, "dora"), adapted(layer, "dora-fused")
    assert plain.injected.adapter.layers["layer"].base.weight is layer.base.layer.weight
    layer.enter(fused, "inference")
    assert not torch.equal(fused.injected.adapter.layers["layer"].base.weight, before)
    assert torch.equal(layer.base.layer.weight, before)


def test_nothing_kept_from_one_training_step_serves_the_next(layer: Workload) -> None:
    variant = adapted(layer, "dora")
    versions = [parameter._version for parameter in variant.trainable]
    layer.before(variant, "training")
    assert all(p._version > old and p.grad is None for p, old in zip(variant.trainable, versions))


@pytest.mark.parametrize(
    ("case", "parameters", "layers"),
    [("sd15-32", 859_520_964, 128), ("sdxl-32", 2_567_463_684, 560)],
)
def test_architectures_are_the_published_ones(case: str, parameters: int, layers: int) -> None:
    with torch.device("meta"):
        model = STEP_CASES[case].build()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(adapted_layers(model, STEP_CASES[case].targets)) == layers


def test_flux_is_the_published_one_with_fewer_blocks() -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        whole = FluxTransformer2DModel(**FLUX, num_layers=19, num_single_layers=38)
        ours = STEP_CASES["flux-256"].build()
    assert sum(p.numel() for p in whole.parameters()) == 11_901_408_320  # FLUX.1-dev
    assert len(ours.transformer_blocks) == 1 and len(ours.single_transformer_blocks) == 2
    assert len(adapted_layers(ours, STEP_CASES["flux-256"].targets)) == 8 + 2 * 3


def test_a_shared_copy_has_its_own_modules(layer: Workload) -> None:
    copied = shared_copy(layer.base)
    assert copied.layer is not layer.base.layer and copied.layer.weight is layer.base.layer.weight


def test_ratios_are_taken_round_by_round() -> None:
    # The machine is twice as slow in the second round: the ratio of medians would be 2, every round says 1.5.
    seconds = {"a": [1.5, 3.0, 1.5], "b": [1.0, 2.0, 1.0]}
    assert ratios(seconds, "a", "b") == [1.5, 1.5, 1.5]
    with pytest.raises(ValueError):
        ratios({"a": [1.0, 2.0], "b": [1.0]}, "a", "b")


def test_spread_is_the_median_and_the_quartiles() -> None:
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    assert spread([7.0]).median == spread([7.0]).low == 7.0


def test_turns_change_the_first_and_the_neighbours() -> None:
    orders = list(in_turns(["a", "b", "c"], 6))
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert {order[0] for order in orders} == {"a", "b", "c"}
    before_b = {order[order.index("b") - 1] for order in orders if order.index("b") > 0}
    assert before_b == {"a", "c"}


def test_short_runs_are_repeated() -> None:
    assert repeats_for(10.0) == 1 and repeats_for(0.001) == 50


def test_targets_are_met_or_missed_by_the_printed_figure(tmp_path: Path) -> None:
    def seconds(*values: float) -> dict[str, object]:
        plain = {"agreement": None, "peak_mb": None, "strength_ms": None, "strength_touches_weights": None}
        return {**plain, "seconds": list(values)}

    entry = {
        "case": "sd15-32", "about": "", "rank": 16, "mode": "training", "device": "cpu", "dtype": "float32",
        "rounds": 3, "reference": "peft-lora", "quick": False, "date": "2026-01-01", "notes": [], "others": 0.0,
        "machine": {"processor": "", "accelerator": None, "threads": 2, "versions": {}},
        "rows": {
            "peft-lora": seconds(1.0, 2.0, 1.0),
            "peft-dora": seconds(2.0, 4.0, 2.0),
            "lora": seconds(0.9, 1.8, 0.9),
            "dora": seconds(0.953, 1.906, 0.953),
        },
    }  # fmt: skip
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"entry": entry}))
    found = {outcome.target.text: (round(outcome.figure, 3), outcome.is_met) for outcome in outcomes(load(path))}
    assert found == {
        "DoRA step / PEFT LoRA step": (0.953, True),
        "DoRA step / PEFT DoRA step": (0.476, True),
        "DoRA step / LoRA step here": (1.059, False),
        "LoRA step / PEFT LoRA step": (0.9, True),
    }
    path.write_text('{"entry": {"case": "sd15-32"}}')
    assert step_here("--show", "--json", str(path)).exit_code == 2
