# SPDX-License-Identifier: MIT
"""Unknown flags, for which the nearest one is named, and the ranges of values."""

import re
import shlex
from pathlib import Path

import pytest

import finetune_flags
import main_finetune
import main_pretrain
import pretrain_flags
from common.command_line import (
    FLAGS_ELSEWHERE,
    NUMBERS_OF_GPUS,
    VALUES_ELSEWHERE,
    Parser,
    Range,
    count,
    positive,
    positive_int,
    positive_share,
    rate,
    share,
)
from sarwmix.prepare import pack
from sarwmix.simulate import patches as simulate
from tests.helpers.runs import refusal

SIMULATE = (simulate.main, "python -m sarwmix.simulate")


@pytest.mark.parametrize(
    "program, words, unknown",
    [
        (
            (main_pretrain.parse_flags, "main_pretrain.py"),
            ["--batch-size", 8],
            "--batch-size (did you mean --batch_size?)",
        ),
        (
            (main_pretrain.parse_flags, "main_pretrain.py"),
            ["--learning_rate=1e-3", "--xyz"],
            "--learning_rate (did you mean --lr?), --xyz",
        ),
        (
            (main_finetune.parse_flags, "main_finetune.py"),
            ["-epoch=3", "--train-fracton", 1],
            "-epoch (did you mean --epochs?), --train-fracton (did you mean --train_fraction?)",
        ),
        (SIMULATE, ["--output", "x"], "--output (did you mean --out?)"),  # before --out is missed
        (SIMULATE, ["--out", "x", "--patches=4", "--sed", "-1"], "--sed (did you mean --seed?)"),
        (
            (pack.main, "python -m sarwmix.prepare.pack"),
            ["--data-path", "a b"],
            "--data-path (did you mean --data_path?)",
        ),
    ],
)
def test_the_nearest_flag_is_named(program, words, unknown, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [program[1]])
    assert (
        refusal(program[0], words, capsys).removesuffix("\n")
        == f"{program[1]}: error: unrecognized arguments: {unknown}"
    )


@pytest.mark.parametrize(
    "word, meant",
    [
        ("--epoch", "--epochs"),
        ("--batchsize", "--batch_size"),
        ("--batch-size", "--batch_size"),
        ("--datapath", "--data_path"),
        ("--data-dir", "--data_path"),
        ("--data", "--data_path"),
        ("--dataset_path", "--data_path"),
        ("--learning-rate", "--lr"),
        ("--output", "--output_dir"),
        ("--out", "--output_dir"),
        ("--workers", "--num_workers"),
        ("--pretrained", "--finetune"),
        ("--checkpoint", "--finetune or --resume"),
        ("--img_size", "--input_size"),
        ("--num-classes", "--nb_classes"),
        ("--evaluate", "--eval"),
        ("--gradient_accumulation_steps", "--accum_iter"),
        ("--gpu", "--device"),
    ],
)
def test_flags_of_other_programs_have_a_name_here(word, meant, capsys):
    message = refusal(main_finetune.parse_flags, [word, 2], capsys)
    assert f"{word} (did you mean {meant}?)" in message and "usage" not in message


