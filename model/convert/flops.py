"""Count the arithmetic of the network, to express a measured speed in FLOP/s. Knows no torch."""

from __future__ import annotations

from model.config import LEVELS, UNetConfig


def count_flops(config: UNetConfig, height: int, width: int) -> int:
    """Count the floating-point operations of one window, 2 per multiply-add.

    Only convolutions are counted: biases, ReLUs and poolings add about 0.1%. `UNetConfig()` at
    512×512 takes 385.3e9.

    Args:
        height, width: of the network's input, in pixels.
    """
    lost = 0 if config.padding else 2  # pixels that a 3×3 convolution takes off height and width
    total = 0

    def add_convolution(inputs: int, outputs: int, kernel: int) -> None:
        nonlocal total, height, width
        if kernel == 3:
            height, width = height - lost, width - lost
        total += 2 * inputs * outputs * kernel**2 * height * width

    def add_double_convolution(inputs: int, outputs: int) -> None:
        add_convolution(inputs, outputs, 3)
        add_convolution(outputs, outputs, 3)

    features = [config.base_features * 2**level for level in range(LEVELS + 1)]
    inputs = config.in_channels
    for outputs in features[:-1]:
        add_double_convolution(inputs, outputs)
        height, width, inputs = height // 2, width // 2, outputs
    add_double_convolution(inputs, features[-1])
    for high, low in zip(features[:0:-1], features[-2::-1], strict=True):
        height, width = height * 2, width * 2
        add_convolution(high, low, 1)  # 2×2 with stride 2: one tap reaches each output pixel
        add_double_convolution(high, low)
    add_convolution(features[0], config.out_channels, 1)
    return total
