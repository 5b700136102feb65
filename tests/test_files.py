"""Files appear whole or not at all, and a log goes on where it was cut off."""

import json

import bucket_helpers
import pytest

from srpo_jax.data import buckets, files


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


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_afterwards(
    tmp_path, monkeypatch
):
    done = []
    sync, replace = files.os.fsync, files.os.replace
    inode = lambda handle: files.os.fstat(handle).st_ino  # noqa: E731
    monkeypatch.setattr(files.os, "fsync", lambda h: (done.append(inode(h)), sync(h)))
    monkeypatch.setattr(files.os, "replace", lambda *a: (done.append("named"), replace(*a)))
    files.write_text(tmp_path / "a", "x")
    assert done == [(tmp_path / "a").stat().st_ino, "named", tmp_path.stat().st_ino]


def test_what_killed_programs_had_begun_is_removed(tmp_path):
    (tmp_path / "rollouts" / ".000001.7.tmp").mkdir(parents=True)
    (tmp_path / "rollouts" / ".000001.7.tmp" / "part").touch()
    for name in (
        ".lock",
        ".summary.json.7.tmp",
        "rollouts/.000002.jsonl.7.tmp",
        "rollouts/a.jsonl",
    ):
        (tmp_path / name).touch()
    files.remove_left_over(tmp_path)
    assert names(tmp_path) == [".lock", "rollouts"] and names(tmp_path / "rollouts") == ["a.jsonl"]


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


def test_a_growing_file_cuts_off_what_a_kill_tore_and_names_itself_when_the_disk_is_full(tmp_path):
    path = tmp_path / "deep" / "rows"
    file = files.Growing(path)
    assert [file.append("one"), file.append("é")] == [0, 4]
    file.close()
    with open(path, "a") as torn:
        torn.write("tor")
    file = files.Growing(path)
    assert file.append("two") == 7
    file.close()
    assert path.read_text("utf-8") == "one\né\ntwo\n"
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        files.Growing("/dev/full").append("x")
    with pytest.raises(OSError, match="No space left on device: '.*/out'"):
        with files.whole(tmp_path / "out"), open("/dev/full", "w") as file:
            file.write("x" * 10**6)


def test_on_a_bucket_files_are_whole_and_grow_by_being_sent_again(tmp_path, monkeypatch):
    bucket = bucket_helpers.mount(monkeypatch, tmp_path)
    place = tmp_path / "bucket"
    with pytest.raises(KeyError), files.whole(f"{bucket}/a/x") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert not (place / "a" / "x").exists()
    files.write_jsonl(f"{bucket}/a/x", [{"x": "é"}])
    assert (place / "a" / "x").read_text() == '{"x": "é"}\n'
    with files.whole(f"{bucket}/folder") as temporary:
        (temporary / "deep").mkdir(parents=True)
        (temporary / "deep" / "file").write_text("all")
    assert (place / "folder" / "deep" / "file").read_text() == "all"
    with pytest.raises(FileExistsError, match="not an empty directory"):
        with files.whole(f"{bucket}/folder") as temporary:
            temporary.mkdir()

    log = files.JsonlLog(f"{bucket}/rows.jsonl", {"seed": 0})
    log.append("a", [{"n": 1}])
    assert not (place / "rows.jsonl.partial").exists()
    log.close()  # as a run does that is stopped
    log = files.JsonlLog(f"{bucket}/rows.jsonl", {"seed": 0})
    assert log.done == {"a"}
    monkeypatch.setattr(files, "SEND_SECONDS", 0)
    log._file._pause = 0
    log.append("b", [{"n": 2}])
    assert len((place / "rows.jsonl.partial").read_text().splitlines()) == 3
    log.finish(["b", "a"])
    assert (place / "rows.jsonl").read_text() == '{"n": 2}\n{"n": 1}\n'
    assert not (place / "rows.jsonl.partial").exists()


def test_paths_are_made_absolute_unless_they_name_a_bucket(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert str(files.absolute("runs/x")) == str(tmp_path / "runs" / "x")
    monkeypatch.setattr(buckets, "LIBRARIES", ("fsspec",))
    assert str(files.absolute("gs://b/x")) == "gs://b/x"


def test_the_content_hash_sees_the_order_of_lines_in_small_and_large_files(tmp_path):
    lines = [f"{i:07d}\n" for i in range(100_000)]

    def hashed(*parts):
        for number, part in enumerate(parts):
            (tmp_path / str(number)).write_text("".join(part))
        return files.content_hash(tmp_path / str(i) for i in range(len(parts)))

    small, large = lines[:100], lines
    swapped = [lines[1], lines[0], *lines[2:]]
    assert hashed(small) == hashed(small) != hashed(swapped[:100])
    assert hashed(large) == hashed(large) != hashed(swapped)
    assert hashed(large) != hashed(sorted(large, reverse=True))
    assert hashed(small, large) != hashed(large, small)
    assert hashed([]) != hashed([], [])


def test_a_fingerprint_without_a_hash_is_compared_by_its_numbers():
    assert files.same_content("3:90:ab", "3:90:ab") and files.same_content("3:90", "3:90:ab")
    assert not files.same_content("3:90:ab", "3:90:cd")
    assert not files.same_content("3:9", "3:90:ab")


# Text that other readers break lines at, and half a surrogate pair, which UTF-8 cannot hold.
STRANGE = "a\u2028b\u2029c\u0085d\x0be\x1cf\r\\n \ud83d \U0001f600"


def test_every_text_is_written_and_read_back(tmp_path):
    rows = [{"x": STRANGE}, {STRANGE: [STRANGE]}]
    files.write_jsonl(tmp_path / "rows", rows)
    assert files.read_jsonl(tmp_path / "rows") == rows
    log = files.JsonlLog(tmp_path / "log", {"text": STRANGE})
    log.append(STRANGE, rows)
    again = files.JsonlLog(tmp_path / "log", {"text": STRANGE})
    assert again.done == {STRANGE} and list(again.rows()) == rows
    again.finish()
    assert files.read_jsonl(tmp_path / "log") == rows


def test_lines_end_at_a_line_feed_only_and_are_numbered(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"x": "' + "a\u2028b".encode() + b'"}\r\n \n\n{"x": 2}')
    assert list(files.numbered_jsonl(path)) == [(1, {"x": "a\u2028b"}), (4, {"x": 2})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b'{"x"', "not valid JSON"), (b"[1]", r"a JSON list, not an object: \[1\]"), (b"\xff", "JSON"),
     (b'"' + b"x" * 9999 + b'"', "a JSON str, not an object: 'xxx"), (b"[" * 99_999, "JSON")],
)  # fmt: skip
def test_a_line_that_is_no_object_is_named_in_short_or_passed_over(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"x": 1}\n' + line + b'\n{"x": 2}\n')
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{reason}.*; one JSON object") as error:
        files.read_jsonl(path)
    assert len(str(error.value)) < 300 + len(str(path))
    assert files.read_jsonl(path, skip_broken=True) == [{"x": 1}, {"x": 2}]
