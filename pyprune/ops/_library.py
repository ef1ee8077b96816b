"""The kernels as torch operators, so that torch.compile, torch.export, vmap and fake tensors know them.

Importing this module imports torch and registers every operator. The modules of the ops import it inside their
functions, where torch is needed anyway; ``import pyprune`` does not. torch.compile carries out an import that it meets
in the code it traces, so even the very first call of an op may be a compiled one.

To add an operator, write in the module of the op

- ``on_tensor(x, ...)``, which takes tensors of any device and returns new ones. It checks its arguments itself;
- ``on_fake(x, ...)``, which takes the same and returns empty tensors of the right shapes, dtypes and devices;
- in the public function, for tensors, ``from pyprune.ops import _library`` and ``return _library.foo(x, ...)``;

and here one line: ``foo = operator("foo(Tensor x, float eps=0.01) -> Tensor", foo_module.on_tensor,
foo_module.on_fake)``. A batching rule for vmap is a third function, ``on_batch(info, in_dims, x, ...)``, that returns
the output and its batch dimension; without one torch takes the batch apart and calls the op in a loop.

Operators are pure functions without a gradient: a tensor that requires grad is taken as it is, and integer results
carry none. An op with floating-point results says in its page what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyprune.ops import rank, ssim

_NAMESPACE: Any = torch.ops.pyprune


def is_tensor(x: Any) -> bool:
    """Return whether ``x`` is a torch tensor, for modules that do not import torch."""
    return isinstance(x, torch.Tensor)


def _library() -> Any:
    """Return the one ``Library`` of this process: a second copy of this module must not define operators again."""
    make: Any = torch.library.Library  # torch leaves it untyped
    return vars(_NAMESPACE).setdefault("_library", make("pyprune", "FRAGMENT"))


def operator(
    schema: str, on_tensor: Callable[..., Any], on_fake: Callable[..., Any], on_batch: Callable[..., Any] | None = None
) -> Any:
    """Register ``pyprune::schema`` for every device, unless it is registered already, and return its overload.

    ``Library.define`` and ``impl`` add 2 us to a call (measured beside a Python function that allocates its result,
    2 us); ``torch.library.custom_op`` adds three times that.
    """
    name = schema.partition("(")[0]
    if not hasattr(_NAMESPACE, name):
        library = _library()
        # flexible_layout: strides are read as they are, so the compiler need not keep or copy them.
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
        library.impl(name, on_tensor, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyprune::{name}", on_fake, lib=library)
        if on_batch is not None:
            torch.library.register_vmap(f"pyprune::{name}", on_batch, lib=library)
    return getattr(_NAMESPACE, name).default


matrix_rank = operator(
    "matrix_rank(Tensor x, float? rtol=None, bool check=True, str variant='auto') -> Tensor",
    rank.on_tensor,
    rank.on_fake,
    rank.on_batch,
)

kernel_ssim = operator(
    "kernel_ssim(Tensor w, float alpha=0.1, float beta=1.0, float gamma=1.0, float eps=0.01, "
    "float? eps_absolute=None, str variant='auto') -> Tensor",
    ssim.on_tensor,
    ssim.on_fake,
)
