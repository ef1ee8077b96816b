"""Whole architectures for the tests of compaction, written for them: narrow and shallow, or at full size."""

from zoo import (
    branches,
    convnext,
    dense_outputs,
    densenet,
    mobilenet,
    other_dimensions,
    regnet,
    resnet,
    shufflenet,
    vgg,
)

FAMILIES = (vgg, resnet, densenet, mobilenet, shufflenet, branches, regnet, dense_outputs, convnext, other_dimensions)
ENTRIES = {entry.name: entry for family in FAMILIES for entry in family.ENTRIES}
