"""Pictures and comparisons: same seed same picture, honest columns, files that stand alone."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dora_diffusion import AdapterConfig, inject_adapter, save_adapter
from dora_diffusion.comparison.compare import BASE, Cell, Column, CompareRequest, columns_of, compare, mean_difference
from dora_diffusion.comparison.curves import Curve
from dora_diffusion.comparison.export import command_of
from dora_diffusion.comparison.grid import draw_grid
from dora_diffusion.comparison.report import write_report
from dora_diffusion.comparison.request import written_number
from dora_diffusion.comparison.sweep import sweep_request
from dora_diffusion.errors import AdapterFileError, ConfigError, PromptError
from dora_diffusion.generation import GenerationRequest, check_prompt, generate
from dora_diffusion.models.loading import Base


def pixels(image: Image.Image) -> bytes:
    return image.tobytes()


@pytest.fixture
def files(sd_base: Base, tmp_path: Path) -> tuple[Path, Path]:
    """A LoRA and a DoRA that change the pictures."""
    paths = []
    for kind in ("lora", "dora"):
        adapter = inject_adapter(sd_base.denoiser, AdapterConfig(kind=kind, rank=2, alpha=8.0), seed=0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        paths.append(save_adapter(adapter, tmp_path / f"{kind}.safetensors"))
        adapter.eject()
    return paths[0], paths[1]


def request_of(files: tuple[Path, Path], **values: object) -> CompareRequest:
    defaults: dict[str, object] = {
        "prompts": ("a cat", "a dog"),
        "seeds": (1, 2),
        "adapters": columns_of(files),
        "num_inference_steps": 3,
    }
    return CompareRequest(**{**defaults, **values})  # type: ignore[arg-type]


def test_a_seed_gives_the_same_picture_whatever_was_drawn_before(sd_base: Base) -> None:
    request = GenerationRequest("a cat", seed=3, num_inference_steps=3)
    first = generate(sd_base, request)
    generate(sd_base, GenerationRequest("a dog", seed=4, num_inference_steps=2))
    assert pixels(generate(sd_base, request)) == pixels(first)
    assert pixels(generate(sd_base, GenerationRequest("a cat", seed=4, num_inference_steps=3))) != pixels(first)


def test_the_picture_is_the_stock_pipelines(sd_base: Base) -> None:
    ours = generate(sd_base, GenerationRequest("a cat", seed=3, num_inference_steps=3, guidance_scale=2.0))
    with torch.no_grad():
        stock = sd_base.pipe(
            "a cat",
            num_inference_steps=3,
            guidance_scale=2.0,
            width=16,
            height=16,
            generator=torch.Generator("cpu").manual_seed(3),
        ).images[0]
    assert pixels(ours) == pixels(stock)


def test_a_comparison_draws_every_cell_with_the_base_first(sd_base: Base, files: tuple[Path, Path]) -> None:
    request = request_of(files)
    cells = list(compare(sd_base, request))
    assert [(cell.row, cell.column) for cell in cells] == [(row, column) for row in range(4) for column in range(3)]
    assert [column.label for column in request.columns] == ["base", "LoRA", "DoRA"]
    for cell in cells:
        assert (cell.difference == 0) == (cell.column == 0)
        assert f"seed {cell.seed}" in cell.caption
    assert "DoRA · rank 2 · strength 1" in cells[2].caption


def test_strength_zero_is_the_base_byte_for_byte_and_the_model_is_left_clean(
    sd_base: Base, files: tuple[Path, Path]
) -> None:
    before = {name: tensor.clone() for name, tensor in sd_base.denoiser.state_dict().items()}
    plain = generate(sd_base, GenerationRequest("a cat", 1, num_inference_steps=3))
    request = request_of(files, prompts=("a cat",), seeds=(1,), adapters=columns_of(files, [0.0, 1.0]))
    base, lora, dora = compare(sd_base, request)
    assert pixels(base.image) == pixels(lora.image) == pixels(plain)
    assert pixels(dora.image) != pixels(plain)
    after = sd_base.denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_stopping_a_comparison_half_way_takes_the_adapters_out(sd_base: Base, files: tuple[Path, Path]) -> None:
    names = list(sd_base.denoiser.state_dict())
    cells = compare(sd_base, request_of(files))
    next(cells)
    cells.close()
    assert list(sd_base.denoiser.state_dict()) == names


def test_mean_difference_is_over_all_pixels_and_channels() -> None:
    a, b = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    b[0, 0] = (48, 0, 0)
    assert mean_difference(Image.fromarray(a), Image.fromarray(b)) == 1.0


def test_two_files_of_one_kind_are_told_apart_by_name(files: tuple[Path, Path]) -> None:
    labels = [column.label for column in columns_of([files[0], files[0], files[1]])]
    assert labels[0].startswith("LoRA ") and labels[0].endswith("/lora") and labels[2] == "DoRA"


def test_wrong_strengths_and_empty_requests_are_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="2 adapters and 1 strengths"):
        columns_of(files, [1.0])
    with pytest.raises(ConfigError, match="at least one prompt"):
        request_of(files, seeds=())
    with pytest.raises(ConfigError, match="num_inference_steps"):
        GenerationRequest("x", num_inference_steps=0)


def test_a_missing_adapter_is_said_before_anything_is_drawn(sd_base: Base, tmp_path: Path) -> None:
    request = CompareRequest(("a",), (1,), (Column("LoRA", tmp_path / "none.safetensors"),))
    with pytest.raises(AdapterFileError, match="no adapter file"):
        next(compare(sd_base, request))


def test_a_prompt_the_tokenizer_would_cut_names_the_words_lost(sd_base: Base) -> None:
    check_prompt(sd_base.pipe, "red apple")
    with pytest.raises(PromptError, match="'red zebra', would be lost"):
        check_prompt(sd_base.pipe, "red " * 23 + "zebra")


def cells_of(request: CompareRequest) -> list[Cell]:
    image = Image.new("RGB", (16, 16), "orange")
    return [
        Cell(row, i, prompt, seed, image, f"{column.label} <b>", 1.5 * i, 0.1)
        for row, (prompt, seed) in enumerate(request.rows)
        for i, column in enumerate(request.columns)
    ]


def test_the_grid_holds_every_cell_enlarged(files: tuple[Path, Path]) -> None:
    request = request_of(files, prompts=("a cat", "a very long prompt " * 12))
    grid = np.asarray(draw_grid(request, cells_of(request)))
    orange = (np.abs(grid.astype(int) - [255, 165, 0]).sum(-1) < 3).sum()
    assert orange >= 12 * 155 * 155


def test_headings_that_are_wider_than_a_picture_do_not_run_into_each_other() -> None:
    names = ("DoRA first-run/dora", "DoRA a-run-with-quite-a-long-name-of-its-own/dora")
    request = CompareRequest(("a cat",), (1,), tuple(Column(name, Path(name)) for name in names))
    grid = np.asarray(draw_grid(request, cells_of(request)))
    pictures = np.flatnonzero((np.abs(grid.astype(int) - [255, 165, 0]).sum(-1) < 3).any(1))
    header = grid[: pictures[0] - 2]
    columns = np.flatnonzero((grid[pictures[5]] != 255).any(-1))
    gaps = np.setdiff1d(np.arange(columns[0], columns[-1]), columns)
    assert len(gaps) == 2 * 8 and (header[:, gaps] == 255).all() and (header < 100).any()


def row_labels(prompts: tuple[str, ...]) -> list[bytes]:
    """What the grid draws beside each row."""
    request = CompareRequest(prompts, (1,), (Column("DoRA", Path("dora")),))
    grid = draw_grid(request, cells_of(request))
    whole = np.asarray(grid).astype(int)
    rows = np.flatnonzero((np.abs(whole - [255, 165, 0]).sum(-1) < 3).any(1))
    tops = [rows[0], *rows[1:][np.diff(rows) > 1]]
    return [grid.crop((0, top, 190, top + 170)).tobytes() for top in tops]


ALIKE = "a very long prompt about a small cat in the grass that sits beside an old house, painted in oil, " * 5


@pytest.mark.parametrize(
    "prompts",
    [
        (ALIKE + "blue", ALIKE + "pink"),
        (ALIKE + "blue " + ALIKE, ALIKE + "pink " + ALIKE),
        ("é", "ß", "Ж", "\U0010fffe"),
        ("漢", "字", "🦊", "🐱"),
        ("x" * 400 + "a" + "x" * 400, "x" * 400 + "b" + "x" * 400),
    ],
)
def test_rows_of_different_prompts_have_different_labels(prompts: tuple[str, ...]) -> None:
    labels = row_labels(prompts)
    assert len(labels) == len(set(labels)) == len(prompts)


def headings(request: CompareRequest) -> list[bytes]:
    grid = draw_grid(request, cells_of(request))
    return [grid.crop((x := 16 + 190 + i * 170, 0, x + 160, 74)).tobytes() for i in range(len(request.columns))]


def test_columns_that_differ_have_different_headings_in_the_grid_the_report_and_the_captions(
    files: tuple[Path, Path],
) -> None:
    strengths = (0.5, 0.1234567, 0.1234568)
    request = sweep_request(["a cat"], [1], strengths, files)
    assert len(set(headings(request))) == len(set(request.headings)) == 7
    html = write_report("A", request, cells_of(request), base_name="emoji")
    assert all(f"<th>{heading}" in html for heading in request.headings) and html.count("<td>lora.safetensors") == 1
    long = "DoRA a-run-with-quite-a-long-name-{}/dora"
    names = tuple(Column(long.format(i), Path(str(i))) for i in range(4))
    assert len(set(headings(CompareRequest(("a cat",), (1,), names)))) == 5


def test_numbers_are_written_with_all_their_digits(files: tuple[Path, Path]) -> None:
    for value in (0.5, 1.0, 0.1234567, 1 / 3, 1e-9, 1.5):
        assert float(written_number(value)) == value
    assert written_number(1.0) == "1" and written_number(0.5) == "0.5"
    request = request_of(files, adapters=columns_of(files, [1 / 3, 0.1234567]), guidance_scale=7.0000001)
    words = shlex.split(command_of(request, "emoji"))
    given = [float(words[i + 1]) for i, word in enumerate(words) if word in ("--strength", "--guidance")]
    assert given == [1 / 3, 0.1234567, 7.0000001]


def test_the_report_is_one_file_that_asks_for_nothing_else(files: tuple[Path, Path]) -> None:
    request = request_of(files, prompts=("<script>alert(1)</script>",))
    curves = {"lora": Curve([0.5, 0.4], [(2, 0.6)])}
    html = write_report("A & B", request, cells_of(request), base_name="emoji", curves=curves, commands=("a <b>",))
    assert html.count("data:image/png;base64,") == 6
    assert "<script" not in html and "A &amp; B" in html and "a &lt;b&gt;" in html
    assert not re.search(r"(?:src|href)=(?!['\"]data:)", html) and "http" not in html
    for path in files:
        assert path.name in html
    assert BASE.label in html
