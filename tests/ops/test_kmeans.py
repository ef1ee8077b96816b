"""The k search: labellings, inertia and silhouettes against their definitions, and against scikit-learn's."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_samples
from threadpoolctl import threadpool_limits

from pyprune import _core, machine
from pyprune.machine import Machine
from pyprune.ops import _reference
from pyprune.ops.kmeans import KSearch, choose_kmeans, k_search, kmeans_variants
from tolerances import INERTIA, SILHOUETTE_GATE

VARIANTS = machine.this_machine().cpu_variants
FIELDS = ("labels", "inertia", "silhouettes", "scores", "rounds", "moves")


def uniform(F, C, seed=0):
    return np.random.default_rng(seed).random((F, C))


def groups(F, C, count, seed=0, spread=0.05):
    rng = np.random.default_rng(seed)
    return rng.random((count, C))[rng.integers(0, count, F)] + spread * rng.standard_normal((F, C))


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def check(x, found):
    """Hold labellings of ``found``, all where they are few, against the definitions."""
    for i, K in list(enumerate(found.ks.tolist()))[:: 1 + len(x) // 40]:
        labels = found.labels[i]
        first = [labels.tolist().index(k) for k in range(K)]  # raises where a cluster is empty
        assert first == sorted(first)
        assert labels.max() == K - 1
        want = _reference.silhouettes(x, labels)
        np.testing.assert_allclose(found.silhouettes[i], want, rtol=0, atol=SILHOUETTE_GATE)
        assert found.scores[i] == pytest.approx(want.mean(), rel=0, abs=SILHOUETTE_GATE)
        scale = np.square(np.ptp(x, axis=0)).sum() * len(x)
        assert found.inertia[i] == pytest.approx(_reference.inertia(x, labels), rel=0, abs=INERTIA * scale)


def at_rest(x, labels):
    """Whether no row is nearer to the centre of another cluster than to its own's."""
    centres = np.stack([x[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
    d = np.square(x[:, None] - centres).sum(axis=-1)
    return (d[np.arange(len(x)), labels] <= d.min(axis=1) + 1e-12).all()


SHAPES = [(5, 1), (7, 3), (31, 2), (32, 10), (33, 10), (64, 1), (67, 33), (97, 130)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("F", "C"), SHAPES)
def test_every_k_is_what_it_says(F, C, variant):
    x = uniform(F, C, F)
    found = k_search(x, k_min=2, variant=variant)
    assert found.variant == variant
    assert found.ks.tolist() == list(range(2, F))
    check(x, found)
    assert all(at_rest(x, labels) for labels in found.labels)


@pytest.mark.parametrize("refine", [False, True])
def test_all_variants_and_numbers_of_threads_give_the_same_bits(refine):
    x = groups(150, 24, 9)
    want = k_search(x, variant=VARIANTS[0], refine=refine, n_init=4)
    for variant in VARIANTS:
        for threads in (1, 2, 5):
            with machine.limited_threads(threads):
                assert same(k_search(x, variant=variant, refine=refine, n_init=4), want)
    assert not same(k_search(x, refine=refine, n_init=4, seed=7), want)


def test_a_k_does_not_depend_on_the_others():
    x = uniform(60, 5)
    every = k_search(x)
    for K in (4, 23, 59):
        alone = k_search(x, K, K)
        assert alone.ks.tolist() == [K]
        assert np.array_equal(alone.labels[0], every.labels[K - 4])
        assert alone.scores[0] == every.scores[K - 4]


def test_by_hand():
    # Two pairs and a single row on a line: K = 3 gives {0, 1}, {10, 12}, {30}.
    found = k_search([[0], [1], [10], [12], [30]], 3, 3)
    assert found.labels.tolist() == [[0, 0, 1, 1, 2]]
    assert found.inertia.tolist() == pytest.approx([0.5 + 2])
    # 0: a = 1, b = 11 -> 10/11; 1: a = 1, b = 10 -> 9/10; 10: a = 2, b = 9.5 -> 7.5/9.5; 12: a = 2, b = 11.5
    want = [10 / 11, 9 / 10, 7.5 / 9.5, 9.5 / 11.5, 0]
    np.testing.assert_allclose(found.silhouettes[0], want, rtol=1e-14)
    assert found.scores[0] == pytest.approx(np.mean(want))
    assert not np.allclose(_reference.silhouettes([[0], [1], [10], [13], [30]], [0, 0, 1, 1, 2]), want)


def test_the_reference_is_scikit_learns():
    x = uniform(40, 6)
    labels = KMeans(7, n_init=1, random_state=0).fit(x).labels_
    want = silhouette_samples(x, labels)
    np.testing.assert_allclose(_reference.silhouettes(x, labels), want, rtol=0, atol=SILHOUETTE_GATE)
    assert abs(_reference.silhouettes(x, np.roll(labels, 1)) - want).max() > 0.1


def test_clear_groups_are_found():
    x = groups(90, 10, 7, seed=3, spread=1e-3)
    found = k_search(x)
    assert found.ks[found.best] == 7
    assert found.scores[found.best] > 0.95


def test_the_smallest_k_wins_a_tie():
    zeros = np.zeros((3, 4))
    one = KSearch(np.arange(4, 7), zeros, zeros[:, 0], zeros, np.array([0.5 - 1e-15, 0.5, 0.2]), *zeros[:2], "")
    assert one.best == 0
    assert KSearch(one.ks, zeros, zeros[:, 0], zeros, np.array([0.5 - 1e-9, 0.5, 0.2]), *zeros[:2], "").best == 1


def ratio(x, ks, **options):
    """Inertia over scikit-learn's best of ten, as the geometric mean."""
    with threadpool_limits(1):
        want = [KMeans(K, random_state=6, n_init=10, max_iter=10000).fit(x).inertia_ for K in ks]
    mine = [k_search(x, K, K, **options).inertia[0] for K in ks]
    return float(np.exp(np.mean(np.log(mine) - np.log(want))))


DATA = {
    "uniform": lambda: uniform(80, 10, 1),
    "groups": lambda: groups(90, 10, 9, 2),
    "few dimensions in many": lambda: uniform(80, 3, 4) @ uniform(3, 60, 5),
}


def test_inertia_is_at_most_scikit_learns():
    ratios = [ratio(make(), (4, 7, 12, 20, 28, 40)) for make in DATA.values()]
    assert np.exp(np.mean(np.log(ratios))) <= 1.000
    assert max(ratios) < 1.02
    assert ratio(DATA["uniform"](), (12, 20, 28), n_init=1) > 1.01, "one restart must show, or this proves nothing"


@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
def test_refining_only_lowers_the_inertia(make):
    x = make()
    plain, refined = k_search(x), k_search(x, refine=True)
    check(x, refined)
    assert (plain.moves == 0).all()
    assert (refined.inertia <= plain.inertia * (1 + 1e-12)).all()
    assert (refined.inertia < plain.inertia)[refined.moves > 0].all()
    assert np.exp(np.log(refined.inertia[:30] / plain.inertia[:30]).mean()) < 0.99
    assert np.array_equal(refined.rounds, plain.rounds)


def test_equal_rows_share_a_cluster():
    x = np.repeat(uniform(9, 4), 5, axis=0)
    found = k_search(x)
    assert found.ks.tolist() == list(range(4, 10))
    check(x, found)
    for labels in found.labels:
        assert (labels.reshape(9, 5) == labels[::5, None]).all()
    assert found.inertia[-1] == pytest.approx(0, abs=1e-13)
    assert found.scores[-1] == pytest.approx(1)


def test_rows_that_differ_by_less_than_a_distance_still_fill_every_cluster():
    x = np.zeros((12, 2))
    x[:, 0] = np.arange(12) * 1e-200  # squares vanish
    found = k_search(x, 4, 8)
    for K, labels in zip(found.ks, found.labels, strict=True):
        assert len(np.unique(labels)) == K
    assert (found.silhouettes == 0).all()


def test_constant_columns_and_offsets_change_nothing():
    x = uniform(50, 6)
    wider = np.insert(x, [0, 3, 6], 1.0, axis=1)
    assert np.array_equal(k_search(wider).labels, k_search(x).labels)
    found = k_search(x + 2.0**20)
    check(x + 2.0**20, found)


def test_scales_change_nothing():
    x = uniform(40, 5)
    want = k_search(x)
    for scale in (2.0**-300, 2.0**300):
        found = k_search(x * scale)
        assert np.array_equal(found.labels, want.labels)
        assert np.array_equal(found.scores, want.scores)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.uint8, ">f8"])
def test_other_numbers_and_layouts(dtype):
    x = (uniform(24, 5) * 50).astype(dtype)
    want = k_search(x.astype(np.float64))
    assert same(k_search(x), want)
    assert same(k_search(np.asfortranarray(x)), want)
    assert same(k_search(np.repeat(x, 2, axis=1)[:, ::2]), want)
    assert same(k_search(x.tolist()), want)


def test_tensors():
    import torch

    x = uniform(24, 5)
    assert same(k_search(torch.from_numpy(x).requires_grad_()), k_search(x))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 70), st.integers(1, 40), st.integers(1, 3), st.booleans(), st.booleans())
