"""Probabilities of an image -> every output that was asked for.

Runs in image workers. The modules of objects, and the libraries of their file formats, are imported
with the first output that needs them. Knows no windows, no queue and no HTTP.
"""

from __future__ import annotations

import dataclasses
import importlib
from functools import cached_property
from typing import TYPE_CHECKING, assert_never

import numpy as np

from app.errors import InvalidRequest
from app.imaging.png import encode_grey16, encode_labels, encode_mask, encode_picture
from app.imaging.render import TINT, cutout, overlay, soften_edge
from app.imaging.tiff import encode_tiff
from app.imaging.webp import MAX_SIDE, encode_webp
from app.inference.outputs import FileFormat, Options, Output, Rendered, Segmentation
from model.arrays import AnyArray, ByteArray, Color, FloatArray
from model.config import PreprocessConfig
from model.transforms import stretch_contrast

if TYPE_CHECKING:
    from model.objects import Objects

_MAX_LABEL_16 = 65535
_OBJECT_MODULES = (
    "app.imaging.rois",
    "model.coco",
    "model.measurements",
    "model.polygons",
    "pycocotools.mask",
    "roifile",
    "tifffile",
)
"""Imported with the first output that needs them, unless `preload_object_modules` was called."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """The model's result for one image, from which every output is made.

    Attributes:
        probabilities: (C, H, W) of the upright image if an output needs full probabilities, else
            of any size. For a binary model the first channel is enough, unless objects are needed.
        whole_mask: (H, W) uint8 and
        confidence: in it, both from `model.transforms.mask_and_confidence`.
        threshold: that the mask was made with.
        preprocess: of the model, with the percentiles of the request.
        options: of the request.
        image: the decoded image, if an output needs it.
        pixel_size: in micrometres, of the request or the file; None if neither states it.
    """

    probabilities: FloatArray
    whole_mask: ByteArray
    confidence: float
    threshold: float
    preprocess: PreprocessConfig
    options: Options
    image: AnyArray | None = None
    pixel_size: float | None = None

    @cached_property
    def _selected(self) -> tuple[Objects, ByteArray]:
        from model.objects import select_objects

        return select_objects(
            self.probabilities,
            self.whole_mask,
            self.preprocess,
            self.threshold,
            min_area=self.options.min_area,
            exclude_edges=self.options.exclude_edges,
        )

    @property
    def objects(self) -> Objects:
        """The objects that are wanted."""
        return self._selected[0]

    @property
    def mask(self) -> ByteArray:
        """(H, W) uint8, without the objects that are not wanted."""
        return self._selected[1] if self.options.removes_objects else self.whole_mask

    @cached_property
    def measurements(self) -> dict[str, AnyArray]:
        """Columns with one value for each object."""
        from model.measurements import measure_objects

        assert self.image is not None
        return measure_objects(self.objects, self.image, self.pixel_size)

    @property
    def foreground(self) -> FloatArray:
        """(H, W) probability of not being background."""
        first: FloatArray = self.probabilities[0]
        return first if self.preprocess.binary else 1 - first

    @property
    def margin(self) -> FloatArray:
        """(H, W), 0 at the border of the mask, more inside and less outside."""
        first: FloatArray = self.probabilities[0]
        if self.preprocess.binary:
            return first - np.float32(self.threshold)
        best: FloatArray = self.probabilities[1:].max(axis=0)
        return best - first

    @property
    def colors(self) -> tuple[Color, ...]:
        """The color of each class for people. A binary model's palette is that of its mask."""
        palette = self.preprocess.palette
        return (palette[0], TINT) if self.preprocess.binary else palette

    def show_image(self) -> ByteArray:
        """Convert the image to 8 bits for people: 16 bits are spread between the percentiles."""
        assert self.image is not None
        if self.image.dtype == np.uint8:
            return self.image
        return self.spread_image()

    def spread_image(self) -> ByteArray:
        """Convert the image to 8 bits between the percentiles."""
        assert self.image is not None
        return stretch_contrast(self.image, self.preprocess.percentiles)


def render(decision: Decision) -> Segmentation:
    """Render every output that was asked for; `seconds` is left empty.

    Raises:
        InvalidRequest: the file format cannot hold an output.
    """
    options = decision.options
    rendered = {output: render_output(decision, output) for output in options.outputs}
    mask = decision.mask
    return Segmentation(
        rendered,
        width=mask.shape[1],
        height=mask.shape[0],
        coverage=np.count_nonzero(mask) / mask.size,
        confidence=decision.confidence,
        objects=decision.objects.count if options.needs_objects else None,
    )


