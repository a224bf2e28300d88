# SPDX-License-Identifier: MIT
"""Checkpoints that are broken or that contradict themselves: each is answered with one line, and nothing is lost."""

import gzip
import hashlib
import json
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models_mixmim import mixmim_tiny
from models_mixmim_ft import SIZES
from sarwmix.selection import RULES
from tests.helpers.damage import JUNK, as_folder, cut, damage, exported, kept, put, zip_of
from tests.helpers.forked import finish
from tests.helpers.inputs import CHECKPOINT_USES, FINETUNE, PRETRAIN
from tests.helpers.runs import argv, is_refused
from util.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

# Those that need a classifier, or go on with a run of one; the others take a checkpoint of pretraining.
OF_CLASSIFIER = ("finetune --resume", "finetune --eval", "finetune --embed", "finetune --export")


@pytest.fixture(scope="module")
def begun(base, tmp_path_factory):
    """{program: folder of a run that was stopped after the first of two epochs}."""
    folders = {name: tmp_path_factory.mktemp("begun") / name for name in ("pretrain", "finetune")}
    for name, (module, *flags) in (("pretrain", PRETRAIN), ("finetune", (*FINETUNE, "--dataset benv2"))):
        flags = [word.format(data=base("v2"), out=folders[name]) for word in argv(flags, "--epochs 2 --stop_epoch 1")]
        finish(module.__name__, flags, folders[name].with_suffix(".txt"))
        shutil.copy(folders[name] / "checkpoint.pth", folders[name].with_suffix(".pth"))
        resaved(optimizer=...)(folders[name].with_suffix(".pth"))
    return folders


@pytest.fixture
def given(begun, tmp_path):
    """given(use) → a checkpoint that this use accepts, no larger than it must be, without a checksum beside it."""

    def copied(use):
        folder = begun["finetune" if use in OF_CLASSIFIER else "pretrain"]
        source = folder / "checkpoint.pth" if "--resume" in use else folder.with_suffix(".pth")
        return Path(shutil.copy(source, tmp_path / "given.pth"))

    return copied


@pytest.mark.parametrize("use", CHECKPOINT_USES)
def test_a_whole_checkpoint_is_accepted(use, given, begun, base, start, tmp_path):
    if "--resume" in use:
        shutil.copytree(begun[use.split()[0]], tmp_path / "run")
    status, _, err = start(CHECKPOINT_USES[use], data=base("v2"), out=tmp_path / "run", checkpoint=given(use))
    assert (status, err) == (0, "") and ((tmp_path / "run").exists() or (tmp_path / "run.npz").exists())


@pytest.fixture
def check_refused(given, base, start, tmp_path, count):
    """check_refused(use, damage): a program that uses the damaged checkpoint says so in one line, and leaves nothing."""

    def check(use, damage):
        path = given(use)
        damage(path)
        before = kept(tmp_path)
        result = start(CHECKPOINT_USES[use], data=base("v2"), out=tmp_path / "run", checkpoint=path)
        good = is_refused(result, "given.pth") and kept(tmp_path) == before
        assert count("corrupted inputs answered with one line", good), (result, kept(tmp_path).keys() - before.keys())

    return check


# ---- Damaged -------------------------------------------------------------------------------------


@damage
def torch_saved(path, value):
    torch.save(value, path)


@damage
def safetensors(path, value):
    save_file(value, path)


@damage
def resaved(path, **parts):
    """Other parts of a checkpoint; ... removes one."""
    state = {**load_checkpoint(path), **parts}
    torch.save({name: value for name, value in state.items() if value is not ...}, path)


@damage
def reweighted(path, change):
    """Other weights of a checkpoint; change: a function of those before."""
    resaved(model=change(load_checkpoint(path)["model"]))(path)


def biased(change):
    """Another bias of the last norm; change: a function of the one before."""
    return reweighted(lambda weights: {**weights, "norm.bias": change(weights["norm.bias"])})


def embedded(value):
    return reweighted(lambda weights: {**weights, "absolute_pos_embed": value})


def without_bias(weights):
    return {key: value for key, value in weights.items() if key != "norm.bias"}


def wider(weights):
    """Weights of a model of twice the width."""
    options = {"img_size": 64, "embed_dim": 64, "num_heads": (2, 4, 8, 16)}
    model = SIZES["mixmim_tiny"](num_classes=19, **options) if "head.weight" in weights else mixmim_tiny(**options)
    return model.state_dict()


