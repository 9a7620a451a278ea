"""`unet export --base-features`: another size, the same masks."""

import dataclasses

import numpy as np

from app import cli
from model.checkpoint import load_checkpoint, read_manifest, save_checkpoint, update_manifest
from model.config import Calibration
from model.predict import Predictor
from tests.conftest import nuclei, write_tiny


def test_a_widened_checkpoint_gives_the_same_probabilities(tmp_path, capsys):
    narrow = tmp_path / "narrow.safetensors"
    write_tiny(narrow)
    calibration = Calibration({"down_conv.0.first": (0.0, 1.0)}, 3, 0.999, 0.0, 1.0)
    card = {"licence": "MIT", "training": {"steps": 3}}
    before = dataclasses.replace(load_checkpoint(narrow), card=card, calibration=calibration)
    save_checkpoint(narrow, before)
    update_manifest(narrow)
    features = before.architecture.base_features
    out = tmp_path / "new" / "wide.safetensors"
    arguments = ["export", str(narrow), "--out", str(out), "--base-features"]
    assert cli.main([*arguments, str(2 * features)]) == 0
    wide = load_checkpoint(out)
    assert wide.id in capsys.readouterr().out
    assert wide.architecture.base_features == 2 * features
    assert wide.state["final_conv.weight"].dtype == before.state["final_conv.weight"].dtype
    assert wide.card["licence"] == "MIT"
    assert wide.card["training"] == {
        "steps": 3, "widened": f"from base_features {features}, without further training"
    }  # fmt: skip
    assert wide.calibration is None  # the steps of 8 bits lie elsewhere now
    assert read_manifest(out.parent).keys() == {"wide.safetensors"}
    image = nuclei(90, 70)[0]
    same = Predictor.of(wide)(image) - Predictor.of(before)(image)
    assert np.abs(same).max() < 1e-4
    assert np.array_equal(wide.golden.image, before.golden.image)
    assert cli.main([*arguments, str(2 * features + 1)]) == 2
    assert "multiple" in capsys.readouterr().err
    assert load_checkpoint(narrow).calibration == calibration


def test_a_graph_is_told_by_its_tensors(tmp_path, capsys):
    path, graph = tmp_path / "tiny.safetensors", tmp_path / "tiny.xml"
    write_tiny(path)
    assert cli.main(["export", str(path), "--openvino", str(graph)]) == 0
    said = "image, uint8 (N, H, W, 3), to probabilities, float32 (N, 1, H, W)"
    assert capsys.readouterr().out == f"{graph}: {said}\n"
    assert graph.is_file()


def test_an_export_of_nothing_is_refused(tmp_path, capsys):
    path = tmp_path / "tiny.safetensors"
    write_tiny(path)
    assert cli.main(["export", str(path)]) == 2
    assert "--base-features N, --calibrate RECIPE, or --openvino" in capsys.readouterr().err
