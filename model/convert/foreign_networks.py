"""Networks of other implementations that equal `model.unet.UNet`, and how their tensors map to it.

Each conversion is exact: the result computes the same logits, up to rounding, if the other code is
unchanged. A tensor without a counterpart is an error, because it belongs to a variant.

At inference, batch normalization is a factor and an offset per channel. Before a ReLU it is folded
into the preceding convolution. After a ReLU it is folded into the layers that read its result; see
`_fold_forward`.

Knows tensors and names; no files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from model.config import LEVELS
from model.errors import CheckpointError

State = dict[str, Tensor]
"""Tensors by state-dict name."""

_ADVICE = "export it where its code is, with torch.onnx.export, and import the .onnx file"

_EPSILON = 1e-5
"""Torch's default for batch normalization. A state dict does not contain it."""


@dataclasses.dataclass(frozen=True)
class Family:
    """An implementation whose networks are converted.

    Attributes:
        name: of the implementation.
        marker: name of a tensor that identifies it.
        convert: from its state dict to that of `model.unet.UNet`.
        paddings: of the 3×3 convolutions that its code can have.
        default_padding: None if neither is more likely.
        pooling_varies: versions of its code pool by maximum and by mean.
        output: what its code applies to the logits; "any" if it leaves that to the caller.
    """

    name: str
    marker: str
    convert: Callable[[State], State]
    paddings: tuple[int, ...] = (1,)
    default_padding: int | None = 1
    pooling_varies: bool = False
    output: Literal["softmax", "sigmoid", "any"] = "any"


def replace_softmax(state: State) -> State:
    """Replace a softmax over background and foreground by an equal sigmoid of one output.

    The softmax of two logits is the sigmoid of their difference.
    """
    weight, bias = state["final_conv.weight"], state["final_conv.bias"]
    return {
        **state,
        "final_conv.weight": weight[1:] - weight[:1],
        "final_conv.bias": bias[1:] - bias[:1],
    }


class _Source:
    """A state dict from which every tensor must be taken.

    Args:
        family: name of the implementation, for messages.
    """

    def __init__(self, state: State, family: str) -> None:
        self._left = {
            name: tensor for name, tensor in state.items() if not name.endswith("_tracked")
        }
        self._family = family

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str) -> Tensor:
        """Take a tensor.

        Raises:
            CheckpointError: it is missing.
        """
        try:
            return self._left.pop(name)
        except KeyError:
            raise CheckpointError(
                f"{self._family}: the state dict is incomplete: {name} is missing"
            ) from None

    def take_convolution(self, source: str, target: str) -> State:
        """Take weight and bias of a layer, the bias being 0 if it has none."""
        weight = self.take(f"{source}.weight")
        has_bias = f"{source}.bias" in self
        bias = self.take(f"{source}.bias") if has_bias else torch.zeros(weight.shape[:1])
        return {f"{target}.weight": weight, f"{target}.bias": bias}

    def take_norm(self, name: str, features: int) -> tuple[Tensor, Tensor]:
        """Take a batch normalization: its factor and offset, y = γ(x - μ)/√(σ² + ε) + β."""
        kinds = ("weight", "bias", "running_mean", "running_var")
        tensors = [self.take(f"{name}.{kind}") for kind in kinds]
        if any(tensor.shape != (features,) for tensor in tensors):
            raise CheckpointError(f"{self._family}: {name} should have {features} features")
        weight, bias, mean, variance = tensors
        scale = weight / (variance + _EPSILON).sqrt()
        return scale, bias - mean * scale

    def take_normalized(self, convolution: str, norm: str, target: str) -> State:
        """Take a convolution and the batch normalization that follows it, as one convolution."""
        weight, bias = self.take_convolution(convolution, target).values()
        scale, shift = self.take_norm(norm, len(weight))
        return {
            f"{target}.weight": weight * scale.view(-1, 1, 1, 1),
            f"{target}.bias": bias * scale + shift,
        }

    def finish(self) -> None:
        """Check that every tensor was taken.

        Raises:
            CheckpointError: one was not.
        """
        if self._left:
            raise CheckpointError(
                f"{self._family}: its code was changed, so it cannot be converted: the network "
                f"has {sorted(self._left)[0]!r}, which the unchanged code does not have"
            )


def _convert_annotated(state: State) -> State:
    return state  # the same names; shapes and missing tensors are checked by `infer_architecture`


