"""Metric rows that survive restarts, timers, and FLOP counts worked by hand."""

import json
import time

import bucket_helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.run import metrics
from srpo_jax.run.metrics import MetricWriter, ModelFlops, Timers, read_rows


def writer(tmp_path, **kw) -> MetricWriter:
    return MetricWriter(tmp_path, total_steps=10, **kw)


def raw_rows(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_deferred_row_is_written_when_the_next_one_comes(tmp_path):
    out = writer(tmp_path)
    out.defer(1, {"loss": jnp.float32(0.5)})
    assert raw_rows(tmp_path) == []
    out.defer(2, {"loss": jnp.float32(0.25)})
    assert [(r["step"], r["loss"]) for r in raw_rows(tmp_path)] == [(1, 0.5)]
    out.write(2, {"accuracy": 1}, split="eval")  # an evaluation comes after its step's row
    assert [(r["split"], r["step"]) for r in raw_rows(tmp_path)] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
    ]
    out.close()


def test_log_is_append_only_and_a_resumed_run_supersedes_its_repeated_steps(tmp_path):
    first = writer(tmp_path)
    for step in (1, 2, 3):
        first.defer(step, {"loss": float(step)})
    first.close()
    second = writer(tmp_path)  # resumed from the checkpoint of step 1
    for step in (2, 3, 4):
        second.defer(step, {"loss": 10.0 * step})
    second.close()
    assert [r["run"] for r in raw_rows(tmp_path)] == [1, 1, 1, 2, 2, 2]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0)]


