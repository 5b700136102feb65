"""Draws the problems of one task and seed, writes both SFT files, tokenizer and random weights."""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from srpo_jax.structs import BLOCKS
from tools.demo import data
from tools.demo.tasks import TASKS
from tools.lib import cli
from tools.study.arms import FULL, ONE_ROUND_SHARE, QUICK, sizes


def cut_to_one_round(table: pa.Table, seed: int) -> pa.Table:
    """The records without reflection and second round where the first answer is right and a coin
    says so."""
    coins = np.random.default_rng([seed, len(BLOCKS)]).random(len(table)) < ONE_ROUND_SHARE
    cut = coins & np.array(table["first_correct"].to_pylist())
    for name in BLOCKS[2:]:
        texts = zip(cut, table[name].to_pylist(), strict=True)
        column = pa.array([None if short else text for short, text in texts], pa.string())
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def main(args: argparse.Namespace) -> None:
    """Everything that an SFT start and the arms after it read."""
    folder, task = Path(args.folder), TASKS[args.task]
    plan = (QUICK if args.quick else FULL).plan
    data.write_records(folder / "data", args.seed, sizes(plan), task)
    data.write_model(folder / "data", folder / "init/hf", args.seed)
    file = folder / "data/sft.parquet"
    mix = cut_to_one_round(pq.read_table(file), args.seed)
    pq.write_table(mix, folder / "data/mix.parquet", row_group_size=512)
    file.rename(folder / "data/five.parquet")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(
        __doc__, "python -m tools.study.prepare --task dot_tiles --seed 0 --folder runs/one"
    )
    parser.add_argument("--task", choices=[*TASKS], required=True)
    parser.add_argument("--seed", type=cli.count, required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--quick", action="store_true")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
