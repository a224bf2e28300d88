# SPDX-License-Identifier: MIT
"""The benchmark of the start runs, and measures all that it says; what the figures are is not asked."""

import json
import subprocess
import sys

from benchmarks import startup
from tests.helpers import ROOT

EXPECTED = (
    "first batch, GeoTIFF",
    "first batch, packed store",
    "reference: os.walk",
    "check_files",
    "extrapolated from 50",
    "index of v2, metadata.parquet",
    "index of v2, CSV dump",
    "index of v2, packed store",
    "index of v1, split lists",
    "reference: pandas.read_csv",
    "flags",
    "mixmim_tiny on the CPU",
    "AdamW",
    "its checksum alone",
    "read, with its checksum",
)


def test_all_but_the_imports(tmp_path):
    parts = [name for name in startup.PARTS if name != "processes"]  # which start one Python after the other
    small = "--rows 600 --rows_v1 700 --folders 50 --patches 16 --batch_size 8 --model mixmim_tiny --rounds 1".split()
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", "--out", str(tmp_path), *small, "--parts", *parts],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["startup.json"]
    report = json.loads((tmp_path / "startup.json").read_text())
    names = [row["what"] for row in report["rows"]]
    assert len(set(names)) == len(names) and all(any(part in name for name in names) for part in EXPECTED)
    assert all(row["median"] > 0 and len(row["seconds"]) == 1 for row in report["rows"])
    assert all(name in run.stdout for name in names)
    counts = {row["what"]: row["count"] for row in report["rows"]}
    assert counts["index of v2, packed store"] == 600 and counts["index of v1, split lists"] == 700


def test_imports_are_timed_as_processes(monkeypatch, tmp_path):
    assert {"import torch", "import main_pretrain", "import main_finetune", "main_pretrain.py --help"} < set(
        startup.PROCESSES
    )
    monkeypatch.setattr(startup, "PROCESSES", {"python alone": ("-c", "pass")})
    args = startup.get_args_parser().parse_args(["--rounds", "2"])
    ((name, count, seconds),) = startup.time_processes(args, tmp_path)
    assert name == "python alone" and count is None and len(seconds) == 2 and min(seconds) > 0


def test_simulated_metadata_can_be_indexed(tmp_path):
    rows = startup.metadata_rows(startup.SCENE_SIDE**2 + 1, seed=0)
    dataset = startup.BigEarthNetv2(startup.write_v2(tmp_path / "v2", rows), "all")
    assert dataset.ids.tolist() == [row[4] for row in rows] and len(set(dataset.groups.tolist())) == 2
    store = startup.packed.PackedDataset(startup.write_packed_index(tmp_path / "store", dataset), "all")
    assert store.ids.tolist() == dataset.ids.tolist() and (store.label_table() == dataset.label_table()).all()
