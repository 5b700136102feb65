"""SRPO in JAX: reflection SFT and reflection-aware GRPO for Qwen2.5-VL on TPU and GPU."""

import os
import signal
import sys
from typing import Any, NoReturn

__version__ = "0.1.0"


class RunError(RuntimeError):
    """A run cannot start or go on; the message names the key, the values and the remedy."""


def _leave(*_: Any) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(130)


def imported() -> None:
    """What a program calls when it begins: from here on Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def importing() -> None:
    """While a program imports, which takes seconds, Ctrl-C is one line and not the traceback of
    whatever was being imported."""
    signal.signal(signal.SIGINT, _leave)


if sys.argv[:1] == ["-m"]:  # `python -m` looks for one of our programs
    importing()
