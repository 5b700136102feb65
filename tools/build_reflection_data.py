r"""Stage 1's data: a policy answers, a teacher reflects, what holds becomes reflection SFT data.

    run      every stage in order: attempt, grade, judge, select, reflect (with its checks), export
    attempt, grade, judge, select, reflect, check     one stage
    status   where everything stands; works while a run is going on
    export   write what is accepted so far
    inspect  an HTML page of random accepted and rejected items
    reset    throw the results of a stage and of those after it away

The three ways, each from records to a data set:

    a vendor's API (the key is read from OPENAI_API_KEY, or from the variable --teacher_key_env):
      python -m tools.build_reflection_data run --workdir runs/data --records train.jsonl \
          --policy_hf_dir Qwen2.5-VL-7B-Instruct --teacher_model o4-mini
    a server of your own (vLLM, SGLang, llama.cpp ...), for policy, teacher or both:
      python -m tools.build_reflection_data run --workdir runs/data --records train.jsonl \
          --policy_model qwen-7b --policy_url http://localhost:8000/v1 \
          --teacher_model qwen-72b --teacher_url http://localhost:8001/v1
    no teacher: the policy reviews itself, and what its review repairs or keeps right is kept:
      python -m tools.build_reflection_data run --workdir runs/data --records train.jsonl \
          --policy_hf_dir Qwen2.5-VL-7B-Instruct --mode self --tries 8

A stopped or killed run goes on where it stood when the same command is run again; --workdir alone
is enough then. Exit code 3: stopped by --budget_usd, --max_items or a signal, nothing is wrong.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

from srpo_jax.data.files import write_text
from srpo_jax.reflection import settings as settings_lib
from srpo_jax.reflection import stages
from srpo_jax.reflection.items import Items
from srpo_jax.reflection.store import STAGES, Store
from srpo_jax.reflection.write import account, export, tally
from srpo_jax.remote.client import Fatal, check_reachable
from srpo_jax.report import reflection_page
from tools.lib import cli

STOPPED = 3  # exit code
BUILDING = ("run", *STAGES)


def make_parser() -> argparse.ArgumentParser:
    """The command line: one option for each field of ``Settings``."""
    parser = cli.base_parser(
        __doc__,
        "python -m tools.build_reflection_data run --workdir runs/data --records train.jsonl "
        "--policy_hf_dir Qwen2.5-VL-7B-Instruct --teacher_model o4-mini --budget_usd 50",
    )
    parser.add_argument("command", choices=(*BUILDING, "status", "export", "inspect", "reset"))
    add = parser.add_argument
    add("--workdir", required=True, help="where state and data set are kept")
    add("--out", help="folder of the data set, or the page (default: in --workdir)")
    add("--stage", choices=STAGES, help="reset: the first stage to throw away")
    add("--n", type=cli.positive, default=40, help="inspect: items on the page (%(default)s)")
    for name, field in settings_lib.FIELDS.items():
        default, about = field.default, field.metadata
        shown = about["help"] + ("" if default in ("", ()) else f" (default {default})")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": shown}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            options |= {"nargs": "+", "metavar": name.upper()}
        else:
            options |= {"type": type(default), "choices": about["choices"] or None}
        add(f"--{name}", **options)
    return parser


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


def build(args: argparse.Namespace) -> int:
    """Run stages; 3 where they stopped before their end."""
    with Store(args.workdir, write=True) as store:
        settings = settings_lib.merge(store, settings_lib.only_settings(vars(args)))

        def policy() -> stages.LocalPolicy:
            from tools.lib.reflection_policy import SamplerPolicy  # loads jax: only where needed

            return SamplerPolicy(settings)

        run = stages.Run(store, settings, say, policy)
        names = ("attempt", "grade", "judge", "select", "reflect")
        if args.command == "run":
            warn_of_servers(settings)
        try:
            for name in names if args.command == "run" else (args.command,):
                stages.STAGES[name](run)
        except stages.Incomplete as stop:
            say(str(stop))
            return STOPPED
        if args.command == "run":
            write(args, store, run.items, settings)
    return 0


def warn_of_servers(settings: settings_lib.Settings) -> None:
    """Say at once what would stop a later stage: no key, or a server that is not there."""
    for who in ("judge", "teacher"):
        try:
            if getattr(settings, f"{who}_model"):
                check_reachable(stages.endpoint(settings, who))
        except Fatal as error:
            say(f"warning, of --{who}_model: {error}")


def write(args: argparse.Namespace, store: Store, items: Items, settings: Any) -> None:
    """The data set as it stands, and where."""
    out = Path(args.out or Path(args.workdir) / "data")
    card = export(store, items, settings, out, say)
    print(
        f"{card['items']} items, {card['first_attempts'].get('right', 0)} with a right first "
        f"attempt, ${card['cost_usd']:.2f}: {out / 'card.md'}"
    )


def read_settings(store: Store, args: argparse.Namespace) -> settings_lib.Settings:
    """Stored settings under those of the command line, for commands that build nothing."""
    return settings_lib.Settings(
        **{**settings_lib.load(store), **settings_lib.only_settings(vars(args))}
    )


def export_now(args: argparse.Namespace) -> int:
    """Write what is accepted so far."""
    with Store(args.workdir, write=False) as store:
        settings = read_settings(store, args)
        write(args, store, Items(settings.records, settings.data_root, settings.columns), settings)
    return 0


def status(args: argparse.Namespace) -> int:
    """Print where everything stands."""
    with Store(args.workdir, write=False) as store:
        for stage, found in tally(store).items():
            if not found["ok"] and not found["reasons"] and not found["errors"]:
                continue
            recent = store.count(
                "SELECT COUNT(*) FROM results WHERE stage = ? AND time > ?",
                (stage, time.time() - 60),
            )
            line = f"{stage:8} {found['ok']} usable"
            for reason, number in found["reasons"].items():
                line += f", {number} {reason}"
            if found["prompt_tokens"] or found["completion_tokens"]:
                line += f"; {found['prompt_tokens']:,} + {found['completion_tokens']:,} tokens"
            if found["cost"]:
                line += f", ${found['cost']:.2f}"
            if found["errors"]:
                line += "; errors: " + ", ".join(f"{k} {n}" for k, n in found["errors"].items())
            print(line + (f"; {recent} in the last minute" if recent else ""))
        records = account(store)
        print(
            f"records  {sum(records.values())}: "
            + ", ".join(f"{n} {s}" for s, n in records.items())
        )
        problems = store.query(
            "SELECT problem, COUNT(*), MIN(origin) FROM items WHERE problem IS NOT NULL "
            "GROUP BY problem ORDER BY 2 DESC LIMIT 5"
        )
        for problem, number, origin in problems:
            print(f"         {number} unusable: {problem} (first: {origin})")
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Write the page of random items."""
    path = Path(args.out or Path(args.workdir) / "inspect.html")
    with Store(args.workdir, write=False) as store:
        settings = read_settings(store, args)
        items = Items(settings.records, settings.data_root, settings.columns)
        shown = reflection_page.items_to_show(store, items, args.n, random.Random(settings.seed))
        html = reflection_page.page(shown, f"Reflection data: {args.workdir}", account(store))
    write_text(path, html)
    print(f"{len(shown)} items: {path}")
    return 0


def reset(args: argparse.Namespace) -> int:
    """Throw away a stage and those after it."""
    if not args.stage:
        raise ValueError("reset: say from which stage on with --stage")
    with Store(args.workdir, write=True) as store:
        gone = STAGES[STAGES.index(args.stage) :]
        print(f"{store.clear(gone)} results of {', '.join(gone)} thrown away")
    return 0


def main(args: argparse.Namespace) -> int:
    """Do the command."""
    if args.command in BUILDING:
        return build(args)
    commands = {"status": status, "export": export_now, "inspect": inspect, "reset": reset}
    return commands[args.command](args)


if __name__ == "__main__":
    cli.run(main, make_parser())
