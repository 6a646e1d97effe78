"""Configurations: what is accepted, and what a wrong key is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_diffusion.errors import ConfigError
from dora_diffusion.training.config import TrainConfig, parse_assignments, read_config, resolve_config

GIVEN: dict[str, object] = {"images": "pictures", "out": "outputs"}


def test_a_configuration_survives_the_way_through_a_file(tmp_path: Path) -> None:
    config = TrainConfig.from_values({**GIVEN, "rank": 8, "preview_prompts": ['a "cat"', "ü"], "snr_gamma": 5.0}, "x")
    (tmp_path / "c.toml").write_text(config.to_toml(), encoding="utf-8")
    assert read_config(tmp_path / "c.toml") == config


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat': did you mean 'learning_rate'?"),
        ({"qqqq": 1}, "unknown key 'qqqq': known keys: images, out"),
        ({"rank": 0}, "rank = 0: input should be greater than or equal to 1"),
        ({"kind": "doora"}, "kind = 'doora': input should be 'dora', 'lora' or 'both'"),
        ({"steps": "many"}, "steps = 'many'"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_nearest_known_one(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_values({**GIVEN, **values}, "run.toml")
    assert expected in str(error.value) and str(error.value).startswith("run.toml:")


def test_a_missing_key_says_how_to_give_it() -> None:
    with pytest.raises(ConfigError, match="--images"):
        TrainConfig.from_values({"out": "x"}, "command line")


@pytest.mark.parametrize(("content", "expected"), [(b"a = = 1", "no TOML file"), (b"\xff\xfe", "cannot read")])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        read_config(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match="no configuration file"):
        read_config(tmp_path / "missing.toml")


def test_assignments_are_read_as_toml_and_else_as_text() -> None:
    values = parse_assignments(["dropout=0.1", "target_modules=['to_q']", "validation_images=a/b", "use_rslora=true"])
    assert values == {"dropout": 0.1, "target_modules": ["to_q"], "validation_images": "a/b", "use_rslora": True}
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_assignments(["dropout"])


def test_options_win_over_the_file_and_resuming_reads_the_runs_own_file(tmp_path: Path) -> None:
    config = TrainConfig.from_values({**GIVEN, "out": str(tmp_path), "rank": 8}, "x")
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert resolve_config(tmp_path / "config.toml", {"rank": 2}).rank == 2
    assert resolve_config(None, {"out": str(tmp_path)}, resume=True).rank == 8


def test_the_presets_are_valid() -> None:
    presets = sorted((Path(__file__).parent.parent / "train_scripts" / "presets").glob("*.toml"))
    assert presets
    for preset in presets:
        read_config(preset, dict(GIVEN))


def test_the_reference_names_every_key_and_no_other() -> None:
    text = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip().strip("`") for line in text.splitlines() if line.startswith("| `")]
    in_a_row = {"preview_seeds", "preview_every"}  # described beside preview_prompts
    assert set(rows) | in_a_row == set(TrainConfig.model_fields)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38, 0.0, -1.0, True])
def test_a_learning_rate_that_is_none_is_refused_by_its_key(value: float) -> None:
    for key in ("learning_rate", "text_encoder_learning_rate"):
        with pytest.raises(ConfigError, match=rf"  {key} = "):
            TrainConfig.from_values({**GIVEN, key: value}, "x")


def test_every_number_with_a_fraction_must_be_finite() -> None:
    floats = [key for key, field in TrainConfig.model_fields.items() if "float" in str(field.annotation)]
    assert {"alpha", "dropout", "weight_decay", "max_grad_norm", "prior_loss_weight", "snr_gamma"} <= set(floats)
    for key in floats:
        for value in (float("inf"), float("-inf"), float("nan")):
            with pytest.raises(ConfigError, match=f"{key} = .*finite"):
                TrainConfig.from_values({**GIVEN, key: value}, "x")


def test_a_warm_up_as_long_as_the_run_is_refused_and_the_default_is_shorter() -> None:
    for steps in (1, 5, 10):
        with pytest.raises(ConfigError, match=r"warmup_steps = 10 with steps = .*before its learning rate is reached"):
            TrainConfig.from_values({**GIVEN, "steps": steps, "warmup_steps": 10}, "x")
        assert TrainConfig.from_values({**GIVEN, "steps": steps}, "x").warm_up == steps - 1
    assert TrainConfig.from_values({**GIVEN, "steps": 500}, "x").warm_up == 10
    assert (
        TrainConfig.from_values({**GIVEN, "steps": 1, "warmup_steps": 10, "lr_scheduler": "constant"}, "x").steps == 1
    )
