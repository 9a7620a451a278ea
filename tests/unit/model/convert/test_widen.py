"""A widened network computes what the narrow one did."""

import pytest
import torch

from model.config import UNetConfig
from model.convert.widen import narrow, widen
from model.errors import ConfigError
from model.unet import UNet


@pytest.mark.parametrize("factor", [1, 2, 3])
@torch.no_grad()
def test_the_function_is_kept(factor):
    torch.manual_seed(0)
    narrow = UNet(3, 2, base_features=4)
    wide = UNet(3, 2, base_features=4 * factor)
    wide.load_state_dict(widen(narrow.state_dict(), narrow.config, wide.config))
    inputs = torch.randn(2, 3, 48, 64)
    assert torch.allclose(wide(inputs), narrow(inputs), atol=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_what_was_widened_is_narrowed_to_what_it_was(factor):
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


def test_the_copies_are_not_alike():
    narrow = UNet(3, 1, base_features=4)
    wide = UNet(3, 1, base_features=8)
    state = widen(narrow.state_dict(), narrow.config, wide.config)
    weight = state["down_conv.0.second.weight"]
    assert not torch.equal(weight[:, :4], weight[:, 4:])
    assert torch.allclose(
        weight[:4, :4] + weight[:4, 4:], narrow.state_dict()["down_conv.0.second.weight"]
    )


@pytest.mark.parametrize(
    "wider",
    [UNetConfig(3, 1, 6), UNetConfig(3, 1, 2), UNetConfig(3, 2, 8), UNetConfig(3, 1, 8, padding=0)],
)
def test_what_is_no_wider_version_is_refused(wider):
    narrow = UNet(3, 1, base_features=4)
    with pytest.raises(ConfigError, match="base_features"):
        widen(narrow.state_dict(), narrow.config, wider)
