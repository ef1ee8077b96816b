"""What the networks of this folder share: checks of sizes, widths by name, and fresh weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from pyprune.hints import did_you_mean


@dataclass(frozen=True)
class Widths:
    """The widths of a network that one can choose, and what they are in the standard one.

    ``stages`` holds the standard width of each stage; ``layers`` the stage of every convolution, in the order of the
    state dict, and its multiple of the stage's width. The convolutions of one of ``streams`` are added to one another,
    so they have one width. ``like`` names other layers that can be given a width, and the convolution that they follow
    unless they are.
    """

    stages: dict[str, int]
    layers: dict[str, tuple[str, int]]
    streams: tuple[tuple[str, ...], ...] = ()
    like: dict[str, str] = field(default_factory=dict)

    def standard(self, who: str, width: float = 1.0) -> dict[str, int]:
        """Return the width of every convolution for a factor ``width`` on those of the stages."""
        stages = {stage: scaled(who, size, width) for stage, size in self.stages.items()}
        return {name: multiple * stages[stage] for name, (stage, multiple) in self.layers.items()}

    def chosen(self, who: str, given: Mapping[str, int] | None, width: float = 1.0) -> dict[str, int]:
        """Return the width of every layer: as ``given`` by its name or its stage's, else the standard one.

        Raises
        ------
        TypeError
            If ``given`` is no mapping.
        ValueError
            If a name is unknown, a width is below 1, one stream gets two, or ``width`` is given as well.
        """
        widths = self.standard(who, width)
        given = {} if given is None else _checked(who, given, width, [*self.stages, *self.layers, *self.like])
        for name, (stage, multiple) in self.layers.items():
            widths[name] = given.get(name, multiple * given[stage] if stage in given else widths[name])
        for stream in self.streams:
            said = {name: given[name] for name in stream if name in given}
            said |= {s: m * given[s] for s, m in (self.layers[name] for name in stream) if s in given}
            _check_stream(who, said)
            widths |= dict.fromkeys(stream, next(iter(said.values()))) if said else {}
        return widths | {name: given.get(name, widths[other]) for name, other in self.like.items()}

    def independent(self) -> list[str]:
        """Return every convolution whose width is its own, and the first of every stream."""
        others = {name for stream in self.streams for name in stream[1:]}
        return [name for name in self.layers if name not in others]


def _checked(who: str, given: Mapping[str, int], width: float, names: Iterable[str]) -> Mapping[str, int]:
    """Return ``given`` once its names and numbers are right."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{who}: widths must map names to filters; got {type(given).__name__}.")
    if width != 1:
        raise ValueError(f"{who}: give either the factor width or widths by name; got width={width} and both.")
    known = dict.fromkeys(names)
    for name in given:
        if name not in known:
            raise ValueError(f"{who}: widths names no stage or layer {name!r}.{did_you_mean(name, known)}")
    check_counts(who, **{f"widths[{name!r}]": size for name, size in given.items()})
    return given


def _check_stream(who: str, said: Mapping[str, int]) -> None:
    """Raise ``ValueError`` if two names give one stream different widths."""
    for name, size in said.items():
        first = next(iter(said))
        if size != said[first]:
            raise ValueError(
                f"{who}: {first!r} and {name!r} set convolutions that are added to one another and need one width; "
                f"got {said[first]} and {size}."
            )


def check_counts(who: str, **counts: int) -> None:
    """Raise ``ValueError`` unless every count is a whole number of at least 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{who}: {name} must be at least 1; got {count!r}.")


def scaled(who: str, size: int, width: float) -> int:
    """Return ``size`` times the factor ``width``, rounded and at least 1."""
    if not 0 < width < float("inf"):
        raise ValueError(f"{who}: width must be a positive factor; got {width}.")
    return max(1, round(size * width))


def initialise(model: nn.Module) -> None:
    """Draw He-normal convolutions and LeCun-normal linear layers (a norm or the loss follows them); zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
