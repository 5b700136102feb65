"""A Hugging Face model directory beside its weights: whether it is one, its JSON files, its end
tokens. It may lie on a bucket."""

import atexit
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from srpo_jax.data.buckets import AnyPath, located, on_bucket, read_bytes, reader

ADAPTER = "adapter_config.json"
END_TOKENS = ("<|im_end|>", "<|endoftext|>")  # as the released generation_config.json names them
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".msgpack", ".h5")


def model_folder(path: AnyPath) -> epath.Path:
    """``path``, where a model's config.json stands.

    Raises FileNotFoundError or ValueError, with the remedy, where it is anything else: a name on
    the hub, a file, a PEFT adapter, a run of ours, the folder above.
    """
    folder = hf_folder(path)
    whole = (folder / "config.json").is_file()
    if (folder / ADAPTER).is_file():
        raise ValueError(f"{path}: {_about_adapter(folder, whole)}")
    if not whole:
        raise FileNotFoundError(f"{path}: has no config.json; {_beside(folder)}")
    return folder


def hf_folder(path: AnyPath) -> epath.Path:
    """``path``, which must be a directory; FileNotFoundError or ValueError with the remedy."""
    folder = located(path)
    if not str(path) or not folder.exists():
        home = "; write $HOME instead of ~, which the shell leaves as it is after ="
        remedy = home if str(path).startswith("~") else how_to_get(str(path))
        raise FileNotFoundError(f"{str(path)!r}: no such directory{remedy}")
    if not folder.is_dir():
        raise ValueError(f"{path}: is a file; give the Hugging Face model directory it lies in")
    return folder


@functools.cache
def small_files(folder: epath.Path) -> Path:
    """The folder, for libraries that know disks only.

    For one on a bucket that is a local copy of what lies in it beside the weights, made once in a
    process and removed at its end.
    """
    if not on_bucket(folder):
        return Path(folder)
    copy = Path(tempfile.mkdtemp(prefix="hf-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for file in folder.iterdir():
        if not file.name.endswith(WEIGHTS) and not file.is_dir():
            (copy / file.name).write_bytes(read_bytes(file))
    return copy


def _about_adapter(folder: epath.Path, beside_model: bool) -> str:
    merge = "PEFT's merge_and_unload"
    if beside_model:
        return (
            f"{ADAPTER} lies beside a whole model, and the adapter would be left out; merge it "
            f"({merge}), or move adapter_* elsewhere"
        )
    base = read_json(folder / ADAPTER).get("base_model_name_or_path") or "an unnamed model"
    return (
        f"is a PEFT adapter of {base}, not a model; give that, and the adapter as init_from, or "
        f"merge it first ({merge}, then save_pretrained) and copy the tokenizer and preprocessor "
        "files of the base model to the result"
    )


def how_to_get(path: str, wanted: str = "a Hugging Face Qwen2.5-VL model directory") -> str:
    """How to get what looks like a model's name on the hub; else to give what is ``wanted``."""
    name = f"Qwen/{path}" if re.fullmatch(r"Qwen2\.5-VL-\w+-Instruct", path) else path
    owner, _, folder = name.partition("/")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) or Path(owner).is_dir():
        return f"; give {wanted}"
    return (
        f"; a model of the hub is downloaded first: hf download {name} --local-dir {folder}, and "
        f"then given as {folder}"
    )


def _beside(folder: epath.Path) -> str:
    """What to give instead of a folder without config.json."""
    if (folder / "checkpoints").is_dir() or (folder / "params").is_dir():
        return "a run or checkpoint of this project is init_from, or exported by tools.convert_hf"
    found = sorted((*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")))
    if found:
        return f"did you mean {found[-1].parent}?"
    return "hf_dir must be a Hugging Face model directory of Qwen2.5-VL"


def read_json(path: Path | epath.Path) -> dict[str, Any]:
    """A JSON file's object, {} where there is no file; ValueError naming what is wrong with it."""
    if not path.is_file():
        return {}
    if is_lfs_pointer(path):
        raise ValueError(f"{path}: is a Git LFS pointer, not the file; run `git lfs pull` there")
    try:
        found = json.loads(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy the file anew") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def is_lfs_pointer(path: Path | epath.Path) -> bool:
    """Whether a repository was cloned without its large files, and this stands for one of them."""
    return reader(path)(0, 20) == b"version https://git-"


def end_token_ids(folder: Path | epath.Path, vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """The ids that end a response: generation_config's (else config's), then `END_TOKENS`.

    The released checkpoints name both; fine-tuned ones often lose one, or write null or [], and
    generation then runs past the end. ``vocabulary`` maps END_TOKENS to their ids. ValueError for a
    value that is no id.
    """
    files = (folder / "generation_config.json", folder / "config.json")
    named = next(filter(None, (token_ids(file, "eos_token_id") for file in files)), [])
    known = (vocabulary[token] for token in END_TOKENS if token in vocabulary)
    return tuple(dict.fromkeys((*named, *known)))


def added_tokens(folder: Path | epath.Path) -> dict[str, int]:
    """Text -> id of the tokens that the tokenizer's files add to its vocabulary."""
    slow = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    fast = read_json(folder / "tokenizer.json").get("added_tokens", [])
    found = {token["content"]: int(key) for key, token in slow.items()}
    return found | {token["content"]: int(token["id"]) for token in fast}


def token_ids(path: Path | epath.Path, key: str) -> list[int]:
    """The token ids, one or several, under ``key`` of a JSON file; [] for null or no such key."""
    value = read_json(path).get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{path}: {key}: expected a token id or a list of them, found {value!r}")
    return ids
