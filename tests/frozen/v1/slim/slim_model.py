"""A slim network, written by pyprune; it needs torch and safetensors."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


class SlimModel(nn.Module):
    """The layers and what happens between them."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Conv2d(1, 3, kernel_size=3))
        self.add_module("1", nn.BatchNorm2d(3))
        self.add_module("2", nn.ReLU())
        self.add_module("3", nn.AdaptiveAvgPool2d(2))
        self.add_module("4", nn.Flatten())
        self.add_module("5", nn.Linear(12, 3))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        input = getattr(self, "0")(input)
        input = getattr(self, "1")(input)
        input = getattr(self, "2")(input)
        input = getattr(self, "3")(input)
        input = getattr(self, "4")(input)
        input = getattr(self, "5")(input)
        return input


def load(folder: str | Path = Path(__file__).parent) -> SlimModel:
    """Return the network in eval mode, with the weights that lie in ``folder``."""
    with torch.device("meta"):
        model = SlimModel()
    weights = load_file(Path(folder) / "model.safetensors")
    model.load_state_dict(weights, assign=True)
    return model.eval()
