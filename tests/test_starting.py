# SPDX-License-Identifier: MIT
"""What a training takes over from the checkpoint it starts from; --statistics; the folder of a run given as a checkpoint."""

import json
import logging
import os
import stat
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluation
import main_finetune
import main_pretrain
import pretrained
from common.errors import UsageError
from models_mixmim import mixmim_tiny, size_of
from sarwmix.prepare import statistics
from sarwmix.registry import DATASETS, is_simulated
from tests.helpers.dataset_fixtures import write_v2
from tests.helpers.runs import argv, refusal
from util.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from util.checkpoint_input import LoadedCheckpoint, flags_of
from util.configuration import log_statistics
from util.export import Program, export

INPUT = {"channels": ["VH", "VV"], "units": "dB", "input_size": 64, "mean": [-18.0, -12.0], "std": [4.0, 4.5]}
SIMULATED = {"train": {"samples": 1024, "simulated": True}, "val": {"samples": 256, "simulated": True}}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return {
        "model": mixmim_tiny(img_size=64).state_dict(),
        "epoch": 7,
        "input": INPUT,
        "args": {"model": "mixmim_tiny", "dataset": "benv2", "norm_pix_loss": True, "val_split": "val"},
        "data": SIMULATED,
    }


@pytest.fixture
def checkpoint(state, tmp_path):
    torch.save(state, tmp_path / "x.pth")
    return tmp_path / "x.pth"


@pytest.fixture(autouse=True)
def logged(caplog):
    caplog.set_level(logging.INFO)


def started(path, *flags, program=main_finetune, dataset="benv2"):
    """The configuration of a training from a checkpoint; images of floods have 512 pixels a side."""
    flags = program.parse_flags(argv("--data_path . --dataset", dataset, "--finetune", path, flags))
    checkpoint = LoadedCheckpoint.load(flags.finetune, size_of) if flags.finetune else None
    images = [SimpleNamespace(size=512)] if program is main_finetune else []
    config = program.configure(flags, checkpoint, *images, {})
    log_statistics(config, DATASETS[dataset], checkpoint)
    return config


# ---- Model, input size and statistics ------------------------------------------------------------


@pytest.mark.parametrize("program", (main_finetune, main_pretrain))
def test_what_no_flag_says_the_checkpoint_says(checkpoint, caplog, program):
    args = started(checkpoint, program=program)
    assert (args.model, args.input_size, args.mean, args.std) == ("mixmim_tiny", 64, [-18.0, -12.0], [4.0, 4.5])
    assert f"standardised with mean -18.0 -12.0 and std 4.0 4.5 dB (VH, VV), from {checkpoint}" in caplog.text
    assert getattr(args, "norm_pix_loss", False) is False and "WARNING" not in caplog.text


def test_floods_keep_the_size_of_their_images(checkpoint):
    args = started(checkpoint, dataset="sen12flood")
    assert (args.model, args.input_size, args.mean) == ("mixmim_tiny", 512, [-18.0, -12.0])


def test_a_flood_classifiers_encoder_has_the_size_of_its_patches(state, tmp_path):
    torch.save({**state, "input": {**INPUT, "input_size": 512}}, tmp_path / "flood.pth")
    assert started(tmp_path / "flood.pth").input_size == 64


def test_other_statistics_and_another_size_can_be_asked_for(checkpoint, caplog):
    args = started(checkpoint, "--mean -19 -13 --input_size 128")
    assert (args.mean, args.std, args.input_size) == ([-19.0, -13.0], [4.0, 4.5], 128)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "was trained with --mean -18.0 -12.0, and this run uses -19.0 -13.0" in warning
    assert f"from --mean and {checkpoint}" in caplog.text


@pytest.mark.parametrize(
    "change, flags, said",
    [
        ({}, "--model mixmim_base", "is a mixmim_tiny, not a mixmim_base"),
        ({"input": {**INPUT, "channels": ["VV", "VH"]}}, [], "trained on VV, VH in dB"),
        ({"input": {**INPUT, "units": "linear"}}, [], "in linear"),
    ],
)
def test_what_cannot_be_is_refused(state, tmp_path, change, flags, said):
    torch.save({**state, **change}, tmp_path / "x.pth")
    for program in (main_finetune, main_pretrain):
        with pytest.raises(UsageError, match=f"x.pth: .*{said}"):
            started(tmp_path / "x.pth", flags, program=program)


@pytest.mark.parametrize("args", ({"model": "mixmim_tiny", "input_size": 64, "mean": [0.0, 0.0]}, {}))
def test_one_that_does_not_say_is_fed_as_the_dataset(state, tmp_path, caplog, args):
    """As those of the released code, which have flags alone, or another program's, which have none."""
    torch.save({"model": state["model"], "args": args}, tmp_path / "x.pth")
    for dataset in ("benv1", "benv2"):
        args = started(tmp_path / "x.pth", dataset=dataset)
        assert (args.model, args.input_size) == ("mixmim_tiny", 64)
        assert (args.mean, args.std) == (list(DATASETS[dataset].MEAN), list(DATASETS[dataset].STD))
        assert f"from --dataset {dataset}" in caplog.text
    assert started(tmp_path / "x.pth", dataset="sen12flood").std == [3.1672, 2.9644]
    model, prepare = pretrained.load(tmp_path / "x.pth", "benv2")
    assert prepare.input_size == 64 and torch.equal(model.norm.weight, state["model"]["norm.weight"])