def _convert_milesial(state: State) -> State:
    """Convert milesial/Pytorch-UNet. It concatenates the skip first, `UNet` the up-sampled half."""
    source = _Source(state, "milesial/Pytorch-UNet")
    if "up1.up.weight" not in source:
        raise CheckpointError(
            "milesial/Pytorch-UNet with bilinear=True interpolates between pixels, which this "
            f"network cannot express, so its weights cannot be converted; {_ADVICE}"
        )
    converted: State = {}
    stages = ["inc", *(f"down{level}.maxpool_conv.1" for level in range(1, 5))]
    stages += [f"up{level}.conv" for level in range(1, 5)]
    for stage, target in zip(stages, _DOUBLES, strict=True):
        for index, layer in ((0, "first"), (3, "second")):
            name = f"{stage}.double_conv"
            converted |= source.take_normalized(
                f"{name}.{index}", f"{name}.{index + 1}", f"{target}.{layer}"
            )
    for level in range(LEVELS):
        converted |= source.take_convolution(f"up{level + 1}.up", f"up_sample.{level}.up")
        first = f"up_conv.{level}.first.weight"
        skip, upsampled = converted[first].chunk(2, dim=1)
        converted[first] = torch.cat([upsampled, skip], dim=1)
    converted |= source.take_convolution("outc.conv", "final_conv")
    source.finish()
    is_softmax = len(converted["final_conv.bias"]) == 2
    return replace_softmax(converted) if is_softmax else converted


def _convert_mateuszbuda(state: State) -> State:
    """Convert the U-Net of mateuszbuda/brain-segmentation-pytorch, which is on torch hub."""
    source = _Source(state, "mateuszbuda/brain-segmentation-pytorch")
    converted: State = {}
    stages = [(f"encoder{level}", f"enc{level}") for level in range(1, 5)]
    stages += [("bottleneck", "bottleneck")]
    stages += [(f"decoder{level}", f"dec{level}") for level in range(4, 0, -1)]
    for (stage, name), target in zip(stages, _DOUBLES, strict=True):
        for index, layer in ((1, "first"), (2, "second")):
            prefix = f"{stage}.{name}"
            converted |= source.take_normalized(
                f"{prefix}conv{index}", f"{prefix}norm{index}", f"{target}.{layer}"
            )
    for level in range(LEVELS):
        converted |= source.take_convolution(f"upconv{LEVELS - level}", f"up_sample.{level}.up")
    converted |= source.take_convolution("conv", "final_conv")
    source.finish()
    return converted


def _convert_jvanvugt(state: State) -> State:
    """Convert jvanvugt/pytorch-unet, whose batch normalization, if any, follows the ReLU."""
    source = _Source(state, "jvanvugt/pytorch-unet")
    if "up_path.0.up.1.weight" in source:
        raise CheckpointError(
            "jvanvugt/pytorch-unet with up_mode='upsample' interpolates between pixels, which this "
            f"network cannot express, so its weights cannot be converted; {_ADVICE}"
        )
    depth = sum(f"down_path.{level}.block.0.weight" in source for level in range(20))
    if depth != LEVELS + 1:
        raise CheckpointError(
            f"jvanvugt/pytorch-unet with depth={depth}: this network has depth {LEVELS + 1}, so "
            f"its weights cannot be converted; {_ADVICE}"
        )
    has_norms = "down_path.0.block.2.running_mean" in source
    converted: State = {}
    norms: dict[str, tuple[Tensor, Tensor]] = {}
    stages = [f"down_path.{level}.block" for level in range(5)]
    stages += [f"up_path.{level}.conv_block.block" for level in range(4)]
    for stage, target in zip(stages, _DOUBLES, strict=True):
        for index, layer in ((0, "first"), (3 if has_norms else 2, "second")):
            name = f"{target}.{layer}"
            converted |= source.take_convolution(f"{stage}.{index}", name)
            if has_norms:
                features = len(converted[f"{name}.weight"])
                norms[name] = source.take_norm(f"{stage}.{index + 2}", features)
    for level in range(LEVELS):
        converted |= source.take_convolution(f"up_path.{level}.up", f"up_sample.{level}.up")
    converted |= source.take_convolution("last", "final_conv")
    source.finish()
    return _fold_forward(converted, norms) if has_norms else converted


