"""Names of files and folders as people give them: what cannot be used is said before any work begins."""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from pathlib import Path

from dora_diffusion.errors import ConfigError

__all__ = ["fitting", "given_path", "obstacle", "operand"]

LONGEST_NAME = 255  # bytes, on every common file system
KINDS = (
    (stat.S_ISFIFO, "is a named pipe"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a device"),
    (stat.S_ISBLK, "is a device"),
)


def given_path(text: str | os.PathLike[str]) -> str:
    """The path with ~ expanded. Raises ConfigError for one that is empty, or that no file here can carry."""
    path = os.fspath(text)
    if not path.strip():
        raise ConfigError("the path is empty: give the name of a file or folder.")
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the name {path!r} is no UTF-8, so it could be written into no configuration, adapter or picture. "
            "Rename the file or folder."
        ) from error
    if wrong := next((c for c in path if unicodedata.category(c) == "Cc"), None):
        raise ConfigError(
            f"the path {path!r} holds the control character {wrong!r}. If you wrote a backslash in a TOML file: in "
            "double quotes it begins an escape, so write the path in single quotes, 'C:\\new', or with slashes."
        )
    if too_long := next((part for part in Path(path).parts if len(os.fsencode(part)) > LONGEST_NAME), None):
        raise ConfigError(
            f"the name {too_long[:40]!r}... has {len(os.fsencode(too_long))} bytes; a file's or folder's may have "
            f"{LONGEST_NAME}. Give a shorter one."
        )
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ConfigError(
            f"there is no user whose home is {path.split(os.sep)[0]!r}. If a file is called so, write ./{path}."
        )
    return expanded


def operand(path: str | os.PathLike[str]) -> str:
    """The path as a command takes it among its arguments, where one that begins with a dash is an option."""
    text = os.fspath(path)
    return f"./{text}" if text.startswith("-") else text


def obstacle(path: Path) -> str:
    """Why a path that is to be read is neither a file nor a folder that can be, as the rest of a sentence.

    Empty where it is one, and where nothing is there: what was expected there, the caller says best. Nothing is
    opened, for a named pipe would wait for its other end.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return f"is a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else ""
    except NotADirectoryError:
        return "leads through a file as if that were a folder"
    except ValueError:
        return "holds a NUL character, which no name may"
    except OSError as error:
        reasons = {errno.ELOOP: "is a link that leads back to itself", errno.ENAMETOOLONG: "is too long a name"}
        return reasons.get(error.errno or 0, f"cannot be reached ({error.strerror}); check its permissions")
    if kind := next((said for test, said in KINDS if test(mode)), ""):
        return f"{kind}, neither a file nor a folder"
    needed = os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)
    return "" if os.access(path, needed) else "may not be read; check its permissions"


def fitting(stem: str, rest: str, longest: int = LONGEST_NAME) -> str:
    """`stem` + `rest` as a file's name, the end of the stem left out where they have more than `longest` bytes."""
    return os.fsencode(stem)[: longest - len(os.fsencode(rest))].decode("utf-8", "ignore") + rest
