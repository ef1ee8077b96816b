"""Kernel SSIM on the pool: threads, callers, forked children, signals, memory. Without torch, for every sanitizer."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pyprune import _core, machine

VARIANTS = machine.this_machine().cpu_variants
CONSTANTS = (0.1, 1.0, 1.0, 1e-2, None)
SANITIZED = os.environ.get("PYPRUNE_SANITIZED", "")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")


def weights(F2, F1, K=3, dtype=np.float32):
    return np.random.default_rng(0).standard_normal((F2, F1, K, K)).astype(dtype)


def everything(w, variant, threads, pairs=None):
    """Every result there is, as one list of arrays."""
    found = _core.ssim_statistics(w, CONSTANTS, [0.2, 0.25, 0.3], 50, 40, True, pairs, variant, threads)
    return [_core.ssim_matrix(w, CONSTANTS, variant, threads), *map(np.asarray, found)]


def same(some, others):
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(200, 40), (530, 9)])
def test_the_number_of_threads_does_not_matter(variant, dtype, shape):
    w = weights(*shape, dtype=dtype)
    w[3], w[90] = w[50], -w[50]
    want = everything(w, variant, 1)
    for threads in (2, 3, 16):
        assert same(everything(w, variant, threads), want)
    pairs = np.argwhere(np.triu(np.ones((60, 60)), 1)).astype(np.int64)
    assert same(everything(w, variant, 5, pairs), everything(w, variant, 1, pairs))
    assert not same(everything(w[::-1].copy(), variant, 2), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_python_threads_at_once(variant):
    w = weights(150, 30)
    want = everything(w, variant, 1)
    with ThreadPoolExecutor(8) as executor:
        runs = [executor.submit(everything, w, variant, 3) for _ in range(24)]
        assert all(same(run.result(), want) for run in runs)


def script(body, timeout=120):
    """Run ``body`` in a process of its own, which a hang ends; return what it prints."""
    preamble = """
        import os, signal, threading, time, warnings
        import numpy as np
        from pyprune import _core
        CONSTANTS = (0.1, 1.0, 1.0, 1e-2, None)
        w = np.random.default_rng(0).standard_normal((160, 64, 3, 3)).astype(np.float32)
        def mean():
            return _core.ssim_statistics(w, CONSTANTS, [], 0, 0, False, None, "cpu_baseline", 4)[1]
        want = mean()
    """
    source = textwrap.dedent(preamble) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", source], timeout=timeout, capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_fork
def test_forked_children_get_their_own_pool():
    answer = script("""
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads
        right = 0
        for _ in range(5):
            process = os.fork()
            if process == 0:
                os._exit(0 if mean() == want else 1)
            right += os.waitpid(process, 0)[1] == 0
        print(right)
    """)
    assert answer == "5"


@pytest.mark.parametrize(
    ("shape", "threads", "pairs"),
    [((4000, 500, 3, 3), 1, 0), ((4000, 500, 3, 3), 2, 0), ((3000, 100, 11, 11), 2, 0), ((70, 60000, 3, 3), 2, 0),
     ((2000, 1000, 3, 3), 2, 1_000_000)],
)  # fmt: skip
def test_ctrl_c_is_answered_within_a_fifth_of_a_second(shape, threads, pairs):
    """Medians of five: a crowded machine may hold any one of them up."""
    seconds = script(f"""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        shape, count = {shape}, {pairs}
        w = np.broadcast_to(np.random.default_rng(0).standard_normal(shape[2:]).astype(np.float32), shape)
        pairs = np.random.default_rng(0).integers(0, 1000, (count, 2)) + np.array([0, 1000]) if count else None
        def press():
            time.sleep(0.1)
            global pressed
            pressed = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
        waits = []
        for _ in range(5):
            threading.Thread(target=press).start()
            try:
                _core.ssim_statistics(w, CONSTANTS, [0.5], 10, 0, False, pairs, "cpu_baseline", {threads})
                print("finished before")
            except KeyboardInterrupt:
                waits.append(time.monotonic() - pressed)
        print(sorted(waits)[2])
    """)
    assert float(seconds) < (5 if SANITIZED else 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_million_calls_keep_no_memory(variant):
    """A tenth of them warm up; a leak of two bytes a call would show."""
    grown = script(
        f"""
        w = w[:2, :1].copy()
        bad = np.full_like(w, np.nan)
        pairs = np.array([[0, 1]])
        def calls():
            _core.ssim_matrix(w, CONSTANTS, {variant!r}, 4)
            _core.ssim_statistics(w, CONSTANTS, [0.5], 10, 1, True, None, {variant!r}, 4)
            _core.ssim_statistics(w, CONSTANTS, [0.5], 10, 1, True, pairs, {variant!r}, 4)
            try:
                _core.ssim_matrix(bad, CONSTANTS, {variant!r}, 4)
            except ValueError:
                return
            raise AssertionError
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for _ in range(100_000):
            calls()
        before = resident()
        for _ in range(1_000_000):
            calls()
        print(resident() - before)
    """,
        timeout=1200,
    )
    assert int(grown) <= 1 << 20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak of memory")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wide_layer_in_little_memory(variant):
    """Statistics of 1536 x 512 x 3 x 3 take less than 8 MiB beyond their input; the matrix alone would be 9."""
    grown = script(f"""
        from pathlib import Path
        w = np.random.default_rng(0).standard_normal((1536, 512, 3, 3), np.float32)
        def peak():
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        _core.ssim_statistics(w, CONSTANTS, [0.5], 10, 100, True, None, {variant!r}, 2)
        grown = peak() - before
        matrix = _core.ssim_matrix(w, CONSTANTS, {variant!r}, 2)
        print(grown, peak() - before)
    """)
    statistics, matrix = map(int, grown.split())  # KiB
    assert statistics < 8 << 10
    assert matrix > 9 << 10
