"""What kernel_ssim takes, returns and refuses; which variant runs."""

import numpy as np
import pytest
import torch

import pyprune as pp
from pyprune import machine
from pyprune.ops.ssim import Constants, _run, kernel_ssim_statistics, ssim_variants

HERE = machine.this_machine()
ALL = ssim_variants(HERE)


@pytest.mark.parametrize("variant", ALL)
def test_hand_computed(variant):
    w = np.zeros((3, 1, 1, 2), np.float32)
    w[0, 0, 0] = [1, 3]  # m = 2, s = 1
    w[1, 0, 0] = [5, 1]  # m = 3, s = 2, covariance with the first -2
    psi, ran = _run(w, Constants(alpha=1, eps_absolute=1), variant)
    assert ran == variant
    want = (2 * 6 + 1) / (4 + 9 + 1) * (2 * 2 + 1) / (1 + 4 + 1) * (2 + 1) / (2 + 1)
    zero = (0 + 1) / (4 + 0 + 1) * (0 + 1) / (1 + 0 + 1) * (0 + 1) / (0 + 1)
    assert psi[0, 1] == pytest.approx(want, abs=1e-6)
    assert psi[0, 2] == pytest.approx(zero, abs=1e-6)
    assert (np.diag(psi) == 1).all()


@pytest.mark.parametrize("variant", ALL)
def test_statistics_are_those_of_the_matrix(variant):
    w = torch.randn(12, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    w[7] = -w[2]
    psi = pp.kernel_ssim(w, variant=variant)
    found = kernel_ssim_statistics(w, thresholds=(0.2, 0.3), top=4, nearest=True, variant=variant)
    i, j = np.triu_indices(12, 1)
    values = psi.numpy()[i, j]
    assert (found.variant, found.pairs, found.histogram.sum()) == (variant, 66, 66)
    assert found.counts.tolist() == [(values > 0.2).sum(), (values > 0.3).sum()]
    assert found.mean == pytest.approx(values.astype(float).mean(), abs=1e-12)
    assert (found.top.i[0], found.top.j[0]) == (2, 7)
    assert found.top.psi.tolist() == sorted(values, reverse=True)[:4]
    assert found.nearest.index[2] == 7
    assert found.nearest.index[7] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, "eps must be positive and finite; got 0"),
        ({"alpha": -1}, "alpha must be finite and not negative; got -1"),
        ({"thresholds": (0.5, 1.5)}, r"thresholds must be in \[0, 1\]"),
        ({"top": 7}, "top must be between 0 and the 6 pairs there are; got 7"),
        ({"pairs": [[0, 4]]}, "two different filters in 0 .. 3; 1 of 1 are not, the first is"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        kernel_ssim_statistics(torch.ones(4, 2, 3, 3), **options)
