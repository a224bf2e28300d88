# SPDX-License-Identifier: MIT
"""Zip files, sound and hostile."""

import struct
import warnings
import zipfile

GOOD, VICTIM = "top/0001/good.bin", "top/0001/victim.bin"


# Fields of the central directory: offset in a record, and struct format.
FIELDS = {
    "flags": (8, "<H"),
    "method": (10, "<H"),
    "crc": (16, "<I"),
    "packed": (20, "<I"),
    "size": (24, "<I"),
    "mode": (38, "<I"),
    "offset": (42, "<I"),
}


def make(path, members, method=zipfile.ZIP_DEFLATED):
    """A zip of {name: content}; a list of pairs may hold a name twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore", UserWarning)
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0)), content, method)
    return path


def record_of(content, name):
    """Where the record of a member in the central directory begins."""
    at = content.find(b"PK\x01\x02")
    while content[at + 46 : at + 46 + len(name)] != name.encode():
        at = content.index(b"PK\x01\x02", at + 4)
    return at


def patch(path, name, **values):
    """Write other values into the central directory record of a member."""
    content = bytearray(path.read_bytes())
    at = record_of(content, name)
    for field, value in values.items():
        offset, form = FIELDS[field]
        struct.pack_into(form, content, at + offset, value)
    path.write_bytes(content)
    return path


def named(name):
    return lambda path: make(path, {GOOD: b"good", name: b"evil"})


def patched(**values):
    return lambda path: patch(make(path, {GOOD: b"good", VICTIM: b"evil" * 100}), VICTIM, **values)


def with_nul(path):
    make(path, {GOOD: b"good", "top/0001/victim.bin@.txt": b"evil"})
    path.write_bytes(path.read_bytes().replace(b"victim.bin@", b"victim.bin\0"))
    return path


def bomb(path):
    return make(path, {GOOD: b"good", VICTIM: bytes(64 * 2**20)})


def overlapping(path):
    make(path, {GOOD: b"good" * 50, VICTIM: b"evil" * 50})
    return patch(
        path, VICTIM, offset=struct.unpack_from("<I", path.read_bytes(), record_of(path.read_bytes(), GOOD) + 42)[0]
    )


def beyond(path):
    return patch(make(path, {GOOD: b"good", VICTIM: b"evil" * 100}), VICTIM, packed=100_000)


# name: (maker, words of the message)
HOSTILE = {
    "parent": (named("../victim.bin"), "'../victim.bin' leads out of its folder"),
    "parent_within": (named("top/0001/../../../victim.bin"), "'top/0001/../../../victim.bin' leads out"),
    "parent_at_the_end": (named("top/0001/.."), "'top/0001/..' leads out"),
    "absolute": (named("/etc/victim"), "'/etc/victim' has an absolute path"),
    "backslash": (named("top\\..\\victim.bin"), "is named by a Windows path"),
    "drive": (named("C:/victim.bin"), "'C:/victim.bin' is named by a Windows path"),
    "nul": (with_nul, r"'top/0001/victim.bin\x00.txt' has control characters"),
    "control": (named("top/0001/vic\x1b[2Jtim.bin"), r"'top/0001/vic\x1b[2Jtim.bin' has control characters"),
    "newline": (named("top/0001/vic\ntim.bin"), r"vic\ntim.bin' has control characters"),
    "long_name": (named(f"top/0001/{'A' * 300}.tif"), "has a name that is too long"),
    "long_path": (named("/".join(["0001"] * 700)), "has a name that is too long"),
    "no_name": (named("./"), "'./' has no name"),
    "link": (patched(mode=0o120777 << 16), f"'{VICTIM}' is a symbolic link"),
    "device": (patched(mode=0o020666 << 16), f"'{VICTIM}' is neither a plain file nor a folder"),
    "pipe": (patched(mode=0o010666 << 16), "neither a plain file nor a folder"),
    "folder_by_mode": (patched(mode=0o040755 << 16), "neither a plain file nor a folder"),
    "encrypted": (patched(flags=0x1), f"'{VICTIM}' is encrypted"),
    "strongly_encrypted": (patched(flags=0x41), "is encrypted"),
    "patch_data": (patched(flags=0x20), "is compressed by a method that this program does not read"),
    "method": (patched(method=12), "is compressed by a method that this program does not read (12)"),
    "duplicate": (
        lambda path: make(path, [(GOOD, b"good"), (VICTIM, b"one"), (VICTIM, b"two")]),
        f"'{VICTIM}' occurs twice",
    ),
    "duplicate_in_disguise": (
        lambda path: make(path, [(VICTIM, b"one"), ("top/.//0001/victim.bin", b"two")]),
        "occurs twice",
    ),
    "file_and_folder": (
        lambda path: make(path, [(VICTIM, b"one"), (f"{VICTIM}/more.bin", b"two")]),
        f"'{VICTIM}' is a file and a folder",
    ),
    "file_and_empty_folder": (
        lambda path: make(path, [(VICTIM, b"one"), (f"{VICTIM}/", b"")]),
        "is a file and a folder",
    ),
    "bomb": (bomb, f"'{VICTIM}' unpacks"),
    "stored_but_other_size": (patched(method=0, size=1000, packed=30), "has another size in the zip"),
    "overlap": (overlapping, f"'{VICTIM}' overlaps another"),
    "beyond_the_end": (beyond, f"'{VICTIM}' reaches beyond"),
}
