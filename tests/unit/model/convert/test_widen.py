"""Widening keeps the function of a network, and narrowing undoes it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import Checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.convert.widen import narrow, narrow_checkpoint, widen, widen_checkpoint
from model.errors import ConfigError
from model.unet import UNet


@pytest.mark.parametrize("factor", [1, 2, 3])
@torch.no_grad()
def test_widening_keeps_the_function(factor: int) -> None:
    torch.manual_seed(0)
    first = UNet(3, 2, base_features=4)
    wide = UNet(3, 2, base_features=4 * factor)
    wide.load_state_dict(widen(first.state_dict(), first.config, wide.config))
    inputs = torch.randn(2, 3, 48, 64)
    assert torch.allclose(wide(inputs), first(inputs), atol=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_narrowing_undoes_widening(factor: int) -> None:
    torch.manual_seed(0)
    first = UNet(3, 2, base_features=4)
    wider = UNetConfig(3, 2, 4 * factor)
    state = widen(first.state_dict(), first.config, wider)
    again = narrow(state, wider, first.config)
    assert again.keys() == state.keys()
    for name, tensor in first.state_dict().items():
        assert torch.allclose(again[name], tensor, atol=1e-6), name
    with pytest.raises(ConfigError, match="base_features"):
        narrow(state, wider, UNetConfig(3, 2, 5))


@pytest.mark.parametrize("factor", [2, 4])
def test_weights_that_were_not_widened_are_not_narrowed(factor: int) -> None:
    torch.manual_seed(0)
    wide = UNet(3, 2, base_features=16)
    narrower = UNetConfig(3, 2, 16 // factor)
    with pytest.raises(ConfigError, match=f"not widened from base_features {16 // factor}"):
        narrow(wide.state_dict(), wide.config, narrower)


def test_copies_that_diverged_a_little_are_narrowed() -> None:
    torch.manual_seed(0)
    first, wider = UNet(3, 2, base_features=4), UNetConfig(3, 2, 8)
    state = widen(first.state_dict(), first.config, wider)
    trained = {
        name: x + 0.1 * x.std(correction=0) * torch.randn_like(x) for name, x in state.items()
    }
    narrowed = narrow(trained, wider, first.config)
    for name, weight in first.state_dict().items():
        spread = float(weight.std(correction=0))
        assert torch.allclose(narrowed[name], weight, atol=0.6 * spread), name


def test_copies_differ_in_the_weights_that_read_them() -> None:
    first = UNet(3, 1, base_features=4)
    wide = UNet(3, 1, base_features=8)
    state = widen(first.state_dict(), first.config, wide.config)
    weight = state["down_conv.0.second.weight"]
    assert not torch.equal(weight[:, :4], weight[:, 4:])
    assert torch.allclose(
        weight[:4, :4] + weight[:4, 4:], first.state_dict()["down_conv.0.second.weight"]
    )


def test_widening_does_not_depend_on_the_order_of_the_tensors() -> None:
    first = UNet(3, 1, base_features=4)
    state, wider = first.state_dict(), UNetConfig(3, 1, 8)
    wide = widen(state, first.config, wider)
    again = widen(dict(reversed(state.items())), first.config, wider)
    assert all(torch.equal(again[name], tensor) for name, tensor in wide.items())


@pytest.mark.parametrize(
    "wider",
    [UNetConfig(3, 1, 6), UNetConfig(3, 1, 2), UNetConfig(3, 2, 8), UNetConfig(3, 1, 8, padding=0)],
)
def test_networks_that_differ_in_more_than_width_are_rejected(wider: UNetConfig) -> None:
    first = UNet(3, 1, base_features=4)
    with pytest.raises(ConfigError, match="base_features"):
        widen(first.state_dict(), first.config, wider)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_checkpoint_is_narrowed_to_what_it_was_widened_from(
    dtype: type[np.floating[Any]], factor: int
) -> None:
    first = draft(8, dtype)
    again = narrow_checkpoint(widen_checkpoint(first, 8 * factor), 8)
    assert again.architecture == first.architecture
    for name, array in first.state.items():
        assert again.state[name].dtype == dtype
        np.testing.assert_allclose(
            again.state[name], array, rtol=float(np.finfo(dtype).eps), atol=1e-7
        )


@pytest.mark.parametrize("base_features", [1, 2, 4])
def test_checkpoint_that_was_not_widened_is_not_narrowed(base_features: int) -> None:
    with pytest.raises(ConfigError, match="not widened"):
        narrow_checkpoint(draft(8, np.float16), base_features)


def test_checkpoint_is_not_narrowed_below_what_it_was_widened_from() -> None:
    wide = widen_checkpoint(draft(8, np.float16), 16)
    with pytest.raises(ConfigError, match="not widened"):
        narrow_checkpoint(wide, 4)
    with pytest.raises(ConfigError, match="multiple"):
        narrow_checkpoint(wide, 5)


@pytest.mark.parametrize(
    "name", ["down_conv.0.first.weight", "up_sample.1.up.weight", "up_conv.2.first.bias"]
)
def test_checkpoint_that_was_trained_after_widening_is_not_narrowed(name: str) -> None:
    wide = widen_checkpoint(draft(8, np.float16), 16)
    trained = wide.state[name].copy()
    trained.flat[0] += 0.01
    state = {**wide.state, name: trained}
    with pytest.raises(ConfigError, match=rf"trained since.*{name}"):
        narrow_checkpoint(dataclasses.replace(wide, state=state), 8)


def draft(base_features: int, dtype: type[np.floating[Any]]) -> Checkpoint:
    torch.manual_seed(0)
    network = UNet(3, 2, base_features=base_features)
    state = {name: tensor.numpy().astype(dtype) for name, tensor in network.state_dict().items()}
    return Checkpoint("draft", network.config, PreprocessConfig(), state)
