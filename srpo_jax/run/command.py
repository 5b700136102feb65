"""The command line of the three entry points: a configuration, its changes, one-line errors."""

import difflib
import errno
import importlib.util
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax

from srpo_jax import imported
from srpo_jax.data.buckets import is_file
from srpo_jax.run import processes
from srpo_jax.run.resume import flat_config
from srpo_jax.structs import RunError

AGAIN = 75  # exit code of what was stopped early (EX_TEMPFAIL): the same command goes on
OVERRIDE = "--config."
EXAMPLE = "configs/grpo.py:size=7b"
_SECTION = object()
# Type of a key -> what reads its text, and what it takes in words.
_KINDS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "True or False"),
    int: (int, "a whole number"),
    float: (float, "a number"),
}


class Terminated(KeyboardInterrupt):
    """SIGTERM while a run is set up or has come to its end: there is nothing to save."""


def main(run: Callable[[Any, str], Any]) -> None:
    """--config, --workdir, --debug; exit code 0 only where ``run`` has come to its end.

    130 on Ctrl-C, and `AGAIN` where a signal stopped it early (``run`` returns None, or a dict with
    ``finished`` False), or SIGTERM before it began.
    """
    imported()
    from absl import app, flags, logging  # noqa: PLC0415  (flags exist only in a program)
    from ml_collections import config_flags  # noqa: PLC0415

    config = config_flags.DEFINE_config_file("config", None, "File of configs/, with arguments.")
    folder = "Folder of the run: checkpoints, logs, results."
    workdir = flags.DEFINE_string("workdir", None, folder)
    debug = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    for name in ("config", "workdir", "debug"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # for --help

    def parse(argv: list[str]) -> list[str]:
        try:
            if _asks_for_help(argv):
                return app.parse_flags_with_usage(argv)
            words = one_word_each(argv[1:])
            check_arguments(words)
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
                processes.leave(str(error))
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
    if isinstance(error, Terminated):
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
    after a save that failed, which wait for minutes for what will not come.
    """
    if jax.process_count() == 1 and all(
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


def read_config(text: str) -> Any:
    """The ConfigDict of ``FILE[:ARGUMENTS]``, as in ``--config=configs/grpo.py:size=7b``.

    Raises RunError for a file that is not there or is no configuration, ValueError for arguments
    that it does not know.
    """
    path, _, argument = text.partition(":")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        kind = "Python file" if Path(path).is_file() else "file"
        raise RunError(
            f"--config={text}: {path} is no {kind}; give one of configs/, e.g. {EXAMPLE}"
        )
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
    for word in words:
        key, equals, text = word.removeprefix(OVERRIDE).partition("=")
        if not word.startswith(OVERRIDE) and key.removeprefix("--") in known:
            raise RunError(f"{key}: is a key of the configuration; write {OVERRIDE}{word[2:]}")
        if word.startswith(OVERRIDE) and equals:
            _check_value(key, text, known.get(key, _SECTION))


def _check_value(key: str, text: str, default: Any) -> None:
    """RunError unless ``text`` can stand where the configuration holds ``default``."""
    if default is _SECTION:
        raise RunError(
            f"{OVERRIDE}{key}: is a section; change its keys, as {OVERRIDE}{key}.KEY=..."
        )
    read, takes = _KINDS.get(type(default), (str, ""))
    try:
        read(text)
    except (ValueError, KeyError):
        raise RunError(f"{OVERRIDE}{key}={text}: takes {takes}, as {default}") from None
