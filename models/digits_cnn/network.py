"""The network: ordinary, residual, depthwise and pointwise convolutions, both poolings and a linear head."""

from __future__ import annotations

import torch
from torch import nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    """Return a same-size convolution without bias and its BatchNorm.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Odd kernel size.
        groups: `inputs` makes it depthwise.
    """
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Two convolutions with a shortcut: relu(x + f(x)), [n, channels, h, w] to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv_bn(channels, channels)
        self.second = conv_bn(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return relu(x + f(x))."""
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class DigitsCNN(nn.Module):
    """Digits to logits: [n, 1, 8, 8] -> [n, 10].

    Args:
        width: Channels of the first half; the second half has twice as many.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = conv_bn(1, width)
        self.block1 = Residual(width)
        self.depthwise = conv_bn(width, width, groups=width)
        self.pointwise = conv_bn(width, 2 * width, kernel=1)
        self.block2 = Residual(2 * width)
        self.dropout = nn.Dropout(0.3)
        self.hidden = nn.Linear(8 * width, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits [n, 10] of images [n, 1, 8, 8]."""
        x = self.block1(torch.relu(self.stem(image)))
        x = nn.functional.max_pool2d(x, 2)
        x = torch.relu(self.pointwise(torch.relu(self.depthwise(x))))
        x = nn.functional.avg_pool2d(self.block2(x), 2)
        x = torch.relu(self.hidden(self.dropout(x.flatten(1))))
        return self.head(self.dropout(x))
