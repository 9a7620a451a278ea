"""COCO annotations, as pycocotools reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco

from model.arrays import AnyArray
from model.coco import encode_coco
from tests.conftest import nuclei
from tests.objects import CLASSES, draw_discs, make_objects

FULL = np.ones((4, 5), int)
COLUMNS = np.zeros((6, 6), int)
COLUMNS[:, 2:4] = 1  # one run through both columns
NUCLEI = np.unique(nuclei(90, 130)[1], return_inverse=True)[1].reshape(90, 130)
NOISE = np.random.default_rng(0).integers(0, 4, (17, 13))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of its decoder
@pytest.mark.parametrize("labels", [FULL, COLUMNS, NUCLEI, NOISE, draw_discs(48, 12)])
def test_pycocotools_decodes_the_same_masks(labels: AnyArray) -> None:
    document = json.loads(encode_coco(make_objects(labels), CLASSES, "a.png"))
    for annotation in document["annotations"]:
        inside = labels == annotation["id"]
        segmentation = annotation["segmentation"]
        np.testing.assert_array_equal(coco.decode(segmentation), inside)
        # Not merely equivalent: the string that pycocotools writes itself.
        whole = coco.encode(np.asfortranarray(inside.astype(np.uint8)))
        assert segmentation["counts"] == whole["counts"].decode()
        assert annotation["area"] == coco.area(segmentation) == inside.sum()
        assert annotation["bbox"] == coco.toBbox(segmentation).tolist()
    assert len(document["annotations"]) == labels.max()


def test_the_document_describes_its_image_and_classes() -> None:
    document = json.loads(encode_coco(make_objects(FULL), ("background", "a", "b"), "é.png"))
    assert document["images"] == [{"id": 1, "width": 5, "height": 4, "file_name": "é.png"}]
    assert [(each["id"], each["name"]) for each in document["categories"]] == [(1, "a"), (2, "b")]
    (annotation,) = document["annotations"]
    assert (annotation["image_id"], annotation["category_id"], annotation["iscrowd"]) == (1, 1, 0)
    assert annotation["score"] == 0.75


def test_an_image_without_objects_has_no_annotations() -> None:
    document = json.loads(encode_coco(make_objects(np.zeros((2, 2), int)), CLASSES))
    assert document["annotations"] == []
