"""Measure which images get the page's hint: `python -m benchmarks.hints MODEL IMAGES[:LABELS]...`.

Sends every image of the folders IMAGES to a service of its own, with the weights in `weights/` and
its usual engine, and applies the rule of `app/static/unlike.js`. Also sends a black and a white
image, noise, and the pictures of scikit-image. Where a folder LABELS has a label map `ID.png` for
the image `ID.*`, the Dice of its mask is compared with the hint. With --json, writes the figures of
every image.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import skimage.data
from PIL import Image
from scipy import ndimage

from app.cli.bench.serving import serving

ROOT = Path(__file__).parent.parent
MARGIN = 1.25  # as in unlike.js
DOUBT_LIMITS = {"nuclei@fe91f4579414": 0.055}  # as in unlike.js
REACH = 2  # as in doubt.js
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
        doubt: the part of it that is away from outlines.
        dice: of the mask; None without labels.
    """

    name: str
    objects: int
    uncertainty: float
    doubt: float
    dice: float | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """The figures above which an image is marked."""

    uncertainty: float
    doubt: float = float("inf")

    def mark(self, checked: Checked) -> bool:
        return (
            not checked.objects
            or checked.uncertainty > self.uncertainty
            or checked.doubt > self.doubt
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("folders", nargs="*", metavar="IMAGES[:LABELS]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    with (
        serving(ROOT / f"weights/{args.model}.safetensors") as service,
        httpx.Client(base_url=service.url, timeout=600) as client,
    ):
        card = client.get(f"/models/{args.model}").json()
        usual = card["metrics"]["uncertainty"]["p95"]
        limits = Limits(MARGIN * usual, DOUBT_LIMITS.get(card["id"], float("inf")))
        print(
            f"{card['id']}: marked above an uncertainty of {limits.uncertainty:.3f} "
            f"({MARGIN} x {usual:.3f}), or a doubt of {limits.doubt}"
        )
        every: dict[str, list[Checked]] = {}
        labelled = list[Checked]()
        for folder in args.folders:
            images, _, labels = folder.partition(":")
            every[images] = [check(client, path, labels) for path in sorted(Path(images).iterdir())]
            report(images, every[images], limits)
            labelled += [each for each in every[images] if each.dice is not None]
        every["drawn"] = [check_bytes(client, name, content) for name, content in draw_images()]
        report("drawn", every["drawn"], limits, names=True)
        every["scikit-image"] = [
            check_bytes(client, name, encode(getattr(skimage.data, name)())) for name in PICTURES
        ]
        report("scikit-image", every["scikit-image"], limits, names=True)
        if labelled:
            report_dice(labelled, Limits(limits.uncertainty), "by the uncertainty alone")
            report_dice(labelled, limits, "by both")
    if args.json:
        rows = {name: [dataclasses.asdict(each) for each in group] for name, group in every.items()}
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def check(client: httpx.Client, path: Path, labels: str) -> Checked:
    """Send one image, and compare its mask with the label map of the same name, if there is one."""
    truth = Path(labels) / f"{path.stem}.png"
    inside = np.asarray(Image.open(truth)) > 0 if labels and truth.exists() else None
    return check_bytes(client, path.name, path.read_bytes(), inside)


def check_bytes(
    client: httpx.Client, name: str, content: bytes, inside: np.ndarray | None = None
) -> Checked:
    """Send one image. `inside` is the true mask, (H, W) bool, or None."""
    outputs = ["mask", "probability", "measurements"]
    response = client.post("/segment", content=content, params={"output": outputs})
    headers = response.raise_for_status().headers
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        mask, probability = (
            np.asarray(Image.open(io.BytesIO(archive.read(member))))
            for ending in ("-mask.png", "-probability.png")
            for member in archive.namelist()
            if member.endswith(ending)
        )
    coverage, confidence = (float(headers[f"X-Mask-{each}"]) for each in ("Coverage", "Confidence"))
    uncertainty = (1 - confidence) / coverage if coverage else float("inf")
    checked = Checked(
        name, int(headers["X-Mask-Objects"]), uncertainty, measure_doubt(mask > 0, probability)
    )
    if inside is None:
        return checked
    dice = 2 * ((mask > 0) & inside).sum() / max(1, (mask > 0).sum() + inside.sum())
    return dataclasses.replace(checked, dice=float(dice))


def measure_doubt(found: np.ndarray, probability: np.ndarray) -> float:
    """The probability of the wrong class, summed over the pixels away from outlines, per found
    pixel.

    Args:
        found: the mask, (H, W) bool.
        probability: (H, W) uint16, from 0 to 65535.

    Returns:
        0 if nothing is found.
    """
    size = 2 * REACH + 1
    near = ndimage.maximum_filter(found, size) != ndimage.minimum_filter(found, size)
    wrong = np.where(found, 65535 - probability.astype(float), probability) / 65535
    return float(wrong[~near].sum() / found.sum()) if found.any() else 0.0


def report(title: str, checked: list[Checked], limits: Limits, *, names: bool = False) -> None:
    """Print how many images are marked; with `names`, those that are not."""
    marked = sum(limits.mark(each) for each in checked)
    values = [each.uncertainty for each in checked]
    low, median, high = np.quantile(values, [0, 0.5, 1], method="nearest")
    print(
        f"{title}: {marked} of {len(checked)} marked; uncertainty {low:.3f} to {high:.3f}, "
        f"median {median:.3f}"
    )
    for each in checked:
        figures = f"uncertainty {each.uncertainty:.3f}, doubt {each.doubt:.3f}"
        if each.dice is not None and limits.mark(each):
            print(f"  {each.name}: {figures}, Dice {each.dice:.2f}")
        elif names and not limits.mark(each):
            print(f"  not marked: {each.name}, {figures}")


def report_dice(checked: list[Checked], limits: Limits, rule: str) -> None:
    """Print the mean Dice with and without the hint, and how many poor results have it."""
    dice = np.array([each.dice for each in checked], float)
    marked = np.array([limits.mark(each) for each in checked])
    poor = dice < 0.8
    means = [f"{dice[some].mean():.2f}" if some.any() else "-" for some in (marked, ~marked)]
    print(
        f"{len(dice)} images with labels, {rule}: mean Dice {means[0]} with the hint, {means[1]} "
        f"without; marked are {(poor & marked).sum()} of {poor.sum()} below 0.8, and "
        f"{(~poor & marked).sum()} of {(~poor).sum()} others"
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
