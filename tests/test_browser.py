"""Pages in a real browser, where one is installed: drawn without errors, model text as text."""

import re
import shutil
import subprocess

import pytest
from page_helpers import EVIL, Page
from test_run_page import metric_rows, run_of, sample, write_rollouts

from srpo_jax.report import run_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed"),
]


@pytest.fixture
def drawn(tmp_path):
    """-> the elements of a page as a browser has drawn it, and what it complained of."""
    write_rollouts(
        tmp_path / "run",
        [sample(0, completion=f"<think>{EVIL}</think>"), sample(1, final_correct=False)],
        [sample(0, id="p-1", step=2, first_correct=False, completion="<answer>x</answer>")],
    )
    run = run_of(tmp_path / "run", metric_rows(12, **{"accuracy/net": 0.1, f"x/{EVIL}": 1.0}))
    (tmp_path / "page.html").write_text(run_page.page([run]), "utf-8")

    def load(address=""):
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
        words += ["--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
        command = [BROWSER, *words, f"file://{tmp_path}/page.html{address}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return Page(done.stdout), re.findall(":CONSOLE.*", done.stderr)

    return load


def test_charts_and_rollouts_are_drawn_and_a_link_narrows_them(drawn):
    page, complaints = drawn()
    assert complaints == []
    assert len(page.all("canvas")) == len(page.all("figure")) == 4 + 2  # two at the top as well
    assert len([a for a in page.all("div") if a.get("class") == "sample"]) == 3
    assert page.all("img") == [] and any(EVIL in text for text in page.texts)
    page, complaints = drawn("#rollouts-part?change=1")
    assert complaints == []
    assert "page 1: 1 groups, of 1 that may fit" in page.texts