def test_what_always_holds(seed, F, C, n_init, coarse, refine):
    x = uniform(F, C, seed)
    if coarse:
        x = np.round(3 * x[:, :3])  # equal rows and equal distances
    distinct = len(np.unique(x, axis=0))
    most = min(F - 1, distinct)
    if most < 2:
        return
    found = k_search(x, 2, n_init=n_init, refine=refine, seed=seed)
    check(x, found)
    with machine.limited_threads(1):
        assert same(k_search(x, 2, n_init=n_init, refine=refine, seed=seed, variant=VARIANTS[0]), found)


def test_one_round_is_not_enough_for_all():
    x = uniform(100, 3)
    short, whole = k_search(x, max_iter=1), k_search(x)
    assert short.rounds.max() <= 2 < whole.rounds.max()
    check(x, short)
    assert short.inertia.sum() > whole.inertia.sum()


def test_progress_adds_up():
    seen = []
    k_search(uniform(40, 3), progress=seen.append)
    assert sum(seen) == 36
    many = []
    k_search(uniform(500, 10), 4, 150, progress=many.append, n_init=20)
    assert sum(many) == 147
    assert len(many) > 1, "told while it runs, or there is no bar to see"


def test_an_error_of_progress_ends_the_search():
    def refuse(done):
        raise RuntimeError(f"after {done}")

    with pytest.raises(RuntimeError, match="after"):
        k_search(uniform(400, 10), progress=refuse)


