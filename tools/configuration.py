"""Write docs/configuration.md: every key with its default, meaning and source."""

import argparse

from srpo_jax.data.files import write_text
from srpo_jax.run.keys import page
from tools.lib import cli


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(__doc__, "python -m tools.configuration")
    parser.add_argument("--out", type=cli.output_file, default="docs/configuration.md")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the page."""
    write_text(args.out, page())
    print(args.out)


if __name__ == "__main__":
    cli.run(main, make_parser())
