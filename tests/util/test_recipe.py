# SPDX-License-Identifier: MIT
"""The recipes: batches, run names and flags of each task, and the settings that are refused."""

import pytest

from common.errors import UsageError
from main_finetune import parse_flags as finetuning_flags
from main_pretrain import parse_flags as pretraining_flags
from sarwmix.bigearthnetv2 import BigEarthNetv2
from util.recipe import SETTINGS, Gpus, check, deal_batch, read_settings, recipe, settled

NODES = {
    "8 × H200": Gpus(8, "NVIDIA H200", 143771),
    "4 × V100": Gpus(4, "V100", 16160),
    "2 × RTX 4090": Gpus(2, "NVIDIA GeForce RTX 4090", 24564),
    "CPU": Gpus(),
}


def made(*words, node="CPU", env=None):
    """The Recipe of a command line on a node, one rank per GPU, as if every file were there."""
    request = read_settings(SETTINGS, words, env or {})
    values = settled(SETTINGS, {"DATA_PATH": "/d", **request.values})
    check(values, request.extra, dry_run=True)
    return recipe(values, max(1, NODES[node].count), NODES[node], dry_run=True)


def pretraining(*words, **where):
    found = made(*words, **where)
    assert found.program == "main_pretrain.py"
    return pretraining_flags(found.flags)


@pytest.fixture
def finetuning(monkeypatch):
    """finetuning(flags …): the parsed flags of a finetuning command, as if its checkpoint were there."""
    monkeypatch.setattr("util.program.os.path.exists", lambda path: True)

    def parsed(*words, **where):
        found = made(*words, **where)
        assert found.program == "main_finetune.py"
        return finetuning_flags(found.flags)

    return parsed


# ---- Batches -------------------------------------------------------------------------------------

# Micro-batch × accumulation for as many ranks as the fourth column says, on GPUs with this memory in MB; 0: on a CPU.
MEMORY = (0, 8192, 16160, 24564, 40960, 81559, 143771)
BATCHES = """
base  pretrain benv2       1    32×64   64×32  128×16   256×8   256×8   256×8   256×8
base  pretrain benv2      16     32×4    64×2   128×1   128×1   128×1   128×1   128×1
base  finetune benv2       1    16×64   64×16   128×8   128×8   128×8   128×8   128×8
base  finetune benv2      16     16×4    64×1    64×1    64×1    64×1    64×1    64×1
base  finetune sen12flood  1     2×64    2×64    4×32    8×16    16×8    16×8    16×8
base  finetune sen12flood 16      2×4     2×4     4×2     8×1     8×1     8×1     8×1
large pretrain benv2       1    32×64   32×64  128×16  128×16   256×8   256×8   256×8
large pretrain benv2      16     32×4    32×4   128×1   128×1   128×1   128×1   128×1
large finetune benv2       1    16×64   32×32   128×8   128×8   128×8   128×8   128×8
large finetune benv2      16     16×4    32×2    64×1    64×1    64×1    64×1    64×1
large finetune sen12flood  1     2×64    2×64    4×32    4×32    8×16    16×8    16×8
large finetune sen12flood 16      2×4     2×4     4×2     4×2     8×1     8×1     8×1
huge  pretrain benv2       1    32×64  2×1024   8×256   64×32  128×16   256×8   256×8
huge  pretrain benv2      16     32×4    2×64    8×16    64×2   128×1   128×1   128×1
huge  finetune benv2       1    16×64   2×512   8×128   64×16   128×8   128×8   128×8
huge  finetune benv2      16     16×4    2×32     8×8    64×1    64×1    64×1    64×1
huge  finetune sen12flood  1     2×64    2×64    2×64    2×64    4×32    8×16    16×8
huge  finetune sen12flood 16      2×4     2×4     2×4     2×4     4×2     8×1     8×1
tiny  pretrain benv2       1    32×64   256×8   256×8   256×8   256×8   256×8   256×8
tiny  pretrain benv2      16     32×4   128×1   128×1   128×1   128×1   128×1   128×1
tiny  finetune benv2       1    16×64   128×8   128×8   128×8   128×8   128×8   128×8
tiny  finetune benv2      16     16×4    64×1    64×1    64×1    64×1    64×1    64×1
tiny  finetune sen12flood  1     2×64    16×8    16×8    16×8    16×8    16×8    16×8
tiny  finetune sen12flood 16      2×4     8×1     8×1     8×1     8×1     8×1     8×1
"""


