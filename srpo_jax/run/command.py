"""The command line of the three entry points: a configuration, its changes, one-line errors."""

import difflib
import errno
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from srpo_jax.run.resume import flat_config
from srpo_jax.structs import RunError

OVERRIDE = "--config."
EXAMPLE = "configs/grpo.py:size=7b"


def main(run: Callable[[Any, str], Any]) -> None:
    """--config, --workdir, --debug; exit code 0 only on success, 130 on Ctrl-C."""
    from absl import app, flags, logging  # noqa: PLC0415  (flags exist only in a program)
    from ml_collections import config_flags  # noqa: PLC0415

    config = config_flags.DEFINE_config_file("config", None, "File of configs/, with arguments.")
    folder = "Folder of the run: checkpoints, logs, results."
    workdir = flags.DEFINE_string("workdir", None, folder, required=True)
    debug = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    flags.mark_flag_as_required("config")
    for name in ("config", "workdir", "debug"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # for --help

    def parse(argv: list[str]) -> list[str]:
        try:
            check_arguments(argv[1:])
            return app.parse_flags_with_usage(argv) if _asks_for_help(argv) else flags.FLAGS(argv)
        except (flags.Error, ValueError, OSError, RuntimeError) as error:
            if "--debug" in argv:
                raise
            _fail(RunError(str(error)) if isinstance(error, flags.Error) else error)

    def call(_: list[str]) -> None:
        # Orbax reports every file it touches; what fails is raised as well, and said in one line.
        logging.set_verbosity(logging.WARNING if debug.value else logging.FATAL)
        sys.unraisablehook = sys.unraisablehook if debug.value else _no_hook
        try:
            run(config.value, workdir.value)
        except (Exception, KeyboardInterrupt) as error:
            if debug.value:
                raise
            _fail(error)

    app.run(call, flags_parser=parse)


def _asks_for_help(argv: list[str]) -> bool:
    return any(word.lstrip("-") in ("help", "helpshort", "helpfull") for word in argv[1:])


def _fail(error: BaseException) -> NoReturn:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text += "; free space and run the same command again: it goes on from what is saved"
    plain = isinstance(error, ValueError | OSError | RuntimeError) and text
    text = text if plain else f"{type(error).__name__}: {text}"
    interrupted = isinstance(error, KeyboardInterrupt)
    print("interrupted" if interrupted else f"error: {text}", file=sys.stderr, flush=True)
    code = 130 if interrupted else 1
    # Other processes may be waiting in a collective: leave without their consent.
    os._exit(code) if jax.process_count() > 1 else sys.exit(code)


def _no_hook(*_: Any) -> None:
    """Through Python's own, TensorStore reports each read and write that it gave up by a page."""


def read_config(text: str) -> Any:
    """The ConfigDict of ``FILE[:ARGUMENTS]``, as in ``--config=configs/grpo.py:size=7b``.

    Raises RunError for a file that is not there or is no configuration, ValueError for arguments
    that it does not know.
    """
    path, _, argument = text.partition(":")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise RunError(f"--config={text}: {path} is no file; give one of configs/, e.g. {EXAMPLE}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise RunError(f"--config={text}: {path} has no get_config; give one of configs/")
    return module.get_config(argument or None)


def check_arguments(words: list[str]) -> None:
    """Of a command line: the configuration can be read, has every key that is changed, once.

    Raises what `read_config` does, and RunError naming the nearest key.
    """
    named = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    if not named:
        return
    keys = [w.removeprefix(OVERRIDE).partition("=")[0] for w in words if w.startswith(OVERRIDE)]
    config = read_config(named[-1])
    known = flat_config(config.to_dict())
    sections = {key.rpartition(".")[0] for key in known}
    for key, count in Counter(keys).items():
        if key not in known and key not in sections:
            # A misspelt last word is sought in its own section first.
            section, _, word = key.rpartition(".")
            beside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
            near = [f"{section}.{w}" for w in difflib.get_close_matches(word, beside, 1, 0.7)]
            near = near or difflib.get_close_matches(key, known, 1, 0.8)
            meant = f"; did you mean {OVERRIDE}{near[0].lstrip('.')}?" if near else ""
            listed = f"; {section} has {', '.join(beside)}" if beside and not near else ""
            raise RunError(f"{OVERRIDE}{key}: the configuration has no such key{meant}{listed}")
        if count > 1:
            raise RunError(f"{OVERRIDE}{key}: given {count} times; give it once")
