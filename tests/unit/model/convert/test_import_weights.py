"""`unet import`: networks are found wherever they are in a file, and code in it never runs."""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from app import cli
from model.checkpoint import load_checkpoint
from model.convert.foreign_networks import State
from model.convert.import_weights import find_network
from model.errors import CheckpointError
from model.unet import UNet


@pytest.fixture
def network() -> UNet:
    torch.manual_seed(0)
    return UNet(3, 1, base_features=4)


@pytest.fixture
def weights(network: UNet, tmp_path: Path) -> Path:
    """The state dict of `network`, saved by torch."""
    path = tmp_path / "annotated.pth"
    torch.save(network.state_dict(), path)
    return path


CONTAINERS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "DataParallel": lambda state: {"state_dict": prefixed("module.", state), "epoch": 3},
    "Lightning": lambda state: {"state_dict": prefixed("model.", state), "hyper_parameters": {}},
    "torch.compile": lambda state: {"model": prefixed("_orig_mod.", state)},
    "nested": lambda state: {"a": {"b": [prefixed("module._orig_mod.unet.net.", state)]}},
    "Fabric": lambda state: {"model": prefixed("_forward_module.generator.", state)},
    "inner wrappers": lambda state: {
        name.replace("down_conv.0.", "down_conv.0._orig_mod."): each
        for name, each in state.items()
    },
    "SWA": lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.", state)},
    "any key": lambda state: {"network_weights": state, "optimizer": {"state": {0: {}}}},
    "beside other tensors": lambda state: {
        **prefixed("network.", state), "criterion.weight": torch.ones(2)
    },
    "twice": lambda state: {"state_dict": state, "best": dict(state)},
    "lists beside it": lambda state: {**state, "mask_values": [0, 1]},
    "NumPy": lambda state: {"model": state, "dice": np.float64(0.9), "curve": np.arange(3.0)},
    "namespace": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, path=Path())},
}  # fmt: skip


@pytest.mark.parametrize(
    ("container", "legacy"),
    # the classes that a file of torch before 1.6 names cannot be listed
    [(name, old) for name in CONTAINERS for old in (False, True) if name != "namespace" or not old],
)
def test_network_is_found_in_any_container(
    network: UNet, tmp_path: Path, container: str, legacy: bool
) -> None:
    path = tmp_path / "file.pt"
    torch.save(
        CONTAINERS[container](network.state_dict()), path, _use_new_zipfile_serialization=not legacy
    )
    finding = find_network(path)
    assert finding.others == ()
    check_state(finding.network.convert(), network)


def test_plain_pickle_is_rejected_in_one_line(network: UNet, tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps(network.state_dict()))
    with pytest.raises(CheckpointError, match="pickled objects that are never loaded"):
        find_network(path)


def test_state_dict_of_safetensors_is_found(network: UNet, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / "file.bin")
    check_state(find_network(tmp_path / "file.bin").network.convert(), network)


class Guarded(UNet):
    """Fails if it is restored from a file."""

    def __setstate__(self, _: object) -> None:
        raise AssertionError("code of the file was used")


@pytest.mark.parametrize("wrap", [lambda each: each, lambda each: {"model": each, "epoch": 1}])
def test_pickled_module_is_read_without_its_code(
    tmp_path: Path, wrap: Callable[[Any], Any]
) -> None:
    network = Guarded(3, 1, base_features=4)
    torch.save(wrap(torch.nn.DataParallel(network)), tmp_path / "module.pt")
    finding = find_network(tmp_path / "module.pt")
    check_state(finding.network.convert(), network)


