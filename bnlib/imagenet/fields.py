"""Frozen dataclasses whose fields know their limits, and give the flags of a command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import field
from typing import Any, get_type_hints

__all__ = ["add_arguments", "check", "given", "option"]

_WORDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_HOLDS: dict[str, Callable[[Any, float], bool]] = {
    "ge": lambda value, limit: value >= limit,
    "gt": lambda value, limit: value > limit,
    "le": lambda value, limit: value <= limit,
    "lt": lambda value, limit: value < limit,
}


def option(
    default: Any,
    help: str,
    source: str = "",
    *,
    choices: tuple[Any, ...] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A dataclass field: what it is, where its value comes from, and what it may be.

    ``ge``, ``gt``, ``le`` and ``lt`` are its limits, as in comparisons: greater or equal, ...
    """
    limits = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    limits = {word: limit for word, limit in limits.items() if limit is not None}
    metadata = {"help": help, "source": source, "choices": choices, "limits": limits}
    return field(default=default, metadata=metadata)


def check(instance: Any) -> None:
    """For ``__post_init__``: every field has its type (an int will do for a float) and limits.

    Raises
    ------
    TypeError, ValueError
        With the field, the value and what is allowed.
    """
    types = get_type_hints(type(instance))
    for entry in dataclasses.fields(instance):
        value = getattr(instance, entry.name)
        if types[entry.name] is float and type(value) is int:
            value = float(value)
        _check_one(entry, types[entry.name], value)
        object.__setattr__(instance, entry.name, value)


def _check_one(entry: dataclasses.Field[Any], wanted: type, value: object) -> None:
    if type(value) is not wanted:
        raise TypeError(f"{entry.name} must be a {wanted.__name__}; got {value!r}")
    choices, limits = entry.metadata["choices"], entry.metadata["limits"]
    if choices and value not in choices:
        raise ValueError(f"{entry.name} is {value!r}; it must be one of {choices}")
    finite = not isinstance(value, float) or math.isfinite(value)
    if not finite or not all(_HOLDS[word](value, limit) for word, limit in limits.items()):
        allowed = " and ".join(f"{_WORDS[word]} {limit:g}" for word, limit in limits.items())
        raise ValueError(f"{entry.name} is {value!r}; it must be {allowed or 'finite'}")


def add_arguments(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """Give the parser one flag per field of the dataclass, such as ``--learning-rate``.

    A flag that is not given leaves no trace in the namespace.  Booleans have two flags, such as
    ``--lrn`` and ``--no-lrn``.
    """
    types = get_type_hints(cls)
    group = parser.add_argument_group(title)
    for entry in dataclasses.fields(cls):
        metadata, kind = entry.metadata, types[entry.name]
        source = f" [{metadata['source']}]" if metadata["source"] else f" (default {entry.default})"
        options: dict[str, Any] = {
            "dest": entry.name,
            "default": argparse.SUPPRESS,
            "help": (metadata["help"] + source).replace("%", "%%"),
        }
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": metadata["choices"]}
            options["metavar"] = None if metadata["choices"] else kind.__name__.upper()
        group.add_argument("--" + entry.name.replace("_", "-"), **options)


def given(cls: type, namespace: argparse.Namespace) -> dict[str, Any]:
    """The fields of the dataclass that flags were given for, with their values."""
    names = {entry.name for entry in dataclasses.fields(cls)}
    return {name: value for name, value in vars(namespace).items() if name in names}
