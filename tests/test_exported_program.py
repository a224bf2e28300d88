# SPDX-License-Identifier: MIT
"""model.pt2 of an exported folder: it gives what `pretrained.load` gives, in a Python that knows only PyTorch."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import main_finetune
import models_mixmim
import models_mixmim_ft
import models_sen12_ft
import pretrained
from batch_preparation import BatchPreparation, Weighting
from exported_program import PreparedModel
from sarwmix.registry import DATASETS
from tests.helpers import ROOT
from tests.helpers.runs import completed, refused

STATISTICS = {"mean": [-19.1966, -12.5144], "std": [5.4501, 5.0019]}
SIDES = {"classifier": 64, "encoder": 64, "pairs": 256, "encoder of pairs": 256}
SHAPES = ((1, 64, 64), (3, 120, 120), (2, 40, 90), (5, 301, 257))  # B, h, w

# What the snippet of a card makes of each case, in a Python without this project. Arguments: its lines that load, its
# lines that call, and files of cases and results.
ALONE = """
import sys
import torch
# An editable install of this project, by which it could be imported, is left out.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
try:
    import pretrained
except ModuleNotFoundError:
    pass
else:
    sys.exit("this project can be imported")
loading, call, cases, results = sys.argv[1:]
loaded, found = {}, []
exec(loading, loaded)
for case in torch.load(cases):
    case |= loaded
    exec(call, case)
    found.append({name: case[name] for name in ("logits", "probabilities", "features") if name in case})
torch.save(found, results)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of each kind with the weights of its initialisation: {kind: path}."""
    torch.manual_seed(5)
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    for kind, model, dataset in (
        ("classifier", models_mixmim_ft.mixmim_tiny(img_size=64, num_classes=19), "benv2"),
        ("encoder", models_mixmim.mixmim_tiny(img_size=64), "benv2"),
        ("pairs", models_sen12_ft.mixmim_tiny(img_size=128), "sen12flood"),
    ):
        classes = {"classes": list(DATASETS[dataset].CLASSES)} if kind != "encoder" else {}
        paths[kind] = folder / f"{kind}.pth"
        state = {
            "model": model.state_dict(),
            "epoch": 7,
            "args": {"model": "mixmim_tiny", "dataset": dataset},
            "input": {"channels": ["VH", "VV"], "units": "dB", "input_size": SIDES[kind], **STATISTICS, **classes},
        }
        torch.save(state, paths[kind])
    return paths


@pytest.fixture
def export(checkpoints, tmp_path, program):
    """export(kind) → the exported folder."""

    def run(kind):
        completed(program(main_finetune, "--export", tmp_path / "shared", "--finetune", checkpoints[kind]))
        return tmp_path / "shared"

    return run


def noise(batch, height, width):
    """Images in dB with about the statistics of Sentinel-1, the same at each call."""
    mean, std = (torch.tensor(STATISTICS[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return torch.randn(batch, 2, height, width, generator=torch.Generator().manual_seed(height)) * std + mean


def cases(names):
    """Inputs of several shapes by name, with pixels without data; the images of a pair differ."""
    made = []
    for shape in SHAPES:
        images = [noise(*shape).roll(k, 2) for k in range(len(names))]
        images[0][0, 1, 0, 2:5] = torch.tensor([float("nan"), float("inf"), -float("inf")])
        made.append(dict(zip(names, images)))
    return made


def run_alone(folder, inputs, tmp_path):
    """What the snippet of a folder's card makes of the inputs."""
    snippet, _ = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "torch.export.load" in snippet and "pretrained" not in snippet
    torch.save(inputs, tmp_path / "cases.pt")
    loading, call = re.split(r"(?<=\.module\(\)\n)", snippet.replace("path/to/this/folder", str(folder)))
    words = (loading, call, tmp_path / "cases.pt", tmp_path / "results.pt")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", ALONE, *words],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(tmp_path / "results.pt")


