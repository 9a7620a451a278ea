"""Measure which images get the page's hint: `python -m benchmarks.hints MODEL IMAGES[:LABELS]...`.

Sends every image of the folders IMAGES to a service of its own, with the weights in `weights/` and
its usual engine, and applies the rule of `app/static/unlike.js`. Also sends a black and a white
image, noise, and the pictures of scikit-image. Where a folder LABELS has a label map `ID.png` for
the image `ID.*`, the Dice of its mask is compared with the hint.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import skimage.data
from PIL import Image

from app.cli.bench.serving import serving

ROOT = Path(__file__).parent.parent
MARGIN = 1.25  # as in unlike.js
PICTURES = (
    *("astronaut", "brick", "camera", "cat", "cell", "clock", "coffee", "coins", "colorwheel"),
    *("grass", "gravel", "horse", "immunohistochemistry", "logo", "moon", "page", "text"),
)
"""Those in scikit-image's wheel; the others would be downloaded."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """The result for one image.

    Attributes:
        objects: that were found.
        uncertainty: of the result; infinite if nothing was found.
        dice: of the mask; None without labels.
    """

    name: str
    objects: int
    uncertainty: float
    dice: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("folders", nargs="*", metavar="IMAGES[:LABELS]")
    args = parser.parse_args()
    with (
        serving(ROOT / f"weights/{args.model}.safetensors") as service,
        httpx.Client(base_url=service.url, timeout=600) as client,
    ):
        card = client.get(f"/models/{args.model}").json()
        usual = card["metrics"]["uncertainty"]["p95"]
        print(f"{card['id']}: marked above {MARGIN * usual:.3f} ({MARGIN} x {usual:.3f})")
        labelled = list[Checked]()
        for folder in args.folders:
            images, _, labels = folder.partition(":")
            checked = [check(client, path, labels) for path in sorted(Path(images).iterdir())]
            report(images, checked, MARGIN * usual)
            labelled += [each for each in checked if each.dice is not None]
        drawn = [check_bytes(client, name, content) for name, content in draw_images()]
        report("drawn", drawn, MARGIN * usual, names=True)
        pictures = [
            check_bytes(client, name, encode(getattr(skimage.data, name)())) for name in PICTURES
        ]
        report("scikit-image", pictures, MARGIN * usual, names=True)
        if labelled:
            report_dice(labelled, MARGIN * usual)


def check(client: httpx.Client, path: Path, labels: str) -> Checked:
    """Send one image, and compare its mask with the label map of the same name, if there is one."""
    content = path.read_bytes()
    checked = check_bytes(client, path.name, content)
    truth = Path(labels) / f"{path.stem}.png"
    if not labels or not truth.exists():
        return checked
    inside = np.asarray(Image.open(truth)) > 0
    response = client.post("/segment", content=content)
    mask = np.asarray(Image.open(io.BytesIO(response.raise_for_status().content))) > 0
    dice = 2 * (mask & inside).sum() / max(1, mask.sum() + inside.sum())
    return dataclasses.replace(checked, dice=float(dice))


def check_bytes(client: httpx.Client, name: str, content: bytes) -> Checked:
    """Send one image."""
    response = client.post("/segment", content=content, params={"output": "measurements"})
    headers = response.raise_for_status().headers
    coverage, confidence = (float(headers[f"X-Mask-{each}"]) for each in ("Coverage", "Confidence"))
    uncertainty = (1 - confidence) / coverage if coverage else float("inf")
    return Checked(name, int(headers["X-Mask-Objects"]), uncertainty)


def is_marked(checked: Checked, limit: float) -> bool:
    return not checked.objects or checked.uncertainty > limit


def report(title: str, checked: list[Checked], limit: float, *, names: bool = False) -> None:
    """Print how many images are marked; with `names`, those that are not."""
    marked = sum(is_marked(each, limit) for each in checked)
    values = [each.uncertainty for each in checked]
    low, median, high = np.quantile(values, [0, 0.5, 1], method="nearest")
    print(
        f"{title}: {marked} of {len(checked)} marked; uncertainty {low:.3f} to {high:.3f}, "
        f"median {median:.3f}"
    )
    for each in checked:
        if each.dice is not None and is_marked(each, limit):
            print(f"  {each.name}: {each.uncertainty:.3f}, Dice {each.dice:.2f}")
        elif names and not is_marked(each, limit):
            print(f"  not marked: {each.name}, {each.uncertainty:.3f}")


def report_dice(checked: list[Checked], limit: float) -> None:
    """Print the mean Dice with and without the hint, and how many poor results have it."""
    dice = np.array([each.dice for each in checked], float)
    marked = np.array([is_marked(each, limit) for each in checked])
    poor = dice < 0.8
    print(
        f"{len(dice)} images with labels: mean Dice {dice[marked].mean():.2f} with the hint, "
        f"{dice[~marked].mean():.2f} without; {(poor & marked).sum()} of {poor.sum()} below 0.8 "
        "are marked"
    )


def draw_images() -> Iterator[tuple[str, bytes]]:
    """Images without any object: a name and a PNG each."""
    rng = np.random.default_rng(0)
    shape = (400, 400)
    images = {
        "black": np.zeros(shape),
        "white": np.full(shape, 255),
        "uniform noise": rng.integers(0, 256, shape),
        "colored noise": rng.normal(120, 20, (*shape, 3)).clip(0, 255),
        "shot noise": rng.poisson(6, shape),
        "gradient": np.tile(np.arange(400) // 2, (400, 1)),
    }
    for name, image in images.items():
        yield name, encode(image.astype(np.uint8))


def encode(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
