"""Whatever a model, a file or a disk comes up with: readers give a value or their own error."""

import json
import math
import struct

import bucket_helpers
import numpy as np
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srpo_jax.data.errors import RecordError
from srpo_jax.data.files import read_jsonl, write_jsonl
from srpo_jax.data.records import open_records
from srpo_jax.model.hf_files import tensors
from srpo_jax.model.hf_table import HFError
from srpo_jax.rewards.answers import decide, extract_answer
from srpo_jax.rewards.expressions import Unreadable, read
from srpo_jax.rewards.profiles import PROFILES
from srpo_jax.rewards.template import TokenText, parse_response
from srpo_jax.structs import BLOCKS

# Reproducible, without a data base beside the tests; no clock decides.
often = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TAGS = [f"<{slash}{kind}>" for slash in ("", "/") for kind in ("think", "answer", "reflection")]
PIECES = st.one_of(
    st.sampled_from([*TAGS, "< think >", "</ answer>", "<", ">", "\n", " ", "\u200b", "é", "日"]),
    st.text(max_size=6),
).map(lambda text: text.encode("utf-8", errors="replace")) | st.binary(max_size=4)
MATHS = st.lists(
    st.sampled_from(
        [*"0123456789.,+-*/^_=<>!|()[]{}$%°x√π:;", r"\frac", r"\sqrt", r"\boxed", r"\left", r"\pi"]
        + [r"\text", r"\cup", r"\binom", "and", "or", " ", "A", "B", "(C)", "10^{9}", "\u00bd"]
    ),
    max_size=24,
).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
COLUMNS = st.sampled_from(["problem", "question", "answer", "images", "image", "choices", "id"])


@often
@given(st.lists(PIECES, max_size=30))
def test_spans_lie_in_the_completion_whatever_its_tokens_and_however_it_is_cut(pieces):
    table = TokenText(pieces)
    whole = table.completion(range(len(pieces)))
    text = b"".join(pieces)
    assert whole.text == text and whole.offsets[-1] == len(text)
    bytewise = TokenText([bytes([i]) for i in range(256)]).completion(list(text))
    for profile in PROFILES:
        parsed = parse_response(whole, profile.template)
        other = parse_response(bytewise, profile.template)
        assert parsed.spans == other.spans and parsed.format_ok == other.format_ok
        assert 0 <= parsed.first_end <= parsed.total_tokens == len(pieces)
        for name, count in zip(BLOCKS, parsed.block_tokens, strict=True):
            start, end = parsed.spans[name] or (0, 0)
            assert 0 <= start <= end <= len(text) and 0 <= count <= len(pieces)
            first, last = whole.token_span((start, end))
            assert last - first == count
            if start < end:  # the tokens cover the span, and none of them lies beside it
                assert whole.offsets[first] <= start and end <= whole.offsets[last]
                assert whole.offsets[first + 1] > start and whole.offsets[last - 1] < end
        if parsed.format_ok:
            assert all(parsed.spans[name] for name in ("first_think", "first_answer"))


@often
@given(MATHS | st.text(max_size=40), MATHS | st.text(max_size=40), st.booleans())
def test_any_answer_is_right_wrong_unread_or_two_expressions(gold, answer, choices):
    options = ("12", "24", "the red one", "none of them") if choices else ()
    for text in (answer, f"\\boxed{{{answer}}}", f"The answer is {answer}."):
        assert isinstance(extract_answer(text), str)
        found = decide(gold, text, options)
        assert found in (True, False, None) or (
            len(found) == 2 and all(one[0] == one[-1] == "$" for one in found)
        )
    try:
        read(answer)
    except Unreadable:
        pass


@often
@given(
    rows=st.lists(st.dictionaries(COLUMNS | st.text(max_size=8), VALUES, max_size=6), max_size=6)
)
def test_rows_come_back_as_they_were_written_and_any_row_is_a_record_or_its_error(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    same = lambda one: json.dumps(one, sort_keys=True)  # noqa: E731  (NaN is not itself)
    assert [*map(same, read_jsonl(path))] == [*map(same, rows)]
    if not rows:
        return
    records = open_records(path)
    assert len(records) == len(rows)
    for i in range(len(rows)):
        try:
            record = records[i]
            assert record.question and record.answer and record.origin == f"{path}:{i + 1}"
        except RecordError as error:
            assert str(error).startswith(f"{path}:{i + 1}: ") and "\n" not in str(error)


@often
@given(lines=st.lists(st.binary(max_size=30) | st.just(b'{"problem": "1+1?", "answer": "2"}')))
def test_bytes_that_are_no_jsonl_spoil_their_own_line_only(lines, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\n".join(lines))
    wanted = [line for text in lines for line in text.split(b"\n") if line.strip()]
    if not wanted:
        return
    records = open_records(path)
    assert len(records) == len(wanted)
    for i, line in enumerate(wanted):
        try:
            assert records[i].answer == "2" and b"1+1?" in line
        except RecordError:
            assert b"1+1?" not in line


def safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F3", "", None]),
        "shape": st.lists(st.integers(-1, 2**33), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(-1, 100), max_size=3) | VALUES,
    }
)
HEADERS = (
    st.dictionaries(st.text(max_size=4), TENSOR, max_size=3).map(
        lambda told: json.dumps(told).encode("utf-8", errors="replace")
    )
    | st.binary(max_size=40)
    | st.just(b"[" * 5000)
)


@often
@given(header=HEADERS, data=st.binary(max_size=64), length=st.none() | st.integers(0, 2**64 - 1))
def test_a_safetensors_header_is_read_or_refused_with_the_file_and_the_remedy(
    header, data, length, tmp_path, monkeypatch
):
    bucket = bucket_helpers.mount(monkeypatch, tmp_path)
    (tmp_path / "bucket").mkdir(exist_ok=True)
    (tmp_path / "bucket" / "one.safetensors").write_bytes(safetensors(header, data, length))
    for path in (tmp_path / "bucket" / "one.safetensors", f"{bucket}/one.safetensors"):
        try:
            for one in tensors(epath.Path(path)):
                array = one.read((slice(None),) * len(one.shape))
                assert array.shape == one.shape and array.nbytes <= len(data)
        except HFError as error:
            assert str(path) in str(error) and "download it again" in str(error)


@often
@given(
    shape=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    chance=st.randoms(use_true_random=False),
)
def test_no_flipped_bit_of_a_safetensors_header_reads_beyond_the_file(shape, chance, tmp_path):
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    told = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, values.nbytes]}}
    file = bytearray(safetensors(json.dumps(told).encode(), values.tobytes()))
    file[chance.randrange(len(file) - values.nbytes)] ^= 1 << chance.randrange(8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(file)
    try:
        for one in tensors(path):
            one.read((slice(None),) * len(one.shape))
    except HFError as error:
        assert str(path) in str(error)
