"""Configurations: what is accepted, and what a wrong key is answered."""

from __future__ import annotations

import os
import re
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
        ({"parametrisation": "locr"}, "parametrisation = 'locr': input should be 'lora', 'lokr' or 'loha'"),
        ({"parametrisation": "lokr", "factor": 0}, "factor is 0; it must be a whole number of at least 1"),
        ({"parametrisation": "lokr", "factor": True}, "factor = true: this key is no switch"),
        (
            {"factor": 4},
            "parametrisation is 'lora': set parametrisation to 'lokr', or leave factor out",
        ),
        ({"parametrisation": "loha", "full_matrix": True}, "full_matrix is LoKr's, and parametrisation is 'loha'"),
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


GOOD = b'images = "a"\nout = "b"\n'


def read(tmp_path: Path, content: bytes) -> TrainConfig:
    (tmp_path / "c.toml").write_bytes(content)
    return read_config(tmp_path / "c.toml")


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf" + GOOD, GOOD.replace(b"\n", b"\r\n"), b"\t" + GOOD.replace(b" ", b"\t")]
)
def test_a_file_as_windows_editors_write_it_is_read(content: bytes, tmp_path: Path) -> None:
    config = read(tmp_path, content)
    assert (config.images, config.out) == ("a", "b")


def test_home_is_expanded_in_every_path_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-mine")
    paths = ("images", "out", "base", "start_from", "validation_images")
    config = TrainConfig.from_values({**dict.fromkeys(paths, "~/x"), "instance_prompt": "~/x"}, "x")
    assert {getattr(config, name) for name in paths} == {"/home/of-mine/x"} and config.instance_prompt == "~/x"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'out = "b"\nimages = "C:\\Users"', r"line 2.*single quotes"),
        (b'images = "C:\\temp"\nout = "b"', r"images = .*single quotes"),
        (GOOD.decode().encode("utf-16"), "UTF-16"),
        (GOOD.decode().encode("utf-16-le"), "UTF-16"),
        (GOOD + "# ä".encode("latin-1"), "0xe4 in line 3"),
        (GOOD + b"rank = 1\nrank = 2\n", "rank stands in line 3 and again in line 4"),
        (b'{"images": "a"}', "JSON"),
        (b"images: a", "line 1.*equals sign"),
        (b"images = a", "line 1.*quotes"),
        (b"[train]\n" + GOOD, r"without the line \[train\]"),
        (b"x = " + b"[" * 100_000, "nested"),
        (b"rank = " + b"1" * 5000, "digits"),
        (GOOD + b"steps = true", "steps = true: this key is no switch"),
        (GOOD + b"alpha = nan", "finite"),
        (GOOD + b"learning_rate = inf", "finite"),
        (b'images = ""\nout = "b"', "images = '': the path is empty"),
        (b'images = "a\\u0000"\nout = "b"', "control character"),
        (b'images = "a"\nout = "~nobody-of-this-name/b"', "no user"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place_and_the_way_out(
    content: bytes, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, content)
    assert re.search(expected, str(error.value), re.DOTALL) and str(tmp_path / "c.toml") in str(error.value)


def test_what_is_no_file_is_no_configuration_and_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "config.toml").write_bytes(GOOD)
    for name, expected in (
        ("pipe", "named pipe"),
        ("loop", "leads back"),
        (".", "did you mean .*config.toml"),
        ("config.toml/x", "through a file"),
        ("a" * 300, "255"),
    ):
        with pytest.raises(ConfigError, match=expected):
            read_config(f"{tmp_path}/{name}")


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
