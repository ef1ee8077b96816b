"""What the networks of this folder share: checks of sizes, scaled widths, and fresh weights."""

from __future__ import annotations

from torch import nn


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
