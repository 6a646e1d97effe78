"""TOML as people write it, by hand and on any system: what is wrong is said with its line and the way out."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from dora_diffusion.errors import ConfigError
from dora_diffusion.paths import obstacle

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same library under its older name
    import tomli as tomllib

__all__ = ["read_toml", "value_or_text"]

MOST_SHOWN = 80  # characters of a line in a message


def read_toml(path: Path) -> dict[str, object]:
    """The values of a TOML file. Raises ConfigError."""
    if reason := obstacle(path):
        raise ConfigError(f"no configuration file at {path}: it {reason}.")
    if path.is_dir():
        hint = f"did you mean {path / 'config.toml'}?" if (path / "config.toml").is_file() else "give a TOML file."
        raise ConfigError(f"{path} is a folder, no configuration file: {hint}")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration file at {path}.") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from error
    return _parse(_decode(content, path), path)


def value_or_text(text: str) -> object:
    """A value as TOML writes it, and failing that the text as it is."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _decode(content: bytes, path: Path) -> str:
    """The text of a file that may begin with a byte order mark, as some editors on Windows write it."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:200]:
        raise ConfigError(f"cannot read {path}: it is UTF-16 or no text at all. Save it again with UTF-8 encoding.")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line, byte = content[: error.start].count(b"\n") + 1, content[error.start]
        raise ConfigError(
            f"cannot read {path}: byte 0x{byte:02x} in line {line} is no UTF-8. Save it again with UTF-8 encoding."
        ) from error


def _parse(text: str, path: Path) -> dict[str, object]:
    if text.lstrip().startswith("{"):
        raise ConfigError(f'{path} is JSON, no TOML file: write each key on a line of its own, such as images = "a".')
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(f"{path} is no TOML file that can be read: its brackets are nested too deep.") from error
    except ValueError as error:  # a TOMLDecodeError, or a number with thousands of digits
        raise ConfigError(f"{path} is no TOML file: {error}.{_look_at_line(text, str(error))}") from error


def _look_at_line(text: str, problem: str) -> str:
    """The line that a TOML error is about, and what is most often wrong in such a line."""
    place = re.search(r"at line (\d+)", problem)
    lines = text.split("\n")
    line = lines[int(place[1]) - 1].strip() if place and int(place[1]) <= len(lines) else ""
    shown = f" The line is: {line[:MOST_SHOWN]}" if line else ""
    if "\\" in line:
        return f"{shown}\nIn double quotes a backslash begins an escape: use single quotes, 'C:\\Users', or slashes."
    if "overwrite" in problem.lower() and (twice := _key_twice(lines)):
        return f"\nThe key {twice[0]} stands in line {twice[1]} and again in line {twice[2]}: delete one of them."
    if re.fullmatch(r"[\w-]+\s*:.*", line):
        return f"{shown}\nTOML has an equals sign where YAML has a colon: key = value."
    if re.fullmatch(r"[\w-]+\s*=\s*[^\"'\[{\d+-].*", line):
        return f'{shown}\nText needs quotes: key = "value"; true and false are written small.'
    return shown


def _key_twice(lines: list[str]) -> tuple[str, int, int] | None:
    """A key that stands in two lines, which the parser names by neither."""
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if found := re.match(r"\s*([\w-]+)\s*=", line):
            if found[1] in seen:
                return found[1], seen[found[1]], number
            seen[found[1]] = number
    return None
