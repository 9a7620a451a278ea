"""Imported networks must give the logits of the network they come from."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from app import cli
from model.checkpoint import load_checkpoint
from model.convert.import_weights import infer_architecture, read_state, to_unet_state_dict
from model.errors import CheckpointError
from model.unet import UNet


class DoubleConv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    def forward(self, x):
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(inputs, outputs))

    def forward(self, x):
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, inputs // 2, 2, stride=2)
        self.conv = DoubleConv(inputs, outputs)

    def forward(self, below, skip):
        return self.conv(torch.cat([skip, self.up(below)], dim=1))


class OutConv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return self.conv(x)


class Milesial(nn.Module):
    """The architecture of milesial/Pytorch-UNet with bilinear=False, from its description."""

    def __init__(self, classes, base):
        super().__init__()
        widths = [base * 2**level for level in range(5)]
        self.inc = DoubleConv(3, base)
        for level in range(4):
            setattr(self, f"down{level + 1}", Down(widths[level], widths[level + 1]))
            setattr(self, f"up{level + 1}", Up(widths[4 - level], widths[3 - level]))
        self.outc = OutConv(base, classes)

    def forward(self, x):
        skips = [self.inc(x)]
        for level in range(1, 5):
            skips.append(getattr(self, f"down{level}")(skips[-1]))
        x = skips.pop()
        for level in range(1, 5):
            x = getattr(self, f"up{level}")(x, skips.pop())
        return self.outc(x)


@pytest.fixture(params=[1, 2, 4])
def milesial(request):
    torch.manual_seed(request.param)
    network = Milesial(request.param, 4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, not as at the start
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.2, 2)
    return network.eval()


def test_milesial_maps_exactly(milesial, tmp_path):
    torch.save({**milesial.state_dict(), "mask_values": [0, 1]}, tmp_path / "theirs.pth")
    state = to_unet_state_dict(read_state(tmp_path / "theirs.pth"))
    ours = UNet.from_config(infer_architecture(state))
    ours.load_state_dict(state)
    x = torch.randn(1, 3, 48, 64)
    with torch.inference_mode():
        theirs, found = milesial(x), ours(x)
    if theirs.shape[1] == 2:
        assert torch.allclose(found.sigmoid()[:, 0], theirs.softmax(1)[:, 1], atol=1e-5)
    else:
        assert torch.allclose(found, theirs, atol=1e-4)


def test_milesial_with_bilinear_upsampling_is_refused(milesial):
    state = {name: t for name, t in milesial.state_dict().items() if ".up." not in name}
    with pytest.raises(CheckpointError, match="bilinear up-sampling cannot be mapped"):
        to_unet_state_dict(state)


@pytest.fixture
def annotated(tmp_path):
    torch.manual_seed(0)
    network = UNet(3, 1, base_features=4)
    path = tmp_path / "annotated.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.mark.parametrize("wrap", ["", "state_dict", "model"])
def test_import_gives_a_checkpoint_that_proves_itself(annotated, tmp_path, wrap, capsys):
    network, path = annotated
    if wrap:
        state = {f"module.{name}": value for name, value in network.state_dict().items()}
        torch.save({wrap: state, "epoch": 3}, path)
    arguments = ["import", str(path), "--out", str(tmp_path), "--name", "mine"]
    assert cli.main([*arguments, "--classes", "background", "cell", "--base-features", "4"]) == 0
    loaded = load_checkpoint(tmp_path / "mine.safetensors")
    assert loaded.architecture == network.config
    assert loaded.preprocess.classes == ("background", "cell")
    assert loaded.golden.image.shape == (256, 256, 3)
    for name, tensor in network.state_dict().items():
        assert np.array_equal(loaded.state[name], tensor.numpy()), name
    assert loaded.card["revision"]
    assert "unet serve --model mine" in capsys.readouterr().out
    assert cli.main(arguments) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["cell"], ["background,cell"], ["background", "cell"]])
def test_import_into_a_file_with_names_as_people_write_them(annotated, tmp_path, names):
    _, path = annotated
    out = tmp_path / "new" / "theirs.safetensors"
    assert cli.main(["import", str(path), "--out", str(out), "--classes", *names]) == 0
    assert load_checkpoint(out).preprocess.classes == ("background", "cell")


def test_values_between_the_percentiles_that_were_trained_with(annotated, tmp_path, capsys):
    out = tmp_path / "theirs.safetensors"
    command = ["import", str(annotated[1]), "--out", str(out), "--percentiles", "0", "100"]
    assert cli.main(command) == 2
    assert "--percentiles needs --intensity percentile" in capsys.readouterr().err
    assert cli.main([*command, "--intensity", "percentile"]) == 0
    assert load_checkpoint(out).preprocess.percentiles == (0, 100)


@pytest.mark.parametrize("half", [False, True])
def test_weights_are_rounded_only_where_nothing_is_lost_or_on_request(annotated, tmp_path, half):
    network, path = annotated
    out = tmp_path / "theirs.safetensors"
    assert cli.main(["import", str(path), "--out", str(out), *["--half"][: int(half)]]) == 0
    assert {array.dtype for array in load_checkpoint(out).state.values()} == {
        np.dtype("float16" if half else "float32")
    }
    torch.save(network.half().state_dict(), path)
    assert cli.main(["import", str(path), "--out", str(out), "--force"]) == 0
    assert {a.dtype for a in load_checkpoint(out).state.values()} == {np.dtype("float16")}


@pytest.mark.parametrize(("value", "says"), [(7e4, "16 bits cannot hold"), (np.nan, "not finite")])
def test_weights_that_are_not_finite_are_refused(annotated, tmp_path, value, says, capsys):
    network, path = annotated
    with torch.no_grad():
        network.final_conv.bias.fill_(value)
    torch.save(network.state_dict(), path)
    assert cli.main(["import", str(path), "--out", str(tmp_path / "out"), "--half"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_outputs_are_what_is_said_of_them(tmp_path, capsys):
    """Class 1 everywhere, by a softmax: the whole mask, and none of it if channel 0 were read."""
    network = UNet(3, 2, base_features=4)
    with torch.no_grad():
        network.final_conv.weight.zero_()
        network.final_conv.bias.copy_(torch.tensor([-5.0, 5.0]))
    torch.save(network.state_dict(), tmp_path / "two.pth")
    command = ["import", str(tmp_path / "two.pth"), "--out", str(tmp_path), "--force"]
    assert cli.main(command) == 2
    assert "--two-outputs softmax" in capsys.readouterr().err
    for kind, outputs, mask in (("softmax", 1, 255), ("border", 2, 0)):
        assert cli.main([*command, "--two-outputs", kind, "--classes", "ground", "cell"]) == 0
        loaded = load_checkpoint(tmp_path / "two.safetensors")
        assert loaded.architecture.out_channels == outputs
        assert loaded.golden.mask.min() == loaded.golden.mask.max() == mask


@pytest.mark.parametrize("name", ["клетка", "a/b", ".hidden", "new\nline", " "])
def test_a_name_that_no_header_can_carry_is_refused(annotated, tmp_path, name, capsys):
    out = tmp_path / "out"
    assert cli.main(["import", str(annotated[1]), "--name", name, "--out", str(out)]) == 2
    assert "invalid model name" in capsys.readouterr().err
    assert not out.exists()


class Evil:
    def __reduce__(self):
        return (os.system, ("touch evil-was-here",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"weight": Evil()}, "holds more than tensors"),
        ({"network": {}, "average": {}, "optimiser": {}}, "is the state of a run"),
        (torch.zeros(3), "holds a Tensor, not a state dict"),
        ({"epoch": 3}, "holds no tensors"),
        ({"layer.weight": torch.zeros(3)}, "no architecture that is known here"),
        ({"down_conv.0.first.weight": torch.zeros(4, 3, 3, 3)}, "is incomplete"),
    ],
)
def test_what_cannot_be_imported_is_said_in_one_line(tmp_path, content, says, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "bad.pth")
    assert cli.main(["import", "bad.pth", "--out", "."]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_a_wrong_width_and_a_text_file_are_refused(annotated, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["import", str(annotated[1]), "--base-features", "64", *out]) == 2
    assert "the file has 4" in capsys.readouterr().err
    (tmp_path / "text.pth").write_text("hello")
    assert cli.main(["import", str(tmp_path / "text.pth"), *out]) == 2
    assert cli.main(["import", str(tmp_path / "absent.pth"), *out]) == 2
    assert not (tmp_path / "out").exists()


def test_the_reference_of_this_test_is_really_their_order():
    """Permuted input channels matter: without the permutation the logits differ."""
    torch.manual_seed(0)
    network = Milesial(1, 4).eval()
    state = to_unet_state_dict(network.state_dict())
    name = "up_conv.0.first.weight"
    upsampled, skip = state[name].chunk(2, dim=1)
    wrong = {**state, name: torch.cat([skip, upsampled], dim=1)}
    x = torch.randn(1, 3, 32, 32)
    right_net, wrong_net = UNet(3, 1, base_features=4), UNet(3, 1, base_features=4)
    right_net.load_state_dict(state)
    wrong_net.load_state_dict(wrong)
    with torch.inference_mode():
        assert F.l1_loss(wrong_net(x), network(x)) > 10 * F.l1_loss(right_net(x), network(x))