def test_running_average_is_preferred_and_reported(
    network: UNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "both.pth", tmp_path / "both.safetensors"
    average = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    torch.save(
        {"state_dict": network.state_dict(), "ema": {"module": average}, "optimizer": {}}, path
    )
    command = ["import", str(path), "--out", str(out), "--force"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "at 'ema.module', a running average" in printed
    assert "not imported: 'state_dict'; choose with --weights" in printed
    loaded = load_checkpoint(out).state["final_conv.bias"]
    assert np.array_equal(loaded, average["final_conv.bias"].numpy())
    assert cli.main([*command, "--weights", "state_dict"]) == 0
    assert "at 'state_dict'\n" in capsys.readouterr().out
    assert network.final_conv.bias is not None
    loaded = load_checkpoint(out).state["final_conv.bias"]
    assert np.array_equal(loaded, network.final_conv.bias.detach().numpy())
    assert cli.main([*command, "--weights", "nothing"]) == 2
    assert "no network at 'nothing', but at 'state_dict', 'ema.module'" in capsys.readouterr().err


def test_average_that_cannot_be_converted_is_an_error_with_an_alternative(
    network: UNet, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    average = {name: each + 1 for name, each in network.state_dict().items() if "bias" not in name}
    torch.save({"model": network.state_dict(), "model_ema": average}, weights)
    assert cli.main(["import", str(weights), "--out", str(tmp_path / "out")]) == 2
    assert "--weights can choose another network: 'model'" in capsys.readouterr().err


@pytest.mark.timeout(20)
def test_modules_that_contain_each_other_end(tmp_path: Path) -> None:
    modules = [torch.nn.Module() for _ in range(60)]
    for outer, inner in itertools.pairwise(modules):
        outer.add_module("a", inner)
        outer.add_module("b", inner)
    modules[-1].add_module("a", modules[-1])
    torch.save(modules[0], tmp_path / "modules.pt")
    with pytest.raises(CheckpointError, match="contains no tensors"):
        find_network(tmp_path / "modules.pt")


def test_average_without_names_is_reported(
    network: UNet, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shadow = [tensor + 1 for tensor in network.state_dict().values()]
    torch.save({"model": network.state_dict(), "ema": {"shadow_params": shadow}}, weights)
    assert cli.main(["import", str(weights), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "not imported: 'ema.shadow_params' looks like a running average" in printed


def test_choice_between_several_networks_is_asked(
    network: UNet, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = UNet(3, 1, base_features=4).state_dict()
    together = {**prefixed("student.", network.state_dict()), **prefixed("teacher.", other)}
    torch.save({"state_dict": together}, weights)
    command = ["import", str(weights), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "several networks, at 'state_dict.student', 'state_dict.teacher'" in line
    assert cli.main([*command, "--weights", "state_dict.student"]) == 0


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def check_state(state: State, network: UNet) -> None:
    assert state.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model"])
def test_import_writes_a_checkpoint_with_a_golden_pair(
    network: UNet,
    weights: Path,
    tmp_path: Path,
    wrapper: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if wrapper:
        state = {f"module.{name}": value for name, value in network.state_dict().items()}
        torch.save({wrapper: state, "epoch": 3}, weights)
    arguments = ["import", str(weights), "--out", str(tmp_path), "--name", "mine"]
    assert cli.main([*arguments, "--classes", "background", "cell", "--base-features", "4"]) == 0
    loaded = load_checkpoint(tmp_path / "mine.safetensors")
    assert loaded.architecture == network.config
    assert loaded.preprocess.classes == ("background", "cell")
    assert loaded.golden.image.shape == (256, 256, 3)
    for name, tensor in network.state_dict().items():
        assert np.array_equal(loaded.state[name], tensor.numpy()), name
    assert loaded.card["revision"]
    assert f"unet serve --model mine --weights-dir {tmp_path}\n" in capsys.readouterr().out
    assert cli.main(arguments) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["cell"], ["background,cell"], ["background", "cell"]])
def test_classes_may_be_separated_by_commas_and_omit_the_background(
    weights: Path, tmp_path: Path, names: list[str]
) -> None:
    out = tmp_path / "new" / "imported.safetensors"
    assert cli.main(["import", str(weights), "--out", str(out), "--classes", *names]) == 0
    assert load_checkpoint(out).preprocess.classes == ("background", "cell")


def test_percentiles_need_the_intensity_percentile(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imported.safetensors"
    command = ["import", str(weights), "--out", str(out), "--percentiles", "0", "100"]
    assert cli.main(command) == 2
    assert "--percentiles needs --intensity percentile" in capsys.readouterr().err
    assert cli.main([*command, "--intensity", "percentile"]) == 0
    assert load_checkpoint(out).preprocess.percentiles == (0, 100)


@pytest.mark.parametrize("half", [False, True])
def test_weights_are_rounded_only_if_exact_or_requested(
    network: UNet, weights: Path, tmp_path: Path, half: bool
) -> None:
    out = tmp_path / "imported.safetensors"
    assert cli.main(["import", str(weights), "--out", str(out), *["--half"][: int(half)]]) == 0
    assert {array.dtype for array in load_checkpoint(out).state.values()} == {
        np.dtype("float16" if half else "float32")
    }
    torch.save(network.half().state_dict(), weights)
    assert cli.main(["import", str(weights), "--out", str(out), "--force"]) == 0
    assert {a.dtype for a in load_checkpoint(out).state.values()} == {np.dtype("float16")}


@pytest.mark.parametrize(("value", "says"), [(7e4, "too large for fp16"), (np.nan, "not finite")])
def test_weights_that_are_not_finite_are_rejected(
    network: UNet,
    weights: Path,
    tmp_path: Path,
    value: float,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert network.final_conv.bias is not None
    with torch.no_grad():
        network.final_conv.bias.fill_(value)
    torch.save(network.state_dict(), weights)
    assert cli.main(["import", str(weights), "--out", str(tmp_path / "out"), "--half"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_meaning_of_two_outputs_must_be_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The softmax predicts class 1 everywhere; channel 0 alone would predict nothing."""
    network = UNet(3, 2, base_features=4)
    assert network.final_conv.bias is not None
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
def test_invalid_model_name_is_rejected(
    weights: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["import", str(weights), "--name", name, "--out", str(out)]) == 2
    assert "invalid model name" in capsys.readouterr().err
    assert not out.exists()


class Malicious:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch executed",))


class Evaluating:
    """Runs code of a module that torch does not block when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("open('executed', 'w').close()",))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_not_executed(
    network: UNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"model": network.state_dict(), "evil": Evaluating()}
    torch.save(content, "file.pth", _use_new_zipfile_serialization=not legacy)
    if legacy:
        with pytest.raises(CheckpointError, match="pickled objects"):
            find_network(Path("file.pth"))
    else:
        check_state(find_network(Path("file.pth")).network.convert(), network)
    assert not Path("executed").exists()
    torch.load("file.pth", weights_only=False)
    assert Path("executed").exists()  # it would have been


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"weight": Malicious()}, "contains pickled objects"),
        ({"network": {}, "ema": {}, "optimizer": {}}, "is the state of a training run"),
        ({"network": {}, "average": {}, "optimiser": {}}, "is the state of a training run"),
        (torch.zeros(3), "contains a Tensor, not a state dict"),
        (torch.nn.Linear(1, 1), "unrecognised architecture: the first tensor is 'weight'"),
        ({"epoch": 3}, "contains no tensors"),
        ({"layer.weight": torch.zeros(3)}, "unrecognised architecture"),
        ({"down_conv.0.first.weight": torch.zeros(4, 3, 3, 3)}, "is incomplete"),
    ],
    ids=[
        "pickle",
        "run state",
        "old run state",
        "tensor",
        "module",
        "no tensors",
        "unknown",
        "incomplete",
    ],
)
def test_file_that_cannot_be_imported_is_reported_in_one_line(
    tmp_path: Path,
    content: Any,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "bad.pth")
    assert cli.main(["import", "bad.pth", "--out", "."]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda optimizer: optimizer.state_dict(),
        lambda optimizer: {"optimizer": optimizer.state_dict()},
        lambda optimizer: {"optimizer_states": [optimizer.state_dict()], "epoch": 3},
    ],
    ids=["state dict", "key", "list"],
)
def test_state_of_an_optimizer_is_named(
    network: UNet, tmp_path: Path, make: Callable[..., Any], wrap: Callable[[Any], Any]
) -> None:
    optimizer = make(network.parameters(), lr=0.1)
    network(torch.zeros(1, 3, 16, 16)).sum().backward()
    optimizer.step()
    torch.save(wrap(optimizer), tmp_path / "optim.pth")
    with pytest.raises(CheckpointError, match="contains the state of an optimizer, and no weights"):
        find_network(tmp_path / "optim.pth")


def test_weights_of_another_network_are_named_beside_an_optimizer(tmp_path: Path) -> None:
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.zeros(1, 1)).sum().backward()
    optimizer.step()
    content = {"optimizer": optimizer.state_dict(), "model": {"only.weight": torch.zeros(3)}}
    torch.save(content, tmp_path / "both.pth")
    with pytest.raises(CheckpointError, match=r"the first tensor is 'only\.weight'"):
        find_network(tmp_path / "both.pth")


def test_wrong_base_features_are_rejected(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["import", str(weights), "--base-features", "64", *out]) == 2
    assert "the file has 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["hello", None], ids=["text", "missing"])
def test_file_that_torch_cannot_read_is_rejected(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.pth"
    if content is not None:
        path.write_text(content)
    assert cli.main(["import", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "file.pth" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("marker", "arguments", "says"),
    [
        ("inc.double_conv.0.weight", ["--padding", "0"], "milesial/Pytorch-UNet pads"),
        ("encoder1.enc1conv1.weight", ["--padding", "0"], "pytorch pads its convolutions"),
        ("down_path.0.block.0.weight", [], "set --padding 0 (padding=False, its default) or "
         "--padding 1, and --pooling max"),
        ("down_path.0.block.0.weight", ["--padding", "0"], "set --pooling max"),
        ("down_path.0.block.0.weight", ["--padding", "1", "--pooling", "average"],
         "average pooling cannot be converted"),
    ],
)  # fmt: skip
def test_code_that_the_file_does_not_describe_is_asked_or_rejected(
    tmp_path: Path,
    marker: str,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "file.pth"
    torch.save({marker: torch.zeros(4, 3, 3, 3)}, path)
    assert cli.main(["import", str(path), "--out", str(tmp_path / "out"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize(
    ("arguments", "overlap"),
    [
        ([], 128),
        (["--window", "256x512"], 128),
        (["--window", "64x96", "256x256"], 32),
        (["--mode", "resize"], 0),
        (["--padding", "0"], 0),
        (["--padding", "0", "--window", "572x572"], 0),
    ],
)
def test_windows_overlap_by_at_most_half_of_the_smallest(
    weights: Path, tmp_path: Path, arguments: list[str], overlap: int
) -> None:
    out = tmp_path / "imported.safetensors"
    assert cli.main(["import", str(weights), "--out", str(out), *arguments]) == 0
    assert load_checkpoint(out).preprocess.overlap == overlap


def test_default_folder_is_not_in_the_hint(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["import", str(weights)]) == 0
    assert "unet serve --model annotated\n" in capsys.readouterr().out
