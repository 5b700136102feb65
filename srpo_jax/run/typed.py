"""A ConfigDict as a dataclass: every key has its field, and every value its field's type."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from srpo_jax.rewards.profiles import Profile, profile_named
from srpo_jax.structs import RunError

T = TypeVar("T")

# Type of a field -> what a value, or each of a tuple's, must be: its types, and in words.
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    tuple[int, ...]: ((int,), "whole numbers, as (1024, 2048)"),
    tuple[float, ...]: ((int, float), "numbers, as (0.7, 0.3)"),
    tuple[str, ...]: ((str,), "texts, as ('vision/',)"),
}


def build(kind: type[T], config: Any, prefix: str = "") -> T:
    """The dataclass ``kind`` from a ConfigDict's keys, sections as the dataclasses they are typed.

    Raises RunError for a key without a field, a field without a key, a value of another type, or
    one that the dataclass itself refuses, with the dotted key in front.
    """
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    for name in config:
        if name not in known:
            raise RunError(f"{prefix}{name}: no such key; is this the program's own config file?")
    values = {}
    for name, field in known.items():
        if name in config:
            values[name] = _value(config[name], hints[name], prefix + name)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise RunError(f"{prefix}{name}: is missing; is this the program's own config file?")
    return _made(prefix, kind, **values)


def _value(value: Any, hint: Any, key: str) -> Any:
    """What stands in a field of type ``hint``."""
    if hint is Profile:
        return _made(f"{key}: ", profile_named, value)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{key}.")  # pyright: ignore[reportArgumentType]
    value = tuple(value) if isinstance(value, list) else value
    if hint in _KINDS:
        types, words = _KINDS[hint]
        several = typing.get_origin(hint) is tuple
        items = value if isinstance(value, tuple) else (value,)
        if several != isinstance(value, tuple) or any(type(item) not in types for item in items):
            raise RunError(f"{key}={value!r}: must be {words}")
    return value


def _made(prefix: str, make: Callable[..., T], *args: Any, **values: Any) -> T:
    try:
        return make(*args, **values)
    except ValueError as error:
        raise RunError(f"{prefix}{error}") from error