def test_ctrl_c_ends_the_search():
    """Medians of three: a crowded machine may hold any one of them up."""
    source = """
        import os, signal, threading, time
        import numpy as np
        from pyprune.ops.kmeans import k_search
        signal.signal(signal.SIGINT, signal.default_int_handler)
        x = np.random.default_rng(0).random((1500, 20))
        def press():
            time.sleep(0.3)
            global pressed
            pressed = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
        waits = []
        for _ in range(3):
            threading.Thread(target=press).start()
            try:
                k_search(x)
                print("finished before")
            except KeyboardInterrupt:
                waits.append(time.monotonic() - pressed)
        print(sorted(waits)[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5


def native(x, elsewhere="", option=0, max_iter=10000, refine=False):
    found = _core.k_search(x, 2, len(x) - 1, 3, max_iter, 6, refine, VARIANTS[0], 1, None, elsewhere, option)
    return KSearch(np.arange(2, len(x)), *(found[i] for i in (0, 2, 1, 3, 4, 5)), "")


@pytest.mark.parametrize("backwards", [0, 1])
@pytest.mark.parametrize(("F", "C"), [(5, 2), (31, 3), (33, 1), (90, 20)])
def test_the_gpus_rounds_are_the_cpus(F, C, backwards):
    """The kernel's code on the host: every labelling of the CPU, whose bounds must therefore be exact."""
    x = uniform(F, C, F)
    assert same(native(x, "twin", backwards), native(x))
    assert same(native(x, "twin", backwards, refine=True), native(x, refine=True))
    assert not same(native(x, "twin", backwards), native(x[::-1].copy()))


def test_the_gpus_rounds_with_ties_and_few_rounds():
    x = np.unique(np.round(3 * uniform(60, 3)), axis=0)  # many equal distances
    check(x, native(x, "twin"))
    many = uniform(70, 4)
    assert same(native(many, "twin", max_iter=1), native(many, max_iter=1))
    assert not same(native(many, "twin", max_iter=1), native(many, "twin"))


