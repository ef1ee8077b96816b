"""Ranking maps while the forward pass goes on: helper threads on the CPU, a stream of its own on a GPU.

Both queues hold maps that nobody writes to (see :mod:`pyprune.aliases`), never more bytes than a fixed budget, and
write integers to places fixed beforehand, so that no result depends on timing.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pyprune import machine
from pyprune.ops import _library  # noqa: F401  # now: a child forked while a helper imports it could never do so
from pyprune.ops.rank import choose_rank, matrix_rank
from pyprune.types import IntArray

Ranks = npt.NDArray[np.int32]

HOST_BYTES = 16 << 20
"""Maps that may wait for helpers, in bytes: what a last cache holds, so that they are still there when ranked. Between
4 and 128 MiB no difference stood out from the scatter of a shared machine, nor did page faults."""

PIECE_BYTES = 1 << 20
"""What a helper takes at a time: about a millisecond of work."""

GROUP_BYTES = 32 << 20
"""Maps that one launch on a GPU gathers, in bytes."""

DEVICE_BYTES = 256 << 20
"""Maps that a GPU may be holding for ranking, in bytes."""


def choose_helpers(threads: int, cpus: int) -> int:
    """Return how many threads rank beside a forward pass of ``threads`` threads on ``cpus`` usable CPUs.

    Only CPUs that the forward pass leaves idle help: ResNet-56 then ranks in 1.04 forward passes, not 1.28. On two CPUs
    with two threads for torch a helper takes its time from the forward pass, whose threads wait for each other by
    spinning, and was not seen to gain anything. Who gives torch one thread has asked for one thread.
    """
    return max(0, min(threads - 1, cpus - threads))


def _changed(where: str) -> ValueError:
    return ValueError(
        f"RankAccumulator: {where} were changed in place before they were ranked, by something that the traced graph "
        "does not show. Register hooks before the `with` block, or return a copy from what changes them."
    )


def _version(maps: torch.Tensor) -> int | None:
    return None if maps.is_inference() else maps._version  # tensors of inference mode count no versions


@dataclass(eq=False)
class _Tap:
    """The maps of one tap that wait."""

    where: str
    maps: torch.Tensor | None  # [N, F, H, W], until ranked
    ranks: Ranks  # [N, F], where the ranks go
    left: int  # pieces not yet ranked
    version: int | None = None
    failed: bool = False


class HostQueue:
    """Maps in host memory that helper threads rank.

    Use from one thread. Helpers are started by the first map and joined by :meth:`close`; a forked child starts its
    own. An exception is raised by :meth:`finish`, for the first tap that has one, as ranking it at once would raise it.
    """

    def __init__(self, helpers: int, budget: int = HOST_BYTES) -> None:
        self._helpers = helpers
        self._budget = budget
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._news = threading.Condition()
        self._pieces: deque[tuple[_Tap, slice, slice]] = deque()
        self._taps: list[_Tap] = []
        self._bytes = 0  # of maps not yet ranked
        self._busy = 0  # helpers with a piece
        self._closed = False
        self._threads: list[threading.Thread] = []

    def takes(self, maps: torch.Tensor) -> bool:
        """Say whether ``maps`` may wait: some of several pieces, and within the budget."""
        return self._helpers > 0 and 0 < maps.nbytes <= self._budget

    def put(self, where: str, maps: torch.Tensor, ranks: Ranks) -> None:
        """Let ``maps`` [N, F, H, W] be ranked into ``ranks`` [N, F]; rank others until there is room for them."""
        if self._pid != os.getpid() or any(tap.failed for tap in self._taps):
            self.finish()  # what failed keeps its maps
        while self._bytes + maps.nbytes > self._budget and self._rank_one():
            pass
        with self._news:
            self._news.wait_for(lambda: self._bytes + maps.nbytes <= self._budget)
        cuts = _cut(maps)
        tap = _Tap(where, maps, ranks, len(cuts), _version(maps))
        self._taps.append(tap)
        with self._news:
            self._bytes += maps.nbytes
            self._pieces.extend((tap, *cut) for cut in cuts)
            self._news.notify_all()
        while len(self._threads) < self._helpers:
            self._threads.append(threading.Thread(target=self._help, name="pyprune rank", daemon=True))
            self._threads[-1].start()

    def finish(self) -> None:
        """Wait until every map is ranked, helping.

        Raises
        ------
        ValueError
            If a map is not finite, or was changed while it waited.
        """
        if self._pid != os.getpid():
            taps = self._taps  # in a forked child, where neither the helpers nor what they held exist
            self._reset()
        else:
            while self._rank_one():
                pass
            with self._news:
                self._news.wait_for(lambda: not self._busy)
                taps, self._taps = self._taps, []
        for tap in taps:
            if tap.maps is not None:
                if _version(tap.maps) != tap.version:
                    raise _changed(tap.where)
                tap.ranks[...] = rank_at_once(tap.where, tap.maps)

    def abandon(self) -> None:
        """Forget what waits; on return no helper writes any more."""
        if self._pid != os.getpid():
            return self._reset()
        with self._news:
            self._pieces.clear()
            self._news.wait_for(lambda: not self._busy)
            self._taps, self._bytes = [], 0
        return None

    def close(self) -> None:
        """Forget what waits and end the helpers."""
        self.abandon()
        with self._news:
            self._closed = True
            self._news.notify_all()
        for thread in self._threads:
            thread.join()
        self._reset()

    def _rank_one(self) -> bool:
        """Rank one piece, if one waits."""
        with self._news:
            piece = self._pieces.popleft() if self._pieces else None
        if piece is not None:
            self._rank(*piece)
        return piece is not None

    def _help(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._pieces or self._closed)
                if self._closed:
                    return
                piece = self._pieces.popleft()
                self._busy += 1
            self._rank(*piece)
            with self._news:
                self._busy -= 1
                self._news.notify_all()
            del piece

    def _rank(self, tap: _Tap, images: slice, filters: slice) -> None:
        maps: Any = tap.maps
        failed, size = True, maps.nbytes
        # What goes wrong here goes wrong again in finish(), which ranks the tap once more.
        with suppress(Exception), machine.limited_threads(1):
            found = matrix_rank(maps[images, filters], check=False).numpy()
            tap.ranks[images, filters] = found
            failed = bool((found < 0).any()) or _version(maps) != tap.version
        del maps  # or finish() might return while this thread still keeps them alive
        with self._news:
            tap.failed |= failed
            tap.left -= 1
            if not tap.left:
                self._bytes -= size
                tap.maps = tap.maps if tap.failed else None
                self._news.notify_all()


def _cut(maps: torch.Tensor) -> list[tuple[slice, slice]]:
    """Cut ``maps`` [N, F, H, W] into pieces of about PIECE_BYTES, along the images or else along the filters."""
    N, F = maps.shape[:2]
    pieces = math.ceil(maps.nbytes / PIECE_BYTES)
    length = N if pieces <= N else F
    step = math.ceil(length / min(pieces, length))
    cuts = [slice(i, i + step) for i in range(0, length, step)]
    return [(cut, slice(None)) if pieces <= N else (slice(None), cut) for cut in cuts]


def rank_at_once(where: str, maps: torch.Tensor) -> Ranks:  # [N, F, H, W] -> [N, F]
    """Return the ranks of ``maps`` in host memory.

    Raises
    ------
    ValueError
        If they cannot be ranked.
    """
    with refused(where):
        return matrix_rank(maps).cpu().numpy()  # type: ignore[no-any-return]


@contextmanager
def refused(where: str) -> Iterator[None]:
    """Let errors of :func:`pyprune.matrix_rank` name the maps."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"RankAccumulator: {where} cannot be ranked. {error}") from None


