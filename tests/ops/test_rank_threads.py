"""The pool: several callers, children of every kind, signals, memory. No torch, so that every sanitizer runs this."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pyprune import _core, machine
from pyprune.ops import _reference

RTOL = 16 * 2.0**-23
VARIANTS = machine.this_machine().cpu_variants
SANITIZED = os.environ.get("PYPRUNE_SANITIZED", "")
HERE = Path(__file__).parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")


def _maps(count):
    rng = np.random.default_rng(0)
    return np.tile(np.maximum(rng.standard_normal((1, 400, 16, 16)), 0).astype(np.float32), (1, count // 400, 1, 1))


def _script(body, timeout=120, check=True):
    """Run ``body`` in a process of its own, which a hang ends after ``timeout`` seconds; return what it prints."""
    preamble = """
        import os, signal, subprocess, sys, threading, time, warnings
        import numpy as np
        from rank_child import _core, child, ranks_are_right
    """
    source = textwrap.dedent(preamble) + textwrap.dedent(body)
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(HERE))))
    done = subprocess.run(
        [sys.executable, "-c", source],
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_number_of_threads_does_not_matter(variant):
    maps = _maps(20_000)
    want = np.tile(_reference.matrix_rank(maps[0, :400]), 50)
    for threads in (1, 2, 3, 16):
        assert (_core.rank(maps, RTOL, variant, threads) == want).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_python_threads_at_once(variant):
    maps = _maps(20_000)
    want = np.tile(_reference.matrix_rank(maps[0, :400]), 50)
    with ThreadPoolExecutor(8) as executor:
        runs = [executor.submit(_core.rank, maps, RTOL, variant, 3) for _ in range(24)]
        assert all((run.result() == want).all() for run in runs)


FORKS = """
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads: they are the point
    right = 0
    def fork(times):
        global right
        for _ in range(times):
            process = os.fork()
            if process == 0:
                child()
            right += os.waitpid(process, 0)[1] == 0
"""


@needs_fork
def test_forked_children_get_their_own_pool():
    assert _script(FORKS + "    fork(5)\n    print(right, ranks_are_right())") == "5 True"


BUSY = """
    stop = False
    def work():
        while not stop:
            assert ranks_are_right()
    busy = [threading.Thread(target=work) for _ in range(2)]
    for thread in busy:
        thread.start()
    fork({times})
    stop = True
    for thread in busy:
        thread.join()
    print(right, ranks_are_right())
"""


@needs_fork
@pytest.mark.skipif(SANITIZED == "thread", reason="its own allocator stays locked in the child of a busy process")
@pytest.mark.parametrize("times", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_children_forked_while_the_pool_is_busy(times):
    """Threads that no longer exist may hold every lock of the parent's pool."""
    assert _script(FORKS + BUSY.format(times=times), timeout=30 + times) == f"{times} True"


@needs_fork
@pytest.mark.slow
def test_a_thousand_children_of_a_forkserver_whose_pool_has_run():
    script = """
        import multiprocessing
        if __name__ == "__main__":
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["rank_child"])
            right = 0
            for _ in range(125):
                children = [context.Process(target=child) for _ in range(8)]
                for process in children:
                    process.start()
                for process in children:
                    process.join()
                    right += process.exitcode == 0
            print(right)
    """
    assert _script(script, timeout=600) == "1000"


@pytest.mark.slow
def test_a_thousand_spawned_interpreters():
    """New interpreters, four at a time, each with a pool of its own."""
    script = """
        right = 0
        command = [sys.executable, "-c", "import rank_child; rank_child.child()"]
        for _ in range(250):
            children = [subprocess.Popen(command) for _ in range(4)]
            right += sum(process.wait(60) == 0 for process in children)
        print(right)
    """
    assert _script(script, timeout=1800) == "1000"


@needs_fork
def test_a_wrong_child_would_be_noticed():
    assert _script(FORKS + "    child = lambda: os._exit(1)\n    fork(3)\n    print(right)") == "0"


@pytest.mark.parametrize(("side", "threads"), [(4, 1), (64, 1), (64, 2), (64, 8), (256, 2)])
def test_ctrl_c_is_answered_within_a_fifth_of_a_second(side, threads):
    """Medians of five: a crowded machine may hold any one of them up."""
    seconds = _script(f"""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        side, threads = {side}, {threads}
        maps = np.broadcast_to(np.eye(side, dtype=np.float32), (min(1 << 25, (1 << 36) // side**3), 1, side, side))
        def press():
            time.sleep(0.1)
            global pressed
            pressed = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
        waits = []
        for _ in range(5):
            threading.Thread(target=press).start()
            try:
                _core.rank(maps, 1e-6, "cpu_baseline", threads)
                print("finished before")
            except KeyboardInterrupt:
                waits.append(time.monotonic() - pressed)
        print(sorted(waits)[2])
    """)
    assert float(seconds) < (5 if SANITIZED else 0.2)  # one item of work takes a sanitizer up to fifty times as long


CALLS = {
    "variants": ("_core.rank_variants()", 1_000_000),
    **{name: (f"_core.rank(maps, 1e-6, {name!r}, 4)", 1_000_000) for name in VARIANTS},
    "bfloat16": ("_core.rank(bits, 1e-6, 'cpu_baseline', 4, 'bfloat16')", 1_000_000),
    "float64, bisected": ("_core.rank(flat, 3e-5, 'cpu_baseline', 4)", 1_000_000),
    "wrong dtype": ("refused(maps.astype('int32'))", 1_000_000),
    "wrong dimensions": ("refused(maps[0])", 1_000_000),
    "matrix_rank": ("matrix_rank(maps)", 1_000_000),
    "the pool": ("_core.rank(many, 1e-6, 'cpu_baseline', 4)", 10_000),  # a call of a millisecond each
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_million_calls_keep_no_memory(name):
    """A tenth of them warm up; a leak of two bytes a call would show."""
    call, times = CALLS[name]
    grown = _script(
        f"""
        from pyprune.ops.rank import matrix_rank
        maps = np.eye(4, dtype=np.float32)[None, None]
        bits = np.full((1, 1, 4, 4), 0x3F80, np.uint16)
        flat = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0][None, None]
        flat = flat * 1.0
        flat[..., 3:] *= 3e-5
        many = np.zeros((1, 4000, 16, 16), np.float32)
        def refused(maps):
            try:
                _core.rank(maps, 1e-6, "cpu_baseline", 1)
            except (TypeError, ValueError):
                return
            raise AssertionError
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for _ in range({times // 10}):
            {call}
        before = resident()
        for _ in range({times}):
            {call}
        print(resident() - before)
    """,
        timeout=1200,
    )
    assert int(grown) <= 1 << 20
