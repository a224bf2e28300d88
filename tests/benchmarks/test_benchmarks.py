# SPDX-License-Identifier: MIT
"""The benchmarks run and report what they did; and what they compare with computes the same as the model."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from matplotlib.image import imread as read_png

import benchmarks.__main__ as everything
from analysis import benchmark_figure
from batch_preparation import BatchPreparation
from benchmarks import gpu_parts, memory, report, scaling, step
from benchmarks.reference import ReferenceMixMIM, ReferenceSamples
from models_mixmim import mixmim_tiny
from sarwmix.bigearthnetv2 import BigEarthNetv2
from tests.helpers import ROOT
from tests.helpers.runs import argv
from util.optimization import emulates_16_bits

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("weight_level", ["token", "pixel"])
@pytest.mark.parametrize("ones, norm_pix_loss", [(8, True), (5, False), (0, True), (16, False)])
def test_the_reference_computes_what_the_model_computes(ones, norm_pix_loss, weight_level):
    """Loss, prediction and every gradient, in float64."""
    torch.manual_seed(0)
    model = mixmim_tiny(norm_pix_loss=norm_pix_loss, weight_level=weight_level).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    x, weights = torch.randn(4, 2, 128, 128).double(), torch.rand(4, 2, 128, 128).double() + 1
    mask = torch.zeros(16).double()
    mask[torch.randperm(16)[:ones]] = 1
    found = []
    for way in (model, ReferenceMixMIM(model)):
        model.zero_grad()
        loss, pred, _ = way(x, weights, mask=mask.view(1, -1, 1))
        loss.backward()
        found.append([loss.detach(), pred.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 + 1e-9 * theirs.abs().max().item())


def test_the_reference_prepares_samples_as_a_batch_is_prepared(simulated):
    dataset = BigEarthNetv2(simulated, split="train")
    samples = ReferenceSamples(dataset)
    prepare = BatchPreparation(128, dataset.MEAN, dataset.STD)
    for i in (0, 5):
        x, weights = samples[i]
        for expected, found in zip(prepare(dataset.image(i)[None]), (x, weights)):
            flipped = [expected[0].flip(axes) for axes in ([], [-1], [-2], [-1, -2])]
            assert any(torch.allclose(found, way, atol=1e-5) for way in flipped)


def test_speedups_are_of_the_same_round():
    calls = []
    seconds = report.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 20, seed=3)
    assert all(sorted(calls[i : i + 2]) == ["a", "b"] for i in range(0, 40, 2))
    assert len(set(map(tuple, zip(calls[::2], calls[1::2])))) == 2
    assert [len(values) for values in seconds.values()] == [20, 20]
    assert report.speedup([2, 4, 8], [1, 2, 2]) == {"median": 2, "low": 2, "high": 4}


@pytest.fixture(scope="module")
def report_run(tmp_path_factory):
    """The report on a GPU, run on this CPU with small sizes: (what it printed, its folder)."""
    folder = tmp_path_factory.mktemp("report")
    run = subprocess.run(
        ["bash", "scripts/gpu_report.sh", "--minutes", "12", "--out", str(folder)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=720,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout, folder


@pytest.fixture(scope="module")
def measured(report_run):
    """A folder into which every benchmark wrote its JSON, of the tiny model: those of the report, and one more."""
    folder = report_run[1] / "gpu_report_parts"
    with pytest.MonkeyPatch.context() as patch:
        flags = ("--model mixmim_tiny --batch_size 4 --device cpu --rounds 2 --warmup 1 --out", folder)
        patch.setattr(sys, "argv", argv("scaling", flags))
        scaling.main()
    return folder


def test_the_report_on_a_cpu(report_run):
    """Every part is there and none has failed; what was found is in the JSON, on the console and in the table."""
    printed, folder = report_run
    data = json.loads((folder / "gpu_report.json").read_text())
    assert {row["part"]: row["status"] for row in data["rows"]} == {
        "machine": "ok",
        "tests": "left out",
        "training": "ok",
        "step": "ok",
        "end_to_end": "ok",
        "parity": "ok",
        "memory": "ok",
        "profile": "ok",
    }
    texts = {row["part"]: [found["text"] for found in row["found"]] for row in data["rows"]}
    for part, words in (
        ("tests", " skipped"),
        ("training", "equal to the last bit"),
        ("training", "finetuning, sen12flood"),
        ("training", "exported, benv2"),
        ("step", "ours, grad_checkpointing: "),
        ("end_to_end", "ours, packed, data_cache ram: "),
        ("parity", "float32, last bits changed: "),
        ("memory", "mixmim_tiny, ours, grad_checkpointing: "),
    ):
        assert any(words in text for text in texts[part]), (words, texts[part])
    assert sum("kernel" in found for found in data["rows"][-1]["found"]) == gpu_parts.KERNELS
    table = (folder / "gpu_report.md").read_text()
    assert all(text in printed and text.strip() in table for part in texts.values() for text in part)
    assert {path.name for path in folder.iterdir()} == {"gpu_report.json", "gpu_report.md", "gpu_report_parts"}
    assert not [path for path in (folder / "gpu_report_parts").iterdir() if path.is_dir()]
    assert len(benchmark_figure.draw("gpu_report", data).subfigs) == 6


def read(folder, name):
    written = json.loads((folder / f"{name}.json").read_text())
    assert written["machine"]["torch"] == str(torch.__version__)
    assert written["command"].startswith(f"python -m benchmarks.{name}")
    return written["rows"]


def bf16_is_measured():
    return not emulates_16_bits(torch.device("cpu"), torch.bfloat16)


def test_step(measured):
    rows = read(measured, "step")
    assert [(row["amp"], row["path"]) for row in rows] == [
        (amp, path)
        for amp in ("bf16", "off")[not bf16_is_measured() :]
        for path in (
            "reference",
            "reference, again",
            "reference, memory kept",
            "ours",
            "ours, memory not kept",
            "ours, grad_checkpointing",
            "ours, fused attention",
        )
    ]
    for row in rows:
        assert row["images_per_s"] > 0 and float(row["loss_difference"]) < (3e-3 if row["amp"] == "bf16" else 1e-5)
    assert rows[0]["flop_per_image"] == rows[-1]["flop_per_image"] > 1e8


def test_bf16_is_left_out_where_it_is_emulated_and_no_product_takes_long(monkeypatch, capsys):
    """As on a processor that was met: 0.43 GFLOP/s in bf16, 58 in float32. Five products of 4096×4096 would take 27 minutes."""
    taken = {torch.bfloat16: [], torch.float32: []}

    def seconds(side, device, dtype):
        taken[dtype].append(2 * side**3 / (0.43e9 if dtype == torch.bfloat16 else 58e9))
        return taken[dtype][-1]

    monkeypatch.setattr(step, "product_seconds", seconds)
    cpu = torch.device("cpu")
    assert [step.product_rate(cpu, amp)[0] for amp in ("bf16", "off")] == pytest.approx([0.43e9, 58e9])
    assert all(4 * max(values) < step.PRODUCT_SECONDS for values in taken.values())
    monkeypatch.setattr(step, "product_seconds", lambda side, *_: side**3 * 1e-15)
    assert step.product_rate(cpu, "bf16") == (pytest.approx(2e15), step.LARGEST_PRODUCT)
    monkeypatch.setattr(step, "emulates_16_bits", lambda *_: True)
    assert step.usual_amp(cpu) == "off" and "bf16 is left out" in capsys.readouterr().out


def test_flop_of_base():
    """Nearly 35.5 G: three times the 5.915 G multiply–adds of a forward pass, less what halved windows save."""
    assert 35.0e9 < step.training_flop("mixmim_base") < 35.5e9


def test_end_to_end(measured):
    rows = read(measured, "end_to_end")
    assert [row["way"] for row in rows] == [
        "reference, GeoTIFF",
        "ours, GeoTIFF",
        "ours, packed",
        "ours, packed, data_cache ram",
        "ours, batch in hand",
    ]
    for row in rows:
        assert len(row["seconds"]) == 2
        assert all(0 <= waited < whole for waited, whole in zip(row["waited"], row["seconds"]))


def test_parity(measured):
    rows = {row["path"]: row for row in read(measured, "parity")}
    assert list(rows) == ["float32", "float32, last bits changed", *["bf16"] * bf16_is_measured(), "reference"]
    assert rows["float32"]["apart"] == 0 < rows["float32, last bits changed"]["apart"] < 0.02
    assert not bf16_is_measured() or rows["float32, last bits changed"]["apart"] < rows["bf16"]["apart"] < 0.02
    assert all(len(row["losses"]) == 8 for row in rows.values())


def test_memory_is_less_with_checkpointing(measured):
    reference, plain, checkpointed = read(measured, "memory")
    assert [row["path"] for row in (reference, plain, checkpointed)] == list(memory.CASES)
    assert reference["kept_mb_per_image"] > plain["kept_mb_per_image"]
    assert checkpointed["kept_mb_per_image"] < plain["kept_mb_per_image"] / 2
    assert checkpointed["fixed_gb"] > 16 * 2.7e6 / 1e9 and plain["batch_in_80_gb"] < checkpointed["batch_in_80_gb"]
    assert not bf16_is_measured() or plain["fixed_gb"] > checkpointed["fixed_gb"]  # weights in 16 bits


def test_scaling(measured):
    one, two = read(measured, "scaling")
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert set(two["seconds"]) == {"threads", "alone", "together", "exchanging", "reference"}
    assert min(two[name] for name in ("alone", "together", "exchanging", "reference")) > 0


def test_figures_of_all_that_was_measured(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_figure", str(measured), "--output", str(tmp_path)])
    benchmark_figure.main()
    assert {path.name for path in tmp_path.iterdir()} == {
        f"benchmark_{name}.{kind}" for name in ("step", "parity", "memory") for kind in ("png", "svg")
    }
    assert all(read_png(path).std() > 0.05 for path in tmp_path.glob("*.png"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "step.json").write_text("[]")
    for folder, said in (
        (tmp_path / "absent", "no benchmark's JSON"),
        (tmp_path / "data", "step.json: not what python -m benchmarks.step writes"),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmark_figure", str(folder)])
        with pytest.raises(SystemExit) as end:
            benchmark_figure.main()
        assert end.value.code == 2 and said in capsys.readouterr().err


def test_all_benchmarks_in_one_command(tmp_path, monkeypatch):
    """Its settings are flags that the benchmarks have, on a CPU and on GPUs; one that fails is named at the end."""
    started = []

    def run(command):
        started.append(command)
        return subprocess.CompletedProcess(command, int("parity" in command[2]))

    monkeypatch.setattr(everything.subprocess, "run", run)
    for gpus in (0, 8):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(SystemExit, match="failed: parity"):
            everything.main(argv("--out", tmp_path))
    for command in started:
        program = importlib.import_module(command[2])
        with monkeypatch.context() as patch:  # the first thing after its flags
            for name in ("pick_device", "measure", "write_data", "ways", "keep_freed_memory"):
                patch.setattr(program, name, stop, raising=False)
            patch.setattr(subprocess, "run", stop)
            with pytest.raises(Started):
                program.main(command[3:])
    assert len(started) == 12 and "1 2 8" in " ".join(started[8])


class Started(Exception):
    """A benchmark has understood its flags."""


def stop(*_, **__):
    raise Started