def test_row_torn_by_a_kill_costs_that_row_only(tmp_path):
    first = writer(tmp_path)
    first.defer(1, {"loss": 1.0})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"run": 1, "split": "tra')
    second = writer(tmp_path)
    second.defer(2, {"loss": 2.0})
    second.close()
    assert [(r["step"], r["run"]) for r in read_rows(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
    ]


def test_rows_are_valid_json_with_non_finite_values_named(tmp_path):
    out = writer(tmp_path)
    values = {"loss": jnp.float32(np.nan), "mfu": None, "n": 3, "lengths": np.array([1, 2])}
    out.write(1, values, split="train")
    out.close()
    strict = json.loads(
        (tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda c: pytest.fail(c)
    )
    assert strict["loss"] is None and strict["mfu"] is None and strict["nonfinite"] == ["loss"]
    assert strict["n"] == 3 and strict["lengths"] == [1, 2]


def test_console_without_a_terminal_prints_plain_lines_of_the_chosen_metrics(tmp_path, capsys):
    out = writer(tmp_path, show=("loss",))
    out.write(10, {"loss": 0.12345678, "other": 1.0}, split="train")
    out.write(10, {"accuracy": 0.5}, split="eval")
    out.close()
    assert capsys.readouterr().out == "step 10/10  loss 0.1235\nstep 10/10 eval  accuracy 0.5\n"


def test_what_is_not_finite_is_shown_as_such(tmp_path, capsys):
    writer = MetricWriter(tmp_path, total_steps=9, show=["loss", "kl", "mfu"])
    writer.write(9, {"loss": float("nan"), "kl": float("-inf"), "mfu": None}, split="train")
    writer.close()
    assert "step 9/9  loss NaN  kl -inf\n" in capsys.readouterr().out


def test_rows_go_to_a_bucket(tmp_path, monkeypatch):
    bucket = bucket_helpers.mount(monkeypatch, tmp_path)
    for step in (1, 2):
        out = writer(f"{bucket}/run")
        out.write(step, {"loss": 0.5}, split="train")
        out.close()
    rows = read_rows(f"{bucket}/run/metrics.jsonl")
    assert [(row["run"], row["step"]) for row in rows] == [(1, 1), (2, 2)]


class Pending:
    """An array that the device still computes, or no longer."""

    def __init__(self, ready):
        self.is_ready = lambda: ready


def test_timers_tell_what_the_device_hides():
    timers = Timers()
    for phase, ready in (("grade", False), ("write", True)):
        with timers(phase, behind=(Pending(True), {"x": Pending(ready)}, None)):
            pass
    with timers("data", behind=(None, None)):  # nothing was asked for
        pass
    spent = timers.take()
    assert spent["hidden/grade"] == spent["time/grade"] > 0 and spent["hidden/write"] == 0
    assert set(spent) == {
        *("time/grade", "hidden/grade", "time/write", "hidden/write", "time/data", "time/step")
    }


def test_timers_add_up_a_phase_and_start_anew():
    timers = Timers()
    for _ in range(2):
        with timers("sample"):
            time.sleep(0.02)
    spent = timers.take()
    assert 0.04 <= spent["time/sample"] < 0.2 and spent["time/step"] >= spent["time/sample"]
    with timers.outside():
        time.sleep(0.05)
    spent = timers.take()
    assert set(spent) == {"time/step"} and spent["time/step"] < 0.04


def shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """L=2, D=8, H=2, K=1, E=4, F=16, V=10; tower: L=3, D=6, H=1, E=6, F=5."""
    f32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    return {
        "text/embed/embedding": f32(10, 8),
        "text/layers/attn/q/kernel": f32(2, 8, 2, 4),
        "text/layers/attn/q/bias": f32(2, 2, 4),
        "text/layers/attn/k/kernel": f32(2, 8, 1, 4),
        "text/layers/attn/v/kernel": f32(2, 8, 1, 4),
        "text/layers/attn/o/kernel": f32(2, 2, 4, 8),
        "text/layers/mlp/gate/kernel": f32(2, 8, 16),
        "text/layers/mlp/up/kernel": f32(2, 8, 16),
        "text/layers/mlp/down/kernel": f32(2, 16, 8),
        "vision/patch_embed/kernel": f32(12, 6),
        "vision/blocks/attn/qkv/kernel": f32(3, 6, 3, 1, 6),
        "vision/blocks/attn/proj/kernel": f32(3, 1, 6, 6),
        "vision/merger/fc1/kernel": f32(24, 24),
        "vision/merger/fc2/kernel": f32(24, 8),
    }


def test_flops_by_hand():
    flops = ModelFlops.of(shapes(), full_blocks=1)
    # A layer: q 8x8 + k 8x4 + v 8x4 + o 8x8 + three of 8x16 = 576 multiply-adds, 2 layers.
    assert flops.text_token == 2 * 2 * 576
    # Scores and weighted sum: 2 heads of 4, 2 FLOPs, twice, 2 layers.
    assert flops.text_pair == 2 * 2 * 2 * 8
    assert flops.head_token == 2 * 10 * 8
    # Patch embedding 72, blocks 3 * (108 + 36), merger (576 + 192) for every fourth patch.
    assert flops.patch == 2 * (72 + 3 * 144) + 2 * 768 / 4
    assert flops.patch_window_pair == 2 * 4 * 6 and flops.patch_full_pair == 1 * 4 * 6
    # Sequences of 2 and 3 tokens see 1 + 2 and 1 + 2 + 3 keys, and 5 more each after a prefix of 5.
    assert flops.text([2, 3]) == 5 * flops.text_token + 9 * flops.text_pair
    assert flops.text([2, 3], prefix=5, head_tokens=4) == (
        5 * flops.text_token + (9 + 25) * flops.text_pair + 4 * flops.head_token
    )
    assert flops.vision(8, 16, 24) == (
        8 * flops.patch + 16 * flops.patch_window_pair + 24 * flops.patch_full_pair
    )


def test_peak_is_known_for_accelerators_and_none_for_the_rest():
    assert metrics.peak_flops("TPU v5 lite") == 197e12
    assert metrics.peak_flops("TPU v5") == 459e12
    assert metrics.peak_flops("TPU v6 lite") == 918e12
    assert metrics.peak_flops("TPU v4") == 275e12
    assert metrics.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert metrics.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert metrics.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert metrics.peak_flops("NVIDIA H200") == 989e12
    assert metrics.peak_flops("cpu") is None
    assert metrics.utilisation(1e12, 1.0) is None  # these tests run on CPU


def test_utilisation_is_of_all_devices(monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda kind: 1e12)
    assert metrics.utilisation(4e12, 2.0) == pytest.approx(4e12 / (2.0 * 1e12 * 8))
