"""Nets from torchvision, nets made of its parts, and its weights for ImageNet.

All map colour images (batch, 3, height, width) to logits, classifiers to (batch, num_classes).
"""

from functools import partial

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

from prunestudy.errors import InputError, require
from prunestudy.models.small import Shape

# Smallest height and width: `min_size` of torchvision's weights.
_LEAST = {"vgg16": 32, "googlenet": 15, "alexnet": 63, "alexnet_grouped": 63}


def build(name: str, shape: Shape, num_classes: int) -> nn.Module:
    """Net `name`, freshly initialised; GoogLeNet without auxiliary classifiers.

    Raises `InputError` for other channels than 3 and for images below torchvision's minimum.
    """
    least = _LEAST.get(name, 1)
    right = shape[0] == 3 and min(shape[1:]) >= least
    require(right, "shape", shape, f"{name} needs 3 channels and at least {least}x{least} pixels")
    if name == "alexnet_grouped":
        return _alexnet_grouped(shape, num_classes)
    if name == "mobilenet_v2_cifar":
        return _mobilenet_v2_cifar(num_classes)
    if name == "deeplabv3plus_resnet50":
        return DeepLabV3Plus(num_classes)
    more = {}
    if name == "googlenet":  # with the input transform that its pretrained weights expect
        more = {"aux_logits": False, "init_weights": True, "transform_input": True}
    net = models.get_model(name, weights=None, num_classes=num_classes, **more)
    if name in ("vgg16", "alexnet") and shape[1:] == (224, 224):
        # Adaptive pooling changes nothing at this size; its backward pass varies on CUDA.
        net.avgpool = nn.Identity()
    return net


def _alexnet_grouped(shape: Shape, num_classes: int) -> nn.Module:
    """AlexNet with the groups of Krizhevsky, Sutskever and Hinton (NIPS 2012).

    96, 256, 384, 384 and 256 filters; convolutions 2, 4 and 5 have two groups. Local response
    normalisation is left out, since it mixes channels.
    """
    net = build("alexnet", shape, num_classes)
    net.features[0] = nn.Conv2d(3, 96, 11, stride=4, padding=2)
    net.features[3] = nn.Conv2d(96, 256, 5, padding=2, groups=2)
    net.features[6] = nn.Conv2d(256, 384, 3, padding=1)
    net.features[8] = nn.Conv2d(384, 384, 3, padding=1, groups=2)
    net.features[10] = nn.Conv2d(384, 256, 3, padding=1, groups=2)
    return net


def _mobilenet_v2_cifar(num_classes: int) -> nn.Module:
    """MobileNetV2 (Sandler et al., CVPR 2018) whose first two strides are 1: 32x32 become 4x4."""
    # Expansion, channels, blocks, first stride (table 2; the second stage has stride 2 there).
    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1]]
    stages += [[6, 160, 3, 2], [6, 320, 1, 1]]
    net = models.MobileNetV2(num_classes, inverted_residual_setting=stages)
    net.features[0][0].stride = (1, 1)
    return net


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ on ResNet-50 for segmentation.

    Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018: torchvision's ASPP
    (rates 6, 12, 18) on features at 1/16 of the size, upsampled and joined with 48 channels from
    the first stage; then two 3x3 convolutions and a classifier.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.backbone = models.resnet50(replace_stride_with_dilation=[False, False, True])
        self.backbone.fc = nn.Identity()
        self.aspp = ASPP(2048, (6, 12, 18))
        convolution = partial(Conv2dNormActivation, inplace=None)
        self.low = convolution(256, 48, 1)
        layers = *convolution(256 + 48, 256), *convolution(256, 256)
        self.decoder = nn.Sequential(*layers, nn.Conv2d(256, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes, height, width) of images (batch, 3, height, width)."""
        net = self.backbone
        low = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        deep = self.aspp(net.layer4(net.layer3(net.layer2(low))))
        low = self.low(low)
        return _resized(self.decoder(torch.cat([_resized(deep, low), low], 1)), x)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    size = like.shape[-2:]
    return nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def use_pretrained(net: nn.Module, name: str) -> None:
    """Load the weights of torchvision's `name` for ImageNet into `net`, or its backbone, in place.

    A classifier for other classes keeps its fresh weights. Raises `InputError` if the weights
    cannot be downloaded.
    """
    weights = models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        found = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # no network, a broken file, a full or read-only disk
        why = f"could not be downloaded ({' '.join(str(error).split())[:200]})"
        line = f"pretrained = True: torchvision's {weights} are not there and {why}"
        raise InputError(line) from error
    net = getattr(net, "backbone", net)
    fresh = net.state_dict()
    fits = {key: found[key].shape == value.shape for key, value in fresh.items()}
    net.load_state_dict({key: found[key] if fits[key] else fresh[key] for key in fresh})
