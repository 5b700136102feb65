"""The command line of the three entry points."""

import os
import sys
from collections.abc import Callable
from typing import Any

import jax


def main(run: Callable[[Any, str], Any]) -> None:
    """The command line of an entry point: --config, --workdir, --debug; one-line errors."""
    from absl import app, flags, logging  # noqa: PLC0415  (flags exist only in a program)
    from ml_collections import config_flags  # noqa: PLC0415

    config = config_flags.DEFINE_config_file("config", None, "File of configs/, with arguments.")
    folder = "Folder of the run: checkpoints, logs, results."
    workdir = flags.DEFINE_string("workdir", None, folder, required=True)
    debug = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    flags.mark_flag_as_required("config")
    for name in ("config", "workdir", "debug"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # for --help

    def call(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every file it touches
        try:
            run(config.value, workdir.value)
        except Exception as error:
            if debug.value:
                raise
            text = " ".join(str(error).split())
            plain = isinstance(error, ValueError | OSError | RuntimeError) and text
            print(f"error: {text if plain else f'{type(error).__name__}: {text}'}", file=sys.stderr)
            sys.stderr.flush()
            # Other processes may be waiting in a collective: leave without their consent.
            os._exit(1) if jax.process_count() > 1 else sys.exit(1)

    app.run(call)
