"""Print the script that lets a shell complete commands, options and configuration keys.

    eval "$(srpo-tool completion bash)"        in ~/.bashrc
    eval "$(srpo-tool completion zsh)"         in ~/.zshrc
    srpo-tool completion fish | source         in ~/.config/fish/config.fish

Programs and options are read from their source and keys from the recipes: nothing heavy is
imported, and the script holds all of it, so that a Tab starts no Python.
"""

import argparse
import ast
import importlib
import re
from collections.abc import Mapping, Sequence

from srpo_jax import launch
from srpo_jax.run.keys import RECIPES, keys
from tools.lib import cli

SHELLS = ("bash", "zsh", "fish")
TRAINED = {"srpo-train-sft": "sft", "srpo-train-grpo": "grpo", "srpo-evaluate": "eval"}
TOOLS = {
    "srpo-convert": "tools.convert_hf",
    "srpo-report": "tools.report",
    "srpo-plan": "tools.plan",
}
COMMON = ("--config=", "--config.", "--overrides=", "--workdir=")  # of what takes a recipe

Table = Mapping[str, Sequence[str]]  # what is before the cursor -> what may come


# --- what there is to complete ---------------------------------------------------------------


def programs() -> dict[str, list[str]]:
    """Command, or command and name -> the words that it takes."""
    found: dict[str, list[str]] = {name: [*COMMON, "--debug", "--help"] for name in TRAINED}
    found |= {name: words(module) for name, module in TOOLS.items()}
    for command, modules in (("srpo-data", launch.DATA), ("srpo-tool", launch.tools())):
        found[command] = [*modules]
        found |= {f"{command} {name}": words(module) for name, module in modules.items()}
    return found


def words(module: str) -> list[str]:
    """Sub-commands and options of a tool; those of a recipe as `COMMON`."""
    known = options(module, "make_parser")
    if {"--config", "--overrides"} <= known:
        known = (known - {"--config", "--overrides", "--workdir"}) | {*COMMON}
    return sorted(known | {"--help"})


def options(module: str, function: str) -> set[str]:
    """The options and sub-commands that a function of a tool adds to a parser, by itself or
    through functions of tools/lib/, as its source has them."""
    tree = launch.source(module)
    ways = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found: set[str] = set()
    for node in ast.walk(next(n for n in tree.body if getattr(n, "name", "") == function)):
        if isinstance(node, ast.Constant) and re.fullmatch(r"--\w+", str(node.value)):
            found.add(str(node.value))
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Attribute(ast.Name(owner), name) if ways.get(owner, "").startswith("tools."):
                with_options = name in ("base_parser", "make_parser") or name.startswith("add_")
                found |= options(ways[owner], name) if with_options else set()
            case ast.Name("command"):  # tools.convert_hf
                found.add(ast.literal_eval(node.args[0]))
    return found | of_settings(tree)


def of_settings(tree: ast.Module) -> set[str]:
    """The stages of `tools.build_reflection_data`, and the options that its settings make."""
    if not any(getattr(n, "module", "") == "srpo_jax.reflection" for n in tree.body):
        return set()
    from srpo_jax.reflection.settings import FIELDS  # noqa: PLC0415
    from srpo_jax.reflection.store import STAGES  # noqa: PLC0415

    switches = {name for name, field in FIELDS.items() if isinstance(field.default, bool)}
    found = {f"--{name}" for name in FIELDS} | {f"--no-{name}" for name in switches}
    return found | {"run", *STAGES, "status", "export", "inspect", "reset"}


def arguments(recipe: str) -> list[str]:
    """What may stand behind the colon of --config."""
    launch.reach_home()
    known = importlib.import_module(f"configs.{recipe}").arguments()
    return [f"{name}={value}" for name, values in known.items() for value in dict.fromkeys(values)]


# --- scripts -----------------------------------------------------------------------------------

