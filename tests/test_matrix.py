"""Every objective with and without adapters, a trained tower and forks: two steps of real training.

Eight runs of 32: all combinations of the three switches, and each objective on either side of each.
"""

import numpy as np
import pytest
import train_helpers
from checkpoint_helpers import stored_params
from test_lora import configured, paths, weights_of  # noqa: F401

from srpo_jax import train_grpo
from srpo_jax.data.files import read_jsonl
from srpo_jax.run import rollout

# Objective: (rank of adapters, the tower is trained, forks) of its two runs.
RUNS = {
    "clip": ((0, False, 1), (4, True, 2)),
    "gspo": ((0, True, 2), (4, False, 1)),
    "cispo": ((4, False, 2), (0, True, 1)),
    "sapo": ((4, True, 1), (0, False, 2)),
}
PLAIN = {"filter.low": 0.0, "filter.high": 1.0, "sampling.group_size": 4}
PLAIN |= {"optim.schedule": "constant", "optim.warmup_ratio": 0.0, "grpo.updates_per_rollout": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "rank", "tower", "forks"), [(name, *run) for name in RUNS for run in RUNS[name]]
)
def test_two_steps_change_what_is_trained_and_nothing_else(
    paths,  # noqa: F811
    tmp_path,
    monkeypatch,
    objective,
    rank,
    tower,
    forks,
):  # a fixture for each part of the world, and four switches
    """The guard of a run makes a program that is compiled again an error."""
    train_helpers.write_answers(monkeypatch)
    monkeypatch.setattr(rollout, "grade", train_helpers.fake_grade)
    freeze = () if tower else ("vision/",)
    changes = {"grpo.objective": objective, "sampling.forks": forks, "freeze": freeze}
    changes |= {"lora.rank": rank, "lora.targets": ("*",) if tower else ("text/layers/*",)}
    config = configured(paths, train_helpers.grpo_config, 2, **PLAIN | changes)
    train_grpo.train(config, str(tmp_path / "run"))
    end = stored_params(tmp_path / "run")
    if rank:  # B begins at zero
        moved = {path for path, x in end.items() if path.endswith("lora_b") and x.any()}
        assert moved == {path for path in end if path.endswith("lora_b")}
        assert any(path.startswith("vision/") for path in moved) == tower
    else:
        config.lora.rank = 0
        start, _ = weights_of(config, tmp_path / "start", train_grpo.grpo_settings)
        still = {path for path, x in end.items() if np.array_equal(x, start[path])}
        # Keys' biases move no attention weight, and get no gradient beyond rounding.
        still = {path for path in still if not path.endswith("k/bias")}
        assert still == {path for path in end if path.startswith("vision/") and not tower}
    rows = [row for step in (1, 2) for row in read_rows(tmp_path / "run", step)]
    parted = 0
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        if forks == 1:
            assert "family" not in one
            continue
        assert one["family"] == other["family"] and one["advantage"] == other["advantage"]
        parted += one["completion"] != other["completion"]
    assert (parted > 0) == (forks == 2)


def read_rows(folder, step):
    return [*read_jsonl(folder / "rollouts" / f"{step:06d}.jsonl")]
