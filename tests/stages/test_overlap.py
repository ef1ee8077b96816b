"""Ranking beside the forward pass: the bits of ranking at once, whatever the timing, errors and in-place forms."""

from __future__ import annotations

import gc
import operator
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

from pyprune import graph, machine, overlap, ranks
from pyprune.aliases import lasting
from pyprune.overlap import DeviceQueue, HostQueue, choose_helpers
from pyprune.ranks import RankAccumulator, rank_filters

C = 3


@fx.wrap
def wrapped(x):
    return x.mul_(0)


class Hidden(nn.Module):
    """Changes its input; nothing in its name says so."""

    def forward(self, x):
        x[:, :, 0] = 0
        return x * 1


Hidden.__module__ = "torch.nn"  # so that tracing does not look inside


class Form(nn.Module):
    """Reads a tap, then does ``then`` with it."""

    def __init__(self, then, activation=None):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), activation or nn.ReLU()
        self.inplace, self.drop, self.hidden = nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), Hidden()
        self.last = nn.Conv2d(4, 2, 1)
        self.then = then

    def forward(self, x):
        h = self.norm(self.conv(x))
        y = self.relu(h)
        return self.last(self.then(self, x, h, y))


def inputs():
    images = torch.randn(12, 1, 7, 6, generator=torch.Generator().manual_seed(1))
    for i in range(12):
        images[i, :, 1 + i % 6 :] = 0
    return images, torch.arange(12) % C


# What comes after the tap, by whether it changes the map: `out` is what the next convolution gets.
CHANGES = {
    "F.relu, inplace": lambda m, x, h, y: F.relu(y - y.mean(), inplace=True) + F.hardtanh(y, -0.1, 0.1, True),
    "F.relu_": lambda m, x, h, y: F.relu_(y.sub_(0.5)),
    "add_": lambda m, x, h, y: y.add_(y, alpha=-1),
    "+=": lambda m, x, h, y: operator.iadd(y, -y) * 1,
    "mul_ of a view": lambda m, x, h, y: (y.view(12, -1).mul_(0.0), y)[1],
    "zero_ of a slice": lambda m, x, h, y: (y[:, 1:3].zero_(), y)[1],
    "zero_ of a chunk": lambda m, x, h, y: (y.chunk(2, 1)[0].zero_(), y)[1],
    "out=": lambda m, x, h, y: (torch.mul(x.expand(-1, 4, -1, -1), 0, out=y), y)[1],
    "wrapped": lambda m, x, h, y: wrapped(y),
    "module, inplace": lambda m, x, h, y: m.inplace(y.detach().neg_()),
    "unknown module": lambda m, x, h, y: m.hidden(y),
    "fill_ of the other one": lambda m, x, h, y: (y.contiguous().fill_(0), y)[1],
}
KEEPS = {
    "pure": lambda m, x, h, y: F.relu(y) + y.mean((2, 3), keepdim=True) * y,
    "only read by add_": lambda m, x, h, y: (x.expand(-1, 4, -1, -1) * 2).add_(y),
    "dropout, flatten": lambda m, x, h, y: F.dropout(y.flatten(1), training=False).view(12, 4, 7, 6) * 2,
    "pools": lambda m, x, h, y: F.max_pool2d(y, 3, 1, 1) + F.avg_pool2d(y, 3, 1, 1),
}


def form(then, **options):
    torch.manual_seed(0)
    model = Form(then, **options).eval()
    nn.init.uniform_(model.norm.bias, -1, 1)
    return model


def sums(model, layers=("conv",), batches=2):
    images, labels = inputs()
    accumulator = RankAccumulator(model, layers, num_classes=C)
    with accumulator:
        for _ in range(batches):
            model(images)
            accumulator.update(labels)
    return accumulator.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def late(monkeypatch):
    """Helpers that never come: every map that may wait does so until the forward pass is over."""
    monkeypatch.setattr(overlap, "choose_helpers", lambda threads, cpus: 1)
    monkeypatch.setattr(HostQueue, "_help", lambda self: None)
    put, waited = HostQueue.put, []

    def recorded(self, where, *given):
        waited.append(where)
        put(self, where, *given)

    monkeypatch.setattr(HostQueue, "put", recorded)
    return waited


