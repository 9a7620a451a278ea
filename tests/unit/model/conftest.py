import pytest
from PIL import Image

from tests.conftest import nuclei


@pytest.fixture
def data(tmp_path):
    """Eight drawn fields of nuclei and a recipe for them."""
    for index in range(8):
        image, labels = nuclei(96, 112, seed=index)
        for name, array in (("images", image), ("masks", labels)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"{index}.png")
    (tmp_path / "recipe.toml").write_text(
        f"""
        name = "drawn"
        [data]
        images = "{tmp_path}/images"
        masks = "{tmp_path}/masks"
        labels = "instances"
        validation_share = 0.25
        licence = "MIT"
        [network]
        out_channels = 2
        base_features = 4
        [preprocess]
        intensity = "percentile"
        window = [[112, 112]]
        overlap = 16
        classes = ["background", "nucleus"]
        [augment]
        crop = [48, 48]
        [optim]
        steps = 12
        batch = 2
        warmup = 2
        batch_norm = true
        [run]
        every = 4
        """
    )
    return tmp_path
