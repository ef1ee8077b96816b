"""Networks to prune: the published VGG-16 for 32x32 images, and a small one for the demo."""

from pyprune.models.vgg import VGG as VGG
from pyprune.models.vgg import vgg16_bn as vgg16_bn
from pyprune.models.vgg import vgg_digits as vgg_digits

__all__ = ["vgg16_bn", "vgg_digits"]
