"""What a call may bring: each argument of the kind that its field takes, and of files only the caller's own uploads.

Every call is judged by this once it is parsed, by whatever way and in whatever spelling it came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.block_function import BlockFunction
from gradio.components.api_component import Api

from dora_diffusion.webapp.received import Received, files_in

__all__ = ["NOT_YOURS", "foreign_file", "in_words", "unfit"]

NOT_YOURS = "A file in this request is not one that you uploaded, or is no longer kept. Upload it again."


def foreign_file(value: object, visitor: str, received: Received) -> bool:
    """Whether a file is named anywhere in it that this visitor has not uploaded."""
    return any(not received.is_of(path, visitor) for path in files_in(value))


def unfit(function: BlockFunction, values: Sequence[object]) -> dict[str, str]:
    """The arguments that are not of the kind that their fields take, each with what it must be."""
    names = getattr(getattr(function.fn, "__code__", None), "co_varnames", ())
    said: dict[str, str] = {}
    for place, (field, value) in enumerate(zip(function.inputs, values)):
        wanted = _wanted(field, value)
        if wanted:
            label = names[place] if isinstance(field, Api) and place < len(names) else getattr(field, "label", None)
            said[str(label or f"argument {place + 1}")] = f"must be {wanted}"
    return said


def in_words(wrong: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {what}" for name, what in wrong.items()) + "."


def _wanted(field: object, value: object) -> str:
    """What the field takes, in words; empty where the value is of that kind."""
    if isinstance(field, Api):
        return "" if _fits_schema(field._api_info, value) else _in_words(field._api_info)
    for kind, (fits, words) in FIELDS.items():
        if isinstance(field, kind):
            return "" if fits(field, value) else words
    return ""


def _is_text(_field: Any, value: object) -> bool:
    return isinstance(value, str)


def _is_key(_field: Any, value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_number(_field: Any, value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _is_choice(field: Any, value: object) -> bool:
    return isinstance(value, str) and any(value == key for _, key in field.choices)


def _are_choices(field: Any, value: object) -> bool:
    return isinstance(value, list) and all(_is_choice(field, each) for each in value)


def _is_table(_field: Any, value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("headers"), list):
        return False
    rows, width = value.get("data"), len(value["headers"])
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == width and not any(isinstance(cell, (dict, list)) for cell in row)
        for row in rows
    )


def _is_file(field: Any, value: object) -> bool:
    if value is None:
        return True
    if field.file_count == "single":
        return _is_one_file(value)
    return isinstance(value, list) and all(map(_is_one_file, value))


def _is_one_file(value: object) -> bool:
    meta = value.get("meta") if isinstance(value, dict) else None
    return isinstance(value, dict) and isinstance(value.get("path"), str) and meta == {"_type": "gradio.FileData"}


FIELDS: dict[type | tuple[type, ...], tuple[Callable[[Any, object], bool], str]] = {
    gr.Textbox: (_is_text, "text"),
    gr.Dropdown: (_is_key, "text"),  # what is offered changes; who uses the choice looks it up
    (gr.Slider, gr.Number): (_is_number, "a number"),
    gr.Checkbox: (lambda _, value: isinstance(value, bool), "true or false"),
    gr.CheckboxGroup: (_are_choices, "a list of what is offered"),
    gr.Radio: (_is_choice, "one of what is offered"),
    gr.Dataframe: (_is_table, "a table whose rows are as long as its headers"),
    (gr.File, gr.UploadButton): (_is_file, "uploaded files"),
}
TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "string": ((str,), "text"),
    "boolean": ((bool,), "true or false"),
    "integer": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "array": ((list,), "a list"),
    "object": ((dict,), "uploaded files"),
}


def _fits_schema(schema: Mapping[str, Any], value: object) -> bool:
    types, _ = TYPES[schema["type"]]
    if isinstance(value, bool) and bool not in types:
        return False
    if schema["type"] == "integer" and isinstance(value, float):
        return value.is_integer()
    if not isinstance(value, types):
        return False
    return not isinstance(value, list) or all(_fits_schema(schema["items"], each) for each in value)


def _in_words(schema: Mapping[str, Any]) -> str:
    words = TYPES[schema["type"]][1]
    return f"{words} of which each is {_in_words(schema['items'])}" if schema["type"] == "array" else words
