"""Networks to prune: VGG-16 and residual networks for small images, ResNet-50, and a small VGG for the demo.

``__all__`` lists the networks; :func:`standard_widths` says which widths each lets one choose.
"""

from pyprune.models.resnet import CifarResNet as CifarResNet
from pyprune.models.resnet import ResNet50 as ResNet50
from pyprune.models.resnet import resnet20 as resnet20
from pyprune.models.resnet import resnet32 as resnet32
from pyprune.models.resnet import resnet44 as resnet44
from pyprune.models.resnet import resnet50 as resnet50
from pyprune.models.resnet import resnet56 as resnet56
from pyprune.models.resnet import resnet110 as resnet110
from pyprune.models.standard import standard_widths as standard_widths
from pyprune.models.vgg import VGG as VGG
from pyprune.models.vgg import vgg16_bn as vgg16_bn
from pyprune.models.vgg import vgg_digits as vgg_digits

__all__ = ["resnet20", "resnet32", "resnet44", "resnet50", "resnet56", "resnet110", "vgg16_bn", "vgg_digits"]
