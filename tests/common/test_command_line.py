# SPDX-License-Identifier: MIT
"""Unknown flags, for which the nearest one is named, and the ranges of values."""

import pytest

import main_finetune
import main_pretrain
from common.command_line import Parser, Range, count, positive, positive_int, positive_share, rate, share
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
        ((main_pretrain.parse_flags, "main_pretrain.py"), ["--learning_rate=1e-3"], "--learning_rate=1e-3"),
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
