"""Run every GPU kernel once on small, awkward shapes: what compute-sanitizer watches in gpu_check.sh.

compute-sanitizer --tool memcheck python benchmarks/gpu_small.py
"""

import torch

from pyprune.machine import this_machine
from pyprune.ops import kmeans, rank, ssim

SIDES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 56, 64, 65, 112, 130, 200)


def main():
    torch.manual_seed(0)
    ran = set()
    for side in SIDES:
        for dtype in (torch.float32, torch.float16, torch.float64):
            maps = torch.randn(3, 5, side, side + side % 3, device="cuda").relu().to(dtype)
            maps[0, 0] = 0
            maps[1, :, side // 2 :] = maps[1, :, : side - side // 2]
            for given in (maps, maps.to(memory_format=torch.channels_last), maps.transpose(2, 3)):
                ranks, variant = rank._run(given)
                ran.add(variant)
                if not torch.equal(ranks.cpu(), rank._run(given.cpu(), variant="reference")[0]):
                    raise SystemExit(f"{variant} disagrees with the float64 SVD on {list(given.shape)}, {dtype}")
    for shape in ((1, 1, 1, 1), (2, 3, 3, 3), (33, 7, 3, 3), (65, 17, 1, 3), (40, 3, 7, 7), (31, 5, 2, 1)):
        w = torch.randn(shape, device="cuda")
        psi, variant = ssim._run(w, ssim.Constants())
        ran.add(variant)
        if (psi.cpu() - ssim._run(w.cpu(), ssim.Constants(), "reference")[0]).abs().max() > 1e-6:
            raise SystemExit(f"{variant} disagrees with the float64 reference on {list(shape)}")
        ssim.kernel_ssim_statistics(w, thresholds=(0.2, 0.6), nearest=True)
    if this_machine().cuda:
        for rows, columns in ((12, 3), (65, 7), (130, 20)):
            x = torch.rand(rows, columns, dtype=torch.float64)
            found, expected = (kmeans.k_search(x, n_init=3, variant=name) for name in ("cuda_gram", "auto"))
            if abs(found.scores - expected.scores).max() > 1e-9:
                raise SystemExit(f"cuda_gram disagrees with the CPU on {rows} x {columns}")
        ran.add("cuda_gram")
    print(f"{', '.join(sorted(ran))} on {torch.cuda.get_device_name()}; cuda {this_machine().cuda}: as the references")


if __name__ == "__main__":
    main()