def _fold_forward(state: State, norms: dict[str, tuple[Tensor, Tensor]]) -> State:
    """Fold batch normalization that follows a ReLU into the layers that read its result.

    A factor moves into the weights of the next layer. An offset cannot move into its bias: zero
    padding surrounds the normalized features, and a transposed convolution weights its four pixels
    differently. So every convolution gets a further feature that is 1 everywhere, whose weights are
    what the offsets contribute. Padding surrounds it by zeros, too. The base features grow by one.

    Args:
        state: under the names of `model.unet.UNet`, without normalization.
        norms: convolution -> factor and offset of what follows its ReLU.

    Raises:
        CheckpointError: a factor before a pooling is negative: the maximum would be a minimum.
    """
    for level in range(LEVELS):
        if (norms[f"down_conv.{level}.second"][0] < 0).any():
            raise CheckpointError(
                "jvanvugt/pytorch-unet with batch_norm=True: a normalization before a pooling has "
                "a negative factor, which this network cannot express, so it cannot be converted"
            )
    base = len(state["down_conv.0.first.bias"])
    result: State = {}
    for name, sources in _list_inputs().items():
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        is_transposed = name.endswith(".up")
        if is_transposed:
            weight = weight.transpose(0, 1)  # it is (in, out, h, w)
        groups = [
            norms.get(source) or _make_identity(len(state[f"{source}.bias"])) for source in sources
        ]
        weight = _append_inputs(weight, groups, base)
        if name != "final_conv":
            more = torch.zeros(len(bias) // base)
            if not is_transposed:
                more[0] = 1
            weight = torch.cat([weight, weight.new_zeros(len(more), *weight.shape[1:])])
            bias = torch.cat([bias, more])
        result[f"{name}.weight"] = (
            weight.transpose(0, 1) if is_transposed else weight
        ).contiguous()
        result[f"{name}.bias"] = bias
    return result


def _list_inputs() -> dict[str, tuple[str, ...]]:
    """List the layers of `model.unet.UNet`, each with the layers whose results it concatenates.

    The image has no layer, so the first list is empty.
    """
    inputs: dict[str, tuple[str, ...]] = {}
    previous: tuple[str, ...] = ()
    for block in _DOUBLES:
        if block.startswith("up_conv."):
            level = int(block.removeprefix("up_conv."))
            inputs[f"up_sample.{level}.up"] = previous
            previous = (f"up_sample.{level}.up", f"down_conv.{LEVELS - 1 - level}.second")
        inputs[f"{block}.first"] = previous
        inputs[f"{block}.second"] = (f"{block}.first",)
        previous = (f"{block}.second",)
    inputs["final_conv"] = previous
    return inputs


def _make_identity(features: int) -> tuple[Tensor, Tensor]:
    return torch.ones(features), torch.zeros(features)


def _append_inputs(weight: Tensor, groups: Iterable[tuple[Tensor, Tensor]], base: int) -> Tensor:
    """Apply factors to the weights (out, in, h, w), and append the weights of the new features.

    Args:
        groups: factor and offset of each concatenated input; none if the input is the image.
        base: base features before. A result of n features gets n / base more; the first is 1.
    """
    parts, start = [], 0
    for factor, offset in groups:
        part = weight[:, start : start + len(factor)]
        start += len(factor)
        constant = (part * offset.view(-1, 1, 1)).sum(1, keepdim=True)
        unused = weight.new_zeros(len(weight), len(factor) // base - 1, *weight.shape[2:])
        parts += [part * factor.view(-1, 1, 1), constant, unused]
    return torch.cat(parts, dim=1) if parts else weight


_DOUBLES = (
    *(f"down_conv.{level}" for level in range(LEVELS)),
    "middle_conv",
    *(f"up_conv.{level}" for level in range(LEVELS)),
)
"""The double convolutions of `model.unet.UNet`, in the order of the data."""

FAMILIES = (
    Family(
        "the annotated implementation (labml.ai)",
        "down_conv.0.first.weight",
        _convert_annotated,
        paddings=(0, 1),
    ),
    Family(
        "milesial/Pytorch-UNet", "inc.double_conv.0.weight", _convert_milesial, output="softmax"
    ),
    Family(
        "mateuszbuda/brain-segmentation-pytorch",
        "encoder1.enc1conv1.weight",
        _convert_mateuszbuda,
        output="sigmoid",
    ),
    Family(
        "jvanvugt/pytorch-unet",
        "down_path.0.block.0.weight",
        _convert_jvanvugt,
        paddings=(0, 1),
        default_padding=None,
        pooling_varies=True,
    ),
)
"""The implementations whose networks are converted."""

_OTHERS = (
    ("segmentation_models_pytorch", ("segmentation_head.0.",)),
    ("MONAI's BasicUNet", ("upcat_4.",)),
    ("MONAI's UNet", (".conv.unit0.conv.weight", ".submodule.")),
    ("MONAI's DynUNet", ("input_block.conv1.conv.",)),
    ("nnU-Net", ("decoder.seg_layers.", "conv_blocks_context.")),
    ("torchvision's segmentation models", ("backbone.body.", "backbone.conv1.", "backbone.0.0.")),
)
"""Implementations of other networks, and a part of a tensor's name that identifies each."""


def describe_unknown(names: Iterable[str]) -> str:
    """Say which network a state dict has that is not converted, and what to do."""
    names = list(names)
    for other, parts in _OTHERS:
        if any(part in name for name in names for part in parts):
            return (
                f"it is a network of {other}, which has other layers than the U-Net of this "
                f"project, so its weights cannot be converted; {_ADVICE}"
            )
    known = ", ".join(f"{each.name} ({each.marker!r})" for each in FAMILIES)
    return (
        f"unrecognised architecture: the first tensor is {names[0]!r}; recognised are {known}; "
        f"weights of other networks cannot be converted; {_ADVICE}"
    )