def render_output(decision: Decision, output: Output) -> Rendered:
    """Render one output. See `render`."""
    return Rendered(_encode_output(decision, output), *decision.options.file_type(output))


def preload_object_modules() -> None:
    """Import the modules that separate, outline and measure objects.

    SciPy takes a third of a second to import. A service does it once it is ready, so that neither
    its start nor its first request waits for that.
    """
    for name in _OBJECT_MODULES:
        importlib.import_module(name)


def _encode_output(decision: Decision, output: Output) -> bytes:
    match output:
        case Output.MASK:
            return _encode_mask(decision)
        case Output.PROBABILITY:
            return _encode_probability(decision)
        case Output.INSTANCES:
            return _encode_instances(decision)
        case Output.OVERLAY:
            return _encode_picture(overlay(decision.show_image(), decision.mask), decision)
        case Output.CUTOUT:
            return _encode_cutout(decision)
        case Output.PREVIEW:
            return _encode_preview(decision)
        case Output.POLYGONS:
            return _encode_polygons(decision)
        case Output.COCO:
            return _encode_coco(decision)
        case Output.ROIS:
            return _encode_rois(decision)
        case Output.MEASUREMENTS:
            return _encode_measurements(decision)
        case _:
            assert_never(output)


def _encode_mask(decision: Decision) -> bytes:
    if decision.options.format is FileFormat.TIFF:
        return encode_tiff(decision.mask, decision.pixel_size)
    if decision.preprocess.binary:
        return encode_mask(decision.mask)
    return encode_labels(decision.mask, decision.preprocess.palette)


def _encode_probability(decision: Decision) -> bytes:
    if decision.options.format is FileFormat.TIFF:
        return encode_tiff(decision.foreground, decision.pixel_size)
    return encode_grey16(np.rint(decision.foreground * 65535).astype(np.uint16))


def _encode_instances(decision: Decision) -> bytes:
    labels, count = decision.objects.labels, decision.objects.count
    fits = count <= _MAX_LABEL_16
    if decision.options.format is FileFormat.TIFF:
        return encode_tiff(labels.astype(np.uint16 if fits else np.uint32), decision.pixel_size)
    if not fits:
        raise InvalidRequest(
            f"the image has {count} objects; a 16-bit PNG holds {_MAX_LABEL_16}: use format=tiff"
        )
    return encode_grey16(labels.astype(np.uint16))


def _encode_cutout(decision: Decision) -> bytes:
    alpha = soften_edge(decision.mask, decision.margin)
    picture = cutout(decision.show_image(), alpha, decision.options.background)
    return _encode_picture(picture, decision)


def _encode_preview(decision: Decision) -> bytes:
    sees_percentiles = decision.preprocess.intensity == "percentile"
    shown = decision.spread_image() if sees_percentiles else decision.show_image()
    return _encode_picture(shown, decision)


def _encode_picture(picture: ByteArray, decision: Decision) -> bytes:
    match decision.options.format:
        case FileFormat.PNG:
            return encode_picture(picture)
        case FileFormat.TIFF:
            return encode_tiff(picture, decision.pixel_size)
        case FileFormat.WEBP:
            return _encode_webp(picture)


def _encode_webp(picture: ByteArray) -> bytes:
    height, width = picture.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise InvalidRequest(
            f"the image has {width} x {height} pixels; a side of a WebP may have {MAX_SIDE}: use "
            "format=png"
        )
    return encode_webp(picture)


def _encode_polygons(decision: Decision) -> bytes:
    from model.polygons import encode_polygons

    return encode_polygons(
        decision.objects,
        decision.preprocess.classes,
        decision.colors,
        decision.measurements,
        "detection" if decision.preprocess.binary else "annotation",
    )


def _encode_coco(decision: Decision) -> bytes:
    from model.coco import encode_coco

    return encode_coco(decision.objects, decision.preprocess.classes, decision.options.name)


def _encode_rois(decision: Decision) -> bytes:
    from app.imaging.rois import encode_rois

    return encode_rois(decision.objects, decision.preprocess.classes, decision.options.page)


def _encode_measurements(decision: Decision) -> bytes:
    from model.measurements import encode_csv

    return encode_csv(decision.objects, decision.preprocess.classes, decision.measurements)