@pytest.mark.parametrize("row", BATCHES.strip().splitlines(), ids=lambda row: " ".join(row.split()[:4]))
def test_the_batch_of_each_model_task_and_machine(row):
    model, task, dataset, ranks, *expected = row.split()
    values = settled(SETTINGS, {"MODEL": model, "TASK_TYPE": task, "DATASET": dataset})
    found = [deal_batch(values, int(ranks), Gpus(int(ranks) if mb else 0, "", mb)) for mb in MEMORY]
    assert [f"{batch}×{accumulate}" for batch, accumulate in found] == expected
    whole = 2048 if task == "pretrain" else 128 if dataset == "sen12flood" else 1024
    assert all(batch * accumulate * int(ranks) == whole for batch, accumulate in found)


@pytest.mark.parametrize(
    "given, ranks, expected",
    [
        ({"BATCH_SIZE": "96"}, 3, (96, 7)),
        ({"ACCUM_ITER": "5"}, 3, (32, 5)),
        ({"BATCH_SIZE": "96", "ACCUM_ITER": "1"}, 8, (96, 1)),
        ({"TASK_TYPE": "test"}, 3, (16, 21)),
    ],
)
def test_a_batch_of_ones_own_and_that_of_a_test_need_not_make_the_published_one(given, ranks, expected):
    assert deal_batch(settled(SETTINGS, given), ranks, Gpus()) == expected


def test_ranks_that_the_published_batch_cannot_be_dealt_to():
    with pytest.raises(UsageError, match="of 2048 cannot be divided among 3 ranks.*BATCH_SIZE"):
        deal_batch(settled(SETTINGS, {}), 3, Gpus())


# ---- Tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "node, batch", [("8 × H200", (256, 1)), ("4 × V100", (128, 4)), ("2 × RTX 4090", (256, 4)), ("CPU", (32, 64))]
)
def test_pretraining_is_the_published_recipe(node, batch):
    args = pretraining(node=node)
    assert (args.batch_size, args.accum_iter, args.amp) == (*batch, None)  # the program chooses amp
    assert (args.dataset, args.data_path, args.model, args.seed) == ("benv2", "/d", "mixmim_base", 0)
    assert (args.epochs, args.stop_epoch, args.warmup_epochs, args.blr, args.min_lr) == (1024, 64, 40, 1.5e-4, 0)
    assert (args.weight_decay, args.mask_ratio, args.norm_pix_loss, args.resume) == (0.05, 0.5, True, "auto")
    assert (args.weight_mode, args.weight_level) == ("per_channel", "token")
    assert args.output_dir == "output/pretrain_benv2_base_per_channel_token_seed0"


def test_finetuning_starts_from_the_pretraining_of_the_same_settings(finetuning):
    settings = {"DATASET": "benv1", "MODEL": "large", "EPOCH": "128", "WEIGHT_MODE": "shared_avg", "MODELS_PATH": "/m"}
    settings |= {"TASK_TYPE": "finetune", "WEIGHT_LEVEL": "pixel", "SEED": "3"}
    args = finetuning(node="2 × RTX 4090", env=settings)
    assert args.finetune == "/m/pretrain_benv1_large_shared_avg_pixel_seed3/checkpoint_128.pth"
    assert args.output_dir == "/m/finetune_benv1_large_shared_avg_pixel_seed3_epoch128"
    assert (args.epochs, args.warmup_epochs, args.blr, args.min_lr, args.weight_decay) == (50, 5, 5e-4, 1e-6, 0.05)
    assert (args.layer_decay, args.drop_path, args.seed, args.model) == (0.7, 0.1, 3, "mixmim_large")
    assert args.batch_size * args.accum_iter * 2 == 1024


@pytest.mark.parametrize(
    "flags, start, folder, mean",
    [
        (
            "",
            "output/pretrain_benv1_base_per_channel_token_seed0/checkpoint_64.pth",
            "benv1_per_channel_token_seed0_epoch64",
            None,
        ),
        (
            "--pretrained_on benv2",
            "output/pretrain_benv2_base_per_channel_token_seed0/checkpoint_64.pth",
            "benv2_per_channel_token_seed0_epoch64",
            None,
        ),
        ("--checkpoint /m/v1_64.pth", "/m/v1_64.pth", "v1_64_seed0", None),
        ("--checkpoint /m/v2.pth --pretrained_on benv2", "/m/v2.pth", "v2_seed0", list(BigEarthNetv2.MEAN)),
        ("--checkpoint random --pretrained_on benv2", "", "random_seed0", list(BigEarthNetv2.MEAN)),
        ("--checkpoint random", "", "random_seed0", None),
    ],
)
def test_floods_start_from_benv1_unless_told_otherwise(finetuning, flags, start, folder, mean):
    """mean: None where that of the checkpoint or of the dataset is taken."""
    args = finetuning("--task_type", "finetune", "--dataset", "sen12flood", *flags.split(), node="8 × H200")
    assert (args.finetune, args.output_dir, args.mean) == (start, f"output/finetune_sen12flood_base_{folder}", mean)
    assert args.std == list(BigEarthNetv2.STD) or mean != list(BigEarthNetv2.MEAN)
    assert args.batch_size * args.accum_iter * 8 == 128


