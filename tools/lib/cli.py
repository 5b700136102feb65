"""What every command-line tool shares: one-line errors.

    def main(args: argparse.Namespace) -> None: ...

    if __name__ == "__main__":
        cli.run(main, make_parser())

A tool's ``main`` raises ordinary exceptions whose text names the file, row or key and the remedy;
``run`` prints that text as one line and exits with 1 (with ``--debug``: the traceback).
"""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from srpo_jax import imported
from srpo_jax.data.files import write_json, write_text
from srpo_jax.launch import program
from srpo_jax.run import console


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong, and which option was meant."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with 2; the page of all options is --help's."""
        if word := re.match(r"unrecognized arguments: (--?[^\s=]+)", message):
            options = [name for name in self._option_string_actions if name.startswith("--")]
            near = difflib.get_close_matches(word[1], options, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def base_parser(description: str | None, example: str) -> argparse.ArgumentParser:
    """An argument parser whose ``--help`` ends with ``example``, with ``--debug`` already there."""
    out = Parser(
        prog=program(),
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    out.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return out


def run(
    main: Callable[[argparse.Namespace], int | None],
    arguments: argparse.ArgumentParser,
    argv: list[str] | None = None,
) -> None:
    """Parse ``argv``, call ``main`` and exit: 0 on success, 1 on an error, 130 on Ctrl-C."""
    imported()
    console.reach_any_locale()
    args = arguments.parse_args(argv)
    try:
        code = main(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if args.debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code or 0)


def one_line(error: BaseException) -> str:
    """The text of an exception on one line; its type too where the text alone says little."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, RuntimeError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def add_columns(parser: argparse.ArgumentParser) -> None:
    """``--columns``, for ``Columns.parse``."""
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=COLUMN",
        help="foreign columns of records: images=img choices=options",
    )


def positive(text: str) -> int:
    """``type=`` of an argument that must be a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, is {value}")
    return value


def count(text: str) -> int:
    """``type=`` of an argument that must be a whole number, 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, is {value}")
    return value


def above_zero(text: str) -> float:
    """``type=`` of an argument that must be a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, is {text}")
    return value


def share(text: str) -> float:
    """``type=`` of an argument that must be a number above 0, at most 1."""
    value = above_zero(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, is {text}")
    return value


def output_file(text: str) -> str:
    """``type=`` of a file to write, so that a folder is refused before the work and not after."""
    if not text or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file in it")
    return text


def write_report(path: str | os.PathLike, summary: dict, page: str) -> None:
    """``path``.json with the summary and ``path``.md with the page; either ending is dropped."""
    base = Path(path)
    base = base.with_suffix("") if base.suffix in (".json", ".md") else base
    write_json(base.with_name(base.name + ".json"), summary)
    write_text(base.with_name(base.name + ".md"), page)
