"""The configuration of a training command, as tools take it: --config and --config.KEY=VALUE."""

import argparse
import ast
import functools
import sys
from collections.abc import Callable
from typing import Any

from srpo_jax.run.recipe import OVERRIDE, check_arguments, expanded, read_config
from tools.lib import cli


def make_parser(description: str | None, example: str) -> argparse.ArgumentParser:
    """A parser with what every such tool takes."""
    example += f"\n\n{OVERRIDE}KEY=VALUE changes the configuration, as in training"
    parser = cli.base_parser(description, example)
    parser.add_argument("--config", required=True, help="a recipe, with its arguments")
    parser.add_argument("--overrides", help="YAML file of configuration keys")
    parser.add_argument("--workdir", help="ignored: a training command may stand here as it is")
    parser.set_defaults(changes=[])
    return parser


def run(main: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser) -> None:
    """`cli.run` of a command line with overrides; they become ``changes``."""
    words = sys.argv[1:]
    parser.set_defaults(changes=[word for word in words if word.startswith(OVERRIDE)])
    cli.run(main, parser, [word for word in words if not word.startswith(OVERRIDE)])


def read(args: argparse.Namespace) -> Any:
    """The ConfigDict that the arguments name; ValueError or RunError naming what is wrong."""
    overrides = [f"--overrides={args.overrides}"] if args.overrides else []
    words = expanded([f"--config={args.config}", *overrides, *args.changes])
    check_arguments(words)
    config = read_config(args.config)
    for word in words[1:]:
        key, equals, text = word.removeprefix(OVERRIDE).partition("=")
        if not equals:
            raise ValueError(f"{word}: write it as {word}=VALUE")
        config.update_from_flattened_dict({key: parsed(config, key, text)})
    return config


def parsed(config: Any, key: str, text: str) -> Any:
    """``text`` as the type that the configuration holds under ``key``."""
    now = functools.reduce(lambda section, name: section[name], key.split("."), config)
    if isinstance(now, bool | tuple | list):
        return type(now)(ast.literal_eval(text.capitalize() if isinstance(now, bool) else text))
    return text if now is None else type(now)(text)
