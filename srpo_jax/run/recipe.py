"""The configuration of a command line: a recipe, --overrides FILE and --config.KEY=VALUE."""

import ast
import contextlib
import difflib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from srpo_jax import RunError, __version__
from srpo_jax.data.files import AnyPath, absolute, write_text
from srpo_jax.launch import HOME, reach_home
from srpo_jax.run.resume import flat_config

OVERRIDE = "--config."
EXAMPLE = "grpo:size=7b"
_SECTION = object()
# Type of a key -> what reads its text, and what it takes in words.
_KINDS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "True or False"),
    int: (int, "a whole number"),
    float: (float, "a number"),
}


def recipe_path(text: str) -> str:
    """``NAME[:ARGUMENTS]`` of a recipe that comes with the package as ``FILE[:ARGUMENTS]``; what
    names a file stays as it is."""
    name, colon, arguments = text.partition(":")
    file = HOME / "configs" / f"{name}.py"
    own = name.isidentifier() and file.is_file() and not Path(name).is_file()
    return f"{file}{colon}{arguments}" if own else text


def read_config(text: str) -> Any:
    """The ConfigDict of ``RECIPE[:ARGUMENTS]``, as in ``--config=grpo:size=7b``: a recipe of
    configs/ by its name, or any file.

    Raises RunError for a file that is not there or is no configuration, ValueError for arguments
    that it does not know.
    """
    reach_home()
    path, _, argument = recipe_path(text).partition(":")
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


def expanded(words: list[str]) -> list[str]:
    """The words of a command line with the file of a named recipe, and with the keys of
    ``--overrides=FILE`` as ``--config.KEY=VALUE`` where the command line does not give them itself.
    """
    given = {word.partition("=")[0] for word in words}
    named = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    out: list[str] = []
    for word in words:
        name, _, value = word.partition("=")
        if name == "--config":
            out.append(f"--config={recipe_path(value)}")
        elif name != "--overrides":
            out.append(word)
        elif named:
            changes = read_overrides(value, read_config(named[-1]))
            pairs = ((f"{OVERRIDE}{key}", text) for key, text in changes.items())
            out += [f"{key}={text}" for key, text in pairs if key not in given]
    return out


# --- YAML ------------------------------------------------------------------------------------


def read_overrides(path: str, config: Any) -> dict[str, str]:
    """Keys and values of a YAML file, as text that ``--config.KEY=VALUE`` takes.

    Sections are nested, or dotted (``optim.lr: 1e-6``). RunError naming file and key for one that
    ``config`` does not have, or a value of another type.
    """
    try:
        # All scalars as text: YAML would read "on" as True, and 1e-6 as text anyway.
        held = yaml.load(absolute(path).read_text(), yaml.BaseLoader)
    except OSError as error:
        raise RunError(f"--overrides={path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"--overrides={path}: is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(held, dict):
        raise RunError(f"--overrides={path}: must hold keys and values, as in steps: 100")
    known = flat_config(config.to_dict())
    changes = flat_config(held)
    for key, value in changes.items():
        check_key(f"{path}: {key}", key, known)
        changes[key] = _tuple(value) if isinstance(value, list) else value
        _check_value(f"{path}: {key}", changes[key], known.get(key, _SECTION))
    return changes


def _tuple(values: list[str]) -> str:
    """A list of a YAML file as Python's text of a tuple."""
    found: list[Any] = []
    for text in values:
        found.append(text)
        with contextlib.suppress(ValueError, SyntaxError):
            found[-1] = ast.literal_eval(text)
    return repr(tuple(found))


class _Inline(yaml.SafeDumper):
    """Sections as blocks, lists in their line."""


_Inline.add_representer(
    list, lambda to, x: to.represent_sequence("tag:yaml.org,2002:seq", x, flow_style=True)
)


def write_config(workdir: AnyPath, plain: dict[str, Any]) -> None:
    """config.yaml: every key of a run with its value, as ``--overrides`` takes it."""
    text = f"# The configuration of this run (srpo_jax {__version__}); --overrides takes it.\n"
    text += yaml.dump(plain, Dumper=_Inline, sort_keys=False, allow_unicode=True, width=100)
    write_text(absolute(workdir) / "config.yaml", text)


def read_config_of(workdir: AnyPath) -> dict[str, Any]:
    """What `write_config` wrote there, as JSON values; {} where it did not, or it is damaged."""
    with contextlib.suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
        held = yaml.safe_load((absolute(workdir) / "config.yaml").read_text())
        return held if isinstance(held, dict) else {}
    return {}


# --- what a run changes ----------------------------------------------------------------------


def stock(plain: dict[str, Any]) -> dict[str, Any]:
    """The recipe that a configuration began with, as JSON values: of its program and size."""
    name = "grpo" if "grpo" in plain else "sft" if "epochs" in plain else "eval"
    return json.loads(json.dumps(read_config(f"{name}:size={plain['size']}").to_dict()))


def differences(plain: dict[str, Any]) -> Iterator[str]:
    """``KEY=VALUE (RECIPE'S)`` of each key that differs from the `stock` recipe."""
    now, before = flat_config(plain), flat_config(stock(plain))
    for key, value in now.items():
        if key not in before or before[key] != value:
            yield f"{key}={value} ({before.get(key, 'no such key')})"


# --- checks ----------------------------------------------------------------------------------


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
    for key, count in Counter(keys).items():
        check_key(f"{OVERRIDE}{key}", key, known)
        if count > 1:
            raise RunError(f"{OVERRIDE}{key}: given {count} times; give it once")
    for word in words:
        key, equals, text = word.removeprefix(OVERRIDE).partition("=")
        if not word.startswith(OVERRIDE) and key.removeprefix("--") in known:
            raise RunError(f"{key}: is a key of the configuration; write {OVERRIDE}{word[2:]}")
        if word.startswith(OVERRIDE) and equals:
            _check_value(f"{OVERRIDE}{key}", text, known.get(key, _SECTION))


def check_key(place: str, key: str, known: dict[str, Any]) -> None:
    """RunError, beginning with ``place``, unless ``key`` is one of the flat ``known`` or a section
    of them; it names the nearest."""
    if key in known or any(name.startswith(f"{key}.") for name in known):
        return
    # A misspelt last word is sought in its own section first.
    section, _, word = key.rpartition(".")
    beside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
    near = [f"{section}.{w}" for w in difflib.get_close_matches(word, beside, 1, 0.7)]
    near = near or difflib.get_close_matches(key, known, 1, 0.8)
    prefix = OVERRIDE if place.startswith(OVERRIDE) else ""
    meant = f"; did you mean {prefix}{near[0].lstrip('.')}?" if near else ""
    listed = f"; {section} has {', '.join(beside)}" if beside and not near else ""
    raise RunError(f"{place}: the configuration has no such key{meant}{listed}")


def _check_value(place: str, text: Any, default: Any) -> None:
    """RunError unless ``text`` can stand where the configuration holds ``default``."""
    if default is _SECTION:
        raise RunError(f"{place}: is a section; change its keys, as {place.split()[-1]}.KEY=...")
    read, takes = _KINDS.get(type(default), (str, ""))
    try:
        read(text)
    except (ValueError, KeyError):
        raise RunError(f"{place}={text}: takes {takes}, as {default}") from None
