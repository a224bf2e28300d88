# SPDX-License-Identifier: MIT
"""Broken images of BigEarthNet, as GeoTIFF, Zarr and LMDB: each is answered with one line that names it."""

import os
import pickle
import shutil
import struct
from pathlib import Path

import lmdb
import numpy as np
import pytest

from tests.helpers.damage import DEEP, JUNK, as_folder, change, cut, damage, linked, put, spotted, tif
from tests.helpers.dataset_fixtures import s1_name, write_tif
from tests.helpers.inputs import cases_of

pytestmark = pytest.mark.slow

# ---- GeoTIFF -------------------------------------------------------------------------------------

TIF = f"BigEarthNet-S1/{s1_name(2).rsplit('_', 3)[0]}/{s1_name(2)}/{s1_name(2)}_VH.tif"
VV_TIF = TIF.replace("_VH.tif", "_VV.tif")


@damage
def tag(path, number, value):
    """Overwrite the value of a TIFF tag: 256 width, 257 height, 273 where the pixels are."""
    content = bytearray(path.read_bytes())
    (directory,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, directory)
    (at,) = (
        at
        for at in range(directory + 2, directory + 2 + 12 * entries, 12)
        if struct.unpack_from("<H", content, at) == (number,)
    )
    struct.pack_into("<HIII", content, at + 2, 4, 1, value, *struct.unpack_from("<I", content, at + 12))
    put(content)(path)


def band(value, dtype=np.float32, shape=(120, 120)):
    return np.full(shape, value, dtype)


def every_tif_linear(root):
    for path in root.rglob("*_VH.tif"):
        write_tif(path, 0.05)


def swap(root):
    """Exchange VH and VV of every patch."""
    for vh in root.rglob("*_VH.tif"):
        vv, aside = vh.with_name(vh.name.replace("_VH", "_VV")), vh.with_suffix(".aside")
        vh.rename(aside)
        vv.rename(vh)
        aside.rename(vv)


