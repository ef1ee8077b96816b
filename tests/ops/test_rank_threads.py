"""The pool: several callers, forked children, signals, a quick end."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pyprune import _core
from pyprune.ops import _reference

RTOL = 16 * 2.0**-23


def _maps(count):
    rng = np.random.default_rng(0)
    return np.tile(np.maximum(rng.standard_normal((1, 400, 16, 16)), 0).astype(np.float32), (1, count // 400, 1, 1))


def test_the_number_of_threads_does_not_matter():
    maps = _maps(20_000)
    want = np.tile(_reference.matrix_rank(maps[0, :400]), 50)
    for threads in (1, 2, 3, 16):
        assert (_core.rank(maps, RTOL, "cpu_baseline", threads) == want).all()


def test_eight_python_threads_at_once():
    maps = _maps(20_000)
    want = np.tile(_reference.matrix_rank(maps[0, :400]), 50)
    with ThreadPoolExecutor(8) as executor:
        runs = [executor.submit(_core.rank, maps, RTOL, "cpu_baseline", 3) for _ in range(24)]
        assert all((run.result() == want).all() for run in runs)


def _script(body, timeout=60):
    preamble = """
        import os, signal, sys, threading, time, warnings
        import numpy as np
        from pyprune import _core
        def ranks(count):
            maps = np.zeros((1, count, 16, 16), np.float32)
            maps[:, :, :9, :9] = np.eye(9)
            return (_core.rank(maps, 1e-6, "cpu_baseline", 4) == 9).all()
    """
    source = textwrap.dedent(preamble) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", source], timeout=timeout, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_a_forked_child_gets_its_own_pool():
    """The parent's threads are busy at the moment of the fork; Python 3.12 warns of that, and it is the point here."""
    done = _script("""
        warnings.simplefilter("ignore", DeprecationWarning)
        stop = False
        def work():
            while not stop:
                assert ranks(20_000)
        busy = [threading.Thread(target=work) for _ in range(2)]
        for thread in busy:
            thread.start()
        for _ in range(10):
            child = os.fork()
            if child == 0:
                os._exit(0 if ranks(50_000) and ranks(50_000) else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop = True
        for thread in busy:
            thread.join()
        print("right", ranks(20_000))
    """)
    assert (done.stdout.strip(), done.returncode) == ("right True", 0), done.stderr


def test_ctrl_c_stops_a_long_call():
    done = _script("""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        maps = np.broadcast_to(np.eye(64, dtype=np.float32), (10_000_000, 1, 64, 64))
        began = time.monotonic()
        try:
            _core.rank(maps, 1e-6, "cpu_baseline", 2)
        except KeyboardInterrupt:
            print("stopped", time.monotonic() - began < 5)
    """)
    assert done.stdout.strip() == "stopped True", done.stderr
