"""Draw the examples of the page's dialog: python -m docs.pictures.examples

The images are those of StarDist (BSD-3-Clause) and scikit-image (see its notes on each), and one
that is drawn. None is from the training data. The left half of each example is the image, the
right half the result.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from app.imaging.render import overlay
from model.checkpoint import load_checkpoint
from model.predict import Predictor
from model.training.images import read_image
from model.transforms import prepare, to_mask
from tests.drawing import nuclei

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "app/static/samples/examples"
SIDE = 160  # pixels
WHOLE = (0.0, 0.0, 1.0)


def main() -> None:
    astronaut = skimage.data.astronaut()
    draw(
        "nuclei",
        {
            "good-1": (read_image(ROOT / "tests/fixtures/img2d.tif"), (0.1, 0.1, 0.5)),
            "good-2": (read_image(ROOT / "app/static/samples/histology.jpg"), (0.0, 0.0, 0.6)),
            "good-3": (nuclei(400, 400)[0], WHOLE),
            "bad-1": (skimage.data.immunohistochemistry(), (0.2, 0.3, 0.6)),
            "bad-2": (skimage.data.coins(), (0.1, 0.0, 0.9)),
        },
    )
    draw(
        "person",
        {
            "good-1": (astronaut, WHOLE),
            "good-2": (astronaut[:330, 60:390], WHOLE),
            "good-3": (to_grey(astronaut), WHOLE),
            "bad-1": (skimage.data.camera(), WHOLE),
            "bad-2": (skimage.data.chelsea(), WHOLE),
        },
    )


def to_grey(image: np.ndarray) -> np.ndarray:
    """The image in grey, 8-bit."""
    return np.asarray(Image.fromarray(image).convert("L"))


def draw(model: str, examples: dict[str, tuple[np.ndarray, tuple[float, float, float]]]) -> None:
    """Segment the images, and save a square of each: left, top and side, as shares of the image."""
    checkpoint = load_checkpoint(ROOT / "weights" / f"{model}.safetensors")
    predict = Predictor.of(checkpoint)
    FOLDER.mkdir(exist_ok=True)
    for name, (image, (left, top, share)) in examples.items():
        mask = to_mask(predict(image), checkpoint.preprocess)
        shown = image if image.ndim == 3 else np.stack([image] * 3, 2)
        if checkpoint.preprocess.mode == "native":
            shown = prepare(image, checkpoint.preprocess)
        side = int(share * min(mask.shape))
        x, y = int(left * mask.shape[1]), int(top * mask.shape[0])
        pair = Image.new("RGB", (2 * SIDE, SIDE))
        for index, pixels in enumerate((shown, overlay(shown, mask))):
            square = Image.fromarray(pixels[y : y + side, x : x + side])
            pair.paste(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (index * SIDE, 0))
        pair.save(FOLDER / f"{model}-{name}.webp", quality=82)


if __name__ == "__main__":
    main()
