# SPDX-License-Identifier: MIT
"""Detects the folder layout of the GeoTIFFs of BigEarthNet, which depends on how the archives were unpacked.

The layout is detected once, when a dataset is opened, by listing a few folders. Names of patches come from the
metadata.
"""

import logging
import os
import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from common.errors import data_error

SUFFIXES = (".tif", ".tiff", ".TIF", ".TIFF")
S1_START = re.compile(r"S1[A-Z]_")
ENOUGH = 4  # folders with patches that are examined
LISTED = 1000  # entries of a folder that are listed, because it may have half a million

log = logging.getLogger(__name__)


class Layout(NamedTuple):
    """Patches in a folder: [<acquisition>/]<patch>/<patch>_{VH,VV}<suffix>.

    The name of an acquisition is that of its patches without their last three parts.
    """

    folder: Path
    acquisitions: bool
    suffix: str = SUFFIXES[0]

    def __str__(self):
        return f"{self.folder}/{'<acquisition>/' * self.acquisitions}<patch>/<patch>_VH{self.suffix}"

    def folder_of(self, patch):
        """The folder of a patch."""
        return f"{self.folder}/{patch.rsplit('_', 3)[0]}/{patch}" if self.acquisitions else f"{self.folder}/{patch}"


def find_layout(root, name, acquisitions):
    """The Layout of the images under a folder, or None if there are no images.

    name: of the official folder of images. acquisitions: whether the official layout has folders of acquisitions.
    These folders are searched in order, until images are found: root/name, root/name/name (extracted twice), root, and
    the first two in each folder of root. A folder with the official layout is not searched for others.
    Raises DataError if there are several layouts.
    """

    def in_named(folder):
        return _layouts_in(folder / name, acquisitions) or _layouts_in(folder / name / name, acquisitions)

    found = in_named(root) or _layouts_in(root, acquisitions)
    if not found:
        found = [layout for folder in folders_in(root) for layout in in_named(folder)]
    if len(found) > 1:
        raise data_error(
            f"{root}: holds images in {len(found)} layouts",
            list(map(str, found)),
            "remove all but one, or give the right folder with --data_path",
        )
    if not found:
        return None
    if found[0] not in (Layout(root / name, acquisitions), Layout(root, acquisitions)):
        log.info("%s: the images are read from %s", root, found[0])
    return found[0]


def folders_in(folder):
    """The folders among the first LISTED entries of a folder, sorted; [] if it cannot be listed."""
    return [Path(folder, entry.name) for entry in _entries(folder) if _is_folder(entry)]


def content_of(folder):
    """For a message: the names of the first three folders in a folder."""
    names = [path.name for path in folders_in(folder)]
    return f"it holds the folders {_first_three(names)}" if names else "it holds no folder"


def _first_three(names):
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _entries(folder):
    try:
        with os.scandir(folder) as entries:
            return sorted(islice(entries, LISTED), key=lambda entry: entry.name)
    except OSError:
        return []


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _layouts_in(folder, acquisitions):
    """The layouts of the first few folders with patches in this folder; only the official one, if it is one of them."""
    found = {}
    for entry in _entries(folder):
        if len(found) >= ENOUGH:
            break
        if S1_START.match(entry.name) and _is_folder(entry):
            if suffix := _suffix_of(entry):
                found[entry.name] = Layout(folder, False, suffix)
            elif suffix := next(filter(None, map(_suffix_of, _patches_of(entry))), None):
                found[entry.name] = Layout(folder, True, suffix)
    layouts = sorted(set(found.values()))
    official = Layout(folder, acquisitions)
    return [official] if official in layouts else layouts


def _patches_of(acquisition):
    patches = (entry for entry in _entries(acquisition) if entry.name.startswith(acquisition.name))
    return islice(filter(_is_folder, patches), ENOUGH)


def _suffix_of(patch):
    """The suffix of the images of a patch, or None if this folder (os.DirEntry) is not the folder of a patch."""
    names = {entry.name for entry in _entries(patch)}
    return next(
        (suffix for suffix in SUFFIXES if any(f"{patch.name}_{channel}{suffix}" in names for channel in ("VH", "VV"))),
        None,
    )


def places_of_lists(root, images, name):
    """The folders in which lists and metadata are searched: root, and the folders from it to the folder `images`.

    If root is the folder of images, or has its name, its parent is searched as well.
    """
    parts = images.relative_to(root).parts
    inner = [root.joinpath(*parts[:k]) for k in range(len(parts) + 1)]
    above = images == root or root.absolute().name == name
    return inner + ([root.parent if root.name not in ("", "..") else root.absolute().parent] if above else [])


def whereabouts(path):
    """For a message about a missing or empty file: its path, and the content of the nearest existing folder."""
    path = Path(path)
    if path.is_file():
        return f"{path} is empty"
    wanted, folder = path, path.parent
    while not folder.is_dir() and folder != folder.parent:
        wanted, folder = folder, folder.parent
    names = [entry.name for entry in _entries(folder)]
    if wanted.name in names:
        return f"looked for {path}, which is no file"
    return f"looked for {path}, but {folder} holds {f'{_first_three(names)} and ' if names else ''}no {wanted.name}"
