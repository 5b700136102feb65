"""Bytes that a compiled program exchanges between devices, read from its text.

XLA's own cost analysis counts the body of a loop once and says nothing about collectives.
"""

import math
import re
from collections import defaultdict

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_RESULT = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_CALLS = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count[^}]*?"n":"(\d+)"')


def collective_bytes(program: str) -> float:
    """Per device and call of a program, given as ``compiled.as_text()``.

    A collective counts its larger side, what goes in or what comes out, as a ring sends about that
    much; an all-reduce twice. Loops count as often as they run where the compiler knows it, once
    otherwise (a decode loop: bytes of a token); of branches all count.
    """
    own, calls, entry = _read(program)
    totals: dict[str, float] = {}

    def total(name: str) -> float:
        if name not in totals:
            totals[name] = own[name] + sum(times * total(callee) for callee, times in calls[name])
        return totals[name]

    return total(entry)


def _read(program: str) -> tuple[dict[str, float], dict[str, list[tuple[str, int]]], str]:
    """Of each computation its own bytes, and which others it runs how often; the entry's name."""
    own, calls = defaultdict[str, float](float), defaultdict[str, list[tuple[str, int]]](list)
    name, entry, sizes = "", "", dict[str, int]()
    for line in program.splitlines():
        if head := _HEAD.match(line):
            name, sizes = head[2], {}
            entry = name if head[1] else entry
        elif found := _RESULT.match(line):
            result, kinds, operation, rest = found.groups()
            sizes[result] = _size(kinds)
            if re.fullmatch(rf"({KINDS})(-start)?", operation):
                operands = re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])
                own[name] += _exchanged(operation, sizes[result], [sizes[x] for x in operands])
            trips = _TRIPS.search(rest) if operation == "while" else None
            called = _CALLS.findall(rest)
            for branches in _BRANCHES.findall(rest):
                called += re.findall(r"%?([\w.\-]+)", branches)
            calls[name] += [(callee, int(trips[1]) if trips else 1) for callee in called]
    return own, calls, entry


def _exchanged(operation: str, result: int, operands: list[int]) -> float:
    given = sum(operands)
    if operation.endswith("-start") and "all-reduce" not in operation:
        result -= given  # such an operation's result holds its operands too
    return max(given, result) * (2 if operation.startswith("all-reduce") else 1)


def _size(kinds: str) -> int:
    """Bytes of all arrays in a type."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", kinds)
    return sum(
        _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in arrays
    )
