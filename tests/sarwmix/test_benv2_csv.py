# SPDX-License-Identifier: MIT
"""CSV dumps of the BigEarthNet v2 metadata: their content, that they read back alike, and what is said about faulty input."""

import csv

import numpy as np
import pytest

from sarwmix.bigearthnetv2 import SNOW_CLOUD, BigEarthNetv2
from sarwmix.prepare.benv2_csv import COLUMNS, main
from tests.helpers.dataset_fixtures import needs_samples, s1_name, sample_path, v2_frame, write_v2
from tests.helpers.runs import argv, refusal

SPLITS = ("train", "val", "test", "train_val")


def official(rows):
    """Rows of v2_frame with all official columns, in an order of their own."""
    frame = v2_frame().iloc[rows].assign(s2v1_name="S2A_x", contains_cloud_or_shadow=True)
    return frame[sorted(frame.columns)]


@pytest.fixture
def root(tmp_path):
    write_v2(tmp_path)
    official([0, 1, 2]).to_parquet(tmp_path / "metadata.parquet")
    official([3]).to_parquet(tmp_path / SNOW_CLOUD)
    return tmp_path


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def fails(capsys, root, *words, flags=()):
    message = refusal(main, ("--metadata", root / "metadata.parquet", "--out", root / "out", flags), capsys)
    for word in words:
        assert word in message


def test_content(root):
    main(argv("--metadata", root / "metadata.parquet", "--out", root / "out"))
    rows = {name: table(root / "out" / f"benv2_{name}.csv") for name in SPLITS}
    assert all(part[0] == list(COLUMNS) and part[0][4] == "s1_name" for part in rows.values())
    assert [len(rows[name]) for name in SPLITS] == [2, 2, 2, 3]
    assert rows["train_val"][1:] == rows["train"][1:] + rows["val"][1:]
    assert rows["test"][1] == [
        "S2A_MSIL2A_2",
        "['Transitional woodland, shrub', 'Inland waters']",
        "test",
        "Austria",
        s1_name(2),
        "S2A_x",
        "False",
        "True",
    ]
    assert sorted(path.name for path in (root / "out").iterdir()) == sorted(f"benv2_{name}.csv" for name in SPLITS)


def same(one, other):
    assert one.ids.tolist() == other.ids.tolist()
    np.testing.assert_array_equal(one.label_table(), other.label_table())
    assert one.label_table().any()


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_it_reads_back_to_the_same_listing(root, split, more):
    main(
        argv(
            "--metadata", root / "metadata.parquet", "--out", root / "out", *(["--include_snow_cloud"] if more else [])
        )
    )
    (root / "out" / "BigEarthNet-S1").symlink_to(root / "BigEarthNet-S1")
    same(BigEarthNetv2(root / "out", split), BigEarthNetv2(root, split, include_snow_cloud=more))
    assert len(BigEarthNetv2(root / "out", "train")) == 1 + more


@needs_samples
@pytest.mark.parametrize("more, rows", [(False, 18), (True, 24)])
def test_the_official_rows(tmp_path, more, rows):
    source = sample_path("benv2")
    main(
        argv("--metadata", source / "metadata.parquet", "--out", tmp_path, *(["--include_snow_cloud"] if more else []))
    )
    (tmp_path / "BigEarthNet-S1").symlink_to(source / "BigEarthNet-S1")
    for split in SPLITS:
        same(BigEarthNetv2(tmp_path, split), BigEarthNetv2(source, split, include_snow_cloud=more))
    assert sum(len(BigEarthNetv2(tmp_path, split)) for split in ("train", "val", "test")) == rows
    labels = [row[1] for row in table(tmp_path / "benv2_train_val.csv")[1:]]
    assert any("significant areas of natural vegetation'" in text for text in labels)  # a name with a comma


def test_an_interrupted_run_is_completed_identically(root):
    flags = ["--metadata", str(root / "metadata.parquet"), "--out", str(root / "out")]
    main(flags)
    whole = {path.name: path.read_bytes() for path in (root / "out").iterdir()}
    (root / "out" / "benv2_val.csv").unlink()
    (root / "out" / ".benv2_test.csv.4711.tmp").write_bytes(b"half")
    main(flags)
    assert {path.name: path.read_bytes() for path in (root / "out").iterdir()} == whole


# ---- Faults --------------------------------------------------------------------------------------


def test_other_lists_are_not_overwritten(root, capsys):
    (root / "out").mkdir()
    (root / "out" / "benv2_val.csv").write_text("mine\n")
    fails(capsys, root, "1 lists are there already and differ", "benv2_val.csv", "--out")
    assert [path.name for path in (root / "out").iterdir()] == ["benv2_val.csv"]
    assert (root / "out" / "benv2_val.csv").read_text() == "mine\n"


def test_faulty_metadata(root, capsys):
    path = root / "metadata.parquet"
    official([0, 1]).drop(columns=["country", "s2v1_name"]).to_parquet(path)
    fails(capsys, root, "lacks 2 of the official columns", "country, s2v1_name")
    official([0, 1]).drop(columns="split").to_parquet(path)
    fails(capsys, root, "lacks 1", "split")
    official([0, 1]).assign(split="dev").to_parquet(path)
    fails(capsys, root, "2 of 2 rows have an unknown split", "metadata.parquet: row 0")
    official([0, 1, 0]).to_parquet(path)
    fails(capsys, root, "1 of 3 rows repeat an id", "metadata.parquet: row 2")
    official([0, 3]).to_parquet(path)
    fails(capsys, root, "1 of 3 rows repeat an id", SNOW_CLOUD, flags=["--include_snow_cloud"])
    (root / SNOW_CLOUD).unlink()
    fails(capsys, root, SNOW_CLOUD, "does not exist", "--include_snow_cloud", flags=["--include_snow_cloud"])
    path.write_text("no parquet")
    fails(capsys, root, "metadata.parquet", "cannot be read as a parquet file")
    path.unlink()
    fails(capsys, root, "metadata.parquet", "cannot be read as a parquet file")
    assert not (root / "out").exists()


def test_csv_as_input_is_refused(root, capsys):
    path = root / "dump.csv"
    official([0]).to_csv(path)
    with pytest.raises(SystemExit) as stopped:
        main(argv("--metadata", path, "--out", root / "out"))
    assert stopped.value.code == 2 and ".parquet" in capsys.readouterr().err
