"""Print slice pairs per second of every kernel SSIM variant and its peers: medians of interleaved runs.

python benchmarks/ssim_table.py [--rounds 7] [--wall]

One thread, by the time that the processor spent on it, which others on the machine disturb least; --wall measures
with all threads by the clock on the wall. Ends with memory and time of a layer of 2048 x 2048 x 3 x 3.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from pyprune import machine
from pyprune.benching import RESNET50, _compiled, broadcast_ssim, broadcast_ssim_block, random_kernels
from pyprune.ops import _reference
from pyprune.ops.ssim import kernel_ssim, kernel_ssim_statistics

OURS = machine.this_machine().cpu_variants
SLOW = 64  # filters for rivals whose time is better not spent on more


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def run(rival, w, compiled):
    if rival == "numpy_rows":
        return _reference.kernel_ssim(w.numpy())
    if rival == "torch_broadcast":
        return broadcast_ssim(w)
    if rival == "torch_compiled":
        return broadcast_ssim(w, compiled)
    return kernel_ssim_statistics(w, variant=rival)


def medians(rivals, w, compiled, rounds, clock):
    """Median slice pairs per second; one round runs all rivals, so that noise hits them alike."""
    rates = {rival: [] for rival in rivals}
    for turn in range(rounds + 1):  # the first one warms up
        for rival in rivals:
            given = w if rival in OURS else w[:SLOW]
            pairs, times = len(given) * (len(given) - 1) // 2 * w.shape[1], 0
            began = clock()
            while clock() - began < 0.02:
                run(rival, given, compiled)
                times += 1
            if turn:
                rates[rival].append(pairs * times / (clock() - began))
    return {rival: statistics.median(found) for rival, found in rates.items()}


def check(w):
    few = w[:40]
    want = _reference.kernel_ssim(few.double().numpy())
    for name in OURS:
        if np.abs(kernel_ssim(few, variant=name).double().numpy() - want).max() > 1e-6:
            raise SystemExit(f"{name} disagrees with the definition")


def wide_layer(clock):
    w = torch.randn(2048, 2048, 3, 3)
    kernel_ssim_statistics(w[:32])
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before, began = peak_kib(), clock()
    kernel_ssim_statistics(w, nearest=True, top=1000)
    seconds, after = clock() - began, peak_kib()
    print(f"2048 x 2048 x 3 x 3: {seconds:.2f} s, {(after - before) / 1024:.0f} MiB beyond the weights")


def peak_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--wall", action="store_true")
    options = parser.parse_args()
    clock = time.perf_counter if options.wall else time.process_time
    if not options.wall:
        torch.set_num_threads(1)
    compiled = _compiled(broadcast_ssim_block)
    rivals = ["numpy_rows", "torch_broadcast", *(["torch_compiled"] if compiled else []), *OURS]
    print(f"{cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, numpy {np.__version__}")
    print("| layer |", " | ".join(rivals), "|")
    print("| --- |", " | ".join("---:" for _ in rivals), "|")
    seconds = dict.fromkeys(rivals, 0.0)
    for (F2, F1, K), count in RESNET50:
        w = random_kernels((F2, F1, K, K), torch.device("cpu"))
        check(w)
        found = medians(rivals, w, compiled, options.rounds, clock)
        for rival, rate in found.items():
            seconds[rival] += count * F2 * (F2 - 1) / 2 * F1 / rate
        cells = " | ".join(f"{found[rival] / 1e6:,.1f}" for rival in rivals)
        print(f"| {F2} x {F1} x {K} x {K} |", cells, "|", flush=True)
    print("| ResNet-50, s |", " | ".join(f"{seconds[rival]:.3f}" for rival in rivals), "|")
    wide_layer(clock)


if __name__ == "__main__":
    main()