def repacked(path):
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    zip_of(members, zipfile.ZIP_DEFLATED)(path)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    Path(f"{path}.sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    put(content)(path)


def scripted(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


CONFIG = json.dumps({"args": {}, "input": {}, "epoch": 0})
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4242\n"
DAMAGED = {
    "empty": put(b""),
    "text": put("no checkpoint"),
    "the page of an expired link": put("<html>\n<body>404</body>\n</html>\n" * 99),
    "the stand-in of Git LFS": put(LFS),
    "random bytes": put(np.random.default_rng(0).bytes(5000)),
    "truncated": cut,
    "a byte short": put(lambda old: old[:-1]),
    "nothing but its first bytes": put(lambda old: old[:4]),
    "a hole": put(lambda old: old[:900] + bytes(4096) + old[4996:]),
    "a bit, where there is a checksum": flipped,
    "gzipped": put(lambda old: gzip.compress(old, 1)),
    "a zip of something else": zip_of({"notes.txt": "hello"}),
    "an empty zip": zip_of({}),
    "a zip that was packed": repacked,
    "a bomb": zip_of({"archive/data.pkl": b"N.", "archive/data/0": bytes(2**24)}, zipfile.ZIP_DEFLATED),
    "a model of TorchScript": scripted,
    "safetensors": safetensors({"w": torch.ones(3)}),
    "a list": torch_saved([1, 2]),
    "a tensor": torch_saved(torch.ones(3)),
    "weights of another model alone": torch_saved({"conv1.weight": torch.ones(3)}),
    "a dict without a model": resaved(model=...),
    "a model that is a list": resaved(model=[1]),
    "weights that are text": biased(lambda bias: "none"),
    "weights that are lists": biased(lambda bias: [0.0]),
    "names that are numbers": reweighted(lambda weights: {**weights, 7: torch.ones(1)}),
    "args that are a list": resaved(args=["--model"]),
    "input that is text": resaved(input="dB"),
    "an optimizer that is a list": resaved(optimizer=[1]),
    "an epoch that is text": resaved(epoch="last"),
    "a folder without config.json": as_folder,
    "a folder with damaged weights": exported(CONFIG, JUNK),
    "a folder with a damaged config.json": exported("{"),
    "a folder with another config.json": exported("[]", lambda old: old),
    "a weight is missing": reweighted(without_bias),
    "no weights": resaved(model={}),
    "a weight too many": reweighted(lambda weights: {**weights, "norm.gain": torch.ones(1)}),
    "another size of model": reweighted(wider),
    "a weight larger than memory": biased(lambda bias: torch.ones(1).expand(2**50)),
}


def in_turn(cases, uses, each=2):
    """Pairs of a case and a use: every case with some of the uses, and every use with its share of the cases."""
    return [(case, uses[(number + 3 * k) % len(uses)]) for number, case in enumerate(cases) for k in range(each)]


@pytest.mark.parametrize("case, use", in_turn(DAMAGED, list(CHECKPOINT_USES)))
def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(case, use, check_refused):
    check_refused(use, DAMAGED[case])


# ---- Whole, with parts that contradict what they are for -----------------------------------------


@damage
def told(path, part, **values):
    """Other values in a part of a checkpoint."""
    resaved(**{part: {**load_checkpoint(path)[part], **values}})(path)


@damage
def moments(path, change):
    """Other moments of the optimizer."""
    optimizer = load_checkpoint(path)["optimizer"]
    state = {key: change(value) for key, value in optimizer["state"].items()}
    resaved(optimizer={**optimizer, "state": state})(path)


PROGRESS = {"step": 1, "losses": torch.zeros(1, dtype=torch.float64), "grad_norm": 0.0, "skipped": 0}
HELD = {rule: {"epoch": 0, "metrics": {}} for rule in RULES["multilabel"]}
TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
INFERENCE, PRETRAINED, RESUME = "pretrain --inference", "pretrain --finetune", "pretrain --resume"
EVAL, EXPORT, RESUME_FT = "finetune --eval", "finetune --export", "finetune --resume"
# name → (damage, *uses)
LIES = {
    "an unknown model": (told("args", model="mixmim_giant"), INFERENCE, EVAL),
    "a model that is a list": (told("args", model=["mixmim_tiny"]), INFERENCE, EVAL),
    "a model whose name steers the terminal": (told("args", model="\x1b[31mred\x07"), INFERENCE, EVAL),
    "more classes than there can be": (told("args", nb_classes=10**9), EVAL),
    "an input size that no program makes": (told("input", input_size=8192), INFERENCE, EVAL),
    "a dataset that is a list": (told("args", dataset=["benv2"]), EVAL, EXPORT),
    "a number of classes that is text": (told("args", nb_classes="19"), EVAL),
    "an input size that is text": (told("input", input_size="64"), INFERENCE, EVAL),
    "an input size that is no size": (told("input", input_size=100), INFERENCE, EVAL),
    "an input size of no whole number": (told("input", input_size=64.0), INFERENCE, EVAL),
    "an input size beyond memory": (told("input", input_size=2**40), INFERENCE, EVAL),
    "a mean that is text": (told("input", mean="ab"), INFERENCE, EVAL, EXPORT),
    "a mean of three": (told("input", mean=[1.0, 2.0, 3.0]), INFERENCE, EVAL),
    "a mean of nothing": (told("input", mean=[None, None]), INFERENCE, EVAL, EXPORT),
    "a deviation of zero": (told("input", std=[0.0, 0.0]), INFERENCE, EVAL),
    "a deviation of NaN": (told("input", std=[float("nan")] * 2), INFERENCE, EVAL),
    "channels of nothing": (told("input", channels=None), INFERENCE, EVAL, EXPORT),
    "units of another kind": (told("input", channels=[1], units=5), INFERENCE, EVAL, EXPORT),
    "classes that are numbers": (told("input", classes=list(range(19))), EVAL),
    "an embedding without dimensions": (embedded(torch.tensor(1.0)), PRETRAINED, EVAL),
    "an empty embedding": (embedded(torch.ones(1, 0, 32)), PRETRAINED, EVAL),
    "two embeddings in one": (embedded(torch.ones(2, 256, 32)), PRETRAINED, EVAL),
    "a table without dimensions": (reweighted(lambda w: {**w, TABLE: torch.tensor(1.0)}), PRETRAINED, EVAL),
    "a sparse weight": (biased(lambda bias: bias.to_sparse()), PRETRAINED, EVAL, EXPORT),
    "a weight without data": (biased(lambda bias: bias.to("meta")), PRETRAINED, EVAL, EXPORT),
    "a weight that is NaN": (biased(lambda bias: bias * float("nan")), INFERENCE, EXPORT),
    "a weight beyond memory": (biased(lambda bias: torch.ones(1).expand(2**50)), EXPORT),
    "a negative epoch": (resaved(epoch=-5), RESUME, RESUME_FT),
    "progress without losses": (resaved(progress={"step": 1}), RESUME, RESUME_FT),
    "progress before its beginning": (resaved(progress={**PROGRESS, "step": -1}), RESUME, RESUME_FT),
    "progress that is text": (resaved(progress={**PROGRESS, "step": "1"}), RESUME, RESUME_FT),
    "losses that are text": (resaved(progress={**PROGRESS, "losses": "abc"}), RESUME, RESUME_FT),
    "another machine's bits": (resaved(bits={1: 2}), RESUME, RESUME_FT),
    "a selection by another rule": (resaved(selection={"luck": {}}), RESUME_FT),
    "a selection of numbers": (resaved(selection=dict.fromkeys(HELD, 1)), RESUME_FT),
    "a selection without metrics": (resaved(selection=HELD), RESUME_FT),
    "an optimizer of nothing": (resaved(optimizer={}), RESUME, RESUME_FT),
    "an optimizer without groups": (resaved(optimizer={"state": {}, "param_groups": []}), RESUME, RESUME_FT),
    "moments of another shape": (moments(lambda old: {**old, "exp_avg": torch.ones(3)}), RESUME, RESUME_FT),
    "moments that are text": (moments(lambda old: {**old, "exp_avg": "abc"}), RESUME, RESUME_FT),
    "moments that are missing": (moments(lambda old: {"step": old["step"]}), RESUME, RESUME_FT),
}


@pytest.mark.parametrize("case, use", [(case, use) for case, (_, *uses) in LIES.items() for use in uses])
def test_a_checkpoint_that_lies_is_one_line_and_leaves_nothing(case, use, check_refused):
    check_refused(use, LIES[case][0])


# ---- A whole run folder --------------------------------------------------------------------------


@pytest.mark.parametrize("program_name", ("pretrain", "finetune"))
@pytest.mark.parametrize(
    "case", ("empty", "text", "truncated", "a bit, where there is a checksum", "a bomb", "a model of TorchScript")
)
def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(
    case, program_name, begun, base, start, tmp_path, count
):
    shutil.copytree(begun[program_name], tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint*.pth"):
        DAMAGED[case](path)
    before = kept(tmp_path)
    use = CHECKPOINT_USES[f"{program_name} --resume"]
    result = start(use, data=base("v2"), out=tmp_path / "run", checkpoint="auto")
    good = is_refused(result, "none of its checkpoints can be loaded", "another --output_dir")
    good = good and kept(tmp_path) == before
    assert count("corrupted inputs answered with one line", good), (result, kept(tmp_path).keys() ^ before.keys())
