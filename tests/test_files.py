"""Files appear whole or not at all, and a log goes on where it was cut off."""

import json

import pytest

from srpo_jax.data import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_jsonl_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a" / "rows.jsonl"
    files.write_jsonl(path, [{"x": "é"}])
    with pytest.raises(TypeError):
        files.write_jsonl(path, [{"x": 1}, {"x": object()}])
    assert path.read_text() == '{"x": "é"}\n'
    assert names(path.parent) == ["rows.jsonl"]


def test_text_that_utf8_cannot_hold_is_written_all_the_same(tmp_path):
    files.write_text(tmp_path / "page", "half \ud83d pair")
    assert (tmp_path / "page").read_text("utf-8") == "half ? pair"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "out"
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), files.whole(folder) as temporary:
            (temporary / "deep").mkdir(parents=True)
            (temporary / "deep" / "file").write_text("half")
            raise error
        assert names(tmp_path) == []
    folder.mkdir()  # an empty one may be there
    with files.whole(folder) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("all")
        assert names(folder) == []
    assert names(tmp_path) == ["out"] and names(folder) == ["file"]


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(OSError), files.whole(tmp_path / "out") as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["mine"]


def test_a_log_goes_on_behind_a_torn_line_and_writes_rows_in_the_wanted_order(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    log = files.JsonlLog(path, {"seed": 0})
    assert log.done == set() and list(log.rows()) == []
    assert not path.parent.exists()  # nothing came yet
    log.append("b", [{"n": 1}, {"n": 2}])
    log.append(3, [{"n": 3}])
    with open(log.partial, "a") as file:
        file.write('{"id": "a", "rows": [{"n')
    with pytest.raises(ValueError, match=r"rows.jsonl.partial was begun with other .*\(seed\)"):
        files.JsonlLog(path, {"seed": 1})
    log = files.JsonlLog(path, {"seed": 0})
    assert log.done == {"b", "3"}
    log.append("a", [{"n": "é"}])
    assert list(log.rows()) == [{"n": 1}, {"n": 2}, {"n": 3}, {"n": "é"}]
    assert not path.exists()
    log.finish(["a", 3, "b"])
    assert [json.loads(line)["n"] for line in path.open()] == ["é", 3, 1, 2]
    assert names(path.parent) == ["rows.jsonl"]


def test_a_log_without_rows_becomes_an_empty_file(tmp_path):
    files.JsonlLog(tmp_path / "rows.jsonl", {}).finish()
    assert (tmp_path / "rows.jsonl").read_text() == ""
