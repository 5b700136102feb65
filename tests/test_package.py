"""The package outside of a checkout: commands, recipes by name, overrides, images."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import train_helpers
import yaml

from srpo_jax import launch
from srpo_jax.run import recipe
from srpo_jax.run.settings import grpo_settings, sft_settings
from srpo_jax.structs import RunError

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = dict(
    re.findall(
        r'^(srpo-[\w-]+) = "srpo_jax.launch:(\w+)"', (ROOT / "pyproject.toml").read_text(), re.M
    )
)


# --- recipes and overrides ---


def test_a_recipe_is_found_by_its_name_from_any_folder_and_a_file_by_its_path(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert recipe.read_config("grpo:size=3b,recipe=authors").steps == 876
    (tmp_path / "grpo").write_text("")  # a file goes first
    with pytest.raises(RunError, match="grpo is no Python file"):
        recipe.read_config("grpo")
    (tmp_path / "mine.py").write_text("from configs.sft import get_config\n")
    assert recipe.read_config("mine.py:size=tiny").size == "tiny"
    with pytest.raises(RunError, match="configs/grpo.py is no file; .* e.g. grpo:size=7b"):
        recipe.read_config("configs/grpo.py")


def overridden(tmp_path, text: str, *words: str):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    return recipe.expanded(["--config=sft:size=tiny", f"--overrides={file}", *words])


def test_overrides_hold_sections_dotted_keys_and_lists_and_the_command_line_goes_first(tmp_path):
    text = "steps: 3\noptim: {lr: 1e-4, b1: 0.8}\ndata.mix: [0.5, 2]\nfreeze: [vision/]\nseed: 1\n"
    words = overridden(tmp_path, text, "--config.seed=7", "--workdir=w")
    assert sorted(words[1:]) == [
        "--config.data.mix=(0.5, 2)",
        "--config.freeze=('vision/',)",
        "--config.optim.b1=0.8",
        "--config.optim.lr=1e-4",
        "--config.seed=7",
        "--config.steps=3",
        "--workdir=w",
    ]
    recipe.check_arguments(words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "my.yaml: optim.lrr: .*no such key; did you mean optim.lr?"),
        ("filter: {on: first}", "my.yaml: filter.on: the configuration has no such key"),
        ("optim: 3", r"my.yaml: optim: is a section; change its keys, as optim.KEY=\.\.\."),
        ("steps: many", "my.yaml: steps=many: takes a whole number, as 0"),
        ("- steps", "my.yaml: must hold keys and values"),
        ("steps: [", "my.yaml: is no YAML: .* line 1"),
    ],
)
def test_a_wrong_override_is_one_line_with_file_and_key(tmp_path, text, message):
    with pytest.raises(RunError, match=message) as told:
        overridden(tmp_path, text)
    assert "\n" not in str(told.value)


def test_overrides_that_are_not_there_are_named():
    with pytest.raises(RunError, match="^--overrides=none.yaml: No such file"):
        recipe.expanded(["--config=sft", "--overrides=none.yaml"])


@pytest.mark.parametrize(("name", "settings"), [("grpo", grpo_settings), ("sft", sft_settings)])
def test_the_config_that_a_run_writes_is_what_it_ran_with(tmp_path, name, settings):
    config = recipe.read_config(f"{name}:size=tiny")
    config.update_from_flattened_dict({"optim.lr": 3e-5, "freeze": (), "data.mix": (0.5, 2.0)})
    plain = settings(config).plain
    recipe.write_config(tmp_path, plain)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == plain
    again = recipe.read_config(name)
    changes = recipe.read_overrides(str(tmp_path / "config.yaml"), again)
    from tools.lib.recipes import parsed  # noqa: PLC0415

    again.update_from_flattened_dict({k: parsed(again, k, text) for k, text in changes.items()})
    assert settings(again).plain == plain
    assert [*recipe.differences(plain)] == [
        "data.mix=[0.5, 2.0] ([])", "freeze=[] (['vision/'])",
        f"optim.lr=3e-05 ({recipe.stock(plain)['optim']['lr']})",
    ]  # fmt: skip


# --- commands ---


def test_every_command_is_a_function_of_the_launcher():
    assert len(SCRIPTS) == 8 and all(callable(getattr(launch, name)) for name in SCRIPTS.values())


def test_a_tool_that_is_not_there_is_one_line_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/srpo-tool", "make_fh"])
    with pytest.raises(SystemExit, match="^error: srpo-tool has no make_fh; did you mean make_hf?"):
        launch.tool()
    monkeypatch.setattr(sys, "argv", ["/bin/srpo-data"])
    launch.data()
    told = capsys.readouterr().out
    assert re.search("^  build  Stage 1's data", told, re.M) and "  check  What would" in told


def test_every_tool_is_listed_with_what_it_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/srpo-tool", "--help"])
    launch.tool()
    told = re.findall(r"^  (\w+)  +(\S.{20,})$", capsys.readouterr().out, re.M)
    assert [name for name, _ in told] == [*launch.tools()]
    assert {"demo", "reflect", "completion", "study", "transformers_check"} <= {n for n, _ in told}


def test_the_image_copies_files_that_are_there_and_installs_extras_that_exist():
    text = (ROOT / "docker/Dockerfile").read_text()
    copied = [word for line in re.findall("^COPY (.*) ", text, re.M) for word in line.split()]
    assert {"setup.py", "pyproject.toml", "srpo_jax", "configs", "tools"} <= {*copied}
    assert all([*ROOT.glob(word)] for word in copied)
    extras = set(re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.M))
    assert {"gpu", "tpu", "plan", "test", "docs", "wandb", "mlflow"} == extras
    assert set(re.findall(r"/src\[(\w+)\]", text)) == {"gpu", "tpu"}


@pytest.mark.slow
def test_the_wheel_works_outside_of_a_checkout(tmp_path):
    source = tmp_path / "source"
    for name in ("srpo_jax", "configs", "tools"):  # building leaves files beside its source
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (
        *ROOT.glob("requirements*.txt"),
        *map(ROOT.joinpath, ("pyproject.toml", "setup.py", "README.md", "LICENSE")),
    ):
        shutil.copy(file, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run([*pip, *build], check=True)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    variables = {"base": str(venv), "platbase": str(venv)}
    libraries = Path(sysconfig.get_path("purelib", "venv", variables))
    (libraries / "installed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = tmp_path.glob("*.whl")
    python = venv / "bin/python"
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", wheel], check=True)
    place = tmp_path / "elsewhere"
    place.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*words: str) -> str:
        command = [venv / "bin" / words[0], *words[1:]]
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    world = train_helpers.world(tmp_path / "world")
    assert "--config.optim.lr" in run("srpo-train-sft", "--help")
    tokenizer = tmp_path / "world/tokenizer"
    run(
        "srpo-tool",
        "make_hf",
        "--out",
        "hf",
        "--tokenizer",
        str(tokenizer),
        "--hidden",
        "16",
        "--layers",
        "1",
    )
    (place / "my.yaml").write_text(
        f"hf_dir: {world['hf_dir']}\ndata: {{train: {world['train']}, global_batch_size: 4}}\n"
        "log.tensorboard: false\n"
    )
    recipe_words = ["--config=sft:size=tiny,mode=debug", "--overrides=my.yaml"]
    assert "40 records" in run("srpo-data", "check", *recipe_words)
    run("srpo-train-sft", *recipe_words, "--workdir=run")
    assert (place / "run/checkpoints/2").is_dir() and (place / "run/config.yaml").is_file()
    run("srpo-report", "--workdir", "run")
    exported = run(
        "srpo-convert",
        "export",
        "--checkpoint",
        "run",
        "--hf_dir",
        "out",
        "--reference",
        world["hf_dir"],
    )
    assert exported and (place / "out/config.json").is_file()
