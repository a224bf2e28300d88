# SPDX-License-Identifier: MIT
"""A machine without the packages of the extras and rasterio: training from a packed store works, the rest is one line."""

import json
import subprocess
import sys
from importlib import import_module

import pytest

import main_pretrain
from analysis import probe
from benchmarks import data
from common import packages
from common.errors import DataError
from sarwmix import sen12_align_s1_to_s2
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.prepare import benv1_to_zarr, pack, statistics
from sarwmix.simulate import flood_archive as simulate_flood_raw
from sarwmix.simulate import patches as simulate
from tests.helpers import ROOT
from tests.helpers.dataset_fixtures import one_line, write_v1, write_v1_zarr, write_v2, write_v2_lmdb
from tests.helpers.runs import argv, refusal
from tests.helpers.sen12 import write_raw

pytestmark = pytest.mark.slow

ABSENT = ("rasterio", "zarr", "lmdb", "osgeo", "mpi4py", "sklearn", "geopandas")
BLOCKED = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.partition(".")[0] in {ABSENT} else find(name, *more)
import analysis.probe, benchmarks.data, benchmarks.step, main_finetune, main_pretrain, sarwmix.prepare.pack
import sarwmix.prepare.statistics, sarwmix.simulate
from common.ending import run_program
sys.exit(run_program(main_pretrain.main))
"""


def test_a_packed_store_is_trained_on_without_them(tmp_path):
    source, store = write_v2(tmp_path / "v2"), tmp_path / "store"
    pack.main(argv("--dataset benv2 --data_path", source, "--out", store, "--workers 1"))
    small = "--model mixmim_tiny --input_size 64 --batch_size 2 --warmup_epochs 0 --epochs 1 --split all --device cpu"
    flags = argv(small, "--num_workers 1 --data_path", store, "--output_dir", tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "step 2/2" in done.stdout and json.loads((tmp_path / "run" / "log.txt").read_text())["train_loss"] > 0


@pytest.fixture
def absent(monkeypatch):
    """This process as if the packages were not installed, where they are not yet imported by name."""

    def missing(name):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name.partition(".")[0])
        return import_module(name)

    from sarwmix.geotiff import load_rasterio

    load_rasterio.cache_clear()
    monkeypatch.setattr(packages, "import_module", missing)
    yield
    load_rasterio.cache_clear()


@pytest.mark.parametrize(
    "write, dataset, words",
    [
        (
            write_v2,
            "benv2",
            "reading GeoTIFFs needs rasterio, which is not installed; pip install rasterio, or pack the data",
        ),
        (
            write_v2_lmdb,
            "benv2",
            "reading an LMDB needs lmdb, which is not installed; pip install lmdb, or pip install -e '.[lmdb]' in the checkout, "
            "or pack the data on a machine that has it",
        ),
        (write_v1, "benv1", "reading GeoTIFFs needs rasterio"),
        (
            lambda root: write_v1_zarr(root, 3) and root,
            "benv1",
            "reading a Zarr store needs zarr, which is not installed; pip install zarr, or pip install -e '.[zarr]'",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line_before_any_work(write, dataset, words, tmp_path, absent, capsys, program):
    root = tmp_path / "data"
    root.mkdir()
    write(root)
    source = ["--dataset", dataset, "--data_path", root]
    status, _, err = program(main_pretrain, *source, "--output_dir", tmp_path / "run")
    assert status == 2 and words in err and err.count("\n") == 1
    assert words in refusal(statistics.main, [*source, "--split", "all", "--workers", 1], capsys)
    splits = ["--splits", "every"] if dataset == "benv1" else []
    assert words in refusal(
        pack.main, [*source, *splits, "--skip_bad", "--out", tmp_path / "store", "--workers", 1], capsys
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_cannot_be_written_is_one_line_before_any_work(tmp_path, absent, capsys):
    write_v1(tmp_path / "v1")
    write_raw(tmp_path / "raw", {"0001": (False, True)})
    for module, flags, words in (
        (simulate, ["--patches", 8], "writing GeoTIFFs needs rasterio"),
        (simulate_flood_raw, ["--folders", 8], "writing GeoTIFFs needs rasterio"),
        (
            sen12_align_s1_to_s2,
            ["--raw_root", tmp_path / "raw"],
            "warping images needs gdal, which is not installed; pip install gdal==$(gdal-config --version), or run scripts",
        ),
        (benv1_to_zarr, ["--root", tmp_path / "v1"], "writing a Zarr store needs zarr"),
    ):
        assert words in refusal(module.main, [*flags, "--out", tmp_path / "out", "--workers", 1], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "v1"]


def test_ranks_that_cannot_find_each_other_are_one_line(tmp_path, absent, capsys, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    line = refusal(simulate.main, ["--patches", 8, "--out", tmp_path / "out"], capsys)
    assert "Open MPI started several processes, and mpi4py, which connects them, cannot be loaded" in line
    assert "pip install mpi4py, or pip install -e '.[mpi]' in the checkout" in line
    assert "--patches" in refusal(simulate.main, ["--patches", "x", "--out", tmp_path / "out"], capsys)


def test_what_measures_and_probes_names_its_packages_before_any_work(tmp_path, absent, capsys):
    line = refusal(probe.main, ["--embeddings", tmp_path / "none.npz"], capsys)
    assert "probing features needs scikit-learn, which is not installed; pip install scikit-learn, or pip" in line
    assert "'.[analysis]'" in line
    assert "needs lmdb" in refusal(data.main, ["--out", tmp_path / "out"], capsys) and not any(tmp_path.iterdir())


def test_a_package_that_cannot_be_imported_is_named_with_the_reason(tmp_path, monkeypatch):
    def broken(name):
        raise ImportError("libgdal.so.34: cannot open\nshared object file")

    monkeypatch.setattr(packages, "import_module", broken)
    with pytest.raises(DataError) as error:
        packages.load("rasterio", "reading GeoTIFFs")
    one_line(
        error,
        "reading GeoTIFFs needs rasterio, which cannot be imported (libgdal.so.34: cannot open shared object file); pip install",
    )


def test_a_dataset_is_opened_without_them(tmp_path, absent):
    dataset = BigEarthNetv2(write_v2(tmp_path), "all")
    dataset.check_files()
    with pytest.raises(DataError, match="needs rasterio"):
        dataset.image(0)
