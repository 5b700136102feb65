"""What is wrong with a record, in one short line."""

import reprlib
from typing import Any


class RecordError(ValueError):
    """A record that cannot be used: where it stands, what is wrong with it and what to do."""

    def __init__(self, origin: str, reason: str, remedy: str = "fix or remove the record"):
        super().__init__(origin, reason, remedy)  # all three, so that the error can be pickled
        self.origin, self.reason, self.remedy = origin, reason, remedy

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}; {self.remedy}"


def shown(value: Any, limit: int = 60) -> str:
    """``repr`` of a value for a message, of about ``limit`` characters at most.

    Texts keep their beginning; only as much of a value is looked at as is shown.
    """
    short = isinstance(value, str | bytes)
    text = repr(value[: limit + 1]) if short else reprlib.repr(value)
    return text if len(text) <= limit + 2 else f"{text[: limit - 3]}..."


def half_character(value: Any) -> str | None:
    """A text in ``value`` (JSON values, bytes) that holds half a surrogate pair, None without one.

    JSON can write such a text; no file, tokenizer or database takes it.
    """
    left = [value]  # a stack: JSON may be nested deeper than functions may call each other
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                return value[max(0, error.start - 10) : error.end + 10]
    return None