VRT = (
    '<VRTDataset rasterXSize="120" rasterYSize="120"><VRTRasterBand dataType="Float32" band="1"><SimpleSource>'
    "<SourceFilename>/etc/passwd</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
)
NAMED, LACKS = (f"{s1_name(2)}_VH.tif", "metadata.parquet: row 2"), ("1 of", s1_name(2), "metadata.parquet: row 2")
NODATA = "gdal_edit.py -a_nodata -9999"
GEOTIFF = {
    "truncated": (TIF, cut, *NAMED, "truncated"),
    "a byte short": (TIF, put(lambda old: old[:-1]), *NAMED, "truncated"),
    "nothing but a header": (TIF, put(lambda old: old[:8]), *NAMED),
    "empty": (TIF, put(b""), *LACKS, "VH"),
    "junk for a header": (TIF, put(lambda old: JUNK[:16] + old[16:]), *NAMED),
    "text": (TIF, put("no image"), *NAMED, "not a GeoTIFF"),
    "the page of an expired link": (TIF, put("<html>404</html>" * 99), *NAMED, "not a GeoTIFF"),
    "a VRT that names another file": (TIF, put(VRT), *NAMED, "not a GeoTIFF"),
    "60 by 60": (TIF, tif(band(-20, shape=(60, 60))), *NAMED, "60x60 pixels"),
    "119 by 120": (TIF, tif(band(-20, shape=(119, 120))), *NAMED, "119x120 pixels"),
    "two bands": (TIF, tif(band(-20, shape=(2, 120, 120))), *NAMED, "has 2 bands"),
    "described as VV": (TIF, tif(-20, ["VV"]), *NAMED, "holds VV"),
    "int16": (TIF, tif(band(-2000, np.int16)), *NAMED, "holds int16"),
    "uint8": (TIF, tif(band(20, np.uint8)), *NAMED, "holds uint8"),
    "complex": (TIF, tif(band(-20 + 1j, np.complex64)), *NAMED, "complex"),
    "NaN": (TIF, tif(np.nan), *NAMED, "100.00%", "--max_nonfinite"),
    "infinite": (TIF, tif(-np.inf), *NAMED, "100.00%"),
    "no data": (TIF, tif(-9999.0, nodata=-9999.0), *NAMED, "100.00%"),
    "no data without a tag": (
        TIF,
        tif(spotted(band(-20.0), -9999)),
        *NAMED,
        "10.00% of the VH pixels are below -100 dB",
        NODATA,
    ),
    "dB times 100": (TIF, tif(-2000.0), *NAMED, "100.00% of the VH pixels", "dB times 10 or 100"),
    "VH and VV swapped": (".", swap, "data", "VH is brighter than VV", "swapped"),
    "linear in one file": (TIF, tif(0.05), f"{s1_name(2)}_VH.tif", "looks linear", "--dataset"),
    "linear in all files": (".", every_tif_linear, "_VH.tif", "looks linear"),
    "missing VH": (TIF, Path.unlink, *LACKS, "VH"),
    "missing VV": (VV_TIF, Path.unlink, *LACKS, "VV"),
    "a patch without its folder": (TIF, lambda path: shutil.rmtree(path.parent), *LACKS, "VH and VV"),
    "a folder": (TIF, as_folder, *LACKS, "VH"),
    "a pipe": (TIF, lambda path: (path.unlink(), os.mkfifo(path)), *LACKS, "VH"),
    "a link to itself": (TIF, linked(), *LACKS, "VH"),
    "a link to nowhere": (TIF, linked("nowhere.tif"), *LACKS, "VH"),
    "a directory beyond the end": (TIF, put(lambda old: old[:4] + b"\xf0\xff\xff\x7f" + old[8:]), *NAMED),
    "pixels beyond the end": (TIF, tag(273, 2**31), *NAMED),
    "wider than memory": (TIF, tag(256, 2**30), *NAMED, "claims to have 120x1073741824 pixels"),
    "without a width": (TIF, tag(256, 0), *NAMED),
}

# ---- Zarr ----------------------------------------------------------------------------------------

PATCH = f"sentinel1/{s1_name(1)}"
JSON, VH_JSON = f"{PATCH}/zarr.json", f"{PATCH}/VH/zarr.json"


def chunk_of(root):
    files = (path for path in sorted((root / PATCH / "VH").rglob("*")) if path.is_file())
    return next(path for path in files if not path.name.startswith((".z", "zarr")))


VH_OF = f"{s1_name(1)}/VH"
GRID = {"name": "regular", "configuration": {"chunk_shape": [0, 0]}}
ZARR = {
    "an array is missing": (f"{PATCH}/VH", shutil.rmtree, s1_name(1), "VH"),
    "no chunk": (chunk_of, Path.unlink, s1_name(1), "VH"),
    "a chunk cut off": (chunk_of, cut, VH_OF, "copy it again"),
    "an empty chunk": (chunk_of, put(b""), VH_OF, "copy it again"),
    "a chunk of junk": (chunk_of, put(JUNK), VH_OF, "copy it again"),
}
ZARR_3 = {
    "attributes that are a list": (JSON, change(attributes=["Pastures"]), "zarr.json", "no JSON object"),
    "attributes that are null": (JSON, change(attributes=None), "zarr.json", "no JSON object"),
    "a group without its metadata": (JSON, Path.unlink, s1_name(1), "cannot be read as JSON"),
    "metadata cut off": (JSON, cut, s1_name(1), "cannot be read as JSON"),
    "metadata without end": (JSON, put(DEEP), s1_name(1), "cannot be read as JSON"),
    "an array's metadata without end": (VH_JSON, put(DEEP), VH_OF, "copy it again"),
    "an array's metadata a list": (VH_JSON, put("[]"), VH_OF, "copy it again"),
    "a shape beyond memory": (VH_JSON, change(shape=[2**40, 2**20]), VH_OF, "holds float32 of shape"),
    "an empty shape": (VH_JSON, change(shape=[0, 0]), VH_OF, "0x0 pixels"),
    "a negative shape": (VH_JSON, change(shape=[-1, 120]), VH_OF),
    "another shape": (VH_JSON, change(shape=[60, 120]), VH_OF),
    "chunks of no size": (VH_JSON, change(chunk_grid=GRID), VH_OF),
    "an unknown codec": (VH_JSON, change(codecs=[{"name": "none such"}]), VH_OF, "none such"),
    "whole numbers": (VH_JSON, change(data_type="int32", fill_value=0), VH_OF, "holds int32"),
    "complex numbers": (VH_JSON, change(data_type="complex64", fill_value=[0, 0]), VH_OF, "holds complex64"),
}
ZARR_2 = {
    "objects that would be unpickled": (f"{PATCH}/VH/.zarray", change(dtype="|O", filters=[{"id": "pickle"}]), VH_OF),
    "an unknown compressor": (f"{PATCH}/VH/.zarray", change(compressor={"id": "none such"}), VH_OF, "none such"),
}

