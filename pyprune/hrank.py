"""What people bring along from HRank: rate strings, rank files, and checkpoints whose filters are zero."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pyprune import files, graph
from pyprune.types import ClassRanks, FilterWhy, FloatArray, LayerWhy, Plan

MOST_RATES = 10_000
"""Longest list that a rate string may stand for; no network has so many convolutions."""

_MAX_RANK_FILE = 1 << 20
_TOKEN = re.compile(r"\s*(?:(?P<number>\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)|(?P<sign>[][()+*,]))")
_FILE = re.compile(r"rank_conv(?P<number>[1-9]\d{0,4})(?:_Class_(?P<label>0|[1-9]\d{0,4}))?\.npy")

_VGG = re.compile(r"features\.\w+")
_CIFAR = re.compile(r"conv1|layer[1-3]\.\d+\.conv[12]")
_BOTTLENECK = re.compile(r"conv1|layer[1-4]\.\d+\.(conv[123]|downsample\.0)")


def parse_rates(text: str) -> list[float]:
    """Return the rates that a string like ``"[0.95]+[0.5]*6+[0.9]*4"`` stands for; nothing is evaluated.

    Lists of numbers are joined by ``+`` and repeated by ``*``, on either side; parentheses group.

    Parameters
    ----------
    text
        Rates are shares of filters that go, in [0, 1).

    Raises
    ------
    ValueError
        If it cannot be read, with the place where, or a rate is out of range.
    TypeError
        If ``text`` is no string.

    Examples
    --------
    >>> parse_rates("[0.]+[0.18]*2+([0.1, 0.2]+[0.3])*2")
    [0.0, 0.18, 0.18, 0.1, 0.2, 0.3, 0.1, 0.2, 0.3]
    """
    if not isinstance(text, str):
        raise TypeError(f"parse_rates: needs a string such as '[0.5]*6+[0.9]*4'; got {type(text).__name__}.")
    parser = _Parser(text)
    rates = parser.sum(depth=0)
    if parser.word:
        parser.fail("the end, '+' or '*'")
    return rates


class _Parser:
    """One pass over a rate string by recursive descent; ``word`` is the next one, empty at the end."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.word = ""
        self.start = self.end = 0
        self.advance()

    def advance(self) -> None:
        found = _TOKEN.match(self.text, self.end)
        rest = self.text[self.end :].lstrip()
        self.start = len(self.text) - len(rest)
        if found is None:
            self.word = rest[:1]
            if rest:
                self.fail("a number or one of [ ] ( ) + * ,")
            return
        self.end = found.end()
        self.word = self.text[self.start : self.end]

    def fail(self, wanted: str) -> None:
        got = repr(self.word) if self.word else "the end"
        shown = self.text if len(self.text) <= 120 else self.text[:117] + "..."
        raise ValueError(
            f"parse_rates: needs {wanted} at character {self.start + 1} of {shown!r}; got {got}. "
            "Write rates like [0.95]+[0.5]*6."
        )

    def take(self, sign: str, wanted: str) -> None:
        if self.word != sign:
            self.fail(wanted)
        self.advance()

    def sum(self, depth: int) -> list[float]:
        rates = self.product(depth)
        while self.word == "+":
            self.advance()
            rates = self.repeated(rates + self.product(depth), 1)
        return rates

    def product(self, depth: int) -> list[float]:
        times = 1
        if self.word.isdecimal():
            times = self.count()
            self.take("*", "'*' after a count")
        rates = self.repeated(self.factor(depth), times)
        while self.word == "*":
            self.advance()
            rates = self.repeated(rates, self.count())
        return rates

    def repeated(self, rates: list[float], times: int) -> list[float]:
        if len(rates) * times > MOST_RATES:
            self.fail(f"at most {MOST_RATES} rates")
        return rates * times

    def count(self) -> int:
        if not self.word.isdecimal() or len(self.word) > 6:
            self.fail("a whole number of repetitions")
        times = int(self.word)
        self.advance()
        return times

    def factor(self, depth: int) -> list[float]:
        if self.word == "(" and depth < 20:
            self.advance()
            rates = self.sum(depth + 1)
            self.take(")", "')', '+' or '*'")
            return rates
        self.take("[", "a list such as [0.5]")
        rates = [self.rate()]
        while self.word == ",":
            self.advance()
            rates.append(self.rate())
        self.take("]", "']' or ','")
        return rates

    def rate(self) -> float:
        if not self.word or self.word in "[]()+*,":
            self.fail("a rate")
        if not 0 <= float(self.word) < 1:
            self.fail("a rate in [0, 1)")
        rate = float(self.word)
        self.advance()
        return rate


