"""The widths that can be chosen for each network, as the standard network has them."""

from __future__ import annotations

from pyprune.hints import did_you_mean
from pyprune.models import resnet, vgg
from pyprune.models.building import scaled

NETWORKS = {**resnet.WIDTHS, **vgg.WIDTHS}
"""What is free in each architecture."""

PER = ("stage", "layer")


def standard_widths(arch: str, per: str = "stage", width: float = 1.0) -> dict[str, int]:
    """Return widths that can be chosen independently of one another, as the standard network has them.

    Every name is one that the builder's ``widths=`` takes, and all of them together build the standard network:
    ``resnet20(widths=standard_widths("resnet20"))`` is ``resnet20()``.

    Parameters
    ----------
    arch
        Name of a network of this package.
    per
        ``"stage"``: one width for every stage. ``"layer"``: one for every convolution; those that are added to one
        another are one width, under the name of the first.
    width
        Factor on the widths of the stages; each is rounded and at least 1.

    Returns
    -------
    dict
        Filters by name, in the order of the network. ``vgg16_bn``'s ``"classifier.linear1"`` is not among them: it
        follows the last convolution.

    Raises
    ------
    ValueError
        If there is no such network, ``per`` is unknown, or ``width`` is not positive.

    Examples
    --------
    >>> standard_widths("resnet50")
    {'conv1': 64, 'layer1': 64, 'layer2': 128, 'layer3': 256, 'layer4': 512}
    """
    if arch not in NETWORKS:
        hint = did_you_mean(arch, NETWORKS, f"There are {', '.join(NETWORKS)}.")
        raise ValueError(f"standard_widths: there is no network {arch!r}.{hint}")
    if per not in PER:
        raise ValueError(f"standard_widths: per must be 'stage' or 'layer'; got {per!r}.{did_you_mean(per, PER)}")
    free = NETWORKS[arch]
    if per == "stage":
        return {stage: scaled("standard_widths", size, width) for stage, size in free.stages.items()}
    widths = free.standard("standard_widths", width)
    return {name: widths[name] for name in free.independent()}
