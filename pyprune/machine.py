"""What this installation can use on this machine: the record that choosers read, and ``backends()`` for people."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

OPTIONAL_PACKAGES = ("onnx", "onnxruntime", "cupy", "nvidia-ml-py", "torchvision")
_MODULES = {"nvidia-ml-py": "pynvml"}  # where the module is not called like the package
_NO_EXTENSION = "the extension pyprune._core is not built; run pip install ."

_limit = threading.local()


@dataclass(frozen=True)
class Machine:
    """What a chooser may know.

    ``cpu_variants`` are the native CPU variants that run here, slowest first. ``cuda`` holds the layouts of the
    compiled CUDA kernels that the GPU can run, each with the largest short side that it takes, in order of choice.
    ``triton`` is the kind of device that Triton kernels run on: ``"cuda"``, ``"cpu"`` under Triton's interpreter, or
    ``""``.
    """

    cpu_variants: tuple[str, ...] = ()
    cuda: tuple[tuple[str, int], ...] = ()
    triton: str = ""


def this_machine(gpu: int = 0) -> Machine:
    """Return the :class:`Machine` that this process runs on, with that GPU.

    GPUs are looked at only once torch has initialised CUDA, hence whenever a tensor is on one: a process that works on
    the CPU must not create a CUDA context, which takes memory and does not survive a fork.
    """
    torch: Any = sys.modules.get("torch")
    return _machine(gpu if torch is not None and torch.cuda.is_initialized() else None)


@cache
def _machine(gpu: int | None) -> Machine:
    usable = tuple(name for name, why_not in cpu_variants().items() if not why_not)
    layouts = () if gpu is None or cuda_reason(gpu) else tuple(_core().rank_cuda_layouts(gpu).items())
    triton = "" if triton_reason(gpu is not None) else "cpu" if _interpreted() else "cuda"
    return Machine(usable, layouts, triton)


def cpu_variants() -> dict[str, str]:
    """Return each compiled CPU variant, slowest first, with the reason why it cannot run here ("" if it can)."""
    core = _core()
    return core.rank_variants() if core else {}


def cuda_reason(gpu: int = 0) -> str:
    """Say why the compiled CUDA kernels cannot run on that GPU ("" if they can)."""
    core = _core()
    if core is None:
        return _NO_EXTENSION
    built, architectures = core.cuda_built()
    if not built:
        return "no CUDA kernels in this build: nvcc was not found, or PYPRUNE_CUDA=OFF"
    why_not: str = core.cuda_device_reason(gpu)
    return f"{why_not.rstrip('.')} (built for {architectures.replace(';', ', ')})" if why_not else ""


def triton_reason(gpu: bool) -> str:
    """Say why Triton kernels cannot run here ("" if they can); ``gpu``: torch has one."""
    if not _found("triton"):
        return "not installed: pip install triton"
    return "" if gpu or _interpreted() else "torch finds no GPU"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _core() -> Any:
    """Return the extension, or ``None`` where it is not built."""
    try:
        from pyprune import _core
    except ImportError:
        return None
    return _core


def threads() -> int:
    """Return how many threads a kernel may use: torch's setting once torch is loaded, else the usable CPUs."""
    limit: int | None = getattr(_limit, "threads", None)
    if limit is not None:
        return limit
    if "torch" in sys.modules:
        import torch

        return torch.get_num_threads()
    return cpus()


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Let kernels that the calling thread starts use ``count`` threads."""
    before = getattr(_limit, "threads", None)
    _limit.threads = count
    try:
        yield
    finally:
        _limit.threads = before


def cpus() -> int:
    """Return how many CPUs this process may use."""
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
        cpu = self.cpu or {"native kernels": _NO_EXTENSION}
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
    triton = triton_reason(present)
    cuda = cuda_reason()
    if cuda and present:
        cuda += f"; GPU tensors go through {'torch.linalg' if triton else 'Triton and torch.linalg'}"
    if not present:
        built_for = torch.version.cuda or getattr(torch.version, "hip", None)
        blind = "torch finds no GPU" if built_for else f"torch {torch.__version__} is built for CPUs only"
        cuda = f"{cuda}; {blind}" if cuda else blind
    return Backends(
        pyprune=importlib.metadata.version("pyprune"),
        python=platform.python_version(),
        torch=str(torch.__version__),
        platform=f"{platform.system()} {platform.machine()}",
        threads=threads(),
        cpu=cpu_variants(),
        cuda=cuda,
        cuda_devices=devices,
        triton=triton,
        packages={name: _package(name) for name in OPTIONAL_PACKAGES},
    )


def _package(name: str) -> str:
    module = _MODULES.get(name, name)
    if not _found(module):
        return f"not installed: pip install {_cupy_name() if name == 'cupy' else name}"
    owners = importlib.metadata.packages_distributions().get(module, [name])
    return importlib.metadata.version(owners[0])


def _cupy_name() -> str:
    """Return the CuPy package for torch's CUDA; the plain name would compile CuPy from source."""
    import torch

    return f"cupy-cuda{(torch.version.cuda or '13').partition('.')[0]}x"


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