def rates_for(model: nn.Module, rates: str | Sequence[float]) -> dict[str, float]:
    """Return the rate of each convolution that a list in HRank's order stands for, with HRank's own rounding.

    Three layouts are told apart by the model and the number of rates:

    - *one a convolution*, in order of definition, as HRank's masks take them: 13 for VGG-16, 55 for ResNet-56, 109
      for ResNet-110, 53 for ResNet-50; and so for any other network. Of F filters int(rate F) go.
    - *12 for VGG-16*: as above for the first twelve convolutions, all that HRank has ranks of; the last keeps all.
      int(F (1 - rate)) stay.
    - *streams and blocks*, as HRank's later code takes them: the stem; the residual stream of each stage but the last,
      which keeps all; then each block's inner convolutions. 30 for ResNet-56 (1 + 2 + 27), 57 for ResNet-110, 20 for
      ResNet-50. A stream's rate goes to every convolution that writes into it. int(F (1 - rate)) stay.

    At least one filter always stays. Each rate that is returned is the exact share that goes, so
    ``select(model, "hrank", rates=...)`` keeps just these numbers.

    Parameters
    ----------
    model
        The network.
    rates
        A string for :func:`parse_rates`, or numbers in [0, 1).

    Raises
    ------
    ValueError
        If the number of rates fits no layout of the model, or a rate is out of range.
    TypeError
        If ``rates`` holds something other than numbers.
    """
    given = parse_rates(rates) if isinstance(rates, str) else _check_rates(rates)
    layers = _convolutions(model)
    names = list(layers)
    if len(given) == len(names):
        return {name: _share(layers[name], given[i], _masked) for i, name in enumerate(names)}
    later = _later_layout(names, given)
    if later is None:
        wanted = " or ".join(str(count) for count in _counts(names))
        raise ValueError(
            f"rates_for: {type(model).__name__} has {len(names)} convolutions and needs {wanted} rates; got "
            f"{len(given)}. Give one for each convolution, in order."
        )
    return {name: _share(layers[name], later[name], _narrowed) for name in names}


def _check_rates(rates: Sequence[float]) -> list[float]:
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, int | float | np.integer | np.floating):
            raise TypeError(f"rates_for: rates must be numbers in [0, 1); got {type(rate).__name__}.")
        if not 0 <= rate < 1:
            raise ValueError(f"rates_for: rates must be in [0, 1); got {rate}.")
    return [float(rate) for rate in rates]


def _masked(filters: int, rate: float) -> int:
    """Return how many filters stay in HRank's masks."""
    return filters - int(rate * filters)


def _narrowed(filters: int, rate: float) -> int:
    """Return how wide a layer is in HRank's later code."""
    return int(filters * (1 - rate))


def _share(layer: nn.Conv2d, rate: float, kept: Callable[[int, float], int]) -> float:
    return 1 - max(1, kept(layer.out_channels, rate)) / layer.out_channels


def _convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: layer for name, layer in graph.convolutions(model).items() if isinstance(layer, nn.Conv2d)}


def _all_match(pattern: re.Pattern[str], names: Sequence[str]) -> bool:
    return len(names) > 0 and all(pattern.fullmatch(name) for name in names)


def _is_vgg16(names: Sequence[str]) -> bool:
    return len(names) == 13 and _all_match(_VGG, names)


