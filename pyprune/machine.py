"""What this installation can use on this machine: the record that choosers read, and ``backends()`` for people."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

OPTIONAL_PACKAGES = ("onnx", "onnxruntime", "cupy", "nvidia-ml-py", "torchvision")
_MODULES = {"nvidia-ml-py": "pynvml"}  # where the module is not called like the package
_PIP_NAMES = {"cupy": "cupy-cuda12x"}  # the plain name would compile CuPy from source


@dataclass(frozen=True)
class Machine:
    """What a chooser may know: the native CPU variants that run here, slowest first."""

    cpu_variants: tuple[str, ...] = ()


@cache
def this_machine() -> Machine:
    """Return the :class:`Machine` that this process runs on."""
    return Machine(tuple(name for name, why_not in cpu_variants().items() if not why_not))


def cpu_variants() -> dict[str, str]:
    """Return each compiled CPU variant, slowest first, with the reason why it cannot run here ("" if it can)."""
    try:
        from pyprune import _core
    except ImportError:
        return {}
    return _core.rank_variants()


def threads() -> int:
    """Return how many threads a kernel may use: torch's setting once torch is loaded, else the usable CPUs."""
    if "torch" in sys.modules:
        import torch

        return torch.get_num_threads()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def keep_freed_memory() -> None:
    """Let the C library keep what is freed, up to some 60 MiB, instead of returning it to the system each time.

    glibc serves large arrays by mapping fresh pages, and the system has to zero every one of them: half a ResNet's
    forward pass of wall time. Freeing one block of just under 32 MiB raises its own thresholds for good (mallopt(3),
    M_MMAP_THRESHOLD). The block is never touched, so it costs nothing; elsewhere this does nothing.
    """
    import torch

    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


@dataclass(frozen=True)
class Backends:
    """What is built in, what this machine can use, and why not the rest; made by :func:`backends`.

    ``cpu`` maps each compiled variant to "" or the reason why it cannot run; ``cuda`` and ``triton`` are "" where
    usable and the reason otherwise; ``packages`` maps an optional package to its version, or to the command that
    installs it.
    """

    pyprune: str
    python: str
    torch: str
    platform: str
    threads: int
    cpu: Mapping[str, str]
    cuda: str
    cuda_devices: tuple[str, ...]
    triton: str
    packages: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain JSON values."""
        return {**asdict(self), "cuda_devices": list(self.cuda_devices)}

    def __str__(self) -> str:
        cpu = self.cpu or {"native kernels": "the extension pyprune._core is not built; run pip install ."}
        lines = [
            ("pyprune", self.pyprune),
            ("python", f"{self.python} on {self.platform}"),
            ("torch", self.torch),
            ("threads", str(self.threads)),
            *((name, why_not or "ready") for name, why_not in cpu.items()),
            ("cuda", self.cuda or "ready"),
            *((f"cuda:{i}", name) for i, name in enumerate(self.cuda_devices)),
            ("triton", self.triton or "ready"),
            *self.packages.items(),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {what}" for name, what in lines)


def backends() -> Backends:
    """Say what this installation has, what this machine can use, and why not the rest.

    Returns
    -------
    Backends
        Print it for people; ``to_json()`` for programs.

    Examples
    --------
    >>> import pyprune as pp
    >>> pp.backends().cpu["cpu_baseline"]
    ''
    """
    import torch

    present = torch.cuda.is_available()
    devices = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) if present else ()
    why = "" if present else "; torch finds no CUDA device"
    return Backends(
        pyprune=importlib.metadata.version("pyprune"),
        python=platform.python_version(),
        torch=str(torch.__version__),
        platform=f"{platform.system()} {platform.machine()}",
        threads=threads(),
        cpu=cpu_variants(),
        cuda=f"no CUDA kernels in this build: GPU tensors go through torch.linalg{why}",
        cuda_devices=devices,
        triton="pyprune has no Triton kernels yet" if _found("triton") else "not installed: pip install triton",
        packages={name: _package(name) for name in OPTIONAL_PACKAGES},
    )


def _package(name: str) -> str:
    module = _MODULES.get(name, name)
    if not _found(module):
        return f"not installed: pip install {_PIP_NAMES.get(name, name)}"
    owners = importlib.metadata.packages_distributions().get(module, [name])
    return importlib.metadata.version(owners[0])


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
