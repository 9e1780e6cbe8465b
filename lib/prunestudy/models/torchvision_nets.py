"""Nets from torchvision, nets made of its parts, and its weights for ImageNet.

All take colour images (batch, 3, height, width) and raise `InputError` for other channels and for
images below torchvision's minimum. torchvision is imported when the first of them is built.
"""

import torch
from torch import Tensor, nn

from prunestudy.errors import InputError, require

# Smallest height and width: `min_size` of torchvision's weights.
_LEAST = {"vgg16": 32, "googlenet": 15, "alexnet": 63}


def torchvision_net(name: str, shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """torchvision's net `name`, freshly initialised; GoogLeNet without auxiliary classifiers.

    Maps images to logits (batch, num_classes).
    """
    import torchvision.models

    _require_colour(name, shape)
    more = {}
    if name == "googlenet":  # with the input transform that its pretrained weights expect
        more = {"aux_logits": False, "init_weights": True, "transform_input": True}
    net = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **more)
    if name in ("vgg16", "alexnet") and shape[1:] == (224, 224):
        # Adaptive pooling changes nothing at this size; its backward pass varies on CUDA.
        net.avgpool = nn.Identity()
    return net


def alexnet_grouped(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """AlexNet with the groups of Krizhevsky, Sutskever and Hinton (NIPS 2012).

    96, 256, 384, 384 and 256 filters; convolutions 2, 4 and 5 have two groups. Local response
    normalisation is left out, since it mixes channels. Maps images to logits (batch, num_classes).
    """
    net = torchvision_net("alexnet", shape, num_classes)
    net.features[0] = nn.Conv2d(3, 96, 11, stride=4, padding=2)
    net.features[3] = nn.Conv2d(96, 256, 5, padding=2, groups=2)
    net.features[6] = nn.Conv2d(256, 384, 3, padding=1)
    net.features[8] = nn.Conv2d(384, 384, 3, padding=1, groups=2)
    net.features[10] = nn.Conv2d(384, 256, 3, padding=1, groups=2)
    return net


def mobilenet_v2_cifar(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """MobileNetV2 for 32x32 images: its first two strides are 1, which leaves a 4x4 map.

    Sandler et al., "MobileNetV2", CVPR 2018. Maps images to logits (batch, num_classes).
    """
    from torchvision.models import MobileNetV2

    _require_colour("mobilenet_v2_cifar", shape)
    # Expansion, channels, blocks, first stride (table 2; the second stage has stride 2 there).
    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1]]
    stages += [[6, 160, 3, 2], [6, 320, 1, 1]]
    net = MobileNetV2(num_classes, inverted_residual_setting=stages)
    net.features[0][0].stride = (1, 1)
    return net


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ on ResNet-50 for segmentation.

    Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018: torchvision's ASPP
    (rates 6, 12, 18) on features at 1/16 of the size, upsampled and joined with 48 channels from
    the first stage; then two 3x3 convolutions and a classifier. Maps images to logits
    (batch, num_classes, height, width).
    """

    def __init__(self, shape: tuple[int, int, int] = (3, 513, 513), num_classes: int = 21):
        from torchvision.models import resnet50
        from torchvision.models.segmentation.deeplabv3 import ASPP

        super().__init__()
        _require_colour("deeplabv3plus_resnet50", shape)
        self.backbone = resnet50(replace_stride_with_dilation=[False, False, True])
        self.backbone.fc = nn.Identity()
        self.aspp = ASPP(2048, (6, 12, 18))
        self.low = nn.Sequential(*_convolution(256, 48, 1))
        self.decoder = nn.Sequential(
            *_convolution(256 + 48, 256, 3),
            *_convolution(256, 256, 3),
            nn.Conv2d(256, num_classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes, height, width) of images (batch, 3, height, width)."""
        net = self.backbone
        low = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        deep = self.aspp(net.layer4(net.layer3(net.layer2(low))))
        low = self.low(low)
        return _resized(self.decoder(torch.cat([_resized(deep, low), low], 1)), x)


def use_pretrained(net: nn.Module, name: str) -> None:
    """Load the weights of torchvision's `name` for ImageNet into `net`, or its backbone, in place.

    A classifier for other classes keeps its fresh weights. Raises `InputError` if the weights
    cannot be downloaded.
    """
    from torchvision.models import get_model_weights

    weights = get_model_weights(name)["IMAGENET1K_V1"]
    try:
        found = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # no network, a broken file, a full or read-only disk
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"pretrained = True: torchvision's {weights} are not there and could not be "
            f"downloaded ({why[:200]})"
        ) from error
    net = getattr(net, "backbone", net)
    own = net.state_dict()
    fits = {key: found[key].shape == value.shape for key, value in own.items()}
    net.load_state_dict({key: found[key] if fits[key] else own[key] for key in own})


def _require_colour(name: str, shape: tuple[int, int, int]) -> None:
    least = _LEAST.get(name, 1)
    right = shape[0] == 3 and min(shape[1:]) >= least
    require(right, "shape", shape, f"{name} needs 3 channels and at least {least}x{least} pixels")


def _convolution(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _resized(x: Tensor, like: Tensor) -> Tensor:
    size = like.shape[-2:]
    return nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