def test_testing_evaluates_what_was_finetuned(finetuning):
    args = finetuning("--task_type", "test", "--seed", "2")
    assert args.eval and args.split == "test" and not args.resume and args.walltime is None
    assert args.output_dir == "output/test_benv2_base_per_channel_token_seed2_epoch64"
    assert args.finetune == "output/finetune_benv2_base_per_channel_token_seed2_epoch64/checkpoint_best.pth"


@pytest.mark.parametrize("task, remedy", [("finetune", "pretrain first"), ("test", "finetune first")])
def test_a_missing_checkpoint_is_named(task, remedy):
    values = settled(SETTINGS, {"TASK_TYPE": task, "CHECKPOINT": "none.pth"})
    with pytest.raises(UsageError, match=f"none.pth: there is no such checkpoint; {remedy}"):
        recipe(values, 1, Gpus())


# ---- Settings ------------------------------------------------------------------------------------


def test_flags_win_over_variables_and_what_follows_the_dashes_over_extra():
    env = {"MODEL": "large", "SEED": "4", "EXTRA": "--clip_grad 1 --log_dir 'a b'", "OTHER": "x"}
    request = read_settings(SETTINGS, ["--model=huge", "--dry_run", "--data_path", "/d"], env)
    assert request.values == {"MODEL": "huge", "SEED": "4", "DATA_PATH": "/d", "EXTRA": env["EXTRA"]}
    assert request.extra == ["--clip_grad", "1", "--log_dir", "a b"] and request.dry_run and not request.help
    assert read_settings(SETTINGS, ["--", "--dry_run", "--"], env).extra == ["--dry_run", "--"]


def test_relative_paths_are_meant_from_where_it_is_started(tmp_path, monkeypatch):
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    flags = ["--data_path", "data", "--models_path", "/m", "--checkpoint", "random"]
    values = read_settings(SETTINGS, flags, {}, tmp_path / "here").values
    assert values == {"DATA_PATH": "../here/data", "MODELS_PATH": "/m", "CHECKPOINT": "random"}


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--data_path= --model base", ["DATA_PATH is missing"]),
        ("--model giant", ["MODEL=giant", "base large huge tiny"]),
        ("--task_type train", ["TASK_TYPE=train"]),
        ("--dataset sen12flood", ["sen12flood", "pretrain with benv1 or benv2"]),
        ("--weight_mode both", ["WEIGHT_MODE=both"]),
        ("--weight_level image", ["WEIGHT_LEVEL=image"]),
        ("--epoch 0", ["EPOCH=0"]),
        ("--seed 08", ["SEED=08"]),
        ("--batch_size many", ["BATCH_SIZE=many"]),
        ("--accum_iter -1", ["ACCUM_ITER=-1"]),
        ("--checkpoint /c.pth", ["CHECKPOINT=/c.pth", "--finetune"]),
        ("--task_type test --checkpoint random", ["CHECKPOINT=random"]),
        ("--model", ["--model: a value is missing"]),
        ("/d", ["/d: is not a flag"]),
        ("--clip_grad 1", ["--clip_grad: there is no such flag here; see --help", "after --"]),
        ("--data-path /d", ["--data-path: there is no such flag here (did you mean --data_path?); see --help"]),
        ("--epochs 3", ["--epochs: there is no such flag here (did you mean --epoch?)"]),
        ("--extra '", ["EXTRA='", "quote it"]),
        ("-- --batch_size 3", ["--batch_size: give it before --"]),
        ("-- --accum_iter=3", ["--accum_iter=3: give it before --"]),
    ],
)
def test_what_cannot_be_meant_is_refused(flags, parts):
    with pytest.raises(UsageError) as error:
        made(*flags.split())
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_data_that_are_not_there_are_refused_except_in_a_dry_run():
    values = settled(SETTINGS, {"DATA_PATH": "no/such/folder"})
    check(values, [], dry_run=True)
    with pytest.raises(UsageError, match="DATA_PATH=no/such/folder: there is no such folder"):
        check(values, [], dry_run=False)
