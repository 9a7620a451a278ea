"""How much arithmetic the network is: what a measured speed is divided by."""

from __future__ import annotations

from model.config import LEVELS, UNetConfig


def flops(config: UNetConfig, height: int, width: int) -> int:
    """Floating-point operations of one height × width window, 2 for each multiply-add.

    Of the convolutions alone: biases, ReLUs and poolings are a thousandth of it. 385.3e9 for
    `UNetConfig()` at 512×512.
    """
    lost = 0 if config.padding else 2  # pixels of height and width that a 3×3 convolution costs
    total = 0

    def convolve(inputs: int, outputs: int, kernel: int) -> None:
        nonlocal total, height, width
        if kernel == 3:
            height, width = height - lost, width - lost
        total += 2 * inputs * outputs * kernel**2 * height * width

    def double(inputs: int, outputs: int) -> None:
        convolve(inputs, outputs, 3)
        convolve(outputs, outputs, 3)

    features = [config.base_features * 2**level for level in range(LEVELS + 1)]
    inputs = config.in_channels
    for outputs in features[:-1]:
        double(inputs, outputs)
        height, width, inputs = height // 2, width // 2, outputs
    double(inputs, features[-1])
    for high, low in zip(features[:0:-1], features[-2::-1], strict=True):
        height, width = height * 2, width * 2
        convolve(high, low, 1)  # 2×2 with stride 2: each pixel it makes is reached by one tap
        double(high, low)
    convolve(features[0], config.out_channels, 1)
    return total
