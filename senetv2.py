"""Chapter 1: the network.  A gate looks at the whole image and turns channels down.

A convolutional network describes an image by feature maps: at each place, C numbers (the
channels), each of which responds to some pattern.  A convolution sees a small neighbourhood.  The
gate averages each channel over the whole image, and decides how much of each channel to keep.

For a feature map x of shape (B, C, H, W), with reduction r and cardinality K:

    squeeze    z = mean of x over H and W                            (B, C)
    excite     u = relu(W1 z + b1)                                   (B, C/r)      SENet
               u = concat of relu(W1k z + b1k) for k = 1..K          (B, K*C/r)    SENetV2
               s = sigmoid(W2 u + b2)                                (B, C)
    scale      y = x * s                                             (B, C, H, W)

The K hidden layers of SENetV2 all read the same z, and a ReLU works on each number alone.  So we
can stack their matrices W11..W1K and get one layer with the same output: SENetV2 with r = 32 and
K = 4 *is* SENet with r = 8, in function, in parameters and, from the same weights, in training,
wherever r divides C, as in a ResNet.  That one layer is what we run.  A test in test_senetv2.py
keeps the K layers apart, as the paper draws them, and compares the two.

Papers: SENetV2 (arXiv 2311.10807), SENet (arXiv 1709.01507), ResNet (arXiv 1512.03385).
Where the sources differ: the text and the figure of SENetV2 say y = x * s, but its released Keras
code returns x + x * s.  We follow the text; residual=True follows the code.  As in that code, the
dense layers have biases and C/r is rounded down.

    python -m tools.table                 parameters and multiply-adds beside the paper's
"""
import inspect

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

# ---------------------------------------------------------------------------------------- The gates


class SqueezeExcitation(nn.Module):
    """The gate of SENet (arXiv 1709.01507, equations 2 to 4): (B, C, H, W) -> (B, C, H, W).

    channels      C of the input.
    reduction     r: the hidden layer has channels // reduction units; few, to be cheap.
    residual      return x + x * s, as the released SENetV2 code does, instead of x * s.
    cardinality   K: the number of such hidden layers side by side; 1 is SENet.

    Raises ValueError for a hidden layer without units, AssertionError for an x without four axes.
    """

    def __init__(self, channels, reduction=32, *, residual=False, cardinality=1):
        super().__init__()
        if not (isinstance(reduction, int) and 1 <= reduction <= channels):
            raise ValueError(f"reduction is {reduction}; it must be a whole number between 1 and "
                             f"the number of channels, {channels}")
        if not (isinstance(cardinality, int) and cardinality >= 1):
            raise ValueError(f"cardinality is {cardinality}; it must be a whole number, 1 or more")

        width = cardinality * (channels // reduction)
        self.reduce = nn.Linear(channels, width)                # W1, or W11..W1K stacked
        self.expand = nn.Linear(width, channels)                # W2
        self.residual = residual

    def scale(self, x):
        """The factor alone, (B, C, 1, 1): s in (0, 1), or 1 + s in (1, 2) with residual=True."""
        # torch's assert, because Python's would stop torch.fx
        torch._assert(x.dim() == 4, f"a gate maps (B, C, H, W), not {x.shape}")
        # The same as x.mean((2, 3)), which would slow a training step at 224 pixels by 8% (H200).
        # In train.py, maps lie in memory channels last, so this view of them is contiguous.
        z = x.permute(0, 2, 3, 1).mean((1, 2))                  # squeeze -> (B, C)
        u = F.relu(self.reduce(z))                              # all K layers at once -> (B, K*C/r)
        s = torch.sigmoid(self.expand(u))[..., None, None]      # excite -> (B, C, 1, 1)
        return 1 + s if self.residual else s

    def forward(self, x):
        return x * self.scale(x)


class AggregatedSqueezeExcitation(SqueezeExcitation):
    """The gate of SENetV2 (arXiv 2311.10807, section 3): K hidden layers, run as one wide layer.

    So it is SqueezeExcitation with another default, K = 4, and the same arguments and shapes.
    Its initial weights have the same distribution as those of K separate layers: their range in
    nn.Linear depends on the number of inputs alone, which is C in both cases.
    """

    def __init__(self, channels, reduction=32, *, cardinality=4, residual=False):
        super().__init__(channels, reduction, residual=residual, cardinality=cardinality)


# -------------------------------------------------------------------------------------- The network

# To try a gate of your own, add it here: a module (B, C, H, W) -> (B, C, H, W).  Its constructor
# gets the number of channels, and those of reduction, cardinality and residual that it names.  If
# its forward counts calls, branches on values or uses random numbers of Python, pass
# --no-cuda-graph: on a GPU, a recording of its operations is replayed, without Python.
GATES = {"senet": SqueezeExcitation, "senetv2": AggregatedSqueezeExcitation}
OURS = ("resnet", *GATES)
PEERS = ("mobilenet_v2", "efficientnet_b0", "resnext50_32x4d", "convnext_tiny", "vit")
STEMS = ("imagenet", "cifar")


class GatedBottleneck(Bottleneck):
    """torchvision's bottleneck, with a gate between the last batch norm and the residual addition.

    The block computes a correction to its input, and the shortcut adds the input again, so that
    gradients reach early layers through the sum.  The first 1x1 convolution reduces the channels,
    which makes the 3x3 one cheap; the last restores them.  A batch norm brings each channel to mean
    0 and deviation 1 over the batch, then scales and shifts it by learnt numbers.

    conv1 to bn3, relu and downsample are torchvision's.  self.gate is set by build_model, after all
    else has been built, so that from one seed all networks draw the same convolutions.
    """

    def forward(self, x):                                       # (B, inplanes, H, W)
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))                # 1x1 -> (B, planes, H, W)
        out = self.relu(self.bn2(self.conv2(out)))              # 3x3 -> (B, planes, H', W')
        out = self.bn3(self.conv3(out))                         # 1x1 -> (B, 4*planes, H', W')
        gated = self.gate(out)                                  # out * s, of the same shape
        torch._assert(gated.shape == out.shape, "a gate returned another shape than it was given")
        return self.relu(gated + shortcut)


