"""Every row of the table of files in docs/import-export.md holds: taken, or which message."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from app import cli
from app.engine.predictor import engine_predictor
from app.engine.selection import build_engine, choose_engines
from model.arrays import FloatArray
from model.checkpoint import load_checkpoint
from model.config import UNetConfig
from model.predict import Predictor
from model.unet import UNet
from tests.conftest import ROOT, encode, nuclei, write_tiny
from tests.onnx_networks import BilinearUNet, export, randomize_statistics
from tests.unet_networks import Jvanvugt, Mateuszbuda, Milesial, trained


@dataclasses.dataclass
class Case:
    """A file, the flags for it, and the network that wrote it, if it is taken."""

    content: Any
    network: Any = None
    flags: Sequence[str] = ()
    name: str = "theirs.pth"


def make_unet() -> UNet:
    torch.manual_seed(0)
    return UNet(3, 1, base_features=4).eval()


def keyed(*keys: str) -> list[Case]:
    """A state dict under each of these keys, beside other things."""
    network = make_unet()
    rest = {"optimizer": {"state": {0: {}}}, "epoch": 3, "best": np.float64(0.9)}
    return [Case({key: network.state_dict(), **rest}, network) for key in keys]


def prefixed(*prefixes: str) -> list[Case]:
    network = make_unet()
    return [
        Case({f"{prefix}{name}": each for name, each in network.state_dict().items()}, network)
        for prefix in prefixes
    ]


def averages() -> list[Case]:
    network = make_unet()
    raw = {name: each + 1 for name, each in network.state_dict().items()}
    average = network.state_dict()
    swa = {"n_averaged": torch.tensor(3), **{f"module.{name}": v for name, v in average.items()}}
    return [
        Case({"state_dict": raw, "ema": average}, network),
        Case({"model": raw, "model_ema": average}, network),
        Case({"state_dict": raw, "state_dict_ema": average}, network),
        Case(swa, network),
    ]


def listed_average() -> list[Case]:
    network = make_unet()
    shadow = [each + 1 for each in network.state_dict().values()]
    return [Case({"model": network.state_dict(), "ema": {"shadow_params": shadow}}, network)]


def several() -> list[Case]:
    first, second = make_unet().state_dict(), UNet(3, 1, base_features=4).state_dict()
    return [Case({"student": first, "teacher": second})]


def pickled_module() -> list[Case]:
    network = make_unet()
    return [Case(network, network), Case({"model": nn.DataParallel(network)}, network)]


def pickles() -> list[Case]:
    return [Case(pickle.dumps(make_unet().state_dict()))]


def torchscript() -> list[Case]:
    return [Case(lambda path: torch.jit.script(nn.Conv2d(3, 4, 1)).save(str(path)))]


def exported_program() -> list[Case]:
    program = torch.export.export(nn.Conv2d(3, 4, 1), (torch.zeros(1, 3, 8, 8),))
    return [Case(lambda path: torch.export.save(program, path), name="theirs.pt2")]


def milesial() -> list[Case]:
    network = trained(Milesial(1, 4))
    return [Case(network.state_dict(), network)]


def mateuszbuda() -> list[Case]:
    network = trained(Mateuszbuda(1, 4))
    return [Case(network.state_dict(), network)]


def jvanvugt() -> list[Case]:
    flags = ["--padding", "1", "--pooling", "max"]
    networks = [trained(Jvanvugt(1, 4, 1, batch_norm)) for batch_norm in (False, True)]
    return [Case(network.state_dict(), network, flags) for network in networks]


def bilinear() -> list[Case]:
    state = Milesial(1, 4).state_dict().items()
    return [Case({name: each for name, each in state if not re.match(r"up\d\.up\.", name)})]


def known_others() -> list[Case]:
    names = ("segmentation_head.0.weight", "net.upcat_4.convs.conv_0.conv.weight",
             "model.0.conv.unit0.conv.weight", "input_block.conv1.conv.weight",
             "decoder.seg_layers.3.weight", "backbone.conv1.weight")  # fmt: skip
    return [Case({name: torch.ones(1)}) for name in names]


def unknown() -> list[Case]:
    return [Case({"stem.weight": torch.ones(1)})]


def onnx_graph() -> list[Case]:
    network = randomize_statistics(BilinearUNet()).eval()
    return [Case(export(network), network, name="theirs.onnx")]


def keras() -> list[Case]:
    return [
        Case(b"\x89HDF\r\n\x1a\n" + bytes(8), name="theirs.h5"),
        Case(make_zip({"model.weights.h5": b""}), name="theirs.keras"),
    ]


def describe(step: Mapping[str, Any], weights: Mapping[str, Any]) -> bytes:
    """The description of a package whose input has bytes of three channels."""
    space = [{"type": "space", "id": axis, "size": {"min": 32, "step": 32}} for axis in "yx"]
    channels = {"type": "channel", "channel_names": ["r", "g", "b"]}
    tensor = {"axes": [{"type": "batch"}, channels, *space], "data": {"type": "uint8"}}
    output = {"axes": [{"type": "batch"}, {**channels, "channel_names": ["cell"]}, *space]}
    description = {"inputs": [{**tensor, "preprocessing": [step]}], "outputs": [output]}
    return json.dumps({**description, "weights": weights}).encode()


def package(step: Mapping[str, Any], network: nn.Module | None) -> list[Case]:
    graph = randomize_statistics(BilinearUNet()).eval()
    files = {
        "rdf.yaml": describe(step, {"onnx": {"source": "weights.onnx"}}),
        "weights.onnx": export(network or graph),
    }
    return [Case(make_zip(files), network, name="theirs.zip")]


def package_of(name: str, kind: str) -> list[Case]:
    step = {"id": "scale_linear", "kwargs": {"gain": 1 / 255}}
    files = {"rdf.yaml": describe(step, {kind: {"source": name}}), name: b""}
    return [Case(make_zip(files), name="theirs.zip")]


def package_with_graph() -> list[Case]:
    network = randomize_statistics(BilinearUNet()).eval()
    return package({"id": "scale_linear", "kwargs": {"gain": 1 / 255}}, network)


def archives() -> list[Case]:
    return [Case(make_zip({"arr_0.npy": b""}), name="theirs.npz"), Case(make_zip({"a.txt": b""}))]


def make_zip(files: Mapping[str, bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)

    return write


def optimizer_state() -> list[Case]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    return [Case(optimizer.state_dict()), Case({"optimizer": optimizer.state_dict()})]


def named(*contents: bytes) -> list[Case]:
    """Each content under the names of weights and of a graph."""
    return [Case(each, name=f"theirs.{end}") for each in contents for end in ("pth", "onnx")]


def part() -> list[Case]:
    buffer = io.BytesIO()
    torch.save(make_unet().state_dict(), buffer)
    return [Case(buffer.getvalue()[:2000])]


def own_checkpoint() -> list[Case]:
    return [Case(lambda path: write_tiny(path), name="theirs.safetensors")]


def run_state() -> list[Case]:
    return [Case({"network": {}, "ema": {}, "optimizer": {}})]


CASES: dict[str, Callable[[], list[Case]]] = {
    "weights under any keys": lambda: keyed(
        "state_dict", "params", "weights", "unet", "generator", "model_state", "net_state_dict",
        "network_weights",
    ),
    "names with prefixes": lambda: prefixed(
        "model.", "net.", "module.", "_orig_mod.", "_forward_module.", "network.", "unet.",
        "module._orig_mod.unet.net.",
    ),
    "weights and their running average": averages,
    "a running average without names": listed_average,
    "several other networks": several,
    "pickled module": pickled_module,
    "other pickles": pickles,
    "TorchScript": torchscript,
    "`.pt2`": exported_program,
    "weights of milesial, `bilinear=False`": milesial,
    "weights of mateuszbuda": mateuszbuda,
    "weights of jvanvugt": jvanvugt,
    "weights of milesial, `bilinear=True`": bilinear,
    "weights of other libraries": known_others,
    "weights of any other network": unknown,
    "ONNX": onnx_graph,
    "bioimage.io package with ONNX": package_with_graph,
    "the same, normalized image by image": lambda: package(
        {"id": "zero_mean_unit_variance"}, None
    ),
    "bioimage.io package with weights of torch": lambda: package_of(
        "weights.pt", "pytorch_state_dict"
    ),
    "bioimage.io package with neither": lambda: package_of("weights.h5", "keras_hdf5"),
    "Keras": keras,
    "other archives": archives,
    "compressed files": lambda: named(gzip.compress(b"weights")),
    "state of an optimizer": optimizer_state,
    "an image": lambda: named(encode(nuclei(16, 16)[0]), encode(nuclei(16, 16)[0], "TIFF")),
    "a pointer of Git LFS": lambda: named(b"version https://git-lfs.github.com/spec/v1\n"),
    "a web page": lambda: named(b"<!DOCTYPE html>\n<title>Not found"),
    "other text": lambda: named(b'{"error": "not found"}'),
    "an empty file": lambda: named(b""),
    "a part of a file": part,
    "checkpoint of this project": own_checkpoint,
    "state of a training run": run_state,
}  # fmt: skip


def read_rows() -> dict[str, list[str]]:
    """The rows of the table: the bold name of the file -> the other cells."""
    text = (ROOT / "docs/import-export.md").read_text().split("### Files\n")[1].split("\n## ")[0]
    rows = {}
    for line in text.splitlines():
        if match := re.match(r"\| \*\*(.+?)\*\*", line):
            rows[match[1]] = [cell.strip() for cell in line.strip("|").split(" | ")][1:]
    return rows


ROWS = read_rows()


def test_every_row_has_a_case() -> None:
    assert ROWS.keys() == CASES.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", CASES)
def test_file_is_taken_or_rejected_as_the_table_says(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result, difference = ROWS[kind]
    golden = tmp_path / "golden.png"
    golden.write_bytes(encode(nuclei(64, 96)[0]))
    for case in CASES[kind]():
        path = tmp_path / case.name
        write(path, case.content)
        command = ["import", str(path), "--out", str(tmp_path / "out"), "--force", *case.flags]
        status = cli.main([*command, "--window", "64x96", "--golden", str(golden)])
        output = capsys.readouterr()
        if difference == "rejected":
            assert status == 2
            (line,) = output.err.splitlines()
            assert all(re.search(quote, line) for quote in read_quotes(result)), line
        else:
            assert status == 0, output.err
            assert all(re.search(quote, output.out) for quote in read_quotes(result)), output.out
            # the tensors are the same, but the memory format differs
            bound = 1e-6 if difference == "none" else float(difference.rpartition(" ")[2])
            expected, found = predict_both(tmp_path / "out/theirs.safetensors", case.network)
            assert np.abs(found - expected).max() <= bound
            assert expected.std() > 10 * bound  # so that the bound distinguishes networks


def write(path: Path, content: Any) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif callable(content) and not isinstance(content, nn.Module):
        content(path)
    else:
        torch.save(content, path)


def read_quotes(text: str) -> list[str]:
    """The quoted messages in a cell, as patterns; "..." stands for anything."""
    quotes = [quote for quote in re.findall(r"`([^`]+)`", text) if " " in quote]
    assert quotes or "imported" in text
    return [".*".join(re.escape(part) for part in quote.split("...")) for quote in quotes]


def predict_both(path: Path, network: Any) -> tuple[FloatArray, FloatArray]:
    """The probabilities of the original and of the checkpoint, for an image of one window."""
    checkpoint = load_checkpoint(path)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    if isinstance(checkpoint.architecture, UNetConfig):
        found = Predictor.of(checkpoint)(image)
    else:
        (choice,) = choose_engines(device="cpu", engine="openvino", precision="fp32")
        found = engine_predictor(build_engine(choice, checkpoint), checkpoint)(image)
    with torch.inference_mode():
        values = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        expected = network(values).sigmoid()[0].numpy()
    return expected, found