@pytest.fixture
def helped(monkeypatch):
    """Three helpers, whatever this machine has."""
    monkeypatch.setattr(overlap, "choose_helpers", lambda threads, cpus: 3)


def at_once(monkeypatch, *given, **options):
    with monkeypatch.context() as patch:
        patch.setattr(overlap, "choose_helpers", lambda threads, cpus: 0)
        return sums(*given, **options)


def test_helpers_are_the_cpus_that_the_forward_pass_leaves_idle():
    assert [choose_helpers(threads, 8) for threads in (1, 2, 4, 6, 8, 16)] == [0, 1, 3, 2, 0, 0]


@pytest.mark.parametrize("then", CHANGES.values(), ids=CHANGES)
def test_maps_that_are_changed_in_place_do_not_wait(monkeypatch, late, then):
    found = sums(form(then))
    assert not late
    assert same(found, at_once(monkeypatch, form(then)))
    # The comparison can fail: were the map to wait, what changes it would be noticed, and would change its ranks.
    monkeypatch.setattr(ranks, "lasting", lambda model, traced, names: set(names))
    with pytest.raises(ValueError, match=r"the maps of 'conv' \(read at 'relu'\) were changed in place before"):
        sums(form(then))
    monkeypatch.setattr(overlap, "_version", lambda maps: 0)
    assert not same(found, sums(form(then)))


@pytest.mark.parametrize("then", KEEPS.values(), ids=KEEPS)
def test_maps_that_are_only_read_wait(monkeypatch, late, then):
    found = sums(form(then))
    assert late == ["the maps of 'conv' (read at 'relu')"] * 2
    assert same(found, at_once(monkeypatch, form(then)))
    changed = form(then)
    with torch.no_grad():
        changed.norm.bias[2] = -100
    assert not same(found, sums(changed))


def test_what_shares_memory_with_the_tap_counts_too():
    """The tap is an in-place activation of a view: whoever writes to what is behind it writes to the tap."""

    class Shares(nn.Module):
        def __init__(self, write):
            super().__init__()
            self.conv, self.write = nn.Conv2d(1, 4, 3), write

        def forward(self, x):
            h = self.conv(x)
            y = F.relu_(h.view(-1, 2, 5, 4))
            return (h.mul_(0) if self.write else h.mul(0)).sum() + y.sum()

    for write in (False, True):
        traced = graph.trace(Shares(write), "test")
        assert lasting(Shares(write), traced, ["relu_"]) == (set() if write else {"relu_"})


def test_norm_taps_before_an_inplace_activation_do_not_wait(monkeypatch, late):
    images, labels = inputs()
    model = form(lambda m, x, h, y: y, activation=nn.ReLU(inplace=True))

    def found():
        accumulator = RankAccumulator(model, ["conv"], taps="norm")
        with accumulator:
            model(images)
            accumulator.update(labels)
        return accumulator.state_dict()

    with monkeypatch.context() as patch:
        patch.setattr(overlap, "choose_helpers", lambda threads, cpus: 0)
        expected = found()
    assert same(found(), expected)
    assert not late


def test_maps_that_are_returned_are_ranked_at_once(late):
    class Returned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(1, 4, 3), nn.ReLU()

        def forward(self, x):
            return self.relu(self.conv(x)).flatten(1)

    sums(Returned())
    assert not late


@pytest.mark.parametrize("place", ["before", "at", "after"])
def test_modules_with_hooks_may_do_anything(monkeypatch, late, place):
    def clear(module, given):
        given[0].zero_()

    def hooked():
        model = form(KEEPS["pure"])
        module = {"before": model.norm, "at": model.relu, "after": model.last}[place]
        if place == "after":
            model.then = lambda m, x, h, y: y
            module.register_forward_pre_hook(clear)
        else:
            module.register_forward_hook(lambda module, inputs, output: None)
        return model

    found = sums(hooked())
    assert same(found, at_once(monkeypatch, hooked()))
    assert bool(late) == (place == "before"), "a norm's hook sees nothing of the activation"


