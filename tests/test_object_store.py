"""A run whose every path lies in a bucket, on a server that speaks Cloud Storage's protocol."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import train_helpers as helpers

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def store(monkeypatch):
    """A file system on the server's bucket; programs that are started find the server too."""
    server = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "STORAGE_EMULATOR_HOST": f"http://localhost:{port}",  # of gcsfs and Google's own client
        "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # of TensorStore
        "GOOGLE_CLOUD_PROJECT": "none",
        "FSSPEC_GCS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC, which it lacks
    }.items():
        monkeypatch.setenv(name, value)
    gcsfs = pytest.importorskip("gcsfs")  # which reads some of them when it is imported
    running = server.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    running.start()
    try:
        yield gcsfs.GCSFileSystem(token="anon", endpoint_url=f"http://localhost:{port}")
    finally:
        running.stop()


def train(steps: int, export: str, cache: Path) -> str:
    """What stage 1 says, with all of its paths in the bucket."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    words = [
        *("--config=configs/sft.py:size=tiny,mode=debug", "--workdir=gs://bucket/run"),
        *("--config.hf_dir=gs://bucket/hf", "--config.data.train=gs://bucket/train.jsonl"),
        *("--config.max_pixels=3136", "--config.data.patch_budgets=(128,)"),
        *("--config.data.tokens=288", "--config.data.prompt_tokens=64"),
        *(f"--config.steps={steps}", f"--config.export_hf_dir=gs://bucket/{export}"),
        f"--config.compilation_cache_dir={cache}",
    ]
    command = [sys.executable, "-m", "srpo_jax.train_sft", *words]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_a_run_reads_saves_goes_on_and_exports_in_an_object_store(store, tmp_path):
    helpers.world(tmp_path / "world")
    for path in (tmp_path / "world").rglob("*"):
        if path.is_file():
            store.pipe_file(f"bucket/{path.relative_to(tmp_path / 'world')}", path.read_bytes())
    assert "2 steps, from weights of gs://bucket/hf" in train(2, "two", tmp_path / "cache")
    assert "4 steps, from step 2" in train(4, "four", tmp_path / "cache")
    rows = store.cat_file("bucket/run/metrics.jsonl").decode().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]
    shards = [store.cat_file(f"bucket/{name}/model.safetensors") for name in ("two", "four")]
    assert len(shards[0]) == len(shards[1]) and shards[0] != shards[1]
    with contextlib.suppress(FileNotFoundError):
        assert not [name for name in store.find("bucket/run") if name.endswith(".tmp")]
