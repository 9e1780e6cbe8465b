"""torchvision's nets for the registry, and those that are made of their parts.

They take colour images of at least the size that torchvision tests them with. Of GoogLeNet there
are no auxiliary classifiers. torchvision is imported when the first of them is built.
"""

import torch
from torch import Tensor, nn

from prunestudy.errors import InputError, require

Shape = tuple[int, int, int]
# Least height and width: `min_size` of torchvision's weights.
_LEAST = {"vgg16": 32, "googlenet": 15, "alexnet": 63}
# The images that the nets were made for, with which the last pooling changes nothing.
_SIDE = 224


def torchvision_net(name: str, shape: Shape, num_classes: int) -> nn.Module:
    """The net that torchvision calls `name`, freshly initialised.

    Maps (batch, 3, height, width) to logits (batch, num_classes). Raises `InputError` for images
    that are not in colour or too small.
    """
    import torchvision.models

    _require_colour(name, shape)
    # The pretrained GoogLeNet has it, so that one that is read back must have it as well.
    own = {"aux_logits": False, "init_weights": True, "transform_input": True}
    more = own if name == "googlenet" else {}
    net = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **more)
    if name in ("vgg16", "alexnet") and shape[1:] == (_SIDE, _SIDE):
        net.avgpool = nn.Identity()  # its backward pass is not deterministic on CUDA
    return net


def alexnet_grouped(shape: Shape, num_classes: int) -> nn.Module:
    """AlexNet as Krizhevsky, Sutskever, Hinton (NIPS 2012) have it, on torchvision's module.

    96, 256, 384, 384 and 256 filters, the second, fourth and fifth convolution in two groups;
    without local response normalisation, which mixes channels. Input and output as above.
    """
    net = torchvision_net("alexnet", shape, num_classes)
    net.features[0] = nn.Conv2d(3, 96, 11, stride=4, padding=2)
    net.features[3] = nn.Conv2d(96, 256, 5, padding=2, groups=2)
    net.features[6] = nn.Conv2d(256, 384, 3, padding=1)
    net.features[8] = nn.Conv2d(384, 384, 3, padding=1, groups=2)
    net.features[10] = nn.Conv2d(384, 256, 3, padding=1, groups=2)
    return net


def mobilenet_v2_cifar(shape: Shape, num_classes: int) -> nn.Module:
    """MobileNetV2 for 32x32: stride 1 in the first convolution and in the first wider stage.

    What is left for the classifier is 4x4, as with most nets for CIFAR. Input and output as above.
    """
    from torchvision.models import MobileNetV2

    _require_colour("mobilenet_v2_cifar", shape)
    # Expansion, channels, blocks, stride of the first: table 2 of Sandler et al. (CVPR 2018), but
    # for the second stride.
    stages = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
    stages += [(6, 160, 3, 2), (6, 320, 1, 1)]
    net = MobileNetV2(num_classes, inverted_residual_setting=[list(stage) for stage in stages])
    net.features[0][0].stride = (1, 1)
    return net


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ on ResNet-50: Chen et al., "Encoder-Decoder with Atrous ...", ECCV 2018.

    Features at 1/16 of the size through torchvision's ASPP (rates 6, 12, 18), four times larger,
    beside 48 channels made of those of the first stage; two 3x3 convolutions, a classifier, and
    the size of the input again. Maps (batch, 3, height, width) to logits (batch, num_classes,
    height, width). Raises `InputError` for images that are not in colour.
    """

    def __init__(self, shape: Shape = (3, 513, 513), num_classes: int = 21) -> None:
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
        """Logits of every pixel; see the class."""
        net = self.backbone
        low = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        deep = self.aspp(net.layer4(net.layer3(net.layer2(low))))
        low = self.low(low)
        return _to_size(self.decoder(torch.cat([_to_size(deep, low), low], 1)), x)


def use_pretrained(net: nn.Module, weights: str, head: str, part: str = "") -> None:
    """Load torchvision's `weights` ("ResNet50_Weights.IMAGENET1K_V1") into `net`, in place.

    Into its submodule `part` if named. The layer `head` stays as it is where the classes are
    others; auxiliary classifiers are left out. Raises `InputError` where they cannot be had.
    """
    from torchvision.models import get_weight

    try:
        found = get_weight(weights).get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # no network, a broken file, a full or read-only disk
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"pretrained = True: torchvision's {weights} are not there and could not be "
            f"downloaded ({why[:200]})"
        ) from error
    inner = net.get_submodule(part)
    own = inner.state_dict()
    if head in dict(inner.named_modules()) and any(
        name.startswith(f"{head}.") and own[name].shape != found[name].shape for name in own
    ):
        found |= {name: own[name] for name in own if name.startswith(f"{head}.")}
    inner.load_state_dict({name: found[name] for name in own})


def _require_colour(name: str, shape: Shape) -> None:
    least = _LEAST.get(name, 1)
    right = shape[0] == 3 and min(shape[1:]) >= least
    require(right, "shape", shape, f"{name} needs 3 channels and at least {least}x{least} pixels")


def _convolution(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _to_size(x: Tensor, like: Tensor) -> Tensor:
    size = like.shape[-2:]
    return nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
