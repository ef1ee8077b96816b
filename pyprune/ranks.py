"""Class-conditional ranks of feature maps: what every filter tells about every class (thesis section 4.1)."""

from __future__ import annotations

import hashlib
import itertools
import operator
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from pyprune import files, graph, machine, overlap
from pyprune.aliases import lasting
from pyprune.datasets.labels import integer_labels
from pyprune.features import Layers, convolution_calls, find_taps, why_left_out
from pyprune.machine import keep_freed_memory
from pyprune.measure import Device, running
from pyprune.progress import bar
from pyprune.sampling import Sample, draw_sample
from pyprune.types import ClassRanks, IntArray

CHECKPOINT_SECONDS = 5.0
"""At most this much ranking is lost when a run is killed."""

MAX_GROWTH = 1 << 16
"""Labels from here on need an explicit ``num_classes``: one stray label must not allocate the memory."""

CHECKPOINT = "pyprune.ranking"


class RankAccumulator:
    """Rank the feature maps of a model while one's own loop runs it, and add the ranks up by class.

    Inside the ``with`` block ``model(x)`` returns what it returns otherwise, in eval mode and without gradients, and
    the maps at every tap are ranked: only ranks, int32 [N, F], are held until :meth:`update` adds them to int64
    sums. Ranking goes on beside the forward pass, on CPUs that torch's threads leave idle or on a stream of its own
    on a GPU, with bounded memory; maps that the model changes in place are ranked the moment they exist. In host
    memory no map outlives its forward pass. On a GPU nothing waits for the device until :meth:`ranks`,
    :meth:`state_dict` or :meth:`merge`, which is where maps that are not finite are found.

    The model is run node by node from its traced graph (so forward hooks of modules that contain others do not
    fire), or as it is, with hooks, where taps are named by hand. On leaving, ``forward`` and the training flags are
    what they were.

    Parameters
    ----------
    model
        The network.
    layers, taps
        Which convolutions are read, and where; see :func:`pyprune.features.find_taps`.
    num_classes
        Number of classes, C; ``None`` lets it grow with the labels seen.

    Attributes
    ----------
    taps : dict
        For each convolution where it is read, a :class:`pyprune.features.Tap`.
    left_out : dict
        Convolutions that are not read, and why.
    variants : set
        Which variants of :func:`pyprune.matrix_rank` ran.

    Raises
    ------
    ValueError, TypeError
        As :func:`pyprune.features.find_taps`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    >>> accumulator = RankAccumulator(model, num_classes=2)
    >>> with accumulator:
    ...     for images, labels in [(torch.ones(2, 1, 8, 8), torch.tensor([0, 1]))]:
    ...         y = model(images)
    ...         accumulator.update(labels)
    >>> accumulator.ranks().layers["0"].shape
    (4, 2)
    """

    def __init__(
        self, model: nn.Module, layers: Layers = None, taps: str = "activation", *, num_classes: int | None = None
    ) -> None:
        self._graph = None if isinstance(layers, Mapping) else graph.trace(model, "RankAccumulator")
        self.taps = find_taps(model, layers, taps, traced=self._graph)
        self.left_out = {} if self._graph is None or layers is not None else _left_out(model, self._graph, self.taps)
        self.num_classes = num_classes
        self._model = model
        convolutions = graph.convolutions(model)
        self._filters = {name: convolutions[name].out_channels for name in self.taps}
        self._layers_at: dict[str, list[str]] = {}  # several convolutions may share one tap
        for name, tap in self.taps.items():
            self._layers_at.setdefault(tap.node, []).append(name)
        order = self._order()
        ends = list(itertools.accumulate((self._filters[self._layers_at[node][0]] for node in order), initial=0))
        self._columns = {node: slice(*ends[i : i + 2]) for i, node in enumerate(order)}  # of each tap
        self._slots = {node: i for i, node in enumerate(self._columns)}
        self._counts = torch.zeros(num_classes or 0, dtype=torch.int64)
        self._sums = torch.zeros(num_classes or 0, ends[-1], dtype=torch.int64)  # [C, filters of all taps]
        # One buffer for all taps, kept from batch to batch: small tensors that outlive the maps between which they
        # were allocated would cut the freed memory into pieces too short for the next maps.
        self._ranks = np.zeros((0, ends[-1]), np.int32)  # [N, filters of all taps]
        self._images = 0  # N of the batch that waits
        self.variants: set[str] = set()
        self._shapes: dict[str, tuple[int, int]] = {}
        self._pending: set[str] = set()  # taps read since the last update
        self._in_host: set[str] = set()  # those of them whose ranks are in _ranks
        self._expected: IntArray | None = None  # the labels of the batch to come, where known
        self._lasting: set[str] = set()  # taps whose maps nothing changes
        self._host: overlap.HostQueue | None = None
        self._devices: dict[torch.device, overlap.DeviceQueue] = {}
        self._open: ExitStack | None = None

    def __enter__(self) -> RankAccumulator:
        if self._open is not None:
            raise ValueError("RankAccumulator: it reads this model already; leave the first `with` before the next.")
        keep_freed_memory()
        self._lasting = set() if self._graph is None else lasting(self._model, self._graph, self._layers_at)
        self._host = overlap.HostQueue(overlap.choose_helpers(torch.get_num_threads(), machine.cpus()))
        with ExitStack() as stack:
            stack.callback(self._host.close)
            stack.enter_context(_eval_mode(self._model))
            run = stack.enter_context(self._hooked()) if self._graph is None else self._interpreted(self._graph)
            stack.enter_context(_forward_replaced(self._model, self._guarded(run)))
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()
        forgotten = bool(self._pending)
        self._forget()
        if forgotten and kind is None:
            raise ValueError("RankAccumulator: the last batch was run and not counted; call update(labels) after it.")

    def update(self, labels: Any) -> None:
        """Add the ranks of the batch that the model ran last to the sums of its classes.

        Parameters
        ----------
        labels
            [N] class indices, one per image, in any mix: a tensor, an array or a list.

        Raises
        ------
        ValueError, TypeError
            If no batch is waiting, a tap was not reached, or the labels are not N whole numbers in
            [0, num_classes). The batch keeps waiting, so the right labels may follow.
        """
        if not self._pending:
            raise ValueError("RankAccumulator: update needs a batch; call model(x) inside the `with` block first.")
        missing = [names[0] for node, names in self._layers_at.items() if node not in self._pending]
        if missing:
            raise ValueError(f"RankAccumulator: the forward pass did not reach the tap of {missing[0]!r}.")
        given = self._check_labels(integer_labels("RankAccumulator", labels), self._images)
        index = torch.from_numpy(given)
        self._grow(int(index.max()) + 1 if len(index) else 0)
        for queue in self._devices.values():
            queue.count(given, len(self._counts))
        if self._in_host:
            self._sums.index_add_(0, index, torch.from_numpy(self._ranks).to(torch.int64))
        self._counts += torch.bincount(index, minlength=len(self._counts))
        self._expected, self._pending, self._in_host = None, set(), set()

    def _expect(self, labels: IntArray) -> None:
        """Say the labels of the batch to come, so that a GPU may add its ranks up as it finds them.

        The sums are of no use if that forward pass fails, so this is not for loops that go on then.
        """
        given = self._check_labels(labels, len(labels))
        self._grow(int(given.max()) + 1 if len(given) else 0)
        self._expected = given

    def _collect(self) -> None:
        """Wait for the devices, and add their sums to those in host memory."""
        for queue in self._devices.values():
            if queue.used:
                sums = torch.from_numpy(queue.collect())
                self._sums[: len(sums)] += sums

    def ranks(self, info: Mapping[str, Any] | None = None) -> ClassRanks:
        """Return the mean ranks so far, R [F, C] = sum / count; ``info`` is kept with them.

        Raises
        ------
        ValueError
            If a class has no image yet, or a map on a GPU was not finite.
        """
        self._collect()
        empty = torch.nonzero(self._counts == 0).flatten().tolist()
        if empty or not len(self._counts):
            which = f"class {empty[0]} has none" if empty else "nothing was counted"
            raise ValueError(
                f"RankAccumulator: needs an image of every class; {which}. Feed more, or lower num_classes."
            )
        notes = {name: tap.note for name, tap in self.taps.items() if tap.note}
        counts = self._counts.numpy()
        means = (self._sums.numpy() / counts[:, None]).T
        return ClassRanks(
            layers={name: means[self._columns[tap.node]] for name, tap in self.taps.items()},
            counts=counts,
            shapes={name: self._shapes[tap.node] for name, tap in self.taps.items()},
            taps={name: tap.node for name, tap in self.taps.items()},
            info={"notes": notes, "left_out": dict(self.left_out), **(info or {})},
        )

    def merge(self, other: RankAccumulator) -> None:
        """Add the sums of ``other``, which read other images of the same model at the same taps.

        Raises
        ------
        ValueError
            If taps, filters or map sizes differ, or either has a batch waiting.
        """
        if other._pending:
            raise ValueError("RankAccumulator: the other one has a batch waiting; call its update(labels) first.")
        self._add(other.state_dict())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return copies of the int64 sums [C, F], the images counted per class [C], and the maps' sizes (H, W)."""
        self._collect()
        sizes = {f"shape/{node}": torch.tensor(shape) for node, shape in self._shapes.items()}
        sums = {f"sums/{node}": self._sums[:, columns].clone() for node, columns in self._columns.items()}
        return {"counts": self._counts.clone(), **sizes, **sums}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace the sums by those of :meth:`state_dict`.

        Raises
        ------
        ValueError
            If they are of other taps, filters or classes, or a batch is waiting.
        """
        self._check_state(state)
        for queue in self._devices.values():
            queue.abandon()
        self._devices.clear()
        self._counts.zero_()
        self._sums.zero_()
        self._shapes = {}
        self._add(state)

    def _add(self, state: Mapping[str, torch.Tensor]) -> None:
        self._check_state(state)
        self._grow(len(state["counts"]))
        C = len(state["counts"])
        self._counts[:C] += state["counts"]
        for node, columns in self._columns.items():
            self._sums[:C, columns] += state[f"sums/{node}"]
            if f"shape/{node}" in state:
                self._check_shape(node, tuple(state[f"shape/{node}"].tolist()))

    def _check_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raise ``ValueError`` unless ``state`` can be added to this accumulator."""
        if self._pending:
            raise ValueError("RankAccumulator: a batch is waiting; call update(labels) first.")
        sums = {name.removeprefix("sums/"): tensor for name, tensor in state.items() if name.startswith("sums/")}
        C = len(state.get("counts", ()))
        same = "counts" in state and sums.keys() == self._columns.keys()
        same = same and all(sums[node].shape == (C, at.stop - at.start) for node, at in self._columns.items())
        if not same or (self.num_classes is not None and self.num_classes < C):
            raise ValueError(
                "RankAccumulator: the sums are of other taps, filters or classes; rank the same model alike."
            )

    def _check_labels(self, labels: IntArray, images: int) -> IntArray:
        if len(labels) != images:
            raise ValueError(
                f"RankAccumulator: needs one label per image; got {len(labels)} labels for {images} images."
            )
        limit = MAX_GROWTH if self.num_classes is None else self.num_classes
        bad = labels[(labels < 0) | (labels >= limit)]
        if len(bad):
            hint = "Pass num_classes." if self.num_classes is None else "Correct the labels or num_classes."
            raise ValueError(f"RankAccumulator: labels must be in [0, {limit}); got {bad[0]}. {hint}")
        return labels

    def _grow(self, classes: int) -> None:
        more = max(0, classes - len(self._counts))
        self._counts = nn.functional.pad(self._counts, (0, more))
        self._sums = nn.functional.pad(self._sums, (0, 0, 0, more))

    def _guarded(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a ``forward`` that runs ``run`` without gradients, once per update, and forgets what failed."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._pending:
                raise ValueError("RankAccumulator: the model ran twice; call update(labels) after each forward pass.")
            try:
                with torch.no_grad():
                    result = run(*args, **kwargs)
                    self._finish()
                return result
            except BaseException:
                self._forget()
                raise

        return forward

    def _finish(self) -> None:
        """Rank what waits; on a GPU, only launch it."""
        if self._host is not None:
            self._host.finish()
        for queue in self._devices.values():
            queue.finish()
        if self._in_host:
            for node in self._pending - self._in_host:
                self._ranks[:, self._columns[node]] = 0  # the rest of the network may have moved to a GPU

    def _forget(self) -> None:
        """Forget the batch that waits."""
        if self._host is not None:
            self._host.abandon()
        for queue in self._devices.values():
            queue.abandon()
        self._ranks = self._ranks[:0]
        self._expected, self._pending, self._in_host = None, set(), set()

    def _order(self) -> list[str]:
        """Return the taps in the order in which they run, as far as that is known."""
        if self._graph is None:
            return list(self._layers_at)
        return [node.name for node in self._graph.nodes if node.name in self._layers_at]

    def _interpreted(self, traced: fx.Graph) -> Callable[..., Any]:
        """Return a ``forward`` that runs the traced graph node by node and reads the taps on the way."""
        run = _Interpreter(self._model, traced, self._layers_at, self._read)
        return lambda *args, **kwargs: run(_bound(traced, args, kwargs))

    @contextmanager
    def _hooked(self) -> Iterator[Callable[..., Any]]:
        """Read the taps named by hand through forward hooks; yield the model's own ``forward``."""
        modules = dict(self._model.named_modules())
        with ExitStack() as hooks:
            for node in self._layers_at:

                def hook(_module: nn.Module, _inputs: Any, maps: Any, node: str = node) -> None:
                    self._read(node, maps)

                hooks.callback(modules[node].register_forward_hook(hook).remove)
            yield self._model.forward

    def _read(self, node: str, maps: Any) -> None:
        """Rank the maps at ``node``, [N, F, H, W], and keep the ranks, [N, F], until the labels come."""
        names = self._layers_at[node]
        where = f"the maps of {names[0]!r} (read at {node!r})"
        if not isinstance(maps, torch.Tensor) or maps.ndim != 4:
            got = list(maps.shape) if isinstance(maps, torch.Tensor) else type(maps).__name__
            raise ValueError(f"RankAccumulator: {where} must be [N, F, H, W]; got {got}. Read another module.")
        for name in names:
            if maps.shape[1] != self._filters[name]:
                raise ValueError(
                    f"RankAccumulator: the maps of {name!r} (read at {node!r}) must be one per filter, "
                    f"{self._filters[name]}; got {maps.shape[1]}. Read another module."
                )
        if node in self._pending:
            raise ValueError(f"RankAccumulator: {node!r} runs more than once in a forward pass; name another module.")
        self._check_shape(node, (maps.shape[2], maps.shape[3]))
        if self._pending and len(maps) != self._images:
            raise ValueError(
                f"RankAccumulator: {where} must be of {self._images} images, as at the taps before; "
                f"got {len(maps)}. Leave the layer out."
            )
        self._images = len(maps)
        if self._expected is not None:
            self._check_labels(self._expected, self._images)
        with overlap.refused(where):
            self.variants.add(overlap.variant(maps))
        self._pending.add(node)
        queue = self._queue_on(maps.device)
        if queue is None or not maps.is_floating_point():  # which matrix_rank refuses
            self._rank_in_host(node, where, maps)
        else:
            queue.put(self._slots[node], maps, self._columns[node], node in self._lasting)

    def _rank_in_host(self, node: str, where: str, maps: torch.Tensor) -> None:
        if len(self._ranks) != len(maps):
            self._ranks = np.zeros((len(maps), self._ranks.shape[1]), np.int32)
        self._in_host.add(node)
        ranks = self._ranks[:, self._columns[node]]
        if self._host is not None and node in self._lasting and self._host.takes(maps):
            self._host.put(where, maps, ranks)
        else:
            ranks[...] = overlap.rank_at_once(where, maps)

    def _queue_on(self, device: torch.device) -> overlap.DeviceQueue | None:
        """Return the queue of a device that has streams."""
        if device not in self._devices:
            gpu = overlap.own_stream(device)
            if gpu is None:
                return None
            names = [f"the maps of {self._layers_at[node][0]!r} (read at {node!r})" for node in self._columns]
            self._devices[device] = overlap.DeviceQueue(gpu, names, self._sums.shape[1])
        queue = self._devices[device]
        if self._expected is not None and not queue.expecting:
            queue.expect(self._expected, len(self._counts))
        return queue

    def _check_shape(self, node: str, shape: tuple[int, ...]) -> None:
        H, W = shape
        known = self._shapes.setdefault(node, (H, W))
        if known != (H, W):
            raise ValueError(
                f"RankAccumulator: the maps at {node!r} were {known[0]}x{known[1]} and are now {H}x{W}. "
                "Feed images of one size."
            )


class _Interpreter:
    """Run a traced graph; hand the value of each node in ``watched`` to ``read`` as soon as it exists.

    ``fx.Interpreter`` does the same at ten times the cost of a node, which small networks feel.
    """

    def __init__(
        self, model: nn.Module, traced: fx.Graph, watched: Container[str], read: Callable[[str, Any], None]
    ) -> None:
        self._read = read
        modules = dict(model.named_modules(remove_duplicate=False))
        last_use = {used: node for node in traced.nodes for used in node.all_input_nodes}
        self._steps = [
            (
                node, _as_function(model, modules, node), node.name in watched,
                [used for used in (node, *node.all_input_nodes) if last_use.get(used, node) is node],
            )
            for node in traced.nodes if node.op not in ("placeholder", "output")
        ]  # fmt: skip
        self._output = next(node for node in traced.nodes if node.op == "output")

    def __call__(self, env: dict[fx.Node, Any]) -> Any:
        for node, function, is_watched, done in self._steps:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = function(*args, **kwargs)
            del args, kwargs  # or the next operation would run while they still hold this one's inputs
            if is_watched:
                self._read(node.name, env[node])
            for used in done:
                del env[used]
        return fx.node.map_arg(self._output.args[0], env.__getitem__)


def _as_function(model: nn.Module, modules: Mapping[str, nn.Module], node: fx.Node) -> Callable[..., Any]:
    """Return what ``node`` calls."""
    if node.op == "call_module":
        return modules[str(node.target)]
    if node.op == "call_method":
        return lambda owner, *args, **kwargs: getattr(owner, str(node.target))(*args, **kwargs)
    if node.op == "get_attr":
        return lambda: operator.attrgetter(str(node.target))(model)
    return node.target  # type: ignore[return-value]  # a function


def _bound(traced: fx.Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[fx.Node, Any]:
    """Return the value of each input of the graph, given by position or by name or left at its default."""
    given, named = list(args), dict(kwargs)
    values: dict[fx.Node, Any] = {}
    for node in traced.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name.startswith("*"):
            values[node], given, named = (named, given, {}) if name.startswith("**") else (given, [], named)
        elif given:
            values[node] = given.pop(0)
        elif name in named or node.args:
            values[node] = named.pop(name) if name in named else node.args[0]
        else:
            raise TypeError(f"RankAccumulator: the model's forward needs {name!r}; pass it.")
    if given or named:
        extra = ", ".join(named) or f"{len(given)} more by position"
        raise TypeError(f"RankAccumulator: the model's forward has no such input, or not twice: {extra}.")
    return values


def _left_out(model: nn.Module, traced: fx.Graph, taps: Container[str]) -> dict[str, str]:
    """Say for each 2-d convolution without a tap why it has none."""
    calls = convolution_calls(model, traced)
    return {name: why_left_out(nodes) for name, nodes in calls.items() if name not in taps}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def _forward_replaced(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give this one instance another ``forward``."""
    own = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def rank_filters(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_classes: int | None = None,
    images_per_class: int = 50,
    layers: Layers = None,
    taps: str = "activation",
    device: Device = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> ClassRanks:
    """Rank the feature maps of every filter on a balanced sample of images, in one pass (thesis algorithm 1).

    R[f, c] is the mean numerical rank of filter f's map over the sampled images of class c. The sample is cut into
    fixed micro-batches of the loader's batch size, recorded in ``info``: the same micro-batches on the same hardware,
    libraries and number of threads give the same bits, in whatever order and after whatever interruption.

    Parameters
    ----------
    model
        A trained network of images [N, C, H, W]; it is not changed.
    loader
        A ``DataLoader`` over a data set with a length: a balanced sample is drawn from it with ``seed``, in its
        batch size and with its ``collate_fn``. Labels come from ``dataset.targets`` or ``.labels``, a
        ``TensorDataset``'s second tensor, or else from reading every item once. Or any iterable of (images, labels)
        batches: the first images of each class are taken, cut anew to the length of the first batch. The data
        should not be augmented.
    num_classes
        Number of classes, C; ``None`` for the largest label plus one.
    images_per_class
        Images per class; 50 as in HRank, whose ranks no longer change from there (use 10 for ImageNet).
    layers, taps
        Which convolutions are read, and where; see :func:`pyprune.features.find_taps`.
    device
        Where to compute; by default where the model's parameters are. The model is moved there and back.
    seed
        Of the sample.
    checkpoint
        A file that keeps the sums of a run under way, written durably every few seconds. The same call continues
        from it and ends with the same bits; it is removed when the ranks are complete.
    progress
        Whether to show a progress bar.

    Returns
    -------
    ClassRanks
        R [F, C] float64 for each convolution. ``info`` holds seed, images_per_class, micro_batch, images, sample (a
        SHA-256 of the images' positions and labels), variants, threads, device and torch version.

    Raises
    ------
    ValueError
        If a class has too few images, a label is out of range, maps are not finite, the model cannot be traced, the
        checkpoint is of another run, or as :class:`RankAccumulator` says.
    TypeError
        If the loader does not yield (images, labels).
    """
    accumulator = RankAccumulator(model, layers, taps, num_classes=num_classes)
    sample = draw_sample(loader, images_per_class, num_classes, seed, progress)
    with running(model, device) as place:
        settings = {
            "seed": seed, "images_per_class": images_per_class, "num_classes": num_classes, "taps": taps,
            "threads": torch.get_num_threads(), "device": place.type, "torch": str(torch.__version__),
        }  # fmt: skip
        progressed = None if checkpoint is None else _Checkpoint(checkpoint, model, accumulator, settings)
        digest = _run(model, accumulator, sample, place, progressed, progress)
    ranks = accumulator.ranks(
        {
            **settings, "num_classes": len(accumulator.state_dict()["counts"]), "micro_batch": sample.micro_batch,
            "sample": digest, "variants": sorted(accumulator.variants),
        }
    )  # fmt: skip
    if progressed is not None:
        progressed.path.unlink(missing_ok=True)
    return ranks


def _run(
    model: nn.Module, accumulator: RankAccumulator, sample: Sample, place: torch.device,
    checkpoint: _Checkpoint | None, progress: bool,
) -> str:  # fmt: skip
    """Rank every micro-batch that the checkpoint does not hold; return the sample's SHA-256."""
    done, prefix = checkpoint.resume(sample) if checkpoint else (0, "")
    digest = hashlib.sha256()
    count = 0
    with accumulator, bar("Ranking", sample.images, progress) as advance:
        for part in sample.batches(skip=done):
            count += 1
            digest.update(part.ids.astype("<i8").tobytes() + part.labels.astype("<i8").tobytes())
            if part.images is not None:
                accumulator._expect(part.labels)
                model(part.images.to(place, non_blocking=True))
                accumulator.update(part.labels)
                if checkpoint:
                    checkpoint.save_if_due(count, digest.hexdigest(), sample)
            elif count == done and digest.hexdigest() != prefix:
                raise _other_images()
            advance(len(part.ids))
    if count < done:
        raise _other_images()
    return digest.hexdigest()


def _other_images() -> ValueError:
    return ValueError(
        "rank_filters: the checkpoint is of other images: the loader now yields others, or in another order. "
        "Use the same loader, or delete the checkpoint to start again."
    )


class _Checkpoint:
    """The sums of a run under way, in a file that knows which run they belong to."""

    def __init__(
        self, path: str | os.PathLike[str], model: nn.Module, accumulator: RankAccumulator, settings: Mapping[str, Any]
    ) -> None:
        self.path = Path(path)
        files.make_folder("rank_filters", self.path.parent)
        read_at = {name: tap.node for name, tap in accumulator.taps.items()}
        self._accumulator = accumulator
        self._run = {**settings, "weights": files.fingerprint(model.state_dict()), "read at": read_at}
        self._saved = time.monotonic()

    def resume(self, sample: Sample) -> tuple[int, str]:
        """Load the sums; return how many micro-batches they hold and the SHA-256 of these."""
        if not self.path.exists():
            return 0, ""
        who = "rank_filters"
        tensors, about = files.read_described(who, self.path, CHECKPOINT, 1)
        run = about.get("run")
        other = [name for name, value in self._run.items() if not isinstance(run, dict) or run.get(name) != value]
        if sample.micro_batch and about.get("micro_batch") != sample.micro_batch:
            other.append("micro_batch")
        if other:
            raise ValueError(
                f"{who}: the checkpoint {self.path} is of another run: {', '.join(other)} differ. "
                "Give what it was started with, or delete it to start again."
            )
        self._accumulator.load_state_dict(tensors)
        return int(about.get("done", 0)), str(about.get("prefix"))

    def save_if_due(self, done: int, prefix: str, sample: Sample) -> None:
        """Write the sums if the last time is long enough ago."""
        if time.monotonic() - self._saved < CHECKPOINT_SECONDS:
            return
        about = {"run": self._run, "done": done, "prefix": prefix, "micro_batch": sample.micro_batch}
        files.write_described(self.path, self._accumulator.state_dict(), CHECKPOINT, 1, about)
        self._saved = time.monotonic()