def test_a_number_of_gpus_is_for_the_launcher(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main_pretrain.py"])
    for flag in ("--gpus", "--num_gpus=4", "--nproc_per_node"):
        message = refusal(main_pretrain.parse_flags, [flag], capsys)
        assert "(for N GPUs, start the program with: torchrun --nproc_per_node N main_pretrain.py)" in message


def test_names_elsewhere_lead_to_flags_and_choices_of_the_main_programs():
    parsers = [pretrain_flags.build_parser(), finetune_flags.build_parser()]
    flags = {flag.lstrip("-") for parser in parsers for flag in parser._option_string_actions}
    choices = {choice for parser in parsers for action in parser._actions for choice in action.choices or ()}
    others = {"output", "out", "size", "workers"}  # of other programs
    assert {name for names in FLAGS_ELSEWHERE.values() for name in names} <= flags | others
    assert {name for names in VALUES_ELSEWHERE.values() for name in names} <= choices
    assert [name for name in (*FLAGS_ELSEWHERE, *VALUES_ELSEWHERE, *NUMBERS_OF_GPUS) if not name.isalnum()] == []


@pytest.mark.parametrize(
    "flags, meant",
    [
        (["--model", "base"], "mixmim_base"),
        (["--model", "mixmim-large"], "mixmim_large"),
        (["--dataset", "bigearthnet"], "benv2 or benv1"),
        (["--dataset", "BigEarthNet-v2"], "benv2"),
        (["--dataset", "sen12"], "sen12flood"),
        (["--dataset", "ben_v1"], "benv1"),
        (["--split", "validation"], "val"),
        (["--amp", "float16"], "fp16"),
        (["--amp", "bfp16"], "fp16"),
        (["--dataset", "imagenet"], None),
    ],
)
def test_the_nearest_choice_is_named(flags, meant, capsys):
    message = refusal(main_finetune.parse_flags, flags, capsys)
    hint = f" (did you mean {meant}?)" if meant else ""
    assert f"error: {' '.join(flags)}: is not a choice{hint}; choose from " in message
    assert message.endswith("sen1floods11\n") or "--dataset" not in flags


def test_choices_that_are_numbers(capsys):
    message = refusal(main_pretrain.parse_flags, ["--target", "multilook", "--looks", "3"], capsys)
    assert message.endswith("--looks 3: is not a choice; choose from 2, 4, 8, 16\n")


def test_values_that_begin_with_a_dash_are_no_flags(capsys):
    args = main_pretrain.parse_flags(["--data_path", "- a b", "--mean", "-19.2", "-12.5", "--std", "5", "5"])
    assert args.mean == [-19.2, -12.5] and args.data_path == "- a b"
    assert "expected 2 arguments" in refusal(main_pretrain.parse_flags, ["--mean", "-1e1", "-1e1"], capsys)
    with pytest.raises(SystemExit) as end:
        main_pretrain.parse_flags(["--batch-size", "8", "--help"])
    assert end.value.code == 0


@pytest.mark.parametrize(
    "kind, text, said",
    [
        (positive_int, "1", 1),
        (positive_int, "0", "must be at least 1"),
        (positive_int, "1.5", "a whole number is needed"),
        (count, "0", 0),
        (count, "-1", "must be at least 0"),
        (positive, "1e-9", 1e-9),
        (positive, "0", "must be above 0"),
        (positive, "inf", "a finite number is needed"),
        (positive, "x", "a number is needed"),
        (share, "1", 1.0),
        (share, "nan", "a finite number is needed"),
        (share, "1.1", "must be at least 0 and at most 1"),
        (positive_share, "0", "must be above 0 and at most 1"),
        (rate, "1", "must be at least 0 and below 1"),
        (Range(int, at_least=1, at_most=65535), "65536", "must be at least 1 and at most 65535"),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_the_range(kind, text, said, capsys):
    parser = Parser("What it does.", "program")
    parser.add_argument("--flag", type=kind, help="a value")
    if not isinstance(said, str):
        assert parser.parse_args(["--flag", text]).flag == said
        return
    assert refusal(parser.parse_args, ["--flag", text], capsys) == f"python -m program: error: --flag {text}: {said}\n"
    assert "a value" + (f" ({kind})" if kind.bounds else "") in " ".join(parser.format_help().split())


def test_numbers_out_of_reach_are_one_line(capsys):
    for value, said in ((10**400, "must be at least 0 and below 9.22337e+18"), ("1e999", "a whole number is needed")):
        assert f"--seed {value}: {said}" in refusal(main_pretrain.parse_flags, ["--seed", value], capsys)
    assert "--lr inf: a finite number is needed" in refusal(main_pretrain.parse_flags, ["--lr", "inf"], capsys)


@pytest.mark.parametrize("program", [pretrain_flags, finetune_flags], ids=["pretrain", "finetune"])
def test_help_begins_with_a_short_usage_and_examples_that_parse(program, monkeypatch):
    name = {pretrain_flags: "main_pretrain.py", finetune_flags: "main_finetune.py"}[program]
    monkeypatch.setattr("sys.argv", [name])
    text = program.build_parser().format_help()
    usage, description, examples = text.split("\n\n")[:3]
    assert usage.startswith(f"usage: {name} [flags] --") and "\n" not in usage
    assert description.count("\n") < 3 and examples.startswith("examples:\n")
    commands = [line for line in examples.splitlines() if "main_" in line]
    assert 3 <= len(commands) <= 6 and all(len(line) <= 120 for line in text.splitlines())
    for command in commands:
        words = shlex.split(command)
        assert re.fullmatch(
            rf"(python|mpirun .*|torchrun .*) ?{re.escape(name)}", " ".join(words[: words.index(name) + 1])
        )
        program.build_parser().parse_args(words[words.index(name) + 1 :])


@pytest.mark.parametrize("program", [pretrain_flags, finetune_flags], ids=["pretrain", "finetune"])
def test_every_flag_and_group_of_the_main_programs_is_explained(program):
    parser = program.build_parser()
    assert [action.dest for action in parser._actions if not action.help] == []
    titles = [group.title for group in parser._action_groups if group._group_actions or group.title == "examples"]
    assert titles[:4] == ["examples", "options", "data", "your own images"]
    assert titles[-2:] == ["device, speed and memory", "several GPUs or machines"]
    assert len(titles) == len(set(titles))


def test_a_long_usage_is_cut_to_what_is_required():
    parser = Parser("What it does.", "program")
    for k in range(20):
        parser.add_argument(f"--flag_number_{k}", help="a flag")
    parser.add_argument("--out", required=True, metavar="DIR", help="a flag")
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--zip", metavar="FILE", help="a flag")
    kinds.add_argument("--folder", metavar="DIR", help="a flag")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="images")
    assert parser.format_usage() == (
        "usage: python -m program [flags] --out DIR (--zip FILE | --folder DIR) IMAGE [IMAGE ...]\n"
    )
    assert Parser("What it does.", "program").format_usage() == "usage: python -m program [-h]\n"


@pytest.mark.parametrize(
    "default, text, said",
    [
        (1, "a value", "a value (default: 1)"),
        (0.0, "a value", "a value (default: 0)"),
        ([40, 600], "a value", "a value (default: 40 600)"),
        ("50%", "a value", "a value (default: 50%)"),
        (None, "a value", "a value"),
        ([], "a value", "a value"),
        ("", "a value", "a value"),
        (True, "a value", "a value"),
        (3, "a value (default: as before)", "a value (default: as before)"),
    ],
)
def test_help_states_the_default_once(default, text, said):
    parser = Parser("What it does.", "program")
    parser.add_argument("--flag", default=default, help=text)
    assert parser.format_help().endswith(f" {said}\n")


def test_help_states_range_and_default_together():
    parser = Parser("What it does.", "program")
    parser.add_argument("--flag", type=positive_int, help="a value (default: as before)")
    assert parser.format_help().endswith(" a value (default: as before; at least 1)\n")


def test_help_shows_one_of_two_spellings_and_names_paths_and_numbers():
    parser = Parser("What it does.", "program")
    parser.add_argument("-l", "--s1_list", "--s1-list", type=Path, help="a list")
    parser.add_argument("--count", type=count, help="a number")
    parser.add_argument("--share", type=float, help="a number")
    text = parser.format_help()
    assert "-l PATH, --s1_list PATH " in text and "--s1-list" not in text
    assert "--count N " in text and "--share X " in text
    assert parser.parse_args(["--s1-list", "x"]).s1_list == Path("x")
