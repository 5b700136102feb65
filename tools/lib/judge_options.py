"""The options of scoring and of a language model that judges, for every tool that has them."""

import argparse
import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from srpo_jax.benchmarks import scoring
from srpo_jax.benchmarks.all import BENCHMARKS
from srpo_jax.benchmarks.judge.client import Judge
from srpo_jax.remote.protocol import Endpoint
from srpo_jax.run import console
from tools.lib import cli

UNAVAILABLE = 3  # exit code: some judgements did not arrive, the same command asks for them


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options --judge_*, --concurrency and --requests_per_minute."""
    group = parser.add_argument_group(
        "judge", "any OpenAI-compatible server; replies are kept, so that no call is made twice"
    )
    add = group.add_argument
    add("--judge_model", default="", help="name of the model")
    add("--judge_url", help="base URL, http://host:8000/v1 (OPENAI_BASE_URL, else OpenAI's)")
    add(
        "--judge_key_env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the key (%(default)s); '': no key",
    )
    add("--judge_cache", metavar="FILE", help="SQLite file of all replies (beside --output)")
    add("--judge_schema", default="on", choices=("on", "off"), help="structured output (on)")
    add(
        "--judge_temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of the first try; -1: none is sent, for models that take none (%(default)s)",
    )
    add("--judge_max_tokens", type=cli.positive, default=2048, help="of one reply (%(default)s)")
    add("--judge_price_in", type=_price, default=0.0, help="USD per million tokens (%(default)s)")
    add("--judge_price_out", type=_price, default=0.0, help="USD per million tokens (%(default)s)")
    add("--concurrency", type=cli.positive, default=16, help="requests in flight (%(default)s)")
    add("--requests_per_minute", type=_price, default=0.0, help="0: unlimited (%(default)s)")
    add(
        "--judge_timeout",
        type=cli.above_zero,
        default=120.0,
        help="seconds of one request (%(default)s)",
    )
    add("--judge_retries", type=int, default=8, help="of a request that fails (%(default)s)")


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """--benchmark, --mode, --workers and --timeout."""
    add = parser.add_argument
    add("--benchmark", required=True, choices=sorted(BENCHMARKS))
    modes = (*scoring.MODES, scoring.JUDGE)
    add("--mode", default="official_rule", choices=modes, help="default: official_rule")
    workers = min(4, os.cpu_count() or 1)
    text = "processes that compare expressions (%(default)s)"
    add("--workers", type=cli.positive, default=workers, help=text)
    add(
        "--timeout",
        type=cli.above_zero,
        default=5.0,
        help="seconds for one comparison (%(default)s)",
    )


def _price(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, is {text}")
    return value


@contextlib.contextmanager
def open_judge(args: argparse.Namespace, total: int, unit: str) -> Iterator[Judge]:
    """The judge of the command line, which shows its progress; ValueError without a model."""
    if not args.judge_model:
        raise ValueError("who judges? give --judge_model (and --judge_url for your own server)")
    endpoint = Endpoint(
        model=args.judge_model,
        base_url=args.judge_url,
        key_env=args.judge_key_env,
        concurrency=args.concurrency,
        requests_per_minute=args.requests_per_minute,
        timeout=args.judge_timeout,
        max_retries=args.judge_retries,
        price_in=args.judge_price_in,
        price_out=args.judge_price_out,
    )
    with console.progress("judging", total, unit) as advance:
        yield Judge(
            endpoint,
            args.judge_cache or default_cache(args.output),
            temperature=args.judge_temperature if args.judge_temperature >= 0 else None,
            schema=args.judge_schema == "on",
            max_tokens=args.judge_max_tokens,
            advance=advance,
        )


def conclude(judge: Judge | None, summary: dict[str, Any]) -> int:
    """Put the judge's account, if there is a judge, into the summary; the exit code."""
    if judge is None:
        return 0
    summary["judge"] = judge.summary()
    return UNAVAILABLE if judge.stats.unavailable else 0


def default_cache(output: str | Path) -> Path:
    """The cache beside an output file."""
    path = Path(output)
    return path.with_name(path.stem + ".judge.sqlite")


def describe(summary: dict[str, Any]) -> list[str]:
    """What the judge of a summary did and cost, one line each; nothing without one."""
    if "judge" not in summary:
        return []
    summary = summary["judge"]
    priced = f", ${summary['cost_usd']:.4f}" if summary["cost_usd"] else ""
    lines = [
        f"judge {summary['model']}: {summary['calls']} calls, {summary['cached']} from the cache, "
        f"{summary['prompt_tokens']:,} + {summary['completion_tokens']:,} tokens{priced}"
    ]
    if summary["nonsense"]:
        kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(summary["nonsense"].items()))
        lines.append(f"replies of no use: {kinds}")
    if summary["refused"]:
        lines.append(f"{summary['refused']} requests refused by the server")
    if summary["unavailable"]:
        lines.append(
            f"{summary['unavailable']} judgements did not arrive: run the same command again"
        )
    return lines
