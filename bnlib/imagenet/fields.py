"""Frozen dataclasses whose fields know their limits, and give the flags of a command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
import operator
from dataclasses import field
from typing import Any, get_type_hints

__all__ = ["add_arguments", "check", "given", "option"]

_LIMITS = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}


def option(
    default: Any,
    help: str,
    source: str = "",
    *,
    choices: tuple[Any, ...] | None = None,
    **limits: float,
) -> Any:
    """A dataclass field: what it is, where its value comes from, and what it may be.

    Its limits are ``ge``, ``gt``, ``le`` and ``lt``, as in comparisons: greater or equal, ...
    """
    checks = {_LIMITS[word]: limit for word, limit in limits.items()}
    metadata = {"help": help, "source": source, "choices": choices, "limits": checks}
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
        if type(value) is not types[entry.name]:
            raise TypeError(f"{entry.name} must be a {types[entry.name].__name__}; got {value!r}")
        choices, limits = entry.metadata["choices"], entry.metadata["limits"]
        if choices and value not in choices:
            raise ValueError(f"{entry.name} is {value!r}; it must be one of {choices}")
        finite = not isinstance(value, float) or math.isfinite(value)
        if not finite or not all(holds(value, limit) for (_, holds), limit in limits.items()):
            allowed = " and ".join(f"{words} {limit:g}" for (words, _), limit in limits.items())
            raise ValueError(f"{entry.name} is {value!r}; it must be {allowed or 'finite'}")
        object.__setattr__(instance, entry.name, value)


def add_arguments(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """Give the parser a flag for each field of the dataclass; booleans have a ``--no-`` form too.

    A flag that is not given leaves no trace in the namespace.
    """
    types = get_type_hints(cls)
    group = parser.add_argument_group(title)
    for entry in dataclasses.fields(cls):
        metadata, kind = entry.metadata, types[entry.name]
        source = f" [{metadata['source']}]" if metadata["source"] else f" (default {entry.default})"
        options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            options = {"type": kind, "choices": metadata["choices"]}
            options["metavar"] = None if metadata["choices"] else kind.__name__.upper()
        group.add_argument(
            "--" + entry.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=(metadata["help"] + source).replace("%", "%%"),
            **options,
        )


def given(cls: type, namespace: argparse.Namespace) -> dict[str, Any]:
    """The fields of the dataclass that flags were given for, with their values."""
    names = {entry.name for entry in dataclasses.fields(cls)}
    return {name: value for name, value in vars(namespace).items() if name in names}