def test_taps_named_by_hand_are_ranked_at_once(monkeypatch, late):
    given = {"conv": "relu"}
    for then in (CHANGES["F.relu_"], KEEPS["pure"]):
        assert same(sums(form(then), given), at_once(monkeypatch, form(then), given))
    assert not late


def test_inference_mode(monkeypatch, late):
    with torch.inference_mode():
        found = sums(form(KEEPS["pure"]))
    assert late
    assert same(found, sums(form(KEEPS["pure"])))


def chain(widths=(8, 8, 16, 16, 8)):
    torch.manual_seed(0)
    layers = []
    for before, width in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], C)).eval()


@pytest.mark.parametrize("piece", [1, 700, 1 << 20])
@pytest.mark.parametrize("budget", [3000, 20_000, 1 << 24])
def test_the_bits_do_not_depend_on_timing_pieces_or_budget(monkeypatch, helped, budget, piece):
    expected = at_once(monkeypatch, chain(), None, batches=1)
    monkeypatch.setattr(overlap, "PIECE_BYTES", piece)
    monkeypatch.setattr(overlap.HostQueue.__init__, "__defaults__", (budget,))
    rank, rng = overlap.matrix_rank, np.random.default_rng(piece)

    def delayed(*given, **options):
        time.sleep(rng.choice([0, 0, 2e-4]))
        return rank(*given, **options)

    monkeypatch.setattr(overlap, "matrix_rank", delayed)
    for _ in range(3 if piece > 1 else 1):
        assert same(sums(chain(), None, batches=1), expected)
    with torch.no_grad():
        other = chain()
        other[6].weight.zero_()
    assert not same(sums(other, None, batches=1), expected)


