# SPDX-License-Identifier: MIT
"""Zips that are broken or made to do harm: each is answered with one line, and nothing is written outside."""

import pickle
import struct
import zipfile
from pathlib import Path

import pytest

from tests.helpers.damage import DEEP, kept, put
from tests.helpers.inputs import USES
from tests.helpers.runs import is_refused
from tests.helpers.sen12 import image_name
from tests.helpers.zips import GOOD, HOSTILE, make, patch

pytestmark = pytest.mark.slow

# What unpacking leaves for the next attempt.
RECORDS = ("step.json", "pairs.csv", "S1list.json")
VICTIM = f"0001/{image_name(0)}_corrected_VV.tif"


def zipped(path, method=zipfile.ZIP_DEFLATED):
    return make(path, {"S1list.json": b"{}", VICTIM: b"evil" * 100, GOOD: b"good"}, method)


def rewritten(change):
    """A zip whose bytes are changed; change: a function of them."""

    def maker(path):
        put(change)(zipped(path))

    return maker


def end_record(offset, value):
    """A zip whose last record, which says where the directory is, holds another value."""

    def change(content):
        at = content.rindex(b"PK\5\6") + offset
        return content[:at] + struct.pack("<I", value) + content[at + 4 :]

    return rewritten(change)


def patched(name, **values):
    return lambda path: patch(zipped(path), name, **values)


LOCAL_NAME = VICTIM.encode()  # comes first before the data, and then in the directory
ZIPS = {
    **HOSTILE,
    "bzip2": (lambda path: zipped(path, zipfile.ZIP_BZIP2), "is compressed by a method"),
    "lzma": (lambda path: zipped(path, zipfile.ZIP_LZMA), "is compressed by a method"),
    "another name before the data": (
        rewritten(lambda old: old.replace(LOCAL_NAME, b"../" + LOCAL_NAME[3:], 1)),
        "is damaged",
    ),
    "a directory elsewhere": (end_record(16, 2**31), "lies outside the zip"),
    "a directory of no size": (end_record(12, 0), "holds neither"),
    "a directory of another size": (end_record(12, 2**30), "is not a zip"),
    "a list that is a bomb": (lambda path: make(path, {"S1list.json": bytes(2**26), VICTIM: b"VV"}), "unpacks"),
    "a list without end": (
        lambda path: make(path, {"S1list.json": DEEP.encode(), VICTIM: b"VV"}),
        "cannot be read as JSON",
    ),
    "a list that states less": (patched("S1list.json", size=1), "holds more than the 1 bytes"),
    "an image that states less": (patched(VICTIM, size=7), "holds more than the 7 bytes"),
    "an image that states more": (patched(VICTIM, size=401), "holds fewer than the 401 bytes"),
    "an image with another checksum": (patched(VICTIM, crc=0), "is damaged"),
    "a pickle": (lambda path: (path.parent.mkdir(), path.write_bytes(pickle.dumps([1])), path)[-1], "is not a zip"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_hostile_zips_are_one_line_and_leave_nothing(case, start, tmp_path, count):
    maker, said = ZIPS[case]
    maker(tmp_path / "data" / "data.zip")
    before = kept(tmp_path)
    of_members = ("1 members", "nothing was extracted", "download it again") if case in HOSTILE else ()
    result = start(USES["unzip"], data=tmp_path / "data", out=tmp_path / "run")
    left = [path for path in kept(tmp_path).keys() - before.keys() if Path(path).name not in RECORDS]
    assert result[2].rstrip("\n").isprintable()
    assert count("hostile zips refused", is_refused(result, "data.zip", said, *of_members) and not left), (result, left)
