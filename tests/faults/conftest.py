"""One world for all runs that faults are caused in."""

import json
import os
from pathlib import Path

import fault_runs
import pytest
import train_helpers as helpers


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny model and records; the server that runs are forked off is up."""
    folder = tmp_path_factory.mktemp("world")
    above = tmp_path_factory.getbasetemp()
    above = above.parent if "PYTEST_XDIST_WORKER" in os.environ else above
    paths = helpers.world(folder) | {"cache": str(above / "compiled_for_faults")}
    (folder / "world.json").write_text(json.dumps(paths))
    fault_runs.start_server(folder)
    return folder