BASH = r"""
_srpo() {
    local line=${COMP_LINE:0:$COMP_POINT} word before program recipe head= list= one
    word=${line##* }
    before=${line%"$word"}
    set -- $before
    program=${1##*/}
    case $program in srpo-tool | srpo-data) [ $# -lt 2 ] || program="$program $2" ;; esac
    recipe=$(_srpo_recipe "$program")
    case " $before$word" in *" --config="*)
        recipe=${line##* --config=} recipe=${recipe%%[: ]*}
        recipe=${recipe##*/} recipe=${recipe%.py} ;;
    esac
    case $word in
        --config=*:*) head=${word%"${word##*[:,]}"} list=$(_srpo_arguments "$recipe") ;;
        --config=*) head=--config= list='RECIPES' ;;
        --config.*=*) ;;
        --config.*) head=--config. list=$(_srpo_keys "$recipe") ;;
        *) list=$(_srpo_words "$program") ;;
    esac
    COMPREPLY=()
    for one in $list; do
        case $head$one in "$word"*) COMPREPLY+=("$head$one") ;; esac
    done
    if [ -n "${BASH_VERSION-}" ] && [ ${#COMPREPLY[@]} -gt 0 ]; then
        # Readline replaces only what stands behind the last = or :.
        head=${word%"${word##*["$COMP_WORDBREAKS"]}"}
        COMPREPLY=("${COMPREPLY[@]#"$head"}")
        case ${COMPREPLY[0]} in *[=:.]) compopt -o nospace 2>/dev/null ;; esac
    fi
}
"""
ZSH = """(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
autoload -Uz bashcompinit && bashcompinit"""
FISH = r"""
function __srpo
    set -l word (commandline -ct)
    set -l before (commandline -opc)
    set -l program (string replace -r '.*/' '' -- $before[1])
    if contains -- $program srpo-tool srpo-data; and set -q before[2]
        set program "$program $before[2]"
    end
    set -l recipe (__srpo_recipe $program)
    for one in $before $word
        string match -q -- '--config=*' $one
        and set recipe (string replace -r '^--config=(.*/)?(\w*).*' '$2' -- $one)
    end
    switch $word
        case '--config=*:*'
            string replace -r '[^:,]*$' '' -- $word | read -l head
            printf "$head%s\n" (__srpo_arguments $recipe)
        case '--config=*'
            printf '%s\n' --config=(string split ' ' 'RECIPES')
        case '--config.*=*'
        case '--config.*'
            printf '%s\n' --config.(__srpo_keys $recipe)
        case '*'
            __srpo_words $program
    end
end
"""


def script(shell: str) -> str:
    """The whole script for bash, zsh or fish."""
    known = programs()
    with_recipe = [name for name, taken in known.items() if COMMON[0] in taken]
    tables: dict[str, Table] = {
        "words": known,
        "recipe": {name: [TRAINED.get(name, "grpo")] for name in with_recipe},
        "arguments": {recipe: arguments(recipe) for recipe in RECIPES},
        "keys": {recipe: [f"{key.name}=" for key in keys(recipe)] for recipe in RECIPES},
    }
    commands = [name for name in known if " " not in name]
    named = " ".join(f"{recipe}:" for recipe in RECIPES)
    if shell == "fish":
        parts = [_fish_table(f"__srpo_{name}", table) for name, table in tables.items()]
        parts.append(FISH.strip().replace("RECIPES", named))
        parts += [f"complete -c {name} -a '(__srpo)'" for name in commands]
    else:
        parts = [_table(f"_srpo_{name}", table) for name, table in tables.items()]
        parts = [ZSH] * (shell == "zsh") + parts + [BASH.strip().replace("RECIPES", named)]
        how = "-o nospace" if shell == "zsh" else "-o bashdefault -o default"
        parts.append(f"complete {how} -F _srpo {' '.join(commands)}")
    return "\n".join(parts) + "\n"


def _table(name: str, table: Table) -> str:
    cases = [f"        '{key}') echo '{' '.join(values)}' ;;" for key, values in table.items()]
    return "\n".join([f"{name}() {{", "    case $1 in", *cases, "    esac", "}"])


def _fish_table(name: str, table: Table) -> str:
    out = [f"function {name}", '    switch "$argv"']
    for key, values in table.items():
        out += [f"        case '{key}'", f"            string split -- ' ' '{' '.join(values)}'"]
    return "\n".join([*out, "    end", "end"])


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.base_parser(__doc__, 'eval "$(srpo-tool completion bash)"')
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the script."""
    print(script(args.shell), end="")


if __name__ == "__main__":
    cli.run(main, make_parser())
