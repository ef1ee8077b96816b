"""The data set that comes along: scikit-learn's handwritten digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from pyprune.datasets.parts import Splits, drawn, stratified


def digits(*, size: int = 16, seed: int = 0, images: int | None = None) -> Splits:
    """Return scikit-learn's handwritten digits: 1,797 real scans of 8x8 pixels, ten classes, no download.

    They are resized bilinearly, split by class into about 1,200 training, 297 validation and 300 test images, and
    normalised with the training images' mean and standard deviation.

    Parameters
    ----------
    size
        Height and width after resizing; 16 leaves room for three pools.
    seed
        Of the split.
    images
        How many to draw in all, each part and class keeping its share; by default all.

    Raises
    ------
    ValueError
        If ``size`` is below 1, or ``images`` too few for one of each class and part or more than there are.

    References
    ----------
    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    if size < 1:
        raise ValueError(f"digits: size must be at least 1; got {size}.")
    from sklearn.datasets import load_digits

    raw = load_digits()
    maps = torch.from_numpy(raw.images).float()[:, None] / 16  # 16 grey levels above black
    maps = F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(raw.target).long()
    parts = stratified(labels.numpy(), (1200 / 1797, 297 / 1797, 300 / 1797), seed)
    chosen = drawn("digits", [raw.target[part] for part in parts], images, seed)
    parts = [part[own] for part, own in zip(parts, chosen, strict=True)]
    std, mean = (float(value) for value in torch.std_mean(maps[parts[0]].double()))
    maps = (maps - mean) / std
    train, val, test = (TensorDataset(maps[part], labels[part]) for part in parts)
    classes = tuple(str(name) for name in raw.target_names)
    return Splits("digits", train, val, test, classes, (1, size, size), (mean,), (std,))
