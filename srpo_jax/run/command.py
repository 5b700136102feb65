"""The command line of the three entry points: a configuration, its changes, one-line errors."""

import contextlib
import errno
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from srpo_jax import imported
from srpo_jax.data.buckets import is_file
from srpo_jax.run import console, processes
from srpo_jax.run.keys import help_text
from srpo_jax.run.recipe import EXAMPLE, check_arguments, expanded
from srpo_jax.structs import RunError, Stalled

STALLED = 74  # exit code where the data do not come (EX_IOERR): what was done is saved
AGAIN = 75  # exit code of what was stopped early (EX_TEMPFAIL): the same command goes on

_RECIPE_OF = {"train_sft": "sft", "train_grpo": "grpo", "evaluate": "eval"}  # by program


class Terminated(KeyboardInterrupt):
    """SIGTERM while a run is set up or has come to its end: there is nothing to save."""


def main(run: Callable[[Any, str], Any]) -> None:
    """A configuration, --workdir and --debug; exit code 0 only where ``run`` has come to its end.

    130 on Ctrl-C, and `AGAIN` where a signal stopped it early (``run`` returns None, or a dict with
    ``finished`` False), or SIGTERM before it began; `STALLED` where the data do not come.
    """
    imported()
    console.reach_any_locale()
    from absl import app, flags, logging  # noqa: PLC0415  (flags exist only in a program)
    from ml_collections import config_flags  # noqa: PLC0415

    config = config_flags.DEFINE_config_file("config", None, "File of configs/, with arguments.")
    flags.DEFINE_string("overrides", None, "YAML file of configuration keys, as config.yaml.")
    folder = "Folder of the run: checkpoints, logs, results."
    workdir = flags.DEFINE_string("workdir", None, folder)
    debug = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    for name in ("config", "overrides", "workdir", "debug"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # for --help

    def parse(argv: list[str]) -> list[str]:
        try:
            if _asks_for_help(argv):
                with contextlib.suppress(SystemExit):
                    app.parse_flags_with_usage(argv)
                width = shutil.get_terminal_size((100, 40)).columns
                print(help_text(_RECIPE_OF[Path(argv[0]).stem.replace("-", "_")], width))
                sys.exit(0)
            words = expanded(one_word_each(argv[1:]))
            check_arguments(words)
            sys.argv[1:] = words  # where config_flags looks for --config.KEY
            rest = flags.FLAGS([argv[0], *words])
            for name, example in (("config", EXAMPLE), ("workdir", "runs/NAME")):
                if not flags.FLAGS[name].value:
                    raise RunError(f"--{name} is missing; give it as in --{name}={example}")
            if is_file(workdir.value or ""):
                raise RunError(f"--workdir={workdir.value}: is a file; give a folder")
            return rest
        except (flags.Error, ValueError, OSError, RuntimeError) as error:
            if "--debug" in argv:
                raise
            _fail(RunError(str(error)) if isinstance(error, flags.Error) else error)

    def call(_: list[str]) -> None:
        # Orbax reports every file it touches; what fails is raised as well, and said in one line.
        logging.set_verbosity(logging.WARNING if debug.value else logging.FATAL)
        sys.unraisablehook = sys.unraisablehook if debug.value else _no_hook
        signal.signal(signal.SIGTERM, _terminated)  # until the run has its own way to stop
        try:
            result = run(config.value, str(workdir.value))
        except (Exception, KeyboardInterrupt) as error:
            if debug.value:
                processes.leave(f"error: {error}")
                raise
            _fail(error)
        if result is None or not result.get("finished", True):
            processes.leave()
            _leave(AGAIN)

    app.run(call, flags_parser=parse)


def _asks_for_help(argv: list[str]) -> bool:
    return any(word.lstrip("-") in ("help", "helpshort", "helpfull") for word in argv[1:])


def _terminated(*_: Any) -> NoReturn:
    raise Terminated


def _fail(error: BaseException) -> NoReturn:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text += "; free space and run the same command again: it goes on from what is saved"
    plain = isinstance(error, ValueError | OSError | RuntimeError) and text
    text = text if plain else f"{type(error).__name__}: {text}"
    said, code = f"error: {text}", 1
    if isinstance(error, Stalled):
        code = STALLED
    elif isinstance(error, Terminated):
        said, code = "stopped by SIGTERM; run the same command again", AGAIN
    elif isinstance(error, KeyboardInterrupt):
        said, code = "interrupted", 130
    processes.name_the_lost(said)
    print(said, file=sys.stderr, flush=True)
    processes.leave(said)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process, at once where Python would wait.

    For other processes, which may be waiting in a collective; for threads, as Orbax leaves them
    after a save that failed, which wait for minutes for what will not come; for workers that hang
    in a disk, where not even a signal reaches them.
    """
    alone = jax.process_count() == 1 and code != STALLED
    if alone and all(
        thread.daemon or thread is threading.main_thread() for thread in threading.enumerate()
    ):
        sys.exit(code)
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _no_hook(*_: Any) -> None:
    """Through Python's own, TensorStore reports each read and write that it gave up by a page."""


def one_word_each(words: list[str]) -> list[str]:
    """The words of a command line with each flag's value in its word: --name=value.

    Raises RunError for a word that belongs to no flag, as around a = with spaces.
    """
    out: list[str] = []
    for word in words:
        if re.match("--?[A-Za-z]", word):
            out.append(f"--{word.lstrip('-')}")
        elif out and "=" not in out[-1] and out[-1] != "--debug" and word != "=":
            out[-1] += f"={word}"
        else:
            raise RunError(f"{word!r} belongs to no flag; write --name=value, without spaces")
    return out
