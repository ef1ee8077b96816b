"""The k search on the pool: threads, callers, forked children. Without torch, for every sanitizer."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pyprune import _core, machine

VARIANTS = machine.this_machine().cpu_variants


def search(x, variant, threads, refine=False):
    return _core.k_search(x, 4, len(x) - 1, 4, 10000, 6, refine, variant, threads, None)


def same(some, others):
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("refine", [False, True])
def test_the_number_of_threads_does_not_matter(variant, refine):
    x = np.random.default_rng(0).random((130, 7))
    want = search(x, variant, 1, refine)
    for threads in (2, 3, 16):
        assert same(search(x, variant, threads, refine), want)
    assert not same(search(x[::-1].copy(), variant, 2, refine), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_eight_python_threads_at_once(variant):
    x = np.random.default_rng(0).random((100, 5))
    want = search(x, variant, 1)
    with ThreadPoolExecutor(8) as executor:
        runs = [executor.submit(search, x, variant, 3) for _ in range(24)]
        assert all(same(run.result(), want) for run in runs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_forked_children_get_their_own_pool():
    source = """
        import os, warnings
        import numpy as np
        from pyprune import _core
        x = np.random.default_rng(0).random((130, 7))
        def labels():
            return _core.k_search(x, 4, 129, 4, 10000, 6, False, "cpu_baseline", 4, None)[0]
        want = labels()
        warnings.simplefilter("ignore", DeprecationWarning)  # that forking beside threads may hang: not here
        child = os.fork()
        if not child:
            os._exit(0 if (labels() == want).all() else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr
