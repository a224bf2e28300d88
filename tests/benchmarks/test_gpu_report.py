# SPDX-License-Identifier: MIT
"""The report on a GPU: a part of it that fails or overruns costs itself alone. tests/benchmarks/test_benchmarks.py runs all of it, on a CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import benchmark_figure
from benchmarks import apart, end_to_end, gpu_parts, gpu_report, parity, report
from benchmarks.apart import Apart, LeftOut, Part
from benchmarks.random_store import write_random_store
from common.workers import Workers
from sarwmix.bigearthnetv2 import BigEarthNetv2
from sarwmix.packed import PackedDataset
from sarwmix.packed_store import verify
from sarwmix.sen12flood_loader import FloodDataset
from tests.helpers.runs import argv, refusal

pytestmark = pytest.mark.slow


def test_missing_packages_are_named_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "NEEDED", ("json", "no_such_package", "nor_this"))
    monkeypatch.setattr(gpu_report.missing_packages, "__defaults__", (gpu_report.NEEDED,))
    said = refusal(gpu_report.main, ("--out", tmp_path / "out"), capsys)
    assert "no_such_package, nor_this" in said
    assert not (tmp_path / "out").exists()


# ---- parts
def part_that_ends(found, settings, seconds):
    found.add("one", value=settings)
    found.add("two")


def part_that_raises(found, settings, seconds):
    found.add("before")
    raise ValueError("no such luck")


def part_that_is_killed(found, settings, seconds):
    os.kill(os.getpid(), signal.SIGKILL)


def part_that_never_ends(found, settings, seconds):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pause()


def part_that_cannot_be_done(found, settings, seconds):
    raise LeftOut("there is no such thing")


def part_that_exits(found, settings, seconds):
    sys.exit("it is not as it must be")


def test_a_part_that_fails_costs_itself_alone(tmp_path, capfd):
    functions = (
        part_that_ends,
        part_that_raises,
        part_that_is_killed,
        part_that_never_ends,
        part_that_cannot_be_done,
        part_that_exits,
        part_that_ends,
    )
    parts = [
        Part(f"{number}", function.__name__, 0.01 if function is part_that_never_ends else 1, function)
        for number, function in enumerate(functions)
    ]
    written = []
    rows = apart.run_parts(parts, tmp_path, 7, time.monotonic() + 100, lambda rows: written.append(len(rows)))
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "failed", "left out", "failed", "ok"]
    assert written == [1, 2, 3, 4, 5, 6, 7]
    assert rows[0]["found"] == [{"text": "one", "value": 7}, {"text": "two"}]
    assert rows[1]["found"] == [{"text": "before"}]
    reasons = [row["reason"] for row in rows]
    assert reasons[1] == "status 1: ValueError: no such luck" and reasons[2].startswith("status -9")
    assert "not over within" in reasons[3]
    assert reasons[4] == "there is no such thing" and reasons[5] == "status 1: it is not as it must be"
    assert "   one\n" in capfd.readouterr().out and "Traceback" in (tmp_path / "1.log").read_text()


def test_time_that_is_left_goes_to_later_parts():
    parts = [Part(name, name, share, None) for name, share in (("a", 1), ("b", 1), ("c", 2))]
    assert [apart.split_time(parts[k:], seconds) for k, seconds in ((0, 40), (1, 39), (2, 38), (0, -1))] == [
        10,
        13,
        38,
        0,
    ]


def with_a_child(path):
    child = subprocess.Popen(["sleep", "1000"])
    path.with_suffix(".tmp").write_text(str(child.pid))
    path.with_suffix(".tmp").rename(path)
    signal.pause()


def test_what_a_part_has_started_ends_with_it(tmp_path):
    process = Apart(with_a_child, tmp_path / "pid", log=tmp_path / "log", session=True)
    while not (tmp_path / "pid").exists():
        assert process.wait(0.01) is None, process.last_line()
    process.end()
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert process.wait() == -signal.SIGKILL
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_round_begins_only_if_there_is_time_for_it():
    calls = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    assert len(report.in_turns(variants, 9, until=time.monotonic() - 1)["a"]) == 1 and len(calls) == 2
    assert len(report.in_turns(variants, 9, until=time.monotonic() + 1000)["b"]) == 9


def test_steps_are_chosen_by_the_time_they_take():
    class Still:
        def run(self, steps):
            pass

    assert parity.steps_within(None, [Still], 200) == 200 and parity.steps_within(1000, [Still], 200) == 200
    assert parity.steps_within(-1, [Still], 200) == 2


def test_idle_time_is_what_no_kernel_covers():
    assert gpu_parts.busy_time([(0, 2), (1, 3), (7, 9), (7.5, 8)]) == 5


@pytest.mark.parametrize(
    "kernel, short",
    [
        ("aten::mm", "aten::mm"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >(int)",
            "vectorized_elementwise_kernel",
        ),
        (
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>(int)",
            "vectorized_layer_norm_kernel",
        ),
        (
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_ti…",
        ),
    ],
)
def test_kernels_have_short_names(kernel, short):
    assert benchmark_figure.short_name(kernel) == short


def test_sizes_are_those_of_the_machine(tmp_path):
    def batch(**machine):
        settings = gpu_parts.Settings.of(machine or None, tmp_path, 0)
        return settings.model, settings.batch, settings.amp

    assert batch() == ("mixmim_tiny", 4, "off") and batch(device="cpu", amp="bf16") == ("mixmim_tiny", 4, "bf16")
    assert batch(device="cuda", amp="bf16", gpu_bytes=80e9) == ("mixmim_base", 256, "bf16")
    assert batch(device="cuda", amp="fp16", gpu_bytes=16e9) == ("mixmim_base", 64, "fp16")


# ---- random stores, and what is done without rasterio
def test_a_random_store_is_a_store_with_the_statistics_of_its_dataset(tmp_path):
    store = write_random_store(tmp_path / "patches", "benv2", {"train": 7, "val": 2}, seed=3)
    assert verify(store, Workers()) == 6
    data = PackedDataset(store, "train", "benv2", supervised=True)
    (images,) = data.images(list(range(7)))
    assert len(data) == 7 and images.shape == (7, 2, 120, 120) and len(PackedDataset(store, "val")) == 2
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor(BigEarthNetv2.MEAN), rtol=0, atol=0.1)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor(BigEarthNetv2.STD), rtol=0.02, atol=0)
    assert not torch.equal(images[0], images[1]) and data.check_units()["train"]["pixels"] == [7 * 120**2] * 2
    again = write_random_store(tmp_path / "again", "benv2", {"train": 7, "val": 2}, seed=3)
    assert (again / "manifest.json").read_bytes() == (store / "manifest.json").read_bytes()


def test_a_random_store_of_floods(tmp_path):
    store = write_random_store(tmp_path / "floods", "sen12flood", {"train": 5, "test": 2}, size=128)
    data = PackedDataset(store, "train", "sen12flood")
    first, second, label = data[1]
    assert data.ids[1] == "train-0000__d0__d2" and first.shape == second.shape == (2, 128, 128) and label == 1
    assert torch.equal(data[0][0], first) and not torch.equal(first, second)
    assert set(np.unique(data.groups)) == {"train-0000", "train-0001"}
    assert first.mean((1, 2)).tolist() == pytest.approx(FloodDataset.MEAN, abs=0.2)
    assert first.min() > FloodDataset.FLOOR_DB


def test_without_rasterio_geotiffs_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(end_to_end.importlib.util, "find_spec", lambda name: None)
    small = "--model mixmim_tiny --batch_size 4 --device cpu --amp off --samples 8 --steps 1 --skip 1"
    end_to_end.main(argv("--out", tmp_path, small, "--rounds 1 --workers 0"))
    rows = json.loads((tmp_path / "end_to_end.json").read_text())["rows"]
    assert [row["way"] for row in rows] == [
        "reference, batch in hand",
        "ours, packed",
        "ours, packed, data_cache ram",
        "ours, batch in hand",
    ]
    assert "GeoTIFFs are left out" in capsys.readouterr().out