def test_a_checkpoint_is_named_once_in_an_error():
    for said in ("wrong", "x.pth: wrong"):
        with pytest.raises(UsageError, match="^x.pth: wrong$"), flags_of("x.pth"):
            raise UsageError(said)


# ---- --statistics --------------------------------------------------------------------------------

WRITTEN = {"mean": [-18.12344, -11.5], "std": [5.25, 4.75], "units": "dB", "channels": ["VH", "VV"]}


@pytest.fixture
def measured(tmp_path):
    def write(content):
        path = tmp_path / "statistics.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_statistics_come_from_a_file_to_four_digits(measured, checkpoint, caplog):
    for content in (WRITTEN, {"train": WRITTEN, "val": {"mean": [0, 0], "std": [1, 1]}}, {"every": WRITTEN}):
        args = started("", "--statistics", measured(content))
        assert (args.mean, args.std) == ([-18.1234, -11.5], [5.25, 4.75])
    assert f"from --statistics {args.statistics}" in caplog.text and "WARNING" not in caplog.text
    assert started(checkpoint, "--statistics", measured(WRITTEN), program=main_pretrain).mean == [-18.1234, -11.5]
    assert "was trained with --mean -18.0 -12.0, and this run uses -18.1234 -11.5" in caplog.text


def used(*flags):
    """The configuration of --eval, --embed or --export."""
    flags = main_finetune.parse_flags(argv(flags))
    return evaluation.configure(flags, LoadedCheckpoint.load(flags.finetune, size_of), {})


def test_a_checkpoint_that_is_used_as_it_is_keeps_its_statistics(measured, checkpoint, tmp_path):
    flags = ("--embed", tmp_path / "x.npz", "--data_path . --finetune", checkpoint, "--statistics", measured(WRITTEN))
    with pytest.raises(UsageError, match="--statistics -18.1234 -11.5 .the checkpoint: -18.0 -12.0."):
        used(flags)
    assert used(flags, "--force_input").mean == [-18.1234, -11.5]


def test_the_file_that_the_statistics_program_writes_is_taken(tmp_path):
    write_v2(tmp_path / "v2")
    flags = ("--dataset benv2 --data_path", tmp_path / "v2", "--split all --out", tmp_path / "s.json", "--workers 1")
    statistics.main(argv(flags))
    content = json.loads((tmp_path / "s.json").read_text())
    args = started("", "--statistics", tmp_path / "s.json")
    np.testing.assert_allclose([args.mean, args.std], [content["mean"], content["std"]], atol=5.1e-5)


@pytest.mark.parametrize(
    "content, flags, said",
    [
        (WRITTEN, "--mean -18 -12", "--statistics contradicts --mean and --std"),
        ({**WRITTEN, "units": "linear"}, [], "in linear, but the input is VH, VV in dB"),
        ({**WRITTEN, "channels": ["VV", "VH"]}, [], "states channels ['VV', 'VH']"),
        ({**WRITTEN, "std": [5.25, 0]}, [], "has no mean and std"),
        ({**WRITTEN, "mean": [None, None]}, [], "has no mean and std"),
        ({**WRITTEN, "mean": [10**400, 0]}, [], "has no mean and std"),
        ({"val": WRITTEN}, [], "has no mean and std"),
        ("[]", [], "has no mean and std"),
        ('{"mean": [', [], "cannot be read as JSON"),
    ],
)
def test_a_file_of_statistics_that_cannot_be_meant_is_one_line(measured, capsys, content, flags, said):
    path = measured(content)
    for program in (main_finetune, main_pretrain):
        line = ("--data_path . --dataset benv2 --finetune '' --statistics", path, flags)
        assert said in refusal(program.parse_flags, line, capsys)


# ---- Folders, exported models --------------------------------------------------------------------

PROGRAM = Program(b"a program", 1, None)


def test_the_folder_of_a_run_stands_for_its_selected_or_latest_checkpoint(state, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run", {**state, "epoch": 1})
    assert find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint.pth")
    save_checkpoint(tmp_path / "run", {**state, "epoch": 2}, ("checkpoint_best.pth",))
    assert find_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint_best.pth")
    assert f"{tmp_path / 'run'} is the folder of a run: using its checkpoint_best.pth" in caplog.text
    assert pretrained.load(tmp_path / "run")[1].input_size == 64
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UsageError, match="empty: a folder without checkpoint_best.pth, checkpoint.pth or an exported model"
    ):
        find_checkpoint(tmp_path / "empty")