@pytest.mark.parametrize("kind", ("classifier", "encoder", "pairs"))
def test_pytorch_alone_gives_what_this_project_gives(kind, export, tmp_path):
    folder = export(kind)
    names = ("first", "second") if kind == "pairs" else ("sar_db",)
    inputs = cases(names)
    results = run_alone(folder, inputs, tmp_path)
    model, prepare = pretrained.load(folder)
    activate = pretrained.TASKS["flood" if kind == "pairs" else "multilabel"].activate
    for images, found in zip(inputs, results, strict=True):
        with torch.no_grad():
            prepared = [prepare(images[name])[0] for name in names]
            expected = model.forward_features(*prepared) if kind == "encoder" else model(*prepared)
        outputs = {"features": expected}
        if kind != "encoder":
            outputs = {"logits": expected, "probabilities": activate(expected)}
        assert found.keys() == outputs.keys()
        for name, output in outputs.items():
            torch.testing.assert_close(found[name], output, rtol=0, atol=1e-5)
            assert found[name].dtype == torch.float32 and not found[name].requires_grad
    assert results[0][next(iter(outputs))].std() > 1e-3  # not all alike


def test_an_encoder_of_pairs_gives_the_features_of_embed(checkpoints, tmp_path, program):
    folder = tmp_path / "shared"
    flags = ("--export", folder, "--finetune", checkpoints["encoder"], "--dataset sen12flood")
    completed(program(main_finetune, flags, "--input_size 256 --force_input"))
    (images, *_) = cases(("first", "second"))
    (found, *_) = run_alone(folder, [images], tmp_path)
    model, prepare = pretrained.load(folder)
    with torch.no_grad():
        expected = model.forward_features(*(prepare(image)[0] for image in images.values()))
    torch.testing.assert_close(found["features"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", (64, 128))
def test_one_interpolation_serves_images_of_all_sizes(side):
    prepare = BatchPreparation(side, **STATISTICS, weighting=Weighting("none"))
    program = PreparedModel(models_mixmim_ft.mixmim_tiny(img_size=side), prepare, features=True)
    for height, width in ((5, 3), (30, 200), (63, 64), (64, 64), (120, 120), (128, 129), (512, 17), (400, 512)):
        images = noise(2, height, width)
        torch.testing.assert_close(program.prepare(images), prepare(images)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ("classifier", "pairs"))
def test_a_program_is_tied_to_no_device_and_to_no_folder_of_this_machine(kind, export):
    """Tensors without data stand for a GPU: one that stayed on the CPU would be an error."""
    path = export(kind) / "model.pt2"
    content = path.read_bytes()
    assert not [place for place in (ROOT, Path(torch.__file__).parent) if os.fsencode(place) in content]
    module = torch.export.load(path).module()
    with FakeTensorMode():
        for part in module.modules():
            for store in (part._parameters, part._buffers):
                for name, value in store.items():
                    store[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
        images = [torch.empty(3, 2, 100, 90, device="cuda") for _ in range(1 + (kind == "pairs"))]
        assert module(*images).device.type == "cuda"


@pytest.mark.parametrize(
    "call, error, status, said",
    [
        ("torch.export.export", RuntimeError("cannot trace\nTraceback …"), 1, "(RuntimeError: cannot trace); nothing"),
        ("torch.export.save", ValueError("no such operation"), 1, "(ValueError: no such operation); nothing was"),
        ("torch.export.save", MemoryError("of 3 GB"), 1, "out of memory"),
        ("pathlib.Path.write_text", OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_an_export_that_fails_is_one_line_and_leaves_nothing(
    call, error, status, said, checkpoints, tmp_path, monkeypatch, program
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(call, fail)
    flags = ("--export", tmp_path / "new" / "shared", "--finetune", checkpoints["classifier"])
    refused(program(main_finetune, flags), said, status=status)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or "shared" in path.name]
