# SPDX-License-Identifier: MIT
"""Damage to files and folders, as data: put("text") or edit("old", "new") is what is done to a path."""

import csv
import functools
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np

from tests.helpers.dataset_fixtures import write_csv, write_tif
from tests.helpers.runs import digests

DEEP = "[" * 100_000  # JSON that takes more recursion than Python has
JUNK = bytes(range(128, 256)) * 8


def damage(function):
    """Makes function(path, …) into function(…), which returns the damage: a function of the path."""
    return functools.wraps(function)(lambda *args, **kwargs: lambda path: function(path, *args, **kwargs))


@damage
def put(path, content):
    """Replaces whatever has this name. content: text, bytes, or a function of the bytes before."""
    content = content(path.read_bytes()) if callable(content) else content
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def cut_at(share):
    return put(lambda old: old[: int(len(old) * share)])


cut = cut_at(0.5)


@damage
def edit(path, old, new):
    """Replaces the first occurrence of a text."""
    content = path.read_text(encoding="utf-8")
    assert old in content
    put(content.replace(old, new, 1))(path)


@damage
def recode(path, encoding, old="Austria", new="Österreich"):
    put(path.read_text(encoding="utf-8").replace(old, new).encode(encoding))(path)


def as_folder(path):
    path.unlink()
    path.mkdir()


@damage
def linked(path, target=None):
    """A link, to itself unless there is a target."""
    path.unlink()
    path.symlink_to(target or path)


@damage
def change(path, **values):
    """Other values of a JSON object; ... removes one."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **values}
    put(json.dumps({key: value for key, value in content.items() if value is not ...}))(path)


@damage
def cell(path, column, value, row=1):
    """Another cell of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    rows[row][rows[0].index(column)] = value
    write_csv(path, rows)


@damage
def zip_of(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)


@damage
def exported(path, config="{}", weights=b""):
    """A folder as --export writes it. weights: bytes, or a function of the bytes of the checkpoint."""
    content = weights(path.read_bytes()) if callable(weights) else weights
    put(b"")(path)
    as_folder(path)
    put(config)(path / "config.json")
    put(content)(path / "model.safetensors")


tif = damage(write_tif)


@damage
def array(path, change):
    """Another array in a .npy file; change: a function of the array before."""
    np.save(path, change(np.load(path)))


def spotted(image, value):
    """The image (..., H, W) with its upper tenth at one value."""
    image = image.copy()
    image[..., : -(-image.shape[-2] // 10), :] = value
    return image


def kept(folder):
    """{path: checksum} of all that may not change; a lock may be there, and then empty."""
    return {name: digest for name, digest in digests(folder).items() if Path(name).name != ".lock"}