def test_maps_that_wait_stay_within_the_budget(monkeypatch, helped):
    """Four maps of 1 KiB at most, though helpers are slow and ten are put."""
    budget, most = 4096, []
    queue = HostQueue(2, budget)
    rank = overlap.matrix_rank

    def slow(maps, **options):
        most.append(queue._bytes)
        time.sleep(1e-3)
        return rank(maps, **options)

    monkeypatch.setattr(overlap, "matrix_rank", slow)
    ranked, maps = np.zeros((10, 2, 2), np.int32), []
    for i in range(10):
        each = torch.eye(8).expand(2, 2, 8, 8) * (torch.arange(8) < i)
        maps.append(weakref.ref(each))
        assert queue.takes(each)
        queue.put(f"map {i}", each, ranked[i])
        del each
        assert sum(ref() is not None for ref in maps) <= budget // 1024
    queue.finish()
    assert 1024 <= max(most) <= budget
    assert ranked[:, 1, 1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert not any(ref() is not None for ref in maps)
    assert not queue.takes(torch.zeros(1, 1, 32, 33)), "larger than the budget"
    queue.close()


def test_helpers_run_beside_and_end(helped):
    seen = set()
    images, labels = inputs()
    model = chain()
    accumulator = RankAccumulator(model)
    threads = threading.active_count()
    with accumulator:
        for _ in range(3):
            model(images)
            accumulator.update(labels)
            seen |= {thread.name for thread in threading.enumerate()}
        assert threading.active_count() == threads + 3
    assert "pyprune rank" in seen
    assert threading.active_count() == threads


def test_helpers_use_one_thread_each(monkeypatch):
    used = []
    rank = overlap.matrix_rank
    monkeypatch.setattr(overlap, "matrix_rank", lambda *a, **k: (used.append(machine.threads()), rank(*a, **k))[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    queue = HostQueue(1)
    queue.put("maps", torch.ones(1, 1, 3, 3), np.zeros((1, 1), np.int32))
    queue.finish()
    queue.close()
    assert (used, machine.threads()) == ([1], 5)


@pytest.mark.parametrize("helpers", [0, 2])
def test_errors_are_those_of_ranking_at_once(monkeypatch, helpers):
    monkeypatch.setattr(overlap, "choose_helpers", lambda threads, cpus: helpers)
    images, labels = inputs()
    model, bad = chain(), images.clone()
    bad[2, 0, 1, 1] = float("nan")
    accumulator = RankAccumulator(model, num_classes=C)
    message = (
        r"^RankAccumulator: the maps of '0' \(read at '_2'\) cannot be ranked. matrix_rank: .* finite; 8 of 96 hold"
    )
    with accumulator:
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                model(bad)
            model(images)
            accumulator.update(labels)
    assert same(accumulator.state_dict(), at_once(monkeypatch, chain(), None))


def test_an_exception_of_the_model_forgets_what_waits(monkeypatch, helped):
    images, labels = inputs()
    model = chain()
    accumulator = RankAccumulator(model, num_classes=C)
    with accumulator:
        with pytest.raises(RuntimeError, match="to have 1 channels"):
            model(images.expand(-1, 2, -1, -1))
        handle = model[12].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("broken")))
        with pytest.raises(OSError, match="broken"):
            model(images)
        handle.remove()
        assert not accumulator._pending
        assert not accumulator._host._bytes
        model(images)
        accumulator.update(labels)
    assert same(accumulator.state_dict(), at_once(monkeypatch, chain(), None, batches=1))


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where whoever started the tests had it ignored, as shells do for what runs behind them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_the_caller_ranks_or_waits(monkeypatch, helped, interruptible):
    images, labels = inputs()
    model, rank = chain(), overlap.matrix_rank
    main = threading.main_thread()
    struck = []

    def slow(*given, **options):
        if not struck:
            struck.append(signal.pthread_kill(main.ident, signal.SIGINT))  # not to a thread that may sleep on
        time.sleep(0.05 if threading.current_thread() is not main else 0)
        return rank(*given, **options)

    def until_struck(*_):  # a busy machine may not have begun to rank when the pass is over
        while not struck and time.monotonic() - began < 10:
            time.sleep(0.001)

    accumulator = RankAccumulator(model, num_classes=C)
    with accumulator:
        monkeypatch.setattr(overlap, "matrix_rank", slow)
        handle = model.register_forward_hook(until_struck)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            model(images)
        assert time.monotonic() - began < 12
        handle.remove()
        monkeypatch.setattr(overlap, "matrix_rank", rank)
        model(images)
        accumulator.update(labels)
    assert struck
    assert same(accumulator.state_dict(), at_once(monkeypatch, chain(), None, batches=1))


FORKED = """
import os, sys
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from test_overlap import chain, inputs, overlap, same, C, RankAccumulator
overlap.choose_helpers = lambda threads, cpus: 2
images, labels = inputs()
model = chain()
child = [None]
def fork(*_):  # in the middle of a pass, with maps waiting
    if {where!r} == "inside" and child[0] is None:
        child[0] = os.fork()
accumulator = RankAccumulator(model, num_classes=C)
with accumulator:
    model[-1].register_forward_pre_hook(fork)
    model(images)
    if child[0] is None:
        child[0] = os.fork()
    accumulator.update(labels)
    model(images)
    accumulator.update(labels)
total = int(sum(value.sum() for name, value in accumulator.state_dict().items()))
if child[0] == 0:
    os._exit(total % 251)
assert os.waitstatus_to_exitcode(os.waitpid(child[0], 0)[1]) == total % 251
print(total)
"""


@pytest.mark.parametrize("where", ["inside", pytest.param("between", marks=pytest.mark.slow)])
def test_a_forked_child_ranks_on_with_helpers_of_its_own(monkeypatch, where):
    script = FORKED.format(here=str(Path(__file__).parent), where=where)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected = at_once(monkeypatch, chain(), None)
    assert int(done.stdout) == int(sum(value.sum() for value in expected.values()))


@pytest.mark.parametrize("at", range(1, 8))
def test_a_checkpoint_holds_whole_batches_whenever_the_run_dies(monkeypatch, helped, tmp_path, at):
    """The run dies at the at-th map of its third micro-batch, while others wait."""
    monkeypatch.setattr(ranks, "CHECKPOINT_SECONDS", 0.0)
    images, labels = inputs()
    loader = DataLoader(TensorDataset(images, labels), batch_size=3)
    given = {"images_per_class": 4, "progress": False}
    model = chain((4, 4, 4, 4, 4, 4, 4))
    calls = []

    def dies(*_):
        calls.append(1)
        if len(calls) == 2 * 7 + at:
            raise KeyboardInterrupt

    handles = [module.register_forward_hook(dies) for module in model if isinstance(module, nn.BatchNorm2d)]
    with pytest.raises(KeyboardInterrupt):
        rank_filters(model, loader, checkpoint=tmp_path / "ranking", **given)
    for handle in handles:
        handle.remove()
    runs = []
    handle = model[0].register_forward_hook(lambda *_: runs.append(1))
    found = rank_filters(model, loader, checkpoint=tmp_path / "ranking", **given)
    handle.remove()
    assert len(runs) == 2, "the two micro-batches that the checkpoint does not hold"
    expected = rank_filters(model, loader, **given)
    assert all(np.array_equal(found.layers[name], expected.layers[name]) for name in expected.layers)
    assert found.counts.tolist() == [4] * C


class LazyGpu:
    """A device whose ranking stream does its work as late as it may, and never looks at memory given back.

    Host memory stands for the device's. What the caller's stream does happens at once; what is submitted happens when
    somebody waits for it. Maps are known by weak references: reading one that its owner let go is the error that a
    caching allocator would turn into wrong numbers.
    """

    def __init__(self, eager=False):
        self.eager, self.queue, self.over, self.fetched = eager, [], 0, 0
        self.launches, self.holds = [], 0

    def move(self, array):
        return torch.from_numpy(array.copy())

    def zeros(self, shape, dtype):
        return torch.zeros(*shape, dtype=dtype)

    def submit(self, work, maps):
        self.queue.append((work, [weakref.ref(each) for each in maps]))
        self.launches.append(len(maps))
        if self.eager:
            self._run(len(self.queue))
        return len(self.queue)

    def hold(self, event):
        self.holds += 1
        self._run(event)

    def is_over(self, event):
        return event <= self.over

    def fetch(self, read):
        self.fetched += 1
        self._run(len(self.queue))
        return read().numpy().copy()

    def _run(self, event):
        for work, refs in self.queue[self.over : event]:
            maps = [ref() for ref in refs]
            assert all(each is not None for each in maps), "maps were given back before they were ranked"
            work(maps)
        self.over = max(self.over, event)


@pytest.fixture
def gpu(monkeypatch):
    found = LazyGpu()
    monkeypatch.setattr(overlap, "own_stream", lambda device: found)
    return found


@pytest.fixture
def compiled(monkeypatch):
    """Let maps pass for those that the compiled kernels take, and add their ranks up as these do."""
    calls = []

    class Kernels:
        @staticmethod
        def rank_sums(maps, labels, out, *, not_finite):
            calls.append(len(maps))
            found = torch.cat([torch.from_numpy(overlap.matrix_rank(m.numpy(), check=False)) for m in maps], 1)
            not_finite += (found < 0).sum()
            out.index_add_(0, labels, found.clamp_min(0).long())
            return ["cuda_group8"] * len(maps)

    monkeypatch.setattr(overlap, "_is_compiled", lambda maps: True)
    monkeypatch.setattr("pyprune.ops._cuda", Kernels, raising=False)
    monkeypatch.setitem(sys.modules, "pyprune.ops._cuda", Kernels)
    return calls


def expected_sums(monkeypatch, *given, **options):
    with monkeypatch.context() as patch:
        patch.setattr(overlap, "own_stream", lambda device: None)
        return at_once(monkeypatch, *given, **options)


@pytest.mark.parametrize("budget", [0, 5000, 1 << 28])
@pytest.mark.parametrize("eager", [False, True])
def test_a_stream_of_its_own_gives_the_same_sums(monkeypatch, gpu, budget, eager):
    gpu.eager = eager
    monkeypatch.setattr(DeviceQueue.__init__, "__defaults__", (1000, budget))
    found = sums(chain(), None, batches=3)
    assert same(found, expected_sums(monkeypatch, chain(), None, batches=3))
    assert gpu.fetched == 2, "the device is waited for once, at the end: for what is not finite, and for the sums"
    assert (gpu.holds > 6) == (budget < 1 << 28 and not eager)
    with torch.no_grad():
        other = chain()
        other[6].weight.zero_()
    assert not same(sums(other, None, batches=3), found)


@pytest.mark.parametrize("then", (CHANGES | KEEPS).values(), ids=CHANGES | KEEPS)
def test_the_stream_is_waited_for_before_a_map_is_changed(monkeypatch, gpu, then):
    assert same(sums(form(then)), expected_sums(monkeypatch, form(then)))


@pytest.mark.parametrize("then", CHANGES.values(), ids=CHANGES)
def test_that_comparison_can_fail(monkeypatch, gpu, then):
    monkeypatch.setattr(ranks, "lasting", lambda model, traced, names: set(names))
    with pytest.raises(ValueError, match="were changed in place before they were ranked"):
        sums(form(then))
    monkeypatch.setattr(overlap, "_version", lambda maps: 0)
    assert not same(sums(form(then)), expected_sums(monkeypatch, form(then)))


def test_the_lazy_device_notices_maps_given_back_too_early(monkeypatch, gpu):
    monkeypatch.setattr(LazyGpu, "hold", lambda self, event: None)
    monkeypatch.setattr(DeviceQueue.__init__, "__defaults__", (1000, 0))
    with pytest.raises(AssertionError, match="given back before they were ranked"):
        sums(chain(), None)


@pytest.mark.parametrize("group", [1, 12_000, 1 << 25])  # a map of 8 filters takes 6720 bytes
def test_known_labels_let_one_launch_add_up_many_taps(monkeypatch, gpu, compiled, group):
    monkeypatch.setattr(DeviceQueue.__init__, "__defaults__", (group, 1 << 28))
    images, labels = inputs()
    loader = DataLoader(TensorDataset(images, labels), batch_size=5)
    found = rank_filters(chain(), loader, images_per_class=4, progress=False)
    assert compiled == {1: [1] * 15, 12_000: [2, 1, 1, 1, 2, 1, 1, 1, 4, 1], 1 << 25: [5] * 3}[group]
    assert gpu.fetched == 2
    monkeypatch.setattr(overlap, "own_stream", lambda device: None)
    expected = rank_filters(chain(), loader, images_per_class=4, progress=False)
    assert all(np.array_equal(found.layers[name], expected.layers[name]) for name in expected.layers)


def test_maps_held_on_a_device_stay_within_the_budget(monkeypatch, gpu):
    size = 12 * 4 * 7 * 6 * 4
    monkeypatch.setattr(DeviceQueue.__init__, "__defaults__", (1000, 3 * size))
    held, put = [], DeviceQueue.put

    def recorded(self, *given):
        put(self, *given)
        held.append(self._group.size + sum(group.size for group in self._held))

    monkeypatch.setattr(DeviceQueue, "put", recorded)
    sums(chain((4,) * 7), None, batches=3)
    assert max(held) == 3 * size


@pytest.mark.parametrize("known", [True, False])
def test_what_is_not_finite_is_found_at_the_next_synchronisation(gpu, compiled, known):
    images, labels = inputs()
    images[2, 0, 1, 1] = float("nan")
    accumulator = RankAccumulator(chain(), num_classes=C)
    with accumulator:
        if known:
            accumulator._expect(labels.numpy())
        accumulator._model(images)
        accumulator.update(labels)
    assert not gpu.fetched
    message = r"'0' \(read at '_2'\).* cannot be ranked. matrix_rank: maps must be finite; \d+ hold NaN or infinity"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            accumulator.ranks()


def test_a_device_ranks_on_after_a_failed_batch_and_after_a_checkpoint(monkeypatch, gpu):
    images, labels = inputs()
    model = chain()
    accumulator = RankAccumulator(model, num_classes=None)
    with accumulator:
        model(images)
        accumulator.update(labels * 0)  # the classes grow later
        saved = accumulator.state_dict()
        with pytest.raises(RuntimeError, match="to have 1 channels"):
            model(images.expand(-1, 2, -1, -1))
        model(images)
        accumulator.update(labels)
        with pytest.raises(ValueError, match="one label per image; got 11 labels for 12"):
            (model(images), accumulator.update(labels[1:]))
        accumulator.update(labels)
    gc.collect()
    whole = accumulator.state_dict()
    restored = RankAccumulator(model, num_classes=C)
    restored.load_state_dict(saved)
    with restored:
        for _ in range(2):
            model(images)
            restored.update(labels)
    assert same(restored.state_dict(), whole)
    assert whole["counts"].tolist() == [20, 8, 8]


def test_lasting_taps_of_the_networks_of_the_zoo():
    """Nothing in them is unknown: only the tap before an in-place activation would have to be ranked at once."""
    from pyprune import models

    for name, options in (("vgg16_bn", {}), ("resnet20", {}), ("resnet50", {"num_classes": 10})):
        model = getattr(models, name)(**options).eval()
        accumulator = RankAccumulator(model)
        taps = {tap.node for tap in accumulator.taps.values()}
        assert lasting(model, graph.trace(model, "test"), taps) == taps, name


@pytest.mark.gpu
@pytest.mark.parametrize("known", [True, False])
def test_a_gpu_gives_the_same_sums_without_waiting(known):
    images, labels = inputs()
    model, device = chain().double(), torch.device("cuda")
    images = images.double()
    expected = RankAccumulator(model, num_classes=C)
    with expected:
        model(images)
        expected.update(labels)
    model.to(device)
    found = RankAccumulator(model, num_classes=C)
    on_device = images.to(device)
    with found:
        for mode in ("default", "error"):  # the first pass may load kernels and libraries
            torch.cuda.set_sync_debug_mode(mode)
            try:
                if known:
                    found._expect(labels.numpy())
                model(on_device)
                found.update(labels)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    state = {name: value if "shape" in name else value // 2 for name, value in found.state_dict().items()}
    assert same(state, expected.state_dict())


@pytest.mark.gpu
def test_a_gpu_finds_what_is_not_finite():
    images, labels = inputs()
    images[2, 0, 1, 1] = float("nan")
    model = chain().cuda()
    accumulator = RankAccumulator(model, num_classes=C)
    with accumulator:
        model(images.cuda())
        accumulator.update(labels)
    with pytest.raises(ValueError, match="maps must be finite; 8 hold NaN or infinity"):
        accumulator.ranks()


@pytest.mark.gpu
def test_memory_on_a_gpu_stays_within_the_budget():
    """Ten passes ahead of the device hold no more maps than one pass and the budget."""
    model = chain((32,) * 6).cuda()
    images, labels = torch.randn(256, 1, 32, 32, device="cuda"), torch.arange(256) % C
    accumulator = RankAccumulator(model, num_classes=C)
    with torch.no_grad():
        model(images)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        model(images)
    plain = torch.cuda.max_memory_allocated()
    with accumulator:
        for _ in range(10):
            model(images)
            accumulator.update(labels)
    assert torch.cuda.max_memory_allocated() <= plain + overlap.DEVICE_BYTES + (64 << 20)
