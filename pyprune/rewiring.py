"""What happens between the layers of a slim network: sums of different channels, paddings and slices of channels.

A sum of branches that kept different channels becomes an indexed addition: the branch is added into the stream at
the places that its channels have there. ``torch.index_add`` costs little more than a plain sum of the full width, and
less than every other exact form that was measured (a table stands in docs/compaction.md); with channels last it is used
along the last dimension, where it is up to six times faster and keeps the memory format.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from pyprune import operations as ops
from pyprune import views
from pyprune.channels import BoolArray, Channels, Pad, Slice, Split, Sum, View
from pyprune.types import IntArray


class Rewiring:
    """One slim graph in the making; ``indices`` are the tensors that it reads, by the name they must get.

    Parameters
    ----------
    graph
        A copy of the graph that was walked, with the same node names; it is changed.
    channels
        What the walk found.
    taken
        Names of modules, which no index may have.
    device
        Where the indices lie.
    channels_last
        Whether the network's weights are in that memory format.
    """

    def __init__(
        self, graph: fx.Graph, channels: Channels, taken: set[str], device: torch.device, channels_last: bool
    ) -> None:
        self.graph, self.channels, self.taken = graph, channels, set(taken)
        self.device, self.channels_last = device, channels_last
        self.stays: BoolArray = ~channels.leaves
        self.indices: dict[str, torch.Tensor] = {}

    def rewire(self) -> None:
        """Write anew every sum, padding, slice, split and view whose channels leave."""
        nodes = {node.name: node for node in self.graph.nodes}
        used = {node.name for node in self.graph.nodes if node.users}
        for name, pad in self.channels.pads.items():
            nodes[name] = self._pad(nodes[name], pad)
        for name, taken in self.channels.slices.items():
            nodes[name] = self._slice(nodes[name], taken, nodes.get(taken.base))
        for name, split in self.channels.splits.items():
            self._split(nodes[name], split)
        for name, view in self.channels.views.items():
            self._view(nodes[name], view, nodes)
        for name, found in self.channels.sums.items():
            self._sum(nodes[name], found)
        for node in reversed(self.graph.nodes):  # numbers and tensors of places that nothing needs any more
            if node.name in used and not node.users and (node.op == "get_attr" or _is_number(node)):
                self.graph.erase_node(node)

    def _sum(self, node: fx.Node, found: Sum) -> None:
        left = [self.stays[slots] for slots in found.sides]
        whole = self.stays[found.result]
        covers = [bool((side == whole).all()) for side in left]
        if all(covers):
            return
        base = 0 if covers[0] or (not covers[1] and left[0].sum() >= left[1].sum()) else 1
        sides: list[Any] = list(node.args)
        with self.graph.inserting_before(node):
            if found.subtracts:
                sides[1] = self.graph.call_function(operator.neg, (sides[1],))
            stream = sides[base] if covers[base] else self._grown(node, sides[base], left[base][whole], found.ndim)
            index = self._index(node, "index", np.flatnonzero(left[1 - base][whole]))
            branch, dim = sides[1 - base], 1
            if self.channels_last and found.ndim == 4:
                dim = 3
                stream, branch = (self.graph.call_method("permute", (one, 0, 2, 3, 1)) for one in (stream, branch))
            added = self.graph.call_function(torch.index_add, (stream, dim, index, branch))
            if dim != 1:
                added = self.graph.call_method("permute", (added, 0, 3, 1, 2))
        node.replace_all_uses_with(added)
        self.graph.erase_node(node)

    def _grown(self, node: fx.Node, side: fx.Node, places: BoolArray, ndim: int) -> fx.Node:
        """Return ``side`` with zero channels wherever ``places`` is false."""
        inside = np.flatnonzero(places)
        before, after = int(inside[0]), int(len(places) - 1 - inside[-1])
        space = [0, 0] * (ndim - 2)
        if before + len(inside) + after == len(places):
            return self.graph.call_function(torch.nn.functional.pad, (side, (*space, before, after)))
        wider = self.graph.call_function(torch.nn.functional.pad, (side, (*space, 0, 1)))
        taken = np.where(places, np.cumsum(places) - 1, len(inside))
        return self.graph.call_function(torch.index_select, (wider, 1, self._index(node, "grown", taken)))

    def _pad(self, node: fx.Node, pad: Pad) -> fx.Node:
        left = [int(self.stays[slots].sum()) for slots in (pad.before, pad.after)]
        widths = list(ops.argument(node, 1, "pad"))
        widths[2 * (pad.ndim - 2) : 2 * (pad.ndim - 1)] = left
        if any(widths):
            kwargs = {key: value for key, value in node.kwargs.items() if key != "pad"}
            node.args, node.kwargs = (node.all_input_nodes[0], tuple(widths), *node.args[2:]), kwargs
            return node
        if pad.copies:
            node.op, node.target, node.args, node.kwargs = "call_method", "clone", (node.all_input_nodes[0],), {}
            return node
        return self._skip(node, node.all_input_nodes[0])

    def _skip(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """Let what reads ``node`` read ``source``, and return that."""
        node.replace_all_uses_with(source)
        self.graph.erase_node(node)
        return source

    def _split(self, node: fx.Node, found: Split) -> None:
        sizes = [int(self.stays[part].sum()) for part in found.parts]
        if sizes != [len(part) for part in found.parts]:
            node.op, node.target, node.kwargs = "call_function", torch.split, {}
            node.args = (node.all_input_nodes[0], sizes, 1)

    def _view(self, node: fx.Node, view: View, nodes: dict[str, fx.Node]) -> None:
        left = int(self.stays[view.slots].sum())
        if view.sizes is not None:
            sizes: list[Any] = list(fx.map_arg(view.sizes.sizes, lambda one: nodes[one.name]))
            place = view.dim - view.sizes.first
            if sizes[place] == -1 or (left == len(view.slots) and not isinstance(sizes[place], fx.Node)):
                return
            sizes[place] = left if -1 in sizes else -1
            views.resized(node, view.sizes, sizes)
        elif left == 1 and view.squeezed:
            node.args, node.kwargs = (node.all_input_nodes[0], view.squeezed), {}
        elif left == 1:
            self._skip(node, node.all_input_nodes[0])

    def _slice(self, node: fx.Node, found: Slice, base: fx.Node | None) -> fx.Node:
        before = self.stays[found.source]
        left = found.taken[before[found.taken]]
        if before.all() and node.target is operator.getitem:
            node.args = (node.args[0], found.index)  # an ellipsis written out
        if before.all() and "index_select" not in str(node.target):
            return node
        copies = found.copies and "index_select" in str(node.target)
        places = (np.cumsum(before) - 1)[left]
        if base is not None:
            return self._permute(node, base, places, int(before.sum()), found.copies)
        node.op, node.target, node.kwargs = "call_function", operator.getitem, {}
        steps = np.unique(np.diff(places))
        index = list(found.index)
        if np.array_equal(places, np.arange(before.sum())) and not copies:
            index[1] = slice(None)
        elif (len(places) == 1 or (len(steps) == 1 and steps[0] > 0)) and not copies:
            index[1] = slice(int(places[0]), int(places[-1]) + 1, int(steps[0]) if len(steps) else None)
        else:
            index[1] = slice(None)
            with self.graph.inserting_after(node):
                number = self._index(node, "taken", places)
            with self.graph.inserting_after(number):
                picked = self.graph.call_function(torch.index_select, (node, 1, number))
            node.replace_all_uses_with(picked, delete_user_cb=lambda user: user is not picked)
            node.args = (node.args[0], tuple(index))
            return picked
        node.args = (node.args[0], tuple(index))
        return node

    def _permute(self, node: fx.Node, source: fx.Node, places: IntArray, count: int, copies: bool) -> fx.Node:
        """Let ``node`` pick channels of ``source``, which has ``count``, instead of viewing it from several sides."""
        view = node.all_input_nodes[0]
        if np.array_equal(places, np.arange(count)) and not copies:
            node = self._skip(node, source)
        else:
            with self.graph.inserting_before(node):
                index = self._index(node, "order", places)
            node.op, node.target, node.args, node.kwargs = "call_function", torch.index_select, (source, 1, index), {}
        while view is not source and not view.users:
            above = view.all_input_nodes[0]
            self.graph.erase_node(view)
            view = above
        return node

    def _index(self, node: fx.Node, word: str, places: IntArray) -> fx.Node:
        """Return a node that reads ``places`` as a tensor."""
        name = f"{node.name}_{word}"
        while name in self.taken or hasattr(fx.GraphModule, name):
            name += "_"
        self.taken.add(name)
        self.indices[name] = torch.from_numpy(np.asarray(places, np.int64)).to(self.device)
        return self.graph.create_node("get_attr", name, (), {})


def _is_number(node: fx.Node) -> bool:
    """Say whether ``node`` reads a size, or computes with sizes alone."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    inputs = node.all_input_nodes
    computed = node.op == "call_function" and bool(inputs) and all(map(_is_number, inputs))
    return node.target is getattr or computed