@pytest.mark.gpu
@pytest.mark.skipif(bool(machine.cuda_reason()), reason="needs the compiled CUDA kernels and a GPU")
def test_the_gpu_agrees():
    x = groups(300, 10, 12)
    found = k_search(x, variant="cuda_gram")
    assert found.variant == "cuda_gram"
    assert same(found, k_search(x))


@pytest.mark.skipif(not machine.cuda_reason(), reason="the compiled CUDA kernels can run")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match=r"variant 'cuda_gram' is not usable: .*; here are auto"):
        k_search(uniform(9, 2), variant="cuda_gram")
    if not _core.cuda_built()[0]:
        with pytest.raises(RuntimeError, match="k_search: this build has no CUDA kernels"):
            native(uniform(9, 2), "cuda")


def test_choice():
    assert kmeans_variants(Machine(("cpu_baseline",), (("cuda_thread", 4),))) == ("cpu_baseline", "cuda_gram")
    assert choose_kmeans(Machine(("cpu_baseline", "cpu_avx2"))) == "cpu_avx2"
    assert kmeans_variants(Machine(("cpu_baseline",))) == ("cpu_baseline",)
    with pytest.raises(ValueError, match="not built"):
        choose_kmeans(Machine())
    assert k_search(uniform(9, 2)).variant == VARIANTS[-1]


NAN = np.full((9, 2), 0.5)
NAN[3, 1] = np.nan
REFUSED = [
    ((NAN,), {}, ValueError, "x must be finite; 1 of 18 numbers are NaN or infinite"),
    ((np.zeros(9),), {}, ValueError, r"x must be \[F, C\] with at least one row and column; got \[9\]"),
    ((np.zeros((9, 0)),), {}, ValueError, r"got \[9, 0\]"),
    ((np.zeros((0, 2)),), {}, ValueError, r"got \[0, 2\]"),
    ((np.zeros((9, 2), complex),), {}, TypeError, "real numbers; got complex128. Convert it"),
    ((np.zeros((9, 2), bool),), {}, TypeError, "real numbers; got bool"),
    (([["a", "b"]],), {}, TypeError, "real numbers; got <U1"),
    ((np.zeros((9, 2)),), {}, ValueError, "4 clusters need at least 5 rows, 4 of them distinct; x has 9 rows, 1 of"),
    ((uniform(4, 2),), {}, ValueError, "x has 4 rows, 4 of them distinct. Leave such a layer alone"),
    ((uniform(9, 2), 4, 9), {}, ValueError, "9 clusters need at least 10 rows, .* Pass k_max=8 or less"),
    ((uniform(9, 2), 1), {}, ValueError, "k_min must be at least 2 and below 2.63; got 1"),
    ((uniform(9, 2), 5, 4), {}, ValueError, "k_max must be at least 5 .*; got 4"),
    ((uniform(9, 2), 4.0), {}, TypeError, "k_min must be a whole number; got 4.0"),
    ((uniform(9, 2),), {"n_init": 0}, ValueError, "n_init must be at least 1"),
    ((uniform(9, 2),), {"seed": -1}, ValueError, "seed must be at least 0"),
    ((uniform(9, 2),), {"max_iter": True}, TypeError, "max_iter must be a whole number; got True"),
    ((uniform(9, 2) * 1e200,), {}, ValueError, "squared distances of x must be below 1.8e308. Scale x"),
    ((np.zeros((40000, 1)),), {}, ValueError, "at most 32767 rows; got 40000"),
    (
        (uniform(9, 2),),
        {"variant": "cpu_basline"},
        ValueError,
        "unknown; here are auto, .* Did you mean 'cpu_baseline'",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "kind", "message"), REFUSED)
def test_what_is_refused(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        k_search(*arguments, **options)


def test_memory_is_bounded_by_the_distances():
    source = """
        import resource
        import numpy as np
        from pyprune.ops.kmeans import k_search
        k_search(np.random.default_rng(0).random((50, 4)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        k_search(np.random.default_rng(0).random((700, 300)), n_init=2)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # 700^2 numbers of 8 bytes for distances and for silhouettes, 4 for labels: 10 MB; three copies of x: 5 MB.
    assert float(done.stdout) < 40
