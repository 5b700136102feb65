"""What a program says of its records before it begins, and what it refuses."""

import pytest
from data_helpers import write_jsonl

from configs import sft
from srpo_jax.run.feed import Ahead, open_source
from srpo_jax.run.settings import sft_settings
from srpo_jax.structs import RunError

GOOD = {"problem": "q", "answer": "1"}


def data(**columns):
    """The data section of a recipe, with foreign columns."""
    config = sft.get_config("size=tiny")
    config.data.columns.update(columns)
    return sft_settings(config).data


def test_the_records_of_a_run_are_told(tmp_path, capsys):
    path = write_jsonl(tmp_path / "d.jsonl", [{**GOOD, "img": "a.png", "id": 1}, GOOD])
    source = open_source("data.train", str(path), data(image="img"))
    assert len(source) == 2 and source[0].images[0].path == "a.png"
    assert capsys.readouterr().out == (
        "data.train: 2 records: 1 with images, 0 with choices, 1 with an id\n"
    )


def test_content_that_would_be_lost_stops_a_run_at_its_start(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [GOOD, {**GOOD, "options": ["x", "y"]}])
    told = "^eval.file: .*d.jsonl:2: no choices, but a column 'options' .*columns.choices=options "
    with pytest.raises(RunError, match=told):
        open_source("eval.file", str(path), data())
    with pytest.raises(RunError, match="data.train is empty: pass --config.data.train=FILE"):
        open_source("data.train", "", data())


class Counting:
    """A loader of the numbers 1, 2, 3, and then an error."""

    place = 0

    def __next__(self):
        if self.place == 3:
            raise RunError("too many are bad")
        self.place += 1
        return self.place

    def get_state(self):
        return {"position": self.place}


def test_a_batch_drawn_early_changes_neither_order_nor_the_place_that_is_saved():
    ahead = Ahead(Counting())
    ahead.draw()
    ahead.draw()  # still the first one
    assert ahead.get_state() == {"position": 0}
    assert [next(ahead), next(ahead)] == [1, 2] and ahead.get_state() == {"position": 2}
    ahead.draw()
    assert ahead.get_state() == {"position": 2} and next(ahead) == 3
    ahead.draw()  # what is wrong belongs to the step that needs the batch
    assert ahead.get_state() == {"position": 3}
    with pytest.raises(RunError, match="too many are bad"):
        next(ahead)
