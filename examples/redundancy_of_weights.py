"""How redundant are the kernels of a network, before and after training? Only its weights are needed.

Run it with ``python examples/redundancy_of_weights.py``; it takes about half a minute on two cores.
"""

from __future__ import annotations

import torch

import pyprune as pp
from pyprune.data import digits, loader
from pyprune.redundancy_plots import plot_ckrm


def main() -> None:
    """Train twice, measure, compare with the untrained network and with random kernels."""
    data = digits()
    networks = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks[f"trained, seed {seed}"] = pp.models.vgg_digits(widths=(16, 16, 32, 32, 64, 64))
        pp.finetune(
            networks[f"trained, seed {seed}"], loader(data.train, shuffle=True), loader(data.val), epochs=4, lr=0.05
        )
    torch.manual_seed(2)
    networks["untrained"] = pp.models.vgg_digits(widths=(16, 16, 32, 32, 64, 64))

    result = pp.ckrm(networks)
    print(result)

    name, layer = next(iter(result.layers("trained, seed 0").items()))
    i, j, psi = layer.top[0]
    print(f"\nMost alike in {name}: filters {i} and {j}, Psi {psi:.3f}")
    print(f"Random kernels of its shape: {layer.random.mean:.3f} +- {layer.random.std:.3f}")

    sampled = pp.ckrm(networks["untrained"], pairs={"features.conv7": 500})
    low, high = sampled["features.conv7"].intervals[0, 0]
    print(f"lambda of features.conv7 from 500 of its pairs: between {low:.4f} and {high:.4f}")

    print(*plot_ckrm(result, "runs/redundancy", networks).values(), sep="\n")
    pp.report(result, "runs/redundancy/report.html")
    result.save("runs/redundancy/ckrm.json")  # pp.CKRM.load brings it back


if __name__ == "__main__":
    main()
