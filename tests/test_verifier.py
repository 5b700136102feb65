"""The pool of killable checkers: order, cache, hangs, crashes, start-up; math-verify's cases."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from srpo_jax.rewards import workers as workers_module
from srpo_jax.rewards.answers import Question
from srpo_jax.rewards.verifier import Verifier

MATH_VERIFY = "tests.math_verify_helpers:math_equal"
HANG = ("$5$", "$9^{9^{9^9}}$")
RIGHT, WRONG = (r"$\frac{1}{2}$", "$0.5$"), (r"$\frac{1}{2}$", "$0.6$")


@pytest.fixture(scope="module")
def pool():
    with Verifier(workers=2, timeout=20) as out:
        yield out


def test_results_come_in_the_order_of_the_items(pool):
    golds = [str(n) for n in range(1, 9)]
    items = [(Question(g), rf"\sqrt{{{int(g) ** 2}}}") for g in golds]
    items[2] = (Question("3"), r"\sqrt{10}")
    items[5] = (Question("A"), "(A)")  # settled without a worker
    items[6] = (Question("7"), None)
    assert pool.check(items) == [True, True, False, True, True, True, False, True]
    assert pool.check([]) == [] and pool.verify_math([]) == []


def test_equal_pairs_are_checked_once_and_remembered(pool, monkeypatch):
    sent = []
    send = workers_module._Worker.send
    monkeypatch.setattr(
        workers_module._Worker, "send", lambda self, *a: sent.append(a) or send(self, *a)
    )
    pair = ("$x^2-1$", "$(x-1)(x+1)$")
    assert pool.verify_math([pair] * 5 + [WRONG]) == [True] * 5 + [False]
    assert pool.verify_math([pair]) == [True]
    assert len(sent) == 2
    assert pool.verify_math([("$1.001$", "$1.002$")], decimals=2) == [True]
    assert pool.verify_math([("$1.001$", "$1.002$")]) == [False]  # options are part of the key
    lenient = {"function": MATH_VERIFY, "strict": False}
    assert pool.verify_math([("$x+1$", "$y+1$")], **lenient) == [True]
    assert pool.verify_math([("$x+1$", "$y+1$")]) == [False]


def test_a_named_function_is_called_instead_in_a_warm_worker():
    module = "srpo_jax.benchmarks.olympiad_rule"
    with Verifier(workers=1, timeout=20, modules=[module]) as pool:
        rule = {"function": f"{module}:equal_answers", "errors": [0.1]}
        assert pool.verify_math([("5", "5.05"), ("5", "5.2")], **rule) == [True, False]
        assert pool.verify_math([("5", "5.05")]) == [False]  # not the other function's verdict
        assert pool.verify_math([("1", "1")], function=f"{module}:missing") == [False]


def test_gold_goes_first(pool):
    inequality, interval = "$1 < x < 3$", "$(1,3)$"
    pairs = [(inequality, interval), (interval, inequality)]
    assert pool.verify_math(pairs, function=MATH_VERIFY) == [True, False]
    assert pool.verify_math(pairs) == [True, True]


def test_a_hung_check_costs_one_sample_its_time_limit():
    with Verifier(workers=2, timeout=1) as pool:
        assert pool.verify_math([RIGHT]) == [True]  # up and running
        start = time.monotonic()
        assert pool.verify_math([HANG, RIGHT, WRONG, HANG]) == [False, True, False, False]
        assert time.monotonic() - start < 60  # the check itself would take hours
        assert (pool.timeouts, pool.crashes) == (1, 0)  # equal pairs are one check
        assert pool.verify_math([("$2$", "$4/2$")]) == [True]  # replaced
        assert pool.check([(Question("5"), r"\boxed{9^{9^{9^9}}}")]) == [False]
        assert pool.timeouts == 2


def kill_when_busy(pool: Verifier, with_signal: int, times: int) -> threading.Thread:
    def kill():
        killed = set()
        while len(killed) < times:
            busy = {w.process.pid for w in list(pool._pool._workers) if w.task is not None} - killed
            time.sleep(0.2 if busy else 0.01)
            for pid in busy:
                os.kill(pid, with_signal)
            killed |= busy

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def test_a_crashing_check_costs_one_sample(pool):
    timeouts, crashes = pool.timeouts, pool.crashes
    thread = kill_when_busy(pool, signal.SIGSEGV, times=2)
    assert pool.verify_math([("$5$", "$9^{9^{9^8}}$")]) == [False]
    thread.join()
    assert (pool.timeouts, pool.crashes) == (timeouts, crashes + 1)
    assert pool.verify_math([("$3$", "$6/2$")]) == [True]


SLOW = "tests.test_verifier:right_after_a_while"


def right_after_a_while(gold: str, predicted: str, *, sleep: float = 0.0) -> bool:
    time.sleep(sleep)
    return gold == predicted


def test_a_check_that_fails_once_is_tried_again_in_a_fresh_worker(pool):
    before = pool.timeouts, pool.crashes
    thread = kill_when_busy(pool, signal.SIGKILL, times=1)
    assert pool.verify_math([("7", "7")], function=SLOW, sleep=1.0) == [True]
    thread.join()
    assert (pool.timeouts, pool.crashes) == before


def test_the_time_of_the_processor_counts_not_that_of_the_clock():
    with Verifier(workers=1, timeout=0.5) as pool:
        assert pool.verify_math([("7", "7")], function=SLOW, sleep=2.5) == [True]
        assert pool.timeouts == 0


def test_a_failed_check_is_not_remembered_and_counts_are_told_once():
    with Verifier(workers=1, timeout=0.5) as pool:
        for _ in range(2):
            assert pool.verify_math([HANG]) == [False]
            assert pool.check([(Question("5"), "five, I think")]) == [False]
            told = {"grading/timeouts": 1, "grading/crashes": 0, "grading/failed": 1}
            told["grading/unread"] = 1
            assert pool.counts() == told
        assert set(pool.counts().values()) == {0}


def test_a_worker_that_died_between_checks_costs_nothing(pool):
    before = pool.timeouts, pool.crashes
    assert pool.verify_math([("$4$", "$8/2$")]) == [True]
    idle = next(w for w in pool._pool._workers if w.idle)
    os.kill(idle.process.pid, signal.SIGKILL)
    idle.process.wait()
    assert pool.verify_math([(f"${n}$", f"${2 * n}/2$") for n in range(5, 9)]) == [True] * 4
    assert (pool.timeouts, pool.crashes) == before


def test_workers_ignore_the_signals_that_stop_a_run_and_leave_when_it_ends():
    code = (
        "import sys, time; from srpo_jax.rewards.verifier import Verifier\n"
        "pool = Verifier(1, 30); pool.verify_math([('$1$', '$2-1$')])\n"
        "print(pool._pool._workers[0].process.pid, flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": "."},
        cwd=workers_module._ROOT,
    )  # fmt: skip
    try:
        worker = int(parent.stdout.readline())
        for stop in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, stop)
        time.sleep(0.3)
        assert is_running(worker)
        parent.kill()  # without any chance to clean up
        parent.wait()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and is_running(worker):
            time.sleep(0.05)
        assert not is_running(worker)
    finally:
        parent.kill()
        parent.stdout.close()
        parent.wait()


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_an_interrupted_call_leaves_no_stale_result(pool, monkeypatch):
    assert pool.verify_math([("$16$", "$31/2$")]) == [False]  # some worker is up

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workers_module, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.verify_math([("$16$", "$32/2$")])
    # Were an old reply still in a pipe, it would answer these wrong pairs with True.
    assert pool.verify_math([("$16$", "$34/2$"), ("$16$", "$36/2$")]) == [False, False]


def test_workers_that_cannot_start_are_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr(workers_module.sys, "executable", "/bin/false")
    with (
        Verifier(workers=1) as pool,
        pytest.raises(RuntimeError, match="cannot start: exit status"),
    ):
        pool.verify_math([RIGHT])


def test_a_closed_pool_says_so():
    pool = Verifier(workers=1)
    process = pool._pool._workers[0].process
    pool.close()
    pool.close()
    assert process.poll() is not None
    with pytest.raises(RuntimeError, match="closed"):
        pool.verify_math([RIGHT])


@pytest.mark.parametrize("bad", [{"workers": 0}, {"timeout": 0}])
def test_limits_must_be_positive(bad):
    with pytest.raises(ValueError, match="must be positive"):
        Verifier(**bad)


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=workers_module._ROOT, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds mappings on Linux only")
def test_memory_is_bounded_and_threads_still_start():
    code = """
