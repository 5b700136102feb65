"""Test set-up: CPU with 8 simulated devices, decided before jax is imported anywhere."""

import os
import sys
from pathlib import Path

from simulated import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
_flags = xla_flags(devices=8)
if _flags not in os.environ.get("XLA_FLAGS", ""):  # what is given wins
    os.environ["XLA_FLAGS"] = f"{_flags} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "float32")
assert jax.device_count() == 8, f"tests need 8 simulated devices, found {jax.device_count()}"


def pytest_addoption(parser):
    """Here, because pytest reads this file before the command line."""
    help = "how often tests/faults kills runs at random moments, all kinds together"
    parser.addoption("--kills", type=int, default=6, help=help)


# Files that take longest, first: with several processes none is left with one of them at the end.
LONGEST = (
    *("test_aot", "test_distributed", "test_demo", "test_real_input", "test_benchmark_evaluation"),
    *("test_runs", "test_matrix", "test_reflection_build", "test_train", "test_processes"),
    *("test_steps", "test_steps_mesh", "test_sampling", "test_duplicates", "test_configs"),
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The folder with the real tokenizer and data sets, where the checkout has one beside it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside the checkout: real tokenizer and data sets missing")
    return SHARED_DATA


@pytest.fixture
def one_device_env() -> dict[str, str]:
    """Environment of a command as a user starts it: one device, programs that are optimised."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