def build_model(name, num_classes=10, layers=(3, 4, 6, 3), stem="imagenet", reduction=32,
                cardinality=4, residual=False, image_size=32, zero_init=False, **options):
    """A network that maps images (B, 3, H, W) to logits (B, num_classes).

    A logit is a score: the larger, the more likely the class.  The whole network, with
    layers=(3, 4, 6, 3), the ImageNet stem, and images of 224x224 pixels (of 32x32):

        conv1, bn1, relu    7x7, stride 2           (B, 64, 112, 112)       (B, 64, 16, 16)
        maxpool             3x3, stride 2           (B, 64, 56, 56)         (B, 64, 8, 8)
        layer1              3 bottlenecks           (B, 256, 56, 56)        (B, 256, 8, 8)
        layer2              4, the first stride 2   (B, 512, 28, 28)        (B, 512, 4, 4)
        layer3              6, the first stride 2   (B, 1024, 14, 14)       (B, 1024, 2, 2)
        layer4              3, the first stride 2   (B, 2048, 7, 7)         (B, 2048, 1, 1)
        avgpool, flatten    mean over H and W       (B, 2048)               (B, 2048)
        fc                  one dense layer         (B, num_classes)        (B, num_classes)

    name       resnet, senet or senetv2; or one of PEERS, which use only num_classes and options
               (vit also image_size).
    layers     bottlenecks per stage: (3, 4, 6, 3) is ResNet-50, (1, 1, 1, 1) the paper's small one.
    stem       "imagenet": 7x7 with stride 2, then max-pooling; layer1 sees 32x32 images as 8x8.
               "cifar": 3x3 with stride 1 and no pooling; they stay 32x32.
    reduction, cardinality, residual    of the gates, as in AggregatedSqueezeExcitation; senet has
               one hidden layer, whatever the cardinality.
    image_size    pixels per side, which only vit must know.
    zero_init     start the last batch norm of each bottleneck at 0 (arXiv 1706.02677, section 5.1),
                  so that at first each block returns the ReLU of its shortcut.  In three epochs on
                  CIFAR-100, with our recipe, plain ResNet-50 gained about as much from this as from
                  gates (results/README.md, "The start").
    options    go to torchvision's constructor, for example norm_layer=... .

    Raises ValueError for an unknown name or stem, for layers that are not four positive numbers,
    and for a reduction or cardinality that leaves a gate without units.

    The trunk is torchvision's ResNet and keeps its parameter names.
    """
    if name not in OURS:
        return build_peer(name, num_classes, image_size, **options)
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; give one of {', '.join(STEMS)}")
    if len(layers) != 4 or not all(isinstance(n, int) and n > 0 for n in layers):
        raise ValueError(f"layers are {layers!r}; give four positive numbers, such as "
                         "(3, 4, 6, 3), which is ResNet-50, or (1, 1, 1, 1)")

    block = GatedBottleneck if name in GATES else Bottleneck
    model = ResNet(block, list(layers), num_classes, zero_init_residual=zero_init, **options)

    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()

    given = dict(reduction=reduction, cardinality=cardinality, residual=residual)
    for module in model.modules():
        if isinstance(module, GatedBottleneck):
            settings = {key: given[key] for key in gate_settings(name)}
            module.gate = GATES[name](module.conv3.out_channels, **settings)
    return model


def gate_settings(name):
    """Which of reduction, cardinality and residual the gate of network `name` has."""
    if name not in GATES:
        return set()
    known = {"reduction", "residual"} if name == "senet" else {  # senet has one hidden layer
        "reduction", "cardinality", "residual"}
    known -= getattr(GATES[name], "keywords", {}).keys()        # functools.partial has set these
    return known & inspect.signature(GATES[name]).parameters.keys()


# ------------------------------------------------------------------------ Networks to compare with


def patch_size(image_size):
    """Pixels per side of the patches into which vit cuts its images."""
    return 4 if image_size <= 64 else 16


def build_peer(name, num_classes, image_size, **options):
    """One of PEERS: a classification network of torchvision, by its name there, or "vit".

    vit is torchvision's VisionTransformer in the size of ViT-S: 21 M parameters, nearly as many as
    ResNet-50.

    Raises ValueError for an unknown name, and for an image size that the patches do not divide.
    """
    if name == "vit":
        patch = patch_size(image_size)
        if image_size % patch:
            raise ValueError(f"vit cuts images into patches of {patch}x{patch} pixels, and "
                             f"{image_size} is not a multiple of {patch}; give another image size")
        return torchvision.models.VisionTransformer(
            image_size, patch, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536,
            num_classes=num_classes, **options)

    if name in PEERS:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    raise ValueError(f"unknown model {name!r}; give one of {', '.join(OURS + PEERS)}")
