"""Prediction rows for the tests of scoring, and the parity data where it is at hand."""

import json
from pathlib import Path

import pytest

PARITY = Path(__file__).resolve().parents[2] / "shared" / "data" / "scoring_parity"


def parity_rows(name: str) -> list[dict]:
    """The rows of a parity file; skips the test where the data is not there."""
    path = PARITY / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no parity data: {path} is not there")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def without(row: dict, *names: str) -> dict:
    """A row without some of its fields."""
    return {key: value for key, value in row.items() if key not in names}


def write_rows(path: Path, rows: list[dict]) -> Path:
    """The rows as a JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
