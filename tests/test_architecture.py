"""The package is one straight line: a part imports only itself and the parts above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dora_diffusion"
# The life of a picture, from the top down; a part is a module or a folder of the package. The engine's wing, adapters/,
# keeps an order of its own.
ORDER = (
    "errors",
    "memory",
    "quiet",
    "screen",
    "markdown",
    "paths",
    "stopping",
    "outputs",
    "journal",
    "lettering",
    "adapters",
    "adapters/labels",
    "adapters/packed",
    "adapters/products",
    "adapters/frozen",
    "adapters/kernels",
    "adapters/layers",
    "adapters/fellows",
    "adapters/whole",
    "adapters/loha",
    "adapters/lokr",
    "adapters/glora",
    "adapters/orthogonal",
    "adapters/input_rotation",
    "adapters/ia3",
    "adapters/variants",
    "adapters/parametrisations",
    "adapters/hosting",
    "adapters/roots",
    "adapters/injection",
    "formats",
    "models",
    "generation",
    "inspection",
    "data",
    "training",
    "comparison",
    "console",
    "demo",
    "webapp",
    "cli",
)


def parts_of(root: Path) -> dict[Path, str]:
    """Every module of the package, and the part it belongs to; the package's own __init__ belongs to none."""
    modules = {path.relative_to(root): path for path in sorted(root.rglob("*.py"))}
    return {path: part_of(name.with_suffix("").parts) for name, path in modules.items() if name != Path("__init__.py")}


def part_of(names: tuple[str, ...]) -> str:
    """The part that a module belongs to, by its path in the package."""
    first, *rest = names
    return f"{first}/{rest[0]}" if first == "adapters" and rest and rest[0] != "__init__" else first


def imports_of(source: str, package: str) -> set[str]:
    """The parts that a module imports, wherever in it; `package` is the dotted package it stands in."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        # `from dora_diffusion import x` names a part if x is one; a public name counts as a part not in the order.
        found |= {part_of(tuple(name.split(".")[1:])) for name in names if name.startswith("dora_diffusion.")}
        found |= {"the whole package" for name in names if name == "dora_diffusion"}
    return found


def package_of(path: Path) -> str:
    return ".".join(("dora_diffusion", *path.relative_to(PACKAGE).parent.parts))


def test_every_part_has_its_place_in_the_order():
    unplaced = set(parts_of(PACKAGE).values()) - set(ORDER)
    assert not unplaced, f"say where {sorted(unplaced)} stands: add it to ORDER, and to docs/architecture.md"


def test_every_part_is_explained_in_the_architecture_page():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = {part.removeprefix("adapters/") for part in parts_of(PACKAGE).values()}
    missing = {name for name in names if f"`{name}.py`" not in page and f"`{name}/`" not in page}
    assert not missing


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(PACKAGE))) for p in parts_of(PACKAGE)])
def test_a_module_imports_only_its_own_part_and_the_parts_above(path):
    part = parts_of(PACKAGE)[path]
    allowed = set(ORDER[: ORDER.index(part) + 1])
    if part == "cli":
        allowed.add("__version__")
    below = imports_of(path.read_text(encoding="utf-8"), package_of(path)) - allowed
    assert not below, f"{part} stands above {sorted(below)}, so it cannot import from there"


@pytest.mark.parametrize(
    "source, parts",
    [
        ("import dora_diffusion.adapters.layers", {"adapters/layers"}),
        ("from dora_diffusion.formats.files import save_adapter", {"formats"}),
        ("from dora_diffusion.adapters import layers", {"adapters/layers"}),
        ("from dora_diffusion import errors", {"errors"}),
        ("from dora_diffusion import formats as f, errors", {"formats", "errors"}),
        ("import dora_diffusion", {"the whole package"}),
        ("from . import files", {"formats"}),
        ("from ..adapters.layers import AdaptedLayer", {"adapters/layers"}),
        ("def f():\n    from dora_diffusion.cli import app", {"cli"}),
        ("import torch, os.path\nfrom diffusers import UNet2DConditionModel", set()),
    ],
)
def test_imports_are_read_in_every_form(source, parts):
    assert imports_of(source, "dora_diffusion.formats") == parts


def modules_after(code: str) -> set[str]:
    """The top-level modules loaded by a fresh interpreter that runs this code."""
    report = f"{code}\nimport sys\nprint('\\n'.join(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", report], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_importing_the_package_pulls_in_no_library():
    loaded = modules_after("import dora_diffusion; dir(dora_diffusion)")
    assert "dora_diffusion" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "gradio", "peft", "accelerate", "PIL", "pydantic"}


def test_the_layers_and_files_need_no_pipeline_and_no_web_app():
    loaded = modules_after("import dora_diffusion; dora_diffusion.inject_adapter; dora_diffusion.load_adapter")
    assert "dora_diffusion.formats.files" in loaded
    assert not loaded & {"diffusers", "transformers", "gradio", "peft", "accelerate"}


def test_the_command_line_starts_without_torch_and_the_web_app():
    loaded = modules_after("import dora_diffusion.cli")
    assert "typer" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "gradio", "peft", "accelerate"}