def _stages(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the blocks of each stage of a residual network with the usual names; nothing for another."""
    if not (_all_match(_CIFAR, names) or _all_match(_BOTTLENECK, names)):
        return {}
    stages: dict[str, list[str]] = {}
    for name in names[1:]:
        stage, k, *_ = name.split(".")
        stages.setdefault(stage, [])
        if f"{stage}.{k}" not in stages[stage]:
            stages[stage].append(f"{stage}.{k}")
    return stages


def _counts(names: Sequence[str]) -> list[int]:
    """Return the numbers of rates that fit a network with these convolutions."""
    stages = _stages(names)
    later = [12] if _is_vgg16(names) else [len(stages) + sum(map(len, stages.values()))] if stages else []
    return [len(names), *later]


def _later_layout(names: Sequence[str], given: Sequence[float]) -> dict[str, float] | None:
    """Return the rate of each convolution in the layouts of HRank's later code; ``None`` if the number fits neither."""
    if len(given) not in _counts(names)[1:]:
        return None
    if _is_vgg16(names):
        return dict(zip(names, [*given, 0.0], strict=True))
    stages = _stages(names)
    streams = dict(zip(stages, [*given[1 : len(stages)], 0.0], strict=True))
    blocks = dict(zip([block for stage in stages.values() for block in stage], given[len(stages) :], strict=True))
    rates = {names[0]: given[0]}
    for name in names[1:]:
        stage, k, leaf, *_ = name.split(".")
        writes = leaf == "downsample" or leaf == ("conv3" if f"{stage}.{k}.conv3" in names else "conv2")
        rates[name] = streams[stage] if writes else blocks[f"{stage}.{k}"]
    return rates


def read_rank_file(path: str | os.PathLike[str]) -> FloatArray:
    """Return the ranks [F] float64 in one .npy file; nothing is unpickled, and sizes are checked before reading.

    Raises
    ------
    ValueError
        If it is missing, truncated, no .npy file, or holds anything but a flat array of finite ranks of at least 0.
    """
    data = files.read_bytes("read_rank_file", path, _MAX_RANK_FILE)
    stream = io.BytesIO(data)
    readers: dict[Any, Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, _, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError, UnicodeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(
            f"read_rank_file: {path} is no .npy file of numbers ({reason}). It may be truncated or of another kind."
        ) from None
    if len(shape) != 1 or dtype.kind not in "fiu" or dtype.itemsize > 8 or shape[0] == 0:
        raise ValueError(f"read_rank_file: {path} must hold ranks [F]; it holds {dtype} of shape {list(shape)}.")
    if shape[0] * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(
            f"read_rank_file: {path} needs {shape[0] * dtype.itemsize} bytes of ranks and has "
            f"{len(data) - stream.tell()}. It may be truncated."
        )
    ranks = np.frombuffer(data, dtype, offset=stream.tell()).astype(np.float64)
    if not np.isfinite(ranks).all() or (ranks < 0).any():
        raise ValueError(f"read_rank_file: {path} has ranks that are negative, NaN or infinite.")
    return ranks


def read_rank_files(folder: str | os.PathLike[str], model: nn.Module) -> ClassRanks:
    """Return the ranks in a folder of HRank's files, ``rank_conv1.npy`` for the first convolution and so on.

    Where there are files ``rank_conv{i}_Class_{c}.npy``, as CRank's listing writes them, they give one column a class;
    otherwise R has the one column that HRank has, which is enough for ``select(model, "hrank", ...)``.

    Parameters
    ----------
    folder
        Other files in it are not looked at.
    model
        The network that was ranked: file i belongs to its i-th convolution, in order of definition. For VGG-16,
        twelve files are enough, as HRank writes them; the last convolution is then left out.

    Raises
    ------
    ValueError
        If files are missing, unreadable or of another network.
    """
    who, layers = "read_rank_files", _convolutions(model)
    found = {match.group(): match for match in map(_FILE.fullmatch, _listing(who, folder)) if match}
    labels = sorted({int(match["label"]) for match in found.values() if match["label"] is not None})
    count = max((int(match["number"]) for match in found.values() if bool(labels) == bool(match["label"])), default=0)
    names = list(layers)
    if count not in ({len(names), 12} if _is_vgg16(names) else {len(names)}):
        raise ValueError(
            f"{who}: {folder} must hold rank_conv1.npy to rank_conv{len(names)}.npy for {type(model).__name__}; "
            + (f"they end at {count}." if count else "it holds none.")
        )
    ranks = {}
    for i, name in enumerate(names[:count], start=1):
        parts = [f"rank_conv{i}_Class_{c}.npy" for c in range(labels[-1] + 1)] if labels else [f"rank_conv{i}.npy"]
        columns = [_ranks_of(who, Path(folder) / part, found, name, layers[name].out_channels) for part in parts]
        ranks[name] = np.stack(columns, axis=1)
    return ClassRanks(ranks, info={"from": "rank files", "classes": len(labels)})


def _listing(who: str, folder: str | os.PathLike[str]) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208  # names are all that is needed
    except OSError as error:
        raise ValueError(f"{who}: needs a folder of rank files; cannot list {folder} ({error.strerror}).") from None


def _ranks_of(who: str, path: Path, found: dict[str, re.Match[str]], name: str, filters: int) -> FloatArray:
    if path.name not in found:
        raise ValueError(f"{who}: {path.parent} lacks {path.name}, the ranks of {name!r}.")
    ranks = read_rank_file(path)
    if len(ranks) != filters:
        raise ValueError(
            f"{who}: the files are of another network: {path} has {len(ranks)} ranks, and {name!r} {filters} filters."
        )
    return ranks


def write_rank_files(
    ranks: ClassRanks, folder: str | os.PathLike[str], model: nn.Module, *, by_class: bool = False
) -> list[Path]:
    """Write ranks as HRank's files, one a convolution, and return their paths.

    Parameters
    ----------
    ranks
        Of ``model``.
    folder
        Created if need be.
    model
        Says which convolution is the first, second, ...
    by_class
        Write one file a convolution and class, ``rank_conv{i}_Class_{c}.npy``, instead of ``rank_conv{i}.npy`` with
        the mean over all images.

    Raises
    ------
    ValueError
        If the ranks are of another network, or the folder cannot be written.
    """
    layers = list(_convolutions(model))
    for name in ranks.layers:
        graph.check_layer("write_rank_files", name, layers)
    target = files.make_folder("write_rank_files", folder)
    paths = []
    for name, R in ranks.layers.items():
        stem = f"rank_conv{layers.index(name) + 1}"
        mean = np.average(R, axis=1, weights=ranks.counts)
        columns = {f"{stem}_Class_{c}.npy": R[:, c] for c in range(R.shape[1])} if by_class else {f"{stem}.npy": mean}
        for file, column in columns.items():
            stream = io.BytesIO()
            np.lib.format.write_array(stream, np.ascontiguousarray(column), allow_pickle=False)
            files.write_bytes(target / file, stream.getvalue())
            paths.append(target / file)
    return paths


def zero_filters(model: nn.Module) -> Plan:
    """Find the filters that are zero, so that a masked checkpoint can be compacted without the plan that masked it.

    A filter goes if its weights and bias are all zero, and so is the affine slice of every norm that a mask of it
    would zero (see :func:`pyprune.graph.dead_slices`). Taking it out then changes nothing. A zero filter whose channel
    a norm's shift brings back to life stays, and the plan's ``why`` names the norm.

    Parameters
    ----------
    model
        Not changed; it must be traceable by torch.fx.

    Returns
    -------
    Plan
        By ``"zeros"``, with every convolution and the reason for each filter.

    Raises
    ------
    ValueError
        If the model cannot be traced.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU())
    >>> with torch.no_grad():
    ...     _ = model[0].weight[2].zero_()
    >>> zero_filters(model).keep["0"].tolist()
    [0, 1, 3]
    """
    layers = graph.convolutions(model)
    zero = {name: _zero_rows(layer) for name, layer in layers.items()}
    kept = {name: {0: "all filters are zero, and one has to stay"} for name, rows in zero.items() if rows.all()}
    wanted = Plan({
        name: np.flatnonzero(~rows) if not rows.all() else np.array([0]) for name, rows in zero.items()
    })  # fmt: skip
    _, stays = graph.follow_masks(model, wanted, graph.trace(model, "zero_filters"), zeroed=True)
    for name, reasons in stays.items():
        kept[name] = {**kept.get(name, {}), **reasons}
    why = {name: LayerWhy(tuple(_reasons(rows, kept.get(name, {})))) for name, rows in zero.items()}
    return Plan(
        keep={name: np.array([f for f, one in enumerate(layer) if one.keep]) for name, layer in why.items()},
        filters={name: len(rows) for name, rows in zero.items()},
        why=why,
        method="zeros",
    )


def _zero_rows(layer: graph.Convolution) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return [F] which filters have no weight or bias but zero."""
    rows = (layer.weight.detach() == 0).flatten(1).all(dim=1)
    if layer.bias is not None:
        rows &= layer.bias.detach() == 0
    found: np.ndarray[Any, np.dtype[np.bool_]] = rows.cpu().numpy()
    return found


def _reasons(rows: np.ndarray[Any, np.dtype[np.bool_]], kept: dict[int, str]) -> list[FilterWhy]:
    return [
        FilterWhy(f"zero, but {kept[f]}", True) if f in kept else FilterWhy("zero" if gone else "not zero", not gone)
        for f, gone in enumerate(rows.tolist())
    ]