# ---- LMDB ----------------------------------------------------------------------------------------

DATA = "lmdb/data.mdb"


@damage
def store_value(path, value):
    """Another value of patch 1; None removes it. value: bytes, or a function of the bytes before."""
    key = s1_name(1).encode()
    environment = lmdb.open(str(path), map_size=2**28)
    with environment.begin(write=True) as transaction:
        old = bytes(transaction.get(key))
        transaction.delete(key)
        if value is not None:
            transaction.put(key, value(old) if callable(value) else value)
    environment.close()
    (path / "lock.mdb").unlink()


def spoil_tree(path):
    """Overwrites the page of keys that a look-up begins with: a page that holds names, and not images."""
    content = bytearray(path.read_bytes())
    for at in range(8192, len(content), 4096):
        if content[at : at + 4096].count(b"S1A_IW") > 2:
            content[at : at + 4096] = b"\xff" * 4096
    put(content)(path)


KEY = (s1_name(1), "lmdb")
LMDB = {
    "truncated": (DATA, cut, "data.mdb", "is truncated"),
    "empty": (DATA, put(b""), "data.mdb", "cannot be read as an LMDB"),
    "text": (DATA, put("no LMDB " * 4096), "data.mdb", "cannot be read as an LMDB"),
    "its first pages junk": (DATA, put(lambda old: JUNK * 8 + old[8192:]), "data.mdb"),
    "its tree junk": (DATA, spoil_tree, "data.mdb", "is damaged"),
    "a folder": (DATA, as_folder, "no LMDB"),
    "a key is missing": ("lmdb", store_value(None), s1_name(1), "lack data"),
    "an empty value": ("lmdb", store_value(b""), *KEY, "safetensors"),
    "a pickle for a value": ("lmdb", store_value(pickle.dumps({"VH": 1})), *KEY, "safetensors"),
    "a value cut off": ("lmdb", store_value(lambda old: old[:-100]), *KEY, "safetensors"),
    "a value with a lying header": ("lmdb", store_value(lambda old: b"\xff" * 8 + old[8:]), *KEY, "safetensors"),
    "a value too large": ("lmdb", store_value(bytes(2**23)), s1_name(1), "is damaged"),
}

MEASURED = ("truncated", "text", "60 by 60", "int16", "complex", "NaN", "wider than memory")
BROKEN = {
    "v2": GEOTIFF,
    "v2 to measure": {name: GEOTIFF[name] for name in MEASURED},
    "zarr 2": {**ZARR, **ZARR_2},
    "zarr 3": {**ZARR, **ZARR_3},
    "lmdb": LMDB,
}


@pytest.mark.parametrize("name, case, use", cases_of(BROKEN))
def test_broken_input_is_one_line_and_leaves_nothing(name, case, use, check_refused):
    check_refused(name, use, BROKEN[name][case])
