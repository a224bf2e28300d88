# SPDX-License-Identifier: MIT
"""Broken packed stores: each is answered with one line that names the file."""

import json
from pathlib import Path

import pytest

from sarwmix.packed_store import manifest_checksum
from tests.helpers.damage import DEEP, cut, damage, edit, put
from tests.helpers.inputs import cases_of

pytestmark = pytest.mark.slow

MANIFEST, SAMPLES, IMAGES = "manifest.json", "samples.parquet", "images.parquet"


@damage
def sign(root, **values):
    """Other values of a manifest with the right checksum, as no accident makes them; ... removes one."""
    manifest = {**json.loads((root / MANIFEST).read_text()), **values}
    manifest = {key: value for key, value in manifest.items() if value is not ...}
    put(json.dumps({**manifest, "sha256": manifest_checksum(manifest)}))(root / MANIFEST)


@damage
def first_part(root, **values):
    first, *others = json.loads((root / MANIFEST).read_text())["parts"]
    sign(parts=[{**first, **values}, *others])(root)


def swapped(root):
    """The tables of samples and of images have each other's names."""
    contents = [(root / name).read_bytes() for name in (IMAGES, SAMPLES)]
    for name, content in zip((SAMPLES, IMAGES), contents):
        put(content)(root / name)


DAMAGED, CONTRADICTS = (MANIFEST, "copy it again"), (MANIFEST, "contradicts itself")
STORE = {
    "a part cut off": ("part_00001.bin", cut, "part_00001.bin has", "copy the store again"),
    "a part too long": ("part_00001.bin", put(lambda old: old + b"x"), "part_00001.bin has"),
    "a part is missing": ("part_00001.bin", Path.unlink, "part_00001.bin"),
    "no manifest": (MANIFEST, Path.unlink, MANIFEST, "not finished"),
    "a manifest cut off": (MANIFEST, cut, *DAMAGED, "cannot be read as JSON"),
    "a manifest that is a list": (MANIFEST, put("[]"), *DAMAGED, "is damaged"),
    "a manifest without end": (MANIFEST, put(DEEP), *DAMAGED, "cannot be read as JSON"),
    "a manifest that was edited": (MANIFEST, edit("benv2", "benv1"), *DAMAGED, "is damaged"),
    "a manifest of another program": (".", sign(format="another"), MANIFEST, "not a packed store of version"),
    "a manifest of another version": (".", sign(version=99), MANIFEST, "not a packed store of version"),
    "statistics are missing": (".", sign(statistics=...), *CONTRADICTS),
    "parts are missing": (".", sign(parts=[]), *CONTRADICTS),
    "checksums are missing": (".", sign(files={}), *CONTRADICTS),
    "a part that lies elsewhere": (".", first_part(file="../part_00000.bin"), *CONTRADICTS),
    "a part of more images": (".", first_part(images=10**9), *CONTRADICTS),
    "a part without a scale": (".", first_part(scale=[]), *CONTRADICTS),
    "a scale that is text": (".", first_part(scale="ab"), *CONTRADICTS),
    "images beyond memory": (".", sign(shape=[2, 10**6, 10**6]), *CONTRADICTS),
    "smaller images": (".", sign(shape=[2, 60, 60]), *CONTRADICTS),
    "an unknown coding": (".", sign(dtype="object"), *CONTRADICTS),
    "another floor": (".", sign(floor_db="low"), *CONTRADICTS),
    "other classes": (".", sign(classes=["Sea"]), SAMPLES, "no column Sea"),
    "two images a sample": (".", sign(images_per_sample=2), SAMPLES, "no column image_1"),
    "tables swapped": (".", swapped, IMAGES, "is damaged"),
    "samples are missing": (SAMPLES, Path.unlink, SAMPLES),
    "a table cut off": (IMAGES, cut, IMAGES, "is damaged"),
    "another dataset": (".", sign(dataset="benv1"), "data", "packed store of benv1"),
}
STORE_TO_VERIFY = {
    "no statistics": ("statistics.json", Path.unlink, "statistics.json", "1 of 7 files"),
    "other statistics": ("statistics.json", edit("mean", "main"), "statistics.json", "1 of 7 files"),
    "another list of bad images": ("bad.csv", put("image,reason\nx,y\n"), "bad.csv", "1 of 7 files"),
    "a bit of a part": ("part_00000.bin", put(lambda old: b"\1" + old[1:]), "part_00000.bin"),
}

BROKEN = {"store": STORE, "store to verify": STORE_TO_VERIFY}


@pytest.mark.parametrize("name, case, use", cases_of(BROKEN))
def test_broken_input_is_one_line_and_leaves_nothing(name, case, use, check_refused):
    check_refused(name, use, BROKEN[name][case])
