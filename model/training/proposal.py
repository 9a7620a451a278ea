"""Two folders -> a recipe, and the reasons for it.

Knows data sets and recipes; no torch.
"""

from __future__ import annotations

import colorsys
import csv
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.arrays import Color
from model.checkpoint import load_checkpoint
from model.config import DIVISOR, check_name
from model.errors import ConfigError
from model.training.data import PairedDataset, code_masks
from model.training.images import list_images
from model.training.inheritance import Inheritance, choose_inheritance
from model.training.masks import pack_colors
from model.training.pairs import Pair, find_named_pairs, prefix_of
from model.training.recipe import SECTIONS, Recipe
from model.training.survey import (
    ImageSurvey,
    MaskMeaning,
    check_masks,
    check_not_image,
    survey_images,
    survey_masks,
    understand_masks,
)

_LONG_SIDE = 384
"""Longer side of a photograph as the network sees it, in pixels."""
_CROP = 160
_VALIDATION_PIXELS = {"cpu": 8_000_000, "cuda": 200_000_000}
"""Pixels of the validations during a run, by type of device."""
_DEFAULTS = {
    "cpu": {"base_features": 16, "batch_size": 4, "minutes": 20},
    "cuda": {"base_features": 32, "batch_size": 16, "minutes": 10},
}
"""Width, crops per step and length of a run, by type of device."""
_FAST_START = {"learning_rate": 3e-3, "batch_norm": True, "initialisation": "torch"}
"""With these a small network learns within a hundred steps; see docs/decisions/0038."""
_TUNING_RATE = 1e-3
"""Learning rate for weights of a checkpoint; see docs/train.md."""
_IMBALANCE = 4.0
"""Ratio of the largest to the smallest class from which on classes are weighted."""
_VOID = {"void", "unlabelled", "unlabeled", "ignore", "ignored"}
"""Names, in small letters, of colors that stand for no label."""
_GENERIC = {"images", "imgs", "image", "train", "data", "x", "."}
"""Names of folders that say nothing about the data."""


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A recipe for a data set.

    Attributes:
        document: the recipe as its TOML file has it, without values that are defaults.
        findings: (name, text) of what was understood.
    """

    document: dict[str, Any]
    findings: tuple[tuple[str, str], ...]

    def to_toml(self) -> str:
        """Format the recipe, with the findings as comments."""
        lines = [f"# {name:9} {text}" for name, text in self.findings]
        for key, value in self.document.items():
            if not isinstance(value, dict):
                lines.append(f"{key} = {_format(value)}")
        for section in SECTIONS:
            if values := self.document.get(section):
                lines += ["", f"[{section}]"]
                lines += [f"{key} = {_format(value)}" for key, value in values.items()]
        return "\n".join(lines) + "\n"


def propose_recipe(
    images: Path, masks: Path, device: str, flags: Mapping[str, str]
) -> tuple[Recipe, Proposal]:
    """Look at two folders and make a recipe for them.

    Args:
        images, masks: the folders, which may be the same.
        device: "cpu" or "cuda", that trains.
        flags: field name -> text of its flag; they override what was understood.

    Raises:
        DataError: the data cannot be right; see `find_named_pairs` and `understand_masks`.
        ConfigError: a flag has no valid value.
    """
    images, masks = images.resolve(), masks.resolve()
    pairs = find_named_pairs(images, masks)
    check_not_image(pairs[0])
    pictures = survey_images(pairs)
    meaning = understand_masks(survey_masks(pairs), flags.get("labels", ""))
    by_color, in_order = _read_class_names((images, masks))
    meaning = _leave_out_void(meaning, by_color)
    names, palette = _name_classes(meaning, by_color, in_order)
    document: dict[str, Any] = {"name": _choose_name(images)}
    document["data"] = _data_section(images, masks, meaning, pairs)
    inherited = None
    if start := flags.get("init_from"):
        checkpoint = load_checkpoint(Path(start))
        is_binary = meaning.labels != "classes"
        inherited = choose_inheritance(checkpoint, flags, pictures.is_color, is_binary)
    document |= _image_sections(pictures, meaning, device, inherited)
    document["network"]["out_channels"] = _count_outputs(meaning, len(names))
    document["preprocess"] |= {"classes": list(names), "palette": [list(c) for c in palette]}
    if weights := _weigh_classes(meaning):
        document["loss"]["class_weights"] = weights
    if {"steps", "epochs", "minutes"} & flags.keys():
        del document["optim"]["minutes"]
    recipe, document = _apply_flags(document, flags)
    dataset = PairedDataset(pairs, code_masks(recipe.data, recipe.preprocess))
    check_masks(dataset)
    findings = (
        ("images", _describe_pairs(images, masks, pairs)),
        ("size", _describe_images(pictures)),
        ("masks", _describe_masks(meaning, names)),
        *([("start", _describe_start(inherited, recipe))] if inherited else []),
        *([("weights", _describe_weights(recipe))] if recipe.loss.class_weights else []),
        ("input", _describe_input(recipe)),
    )
    return recipe, Proposal(document, findings)


def _data_section(
    images: Path, masks: Path, meaning: MaskMeaning, pairs: Sequence[Pair]
) -> dict[str, Any]:
    groups = {pair.group for pair in pairs}
    section: dict[str, Any] = {
        "kind": "named",
        "images": str(images),
        "masks": str(masks),
        "labels": meaning.labels,
    }
    if meaning.ignore >= 0:
        section["ignore"] = meaning.ignore
    if meaning.colors:
        section["colors"] = [list(color) for color in meaning.colors]
    if _have_prefixes(pairs):
        section["group_by"] = "prefix"
        groups = {prefix_of(group) for group in groups}
    if len(groups) < 25:
        section["validation_share"] = 0.2
    return section


def _have_prefixes(pairs: Sequence[Pair]) -> bool:
    """Whether names up to their last underscore form groups: several views of several things."""
    groups = {pair.group for pair in pairs}
    sizes = Counter(prefix_of(group) for group in groups)
    return 4 <= len(sizes) <= len(groups) / 2 and min(sizes.values()) > 1


def _image_sections(
    pictures: ImageSurvey, meaning: MaskMeaning, device: str, inherited: Inheritance | None
) -> dict[str, Any]:
    """Choose network, preprocessing, crops and length by the kind of the images.

    Color images without masks of instances are taken for photographs: the network sees them as
    a whole. All others are seen at their own resolution. What is inherited replaces this choice.
    """
    defaults = _DEFAULTS["cpu" if device == "cpu" else "cuda"]
    optim = {"batch_size": defaults["batch_size"], **_FAST_START}
    optim |= {"minutes": defaults["minutes"], "stop_after": 5}
    sections: dict[str, Any] = {"network": {"base_features": defaults["base_features"]}}
    is_photo = pictures.is_color and meaning.labels != "instances"
    height, width = pictures.middle
    preprocess: dict[str, Any] = {"intensity": "percentile"}
    if is_photo:
        scale = min(1.0, _LONG_SIDE / max(height, width))
        window = [_round(height * scale), _round(width * scale)]
        preprocess = {"mode": "resize", "window": [window], "overlap": 0}
    if inherited:
        optim["learning_rate"] = _TUNING_RATE
        sections["network"] |= inherited.network
        preprocess |= inherited.preprocess
    if preprocess.get("mode") == "resize":
        height, width = preprocess.get("size") or preprocess["window"][0]
        augment = {
            "crop": [_round(0.7 * height), _round(0.7 * width)], "zoom": [0.6, 1.2],
            "rotate": 12, "elastic": 4, "invert": 0, "gamma": 0.3, "color": 0.1, "noise": 0.02,
        }  # fmt: skip
    else:
        augment = {"crop": [_round(min(_CROP, side), down=True) for side in (height, width)]}
    pixels = _VALIDATION_PIXELS["cpu" if device == "cpu" else "cuda"]
    sections["preprocess"] = preprocess
    sections["augment"] = augment
    sections["loss"] = {} if meaning.labels == "instances" else {"border_weight": 0}
    sections["optim"] = optim
    sections["run"] = {"validate_images": max(4, min(200, pixels // (height * width)))}
    return sections


def _round(side: float, down: bool = False) -> int:
    """Round to a multiple of the network's divisor, at least two of them."""
    count = int(side // DIVISOR) if down else round(side / DIVISOR)
    return DIVISOR * max(2, count)


def _count_outputs(meaning: MaskMeaning, classes: int) -> int:
    if meaning.labels == "classes":
        return classes
    return 2 if meaning.labels == "instances" else 1


def _weigh_classes(meaning: MaskMeaning) -> list[float]:
    """Weigh classes by the root of their rarity, 1 for the median; [] if all are similar."""
    present = sorted(share for share in meaning.shares if share > 0)
    if meaning.labels != "classes" or len(present) < 2 or present[-1] < _IMBALANCE * present[0]:
        return []
    median = present[len(present) // 2]
    return [
        round(min(4.0, max(0.25, (median / share) ** 0.5)), 2) if share else 1.0
        for share in meaning.shares
    ]


def _apply_flags(
    document: dict[str, Any], flags: Mapping[str, str]
) -> tuple[Recipe, dict[str, Any]]:
    """Override a document; return the recipe, and the document with the values of the flags."""
    recipe = Recipe.merge(document, flags)
    merged: dict[str, Any] = {"name": recipe.name}
    values = recipe.to_json()
    for section, kind in SECTIONS.items():
        given = {name for name in kind().to_json() if name in flags}
        chosen = document.get(section, {}).keys() | given
        merged[section] = {name: value for name, value in values[section].items() if name in chosen}
    return recipe, merged


def describe_split(recipe: Recipe, training: PairedDataset, validation: PairedDataset) -> str:
    """Say how the images are split."""
    text = f"{len(training)} images for training, {len(validation)} for validation"
    groups = {pair.group for pair in (*training.pairs, *validation.pairs)}
    if len(groups) == 1:
        return f"{text}: the last pages of the only stack, which resemble those before"
    if recipe.data.group_by == "prefix":
        return f"{text}; names that are equal up to the last _ stay together ({len(groups)} groups)"
    if len(groups) < len(training) + len(validation):
        return f"{text}; the pages of a stack stay together"
    return text


def _describe_pairs(images: Path, masks: Path, pairs: Sequence[Pair]) -> str:
    first = pairs[0]
    names = f"{first.image.relative_to(images)} with {first.mask.relative_to(masks)}"
    files = {pair.image for pair in pairs}
    pages = ""
    if len(files) < len(pairs):
        pages = " pages of one file" if len(files) == 1 else f" pages of {len(files)} files"
    used = files | {pair.mask for pair in pairs}
    left = [path.name for path in list_images(images, deep=True) if path not in used]
    if images != masks and masks.is_relative_to(images):
        left = [name for name in left if not (masks / name).exists()]
    unused = f"; {len(left)} without a mask are left out, such as {left[0]}" if left else ""
    return f"{len(pairs)}{pages} with masks, such as {names}{unused}"


def _describe_images(pictures: ImageSurvey) -> str:
    sizes = Counter(pictures.sizes)
    ((height, width), _), *others = sizes.most_common()
    size = f"{width}x{height}"
    if others:
        widths, heights = [w for _, w in sizes], [h for h, _ in sizes]
        size = f"{min(widths)}x{min(heights)} to {max(widths)}x{max(heights)}"
    return f"{size} pixels, {'color' if pictures.is_color else 'grey'}, {pictures.bits} bits"


def _describe_masks(meaning: MaskMeaning, names: Sequence[str]) -> str:
    text = f"{meaning.labels}, because {meaning.reason}"
    if len(meaning.shares) == 1:
        return f"{text}; {meaning.shares[0]:.0%} of the pixels are foreground"
    if not meaning.shares:
        return text
    shares = ", ".join(
        f"{name} {share:.1%}" for name, share in zip(names, meaning.shares, strict=False)
    )
    return f"{text}: {shares}"


def _describe_start(inherited: Inheritance, recipe: Recipe) -> str:
    values = f", with its {', '.join(inherited.findings)}" if inherited.findings else ""
    return f"{inherited.checkpoint}{values}; learning rate {recipe.optim.learning_rate:g}"


def _describe_weights(recipe: Recipe) -> str:
    pairs = zip(recipe.preprocess.classes, recipe.loss.class_weights, strict=True)
    return "of rare classes in the loss: " + ", ".join(f"{name} {each:g}" for name, each in pairs)


def _describe_input(recipe: Recipe) -> str:
    preprocess, crop = recipe.preprocess, "x".join(map(str, recipe.augment.crop[::-1]))
    if preprocess.mode == "resize":
        height, width = preprocess.resized
        return f"whole images at {width}x{height}, crops of {crop or 'all of it'}"
    return f"windows at the images' own resolution, crops of {crop}"


def _leave_out_void(meaning: MaskMeaning, by_color: Mapping[int, str]) -> MaskMeaning:
    """Take a color whose name says so for pixels without a label."""
    packed = pack_colors(np.array(meaning.colors)).tolist() if meaning.colors else []
    kept = [
        index for index, pack in enumerate(packed) if by_color.get(pack, "").lower() not in _VOID
    ]
    if len(kept) == len(packed) or len(kept) < 3:
        return meaning
    total = sum(meaning.shares[index] for index in kept)
    (name, *_) = (by_color[pack] for index, pack in enumerate(packed) if index not in kept)
    return dataclasses.replace(
        meaning,
        reason=f"{meaning.reason}; the color named {name} has no label",
        values=tuple(meaning.values[index] for index in kept),
        colors=tuple(meaning.colors[index] for index in kept),
        shares=tuple(meaning.shares[index] / total for index in kept),
        ignore=255,
    )


def _name_classes(
    meaning: MaskMeaning, by_color: Mapping[int, str], in_order: Sequence[str]
) -> tuple[tuple[str, ...], tuple[Color, ...]]:
    """Name the classes by a list beside the data, if there is one, and choose their colors."""
    if meaning.labels != "classes":
        return ("background", "object" if meaning.labels == "instances" else "foreground"), (
            (0, 0, 0),
            (255, 255, 255),
        )
    count = max(3, len(meaning.values))
    colors = meaning.colors or tuple(_make_color(index) for index in range(count))
    names = ["background", *(f"class {index}" for index in range(1, count))]
    if meaning.colors:
        packed = pack_colors(np.array(meaning.colors)).tolist()
        names = [by_color.get(pack, name) for pack, name in zip(packed, names, strict=True)]
    elif len(in_order) >= count:
        names = list(in_order[:count])
    return tuple(names), colors


def _make_color(index: int) -> Color:
    """Return a color that is easy to tell from those before it; black for the background."""
    if index == 0:
        return 0, 0, 0
    hue = index * 0.618034 % 1
    values = colorsys.hsv_to_rgb(hue, 0.85 if index % 2 else 0.55, 1.0 if index % 3 else 0.75)
    red, green, blue = (round(255 * value) for value in values)
    return red, green, blue


def _read_class_names(folders: Sequence[Path]) -> tuple[dict[int, str], list[str]]:
    """Read names of classes beside the data, by packed color and in order.

    The files are those of CamVid in its several editions: label_colors.txt (R G B name),
    class_dict.csv (name,r,g,b), and codes.txt or classes.txt (a name in each line).
    """
    by_color: dict[int, str] = {}
    for folder in dict.fromkeys([*folders, *(folder.parent for folder in folders)]):
        path = folder / "label_colors.txt"
        if path.is_file():
            for line in path.read_text(errors="replace").splitlines():
                if match := re.fullmatch(r"\s*(\d+)\s+(\d+)\s+(\d+)\s+(\S.*?)\s*", line):
                    red, green, blue = map(int, match.groups()[:3])
                    by_color[red << 16 | green << 8 | blue] = match[4]
        path = folder / "class_dict.csv"
        if path.is_file():
            with path.open(newline="", errors="replace") as file:
                for row in list(csv.reader(file))[1:]:
                    if len(row) == 4 and all(part.strip().isdigit() for part in row[1:]):
                        red, green, blue = map(int, row[1:])
                        by_color[red << 16 | green << 8 | blue] = row[0].strip()
        for name in ("codes.txt", "classes.txt"):
            if (folder / name).is_file():
                lines = (folder / name).read_text(errors="replace").splitlines()
                return by_color, [line.strip() for line in lines if line.strip()]
    return by_color, list(by_color.values())


def _choose_name(images: Path) -> str:
    """Name the model after the first folder whose name says something."""
    for folder in (images, *images.parents):
        name = re.sub(r"[^A-Za-z0-9 ()+\-._]+", "-", folder.name).strip(" .-")
        if name and folder.name.lower() not in _GENERIC:
            try:
                check_name(name)
            except ConfigError:
                continue
            return name
    return "model"


def _format(value: Any) -> str:
    """Format a value as TOML, of which JSON's strings, numbers and lists are a part."""
    return json.dumps(value, ensure_ascii=False)
