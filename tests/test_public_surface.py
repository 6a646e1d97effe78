"""The public names, pinned: a change of this list is a change for every user."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dora_diffusion

PUBLIC = [
    "Adapter",
    "AdapterConfig",
    "AdapterFile",
    "DoraDiffusionError",
    "GenerationRequest",
    "TrainConfig",
    "generate",
    "inject_adapter",
    "load_adapter",
    "load_base",
    "read_adapter_file",
    "save_adapter",
    "train",
]
HANDLE = {"config", "eject", "fuse", "is_fused", "layers", "load", "model", "name", "named_parameters"}
HANDLE |= {"num_parameters", "parameters", "strength", "merge", "unfuse", "updates"}


def test_the_public_names_are_these_and_sorted():
    assert dora_diffusion.__all__ == PUBLIC == sorted(PUBLIC)
    assert dir(dora_diffusion) == sorted([*PUBLIC, "__version__"])


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_resolves_to_something_documented(name):
    value = getattr(dora_diffusion, name)
    assert value.__name__ == name
    doc = value.__doc__ or ""
    assert len(doc.split()) >= 4, f"{name} needs a docstring"
    assert not doc.startswith(f"{name}("), f"{name} has only the signature that dataclass writes"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_exported_by_the_module_it_comes_from(name):
    home = __import__(f"dora_diffusion.{dora_diffusion._HOME[name]}", fromlist=["__all__"])
    assert name in home.__all__


def test_type_checkers_and_the_lazy_import_know_the_same_names():
    tree = ast.parse(Path(dora_diffusion.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: statement.module.removeprefix("dora_diffusion.")
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert typed == dora_diffusion._HOME
    assert sorted(typed) == PUBLIC


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'inject_adaptor'"):
        _ = dora_diffusion.inject_adaptor


def test_an_adapters_handle_has_these_names(unet):
    adapter = dora_diffusion.inject_adapter(unet, dora_diffusion.AdapterConfig())
    assert {name for name in dir(adapter) if not name.startswith("_")} == HANDLE


def test_every_error_is_a_dora_diffusion_error_and_stands_in_the_tree():
    errors = __import__("dora_diffusion.errors", fromlist=["__all__"])
    for name in errors.__all__:
        value = getattr(errors, name)
        if isinstance(value, type):
            assert issubclass(value, dora_diffusion.DoraDiffusionError)
            assert name in errors.__doc__, f"{name} is missing from the tree in the docstring"
