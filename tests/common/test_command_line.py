# SPDX-License-Identifier: MIT
"""Flags that there are none of: the nearest one is named."""

import pytest

import main_finetune
import main_pretrain
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