from srpo_jax.rewards.workers import _limit_memory
import threading
_limit_memory(300)
for _ in range(8):
    thread = threading.Thread(target=int); thread.start(); thread.join()
try:
    bytearray(600 << 20)
except MemoryError:
    print("bounded")
"""
    assert run_python(code) == "bounded"


@pytest.mark.skipif(sys.platform != "linux", reason="kernel limits as on Linux")
def test_a_hung_orphan_is_ended_by_the_kernel():
    code = """
import os, signal, time
from srpo_jax.rewards.workers import _limit_cpu
pid = os.fork()
if pid == 0:
    _limit_cpu(0.5)
    while time.process_time() < 20: pass
    os._exit(0)
_, status = os.waitpid(pid, 0)
print(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
"""
    assert run_python(code) == "True"


def test_a_worker_imports_neither_jax_nor_numpy_nor_the_callers_main():
    code = """
import sys
import srpo_jax.rewards.verifier
from srpo_jax.rewards.equality import equal
assert equal("$0.5$", "$\\\\frac{1}{2}$")
print(sorted({"jax", "numpy", "flax", "transformers"} & set(sys.modules)))
"""
    assert run_python(code) == "[]"


def test_checks_from_several_threads_do_not_mix(pool):
    found = {}

    def ask(n: int) -> None:
        found[n] = pool.verify_math([(f"${n}$", f"${2 * n}/2$"), (f"${n}$", f"${2 * n}/3$")])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(11, 15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(11, 15), [True, False])


def test_math_verifys_own_cases(shared_data, pool):
    path = shared_data / "scoring_parity" / "math_verify_cases.jsonl"
    cases = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len(cases) == 134
    names = ("match_types", "float_rounding", "strict", "allow_set_relation_comp")
    groups = {}
    for case in cases:  # "default" cases give no options: ours are the library's
        options = {n: case[n] for n in names} if case["match_types"] != "default" else {}
        groups.setdefault(json.dumps(options), []).append(case)
    before = pool.timeouts, pool.crashes
    wrong = []
    for options, group in groups.items():
        pairs = [(case["gold"], case["pred"]) for case in group]
        found = pool.verify_math(pairs, function=MATH_VERIFY, **json.loads(options))
        wrong += [
            case["id"]
            for case, ok in zip(group, found, strict=True)
            if ok is not bool(case["expected"])
        ]
    assert wrong == []
    assert (pool.timeouts, pool.crashes) == before


def test_checks_that_have_no_turn_in_a_steps_time_are_told_apart_and_not_remembered():
    with Verifier(workers=1, timeout=20, step_timeout=3) as pool:
        assert pool.check([(Question("2"), r"\sqrt{4}")]) == [True]  # it is up
        slow = [(Question("5"), r"9^{9^{9^9}}"), (Question("4"), "4"), (Question("3"), r"\sqrt{9}")]
        assert pool.check(slow) == [None, True, None]
        counts = pool.counts()
        assert counts["grading/failed"] == 2 and counts["grading/timeouts"] == 0
        assert pool.check(slow[1:]) == [True, True]