class Gpu(Protocol):
    """What :class:`DeviceQueue` needs of a device with streams; all but :meth:`fetch` return at once."""

    def move(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Return a copy of ``array`` for use on the ranking stream."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return zeros for use on the ranking stream."""

    def submit(self, work: Callable[[Sequence[torch.Tensor]], None], maps: Sequence[torch.Tensor]) -> Any:
        """Do ``work(maps)`` on the ranking stream once the caller's stream has made ``maps``; return its event."""

    def hold(self, event: Any) -> None:
        """Let the caller's stream wait for ``event``."""

    def is_over(self, event: Any) -> bool:
        """Say whether ``event`` has happened."""

    def fetch(self, read: Callable[[], torch.Tensor]) -> npt.NDArray[np.int64]:
        """Return ``read()``, done on the ranking stream after all that was submitted, in host memory."""


class CudaStream(Gpu):
    """One CUDA device and a stream of its own for ranking."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def move(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Return a copy of ``array`` for use on the ranking stream."""
        with torch.cuda.stream(self._side):
            # Pinned, because the host waits for copies from pageable memory.
            return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return zeros for use on the ranking stream."""
        with torch.cuda.stream(self._side):
            return torch.zeros(*shape, dtype=dtype, device=self._device)

    def submit(self, work: Callable[[Sequence[torch.Tensor]], None], maps: Sequence[torch.Tensor]) -> torch.cuda.Event:
        """Do ``work(maps)`` on the ranking stream once the caller's stream has made ``maps``; return its event."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        for each in maps:
            each.record_stream(current)  # does nothing unless they were made on a third stream
        with torch.cuda.stream(self._side):
            work(maps)
            return self._side.record_event()  # type: ignore[no-any-return]

    def hold(self, event: torch.cuda.Event) -> None:
        """Let the caller's stream wait for ``event``."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def is_over(self, event: torch.cuda.Event) -> bool:
        """Say whether ``event`` has happened."""
        return bool(event.query())  # type: ignore[no-untyped-call]

    def fetch(self, read: Callable[[], torch.Tensor]) -> npt.NDArray[np.int64]:
        """Return ``read()``, done on the ranking stream after all that was submitted, in host memory."""
        with torch.cuda.stream(self._side):
            return read().cpu().numpy()


def own_stream(device: torch.device) -> Gpu | None:
    """Return a stream of its own for ranking on ``device``, if it has streams."""
    return CudaStream(device) if device.type == "cuda" else None


@dataclass(eq=False)
class _Group:
    """Taps of one launch; their columns follow each other. Once launched, maps may go when ``event`` is over."""

    slots: list[int] = field(default_factory=list)
    maps: list[torch.Tensor] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    columns: slice = field(default_factory=lambda: slice(0, 0))
    event: Any = None

    @property
    def size(self) -> int:
        return sum(maps.nbytes for maps in self.maps)

    def add(self, slot: int, maps: torch.Tensor, columns: slice) -> None:
        self.columns = slice(self.columns.start if self.maps else columns.start, columns.stop)
        self.slots.append(slot)
        self.maps.append(maps)
        self.versions.append(_version(maps))

    def changed(self) -> int | None:
        """Return the first slot whose maps were written to since."""
        found = zip(self.slots, self.maps, self.versions, strict=True)
        return next((slot for slot, maps, version in found if _version(maps) != version), None)


class DeviceQueue:
    """Maps on one GPU, ranked on a stream of its own; sums and counts of what is not finite stay on the device.

    The host never waits except in :meth:`collect`. Memory is bounded on the device's side: beyond ``budget`` bytes the
    caller's stream waits for the ranking stream, and only then are the maps given back, so that what the caller's
    stream allocates there comes after.

    Parameters
    ----------
    gpu
        The device.
    names
        For each tap ("slot"), how messages call its maps.
    filters
        Columns of the sums.
    """

    def __init__(
        self, gpu: Gpu, names: Sequence[str], filters: int, group: int = GROUP_BYTES, budget: int = DEVICE_BYTES
    ) -> None:
        self._gpu = gpu
        self._names = names
        self._group_bytes, self._budget = group, budget
        self._sums = gpu.zeros((0, filters), torch.int64)  # [C, filters of all taps]
        self._bad = gpu.zeros((len(names),), torch.int64)  # maps that are not finite, by first tap of the launch
        self._last: dict[int, int] = {}  # the last tap of the launch that began with a tap
        self._ranks: torch.Tensor | None = None  # int32 [N, filters of all taps], where labels come after the maps
        self._labels: torch.Tensor | None = None  # [N], where they come before
        self._group = _Group()
        self._held: deque[_Group] = deque()  # launched
        self.used = False  # since the last collect()

    @property
    def expecting(self) -> bool:
        """Whether the labels of the batch are known."""
        return self._labels is not None

    def expect(self, labels: IntArray, classes: int) -> None:
        """Say the labels of the batch to come: [N] in [0, classes)."""
        self._labels = self._gpu.move(labels)
        self._grow(classes)

    def put(self, slot: int, maps: torch.Tensor, columns: slice, lasting: bool) -> None:
        """Rank ``maps`` [N, F, H, W] of tap ``slot`` into ``columns``; unless ``lasting``, before what comes next."""
        self.used = True
        compiled = _is_compiled(maps)
        if self._group.maps and (self._group.columns.stop != columns.start or not compiled):
            self._launch()
        self._group.add(slot, maps, columns)
        if self._labels is None or not (compiled and lasting) or self._group.size >= self._group_bytes:
            self._launch()
        self._release(self._budget - self._group.size if lasting else -1)

    def finish(self) -> None:
        """Launch what waits: the forward pass is over.

        Raises
        ------
        ValueError
            If maps were changed in place meanwhile.
        """
        self._launch()
        for group in self._held:
            self._check(group)

    def count(self, labels: IntArray, classes: int) -> None:
        """Add the batch's ranks to the sums of its classes, unless :meth:`expect` did so."""
        self._grow(classes)
        if self._labels is None:
            moved, ranks = self._gpu.move(labels), self._ranks

            def work(_: Sequence[torch.Tensor]) -> None:
                self._sums.index_add_(0, moved, ranks.to(torch.int64))  # type: ignore[union-attr]  # put() made it
                ranks.zero_()  # type: ignore[union-attr]

            if ranks is not None:
                self._gpu.submit(work, ())
        self._labels = None

    def collect(self) -> IntArray:
        """Wait for the device; return the sums [C, filters] since the last time, and start anew.

        Raises
        ------
        ValueError
            If a map was not finite.
        """
        bad = self._gpu.fetch(lambda: self._bad)
        if bad.any():
            slot = int(np.flatnonzero(bad)[0])
            last = self._last.get(slot, slot)
            more = "" if last == slot else f", or of the taps up to {self._names[last]},"
            raise ValueError(
                f"RankAccumulator: {self._names[slot]}{more} cannot be ranked. matrix_rank: maps must be finite; "
                f"{bad[slot]} hold NaN or infinity. Find what makes them."
            )
        sums = self._gpu.fetch(lambda: self._sums)
        self._held.clear()
        zeroed = self._sums
        self._gpu.submit(lambda _: _do(zeroed.zero_()), ())
        self.used = False
        return sums

    def abandon(self) -> None:
        """Forget the batch; maps are given back once the caller's stream waits for their ranking."""
        self._group, self._labels, self._ranks = _Group(), None, None
        if self._held:
            self._gpu.hold(self._held[-1].event)  # and so for all before
        self._held.clear()

    def _launch(self) -> None:
        """Rank the group on the ranking stream."""
        group, self._group = self._group, _Group()
        if not group.maps:
            return
        columns, first, labels = group.columns, group.slots[0], self._labels
        self._last[first] = max(group.slots[-1], self._last.get(first, 0))
        if labels is None:
            shape = len(group.maps[0]), self._sums.shape[1]
            if self._ranks is None or self._ranks.shape != shape:
                self._ranks = self._gpu.zeros(shape, torch.int32)
        sums, ranks, bad = self._sums, self._ranks, self._bad[first : first + 1]

        def work(maps: Sequence[torch.Tensor]) -> None:
            if labels is not None:
                _add_ranks(maps, labels, sums[:, columns], bad)
            else:
                ranks[:, columns] = _finite_ranks(maps[0], bad)  # type: ignore[index]

        group.event = self._gpu.submit(work, group.maps)
        self._held.append(group)

    def _release(self, budget: int) -> None:
        """Give maps back, oldest first, that are ranked already or exceed ``budget`` bytes."""
        size = sum(held.size for held in self._held)
        while self._held:
            oldest = self._held[0]
            over = self._gpu.is_over(oldest.event)
            if not over and size <= budget:
                break
            if not over:
                self._gpu.hold(oldest.event)
            self._held.popleft()
            self._check(oldest)
            size -= oldest.size

    def _check(self, group: _Group) -> None:
        slot = group.changed()
        if slot is not None:
            raise _changed(self._names[slot])

    def _grow(self, classes: int) -> None:
        if classes <= len(self._sums):
            return
        old, new = self._sums, self._gpu.zeros((classes, self._sums.shape[1]), torch.int64)
        self._gpu.submit(lambda _: _do(new[: len(old)].copy_(old)), ())
        self._sums = new


def _do(_: torch.Tensor) -> None:
    """Drop a result, so that a lambda may be for its effect."""


def _is_compiled(maps: torch.Tensor) -> bool:
    return variant(maps).startswith("cuda_")


def variant(maps: torch.Tensor) -> str:
    """Return which variant of :func:`pyprune.matrix_rank` takes ``maps``."""
    name = str(maps.dtype).removeprefix("torch.")
    return choose_rank(maps.shape, name, maps.device.type, machine.this_machine(maps.device.index or 0))


def _finite_ranks(maps: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    """Return ranks int32 [N, F], 0 for maps that are not finite, which are counted in ``bad`` [1]."""
    ranks: torch.Tensor = matrix_rank(maps, check=False)
    bad += (ranks < 0).sum()
    return ranks.clamp_min(0)


def _add_ranks(maps: Sequence[torch.Tensor], labels: torch.Tensor, sums: torch.Tensor, bad: torch.Tensor) -> None:
    """Add the ranks of several taps, images by their ``labels`` [N], to ``sums`` [C, filters of these taps]."""
    if _is_compiled(maps[0]):
        from pyprune.ops import _cuda

        _cuda.rank_sums(maps, labels, sums, not_finite=bad)
        return
    ranks = torch.cat([_finite_ranks(each, bad) for each in maps], 1)
    sums.index_add_(0, labels, ranks.to(torch.int64))