@pytest.fixture
def exported(state, tmp_path):
    args = SimpleNamespace(
        dataset="benv2", task="multilabel", model="mixmim_tiny", patch_cut="vhvv", patch_op="avg", **INPUT
    )
    umask = os.umask(0o027)
    try:
        export(
            tmp_path / "out",
            {**state, "metrics": {"loss": 0.5}},
            args,
            None,
            {"test": {"ap_macro": 0.5}},
            {"test": {"samples": 128, "simulated": True}},
            PROGRAM,
        )
    finally:
        os.umask(umask)
    return tmp_path / "out"


def test_exported_files_have_the_permissions_of_any_other(exported):
    assert stat.S_IMODE(exported.stat().st_mode) == 0o750
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in exported.iterdir()} == dict.fromkeys(
        ("README.md", "config.json", "model.pt2", "model.safetensors"), 0o640
    )


def test_a_checkpoint_has_the_permissions_of_any_other(state, tmp_path):
    umask = os.umask(0o027)
    try:
        save_checkpoint(tmp_path, {"model": {}, "epoch": 0}, ("checkpoint_best.pth",))
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_the_weights_of_an_exported_folder_stand_for_it_and_alone_for_themselves(exported, caplog):
    for name in ("model.safetensors", "model.pt2"):
        assert find_checkpoint(exported / name) == str(exported) and "config.json beside it" in caplog.text
    (exported / "config.json").unlink()
    alone = exported / "model.safetensors"
    assert find_checkpoint(alone) == str(alone)
    args = started(alone)
    assert (args.model, args.input_size, args.mean) == ("mixmim_tiny", 64, list(DATASETS["benv2"].MEAN))


def spoil(folder, how):
    weights = folder / "model.safetensors"
    if how == "other name":
        weights.rename(folder / "weights.safetensors")
    else:
        weights.unlink()
    if how == "broken link":
        weights.symlink_to("/nowhere/blob")
    elif how == "a folder":
        weights.mkdir()


@pytest.mark.parametrize(
    "how, said",
    [
        ("absent", "model.safetensors is missing (there: README.md, config.json, model.pt2)"),
        ("other name", "is missing (there: README.md, config.json, model.pt2, weights.safetensors)"),
        ("broken link", "model.safetensors is missing"),
        ("a folder", "model.safetensors: cannot be read"),
    ],
)
def test_an_exported_folder_without_its_weights_is_one_line(exported, how, said):
    spoil(exported, how)
    with pytest.raises(UsageError) as error:
        load_checkpoint(exported)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_card_of_a_model_says_that_its_data_are_simulated_and_how_many(exported, state):
    card = (exported / "README.md").read_text()
    header = card.split("---\n")[1]
    assert "license: mit\npipeline_tag: image-feature-extraction\n" in header
    assert "masked-autoencoder, simulated]" in header
    assert "**Simulated data**" in card and "Data: train 1,024 simulated samples, val 256 simulated samples." in card
    assert "Data: val 256 simulated samples, test 128 simulated samples." in card.split("## Metrics")[1]
    assert load_checkpoint(exported)["data"] == state["data"]


def test_the_card_of_measured_or_unknown_data_does_not(state, tmp_path):
    args = SimpleNamespace(
        dataset="benv2", task="multilabel", model="mixmim_tiny", patch_cut="vhvv", patch_op="avg", **INPUT
    )
    for name, data in (
        ("measured", {"data": {"train": {"samples": 9, "simulated": False}}}),
        ("unknown", {"data": None}),
    ):
        old = {key: value for key, value in {**state, **data}.items() if value is not None}
        export(tmp_path / name, old, args, ["a", "b"], {}, {}, Program(b"a program", 1, "sigmoid"))
        card = (tmp_path / name / "README.md").read_text()
        assert "imulated" not in card and "pipeline_tag: image-classification\n" in card
        assert ("Data: train 9 samples." in card) == (name == "measured")


@pytest.mark.parametrize(
    "sample, simulated",
    [
        ("S1A_IW_GRDH_1SDV_20000101T001500_33UUP_3_4", True),
        ("S1B_IW_GRDH_1SDV_20170613T165043_33UUP_61_39", False),
        ("0001__S1A_IW_GRDH_1SDV_20000101T000000__S1A_IW_GRDH_1SDV_20000113T000000", True),
        ("patch", False),
    ],
)
def test_simulated_data_are_known_by_their_dates_or_their_record(tmp_path, sample, simulated):
    dataset = SimpleNamespace(root=tmp_path, ids=np.array([sample]))
    assert is_simulated(dataset) == simulated
    (tmp_path / "simulation.json").write_text("{}")
    assert is_simulated(dataset)


# ---- PyTorch too old to read what it writes ------------------------------------------------------


@pytest.mark.parametrize("program", (main_finetune, main_pretrain))
def test_a_torch_too_old_for_checkpoints_is_refused_before_the_first_step(program, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1+cu128"))
    flags = ("--data_path . --dataset benv2 --finetune '' --output_dir", tmp_path / "run")
    err = refusal(program.parse_flags, flags, capsys)
    assert "PyTorch 2.9.1+cu128" in err and "install 2.10 or newer" in err
    assert "--overwrite" not in err and not (tmp_path / "run").exists()
