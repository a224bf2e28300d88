# SPDX-License-Identifier: MIT
"""Zips that are damaged or made to do harm: each is refused in one line, and nothing is written."""

import random
import zipfile
import zlib

import pytest

from common.errors import DataError
from common.safe_zip import MAX_BYTES, MAX_ENTRIES, MAX_RATIO, RATIO_FROM, open_archive
from tests.helpers.dataset_fixtures import fails_with, one_line
from tests.helpers.zips import GOOD, VICTIM, bomb, make, patch

RANDOM = random.Random(0).randbytes(50_000)


def everything_under(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# ---- The directory -------------------------------------------------------------------------------


def test_many_bad_members_are_counted_and_five_named(tmp_path):
    path = make(tmp_path / "data.zip", {f"../{n}.bin": b"" for n in range(9)})
    with pytest.raises(DataError) as error:
        open_archive(path)
    one_line(error, "9 members", "'../4.bin'", "and 4 more")
    assert "'../5.bin'" not in str(error.value)


def test_the_caps_are_those_that_are_promised():
    assert (MAX_ENTRIES, MAX_BYTES, MAX_RATIO, RATIO_FROM) == (200_000, 200 * 10**9, 200, 8 * 2**20)


def test_too_many_members_too_many_bytes_too_high_a_ratio(tmp_path):
    path = make(tmp_path / "data.zip", {f"{n}.bin": bytes(3 * 2**20) for n in range(4)})
    open_archive(path, max_entries=4, max_bytes=12 * 2**20).__exit__()  # exactly as many; 3 MiB of zeros may be
    for flags, words in (
        ({"max_entries": 3}, "has 4 members, more than the 3"),
        ({"max_bytes": 12 * 2**20 - 1}, "12582912 bytes in all"),
    ):
        fails_with(lambda: open_archive(path, **flags), str(path), words, "download it again")
    path = make(tmp_path / "large.zip", {"large.bin": (RANDOM[:1000] + bytes(2**17)) * 80})
    ratio = path.stat().st_size / (80 * (1000 + 2**17))
    open_archive(path, max_ratio=2 / ratio).__exit__()
    with pytest.raises(DataError, match="'large.bin' unpacks"):
        open_archive(path, max_ratio=0.5 / ratio)


def test_stated_sizes_beyond_the_default_cap(tmp_path):
    path = make(tmp_path / "data.zip", {f"{n:02}.bin": b"x" for n in range(50)})
    for n in range(50):
        patch(path, f"{n:02}.bin", size=2**32 - 2)
    fails_with(lambda: open_archive(path), str(path), f"{50 * (2**32 - 2)} bytes in all", "200000000000 allowed")


def cut(content):
    return content[: len(content) // 2]


def without_its_middle(content):
    return content[:1000] + content[2000:]


@pytest.mark.parametrize(
    "damage, words",
    (
        (cut, "is not a zip"),
        (without_its_middle, "overlaps another, or lies outside"),
        (lambda _: b"", "is not a zip"),
        (lambda _: b"<html>Sign in</html>" * 100, "is not a zip"),
        (lambda content: content[:-1], "is not a zip"),
    ),
)
def test_what_is_not_a_whole_zip(damage, words, tmp_path):
    path = make(tmp_path / "data.zip", {GOOD: RANDOM, VICTIM: RANDOM})
    path.write_bytes(damage(path.read_bytes()))
    fails_with(lambda: open_archive(path), str(path), words, "download it again")


def test_a_zip_that_is_not_there_or_a_folder(tmp_path):
    with pytest.raises(DataError) as error:
        open_archive(tmp_path / "none.zip")
    one_line(error, str(tmp_path / "none.zip"), "there is no such file")
    fails_with(lambda: open_archive(tmp_path), str(tmp_path), "Is a directory")


def test_names_that_look_odd_but_are_not(tmp_path):
    names = ["a..b/...c", "./d/e", "f g/ü.bin", "h/i", "h-j"]
    with open_archive(make(tmp_path / "data.zip", {name: name.encode() for name in ["h/", *names]})) as archive:
        assert list(archive.members) == ["a..b/...c", "d/e", "f g/ü.bin", "h/i", "h-j"]
        assert archive.read("d/e") == b"./d/e"
        with pytest.raises(DataError, match="'d/e' has 5 bytes, far more"):
            archive.read("d/e", most=4)


def test_the_fingerprint_depends_on_names_sizes_and_checksums(tmp_path):
    prints = []
    for n, members in enumerate(
        (
            {"a": b"1", "b": b"22"},
            {"a": b"1", "b": b"22"},
            {"a": b"1", "c": b"22"},
            {"a": b"1", "b": b"33"},
            {"a": b"1", "b": b"222"},
        )
    ):
        with open_archive(make(tmp_path / f"{n}.zip", members)) as archive:
            prints.append(archive.fingerprint())
    assert prints[0] == prints[1] and len(set(prints)) == 4


# ---- Extraction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
def test_what_is_chosen_is_extracted_and_nothing_else(method, tmp_path):
    large = RANDOM * 50  # several chunks
    path = make(
        tmp_path / "data.zip", {GOOD: large, VICTIM: b"not wanted", "top/empty": b"", "top/exact": bytes(2**20)}, method
    )
    with open_archive(path) as archive:
        archive.extract({"x/y.bin": GOOD, "empty": "top/empty", "exact": "top/exact"}, tmp_path / "out")
    assert everything_under(tmp_path / "out") == {
        tmp_path / "out" / "x": None,
        tmp_path / "out" / "x" / "y.bin": large,
        tmp_path / "out" / "empty": b"",
        tmp_path / "out" / "exact": bytes(2**20),
    }


def test_what_is_there_with_the_right_size_stays(tmp_path):
    path, chosen = make(tmp_path / "data.zip", {"a": b"aaa", "b": b"bbb", "c": b"ccc"}), {"1": "a", "2": "b", "3": "c"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1").write_bytes(b"AAA")
    (tmp_path / "out" / "2").write_bytes(b"B")
    with open_archive(path) as archive:
        assert archive.pending(chosen, tmp_path / "out") == {"2": "b", "3": "c"}
        archive.extract(chosen, tmp_path / "out")
        assert archive.pending(chosen, tmp_path / "out") == {}
    assert [(tmp_path / "out" / name).read_bytes() for name in "123"] == [b"AAA", b"bbb", b"ccc"]


def lying_bomb(path):
    """64 MiB of zeros, stated as 1000 bytes, with the checksum of the first 1000: zipfile alone would take it."""
    return patch(bomb(path), VICTIM, size=1000, crc=zlib.crc32(bytes(1000)))


def test_a_bomb_that_states_a_small_size_stops_at_once(tmp_path, monkeypatch):
    path = lying_bomb(tmp_path / "data.zip")
    with zipfile.ZipFile(path) as plain:
        assert plain.read(VICTIM) == bytes(1000)
    came, read = [], zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda member, n: came.append(read(member, n)) or came[-1])
    with open_archive(path) as archive, pytest.raises(DataError) as error:
        archive.extract({"0001/victim.bin": VICTIM}, tmp_path / "out")
    one_line(error, str(path), f"'{VICTIM}' holds more than the 1000 bytes", "do not trust")
    assert 1000 < sum(map(len, came)) <= 2**20
    assert everything_under(tmp_path / "out") == {tmp_path / "out" / "0001": None}


@pytest.mark.parametrize("method", (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
def test_bit_rot_in_a_member_is_told(method, tmp_path):
    path = make(tmp_path / "data.zip", {GOOD: b"good", VICTIM: bytes(range(256)) * 40}, method)
    whole = path.read_bytes()
    start = whole.index(VICTIM.encode()) + len(VICTIM)
    with zipfile.ZipFile(path) as plain:
        length = plain.getinfo(VICTIM).compress_size
    for n in range(0, length, max(1, length // 40)):
        rotten = bytearray(whole)
        rotten[start + n] ^= 0x10
        path.write_bytes(rotten)
        with open_archive(path) as archive, pytest.raises(DataError) as error:
            archive.extract({"good": GOOD, "victim": VICTIM}, tmp_path / f"out{n}")
        one_line(error, str(path), f"member '{VICTIM}'", "download it again")
        assert everything_under(tmp_path / f"out{n}") == {tmp_path / f"out{n}" / "good": b"good"}


def test_whatever_byte_is_wrong_it_is_a_data_error_or_does_no_harm(tmp_path):
    contents = {"a/b": b"some text, some text", "a/c": bytes(30)}
    whole = make(tmp_path / "data.zip", contents).read_bytes()
    path, kept = tmp_path / "changed.zip", 0
    for n in range(len(whole)):
        for change in (0x01, 0x80, 0xFF):
            path.write_bytes(whole[:n] + bytes([whole[n] ^ change]) + whole[n + 1 :])
            try:
                with open_archive(path) as archive:
                    assert all(archive.read(name) in contents.values() for name in archive.members)
                    kept += 1
            except DataError as error:
                assert "\n" not in str(error) and str(path) in str(error)
    assert 0 < kept < len(whole) * 2  # dates, for example, do not matter
