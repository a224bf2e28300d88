# SPDX-License-Identifier: MIT
"""docs/FLAGS.md: made from the parsers, complete, up to date; the flags that users of the released code know."""

import os
import re

import pytest

from analysis import flag_tables
from common.command_line import Parser, Range
from tests.helpers import ROOT
from tests.helpers.runs import argv, refusal

# Of the released code's programs, with the same meaning here.
KEPT = """batch_size epochs accum_iter model input_size mask_ratio norm_pix_loss clip_grad weight_decay lr blr min_lr warmup_epochs
data_path output_dir log_dir device seed resume finetune start_epoch num_workers pin_mem no_pin_mem inference drop_path layer_decay nb_classes
eval dist_eval mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode smoothing patch_op world_size local_rank dist_on_itp dist_url
port""".split()
ADDED = """dataset weight_mode weight_level weight_domain weight_clip exp_scale stop_epoch save_epochs amp train_fraction mean std patch_cut
crop_scale val_fraction save_every_steps save_every_minutes walltime compile grad_checkpointing data_cache""".split()


def sections(page):
    """{program: its part of the page}."""
    return dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))


def rows_of(part):
    """{flag: (values, default, meaning)} of a section of the page."""
    cells = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in part.splitlines() if line.startswith("| `--")]
    assert all(len(row) == 4 for row in cells)
    return {row[0].strip("`").removeprefix("--"): tuple(row[1:]) for row in cells}


def test_the_page_is_what_the_parsers_say():
    page = (ROOT / "docs" / "FLAGS.md").read_text(encoding="utf-8")
    assert page == flag_tables.page(), "docs/FLAGS.md is out of date: make docs"
    assert [line for line in page.splitlines() if len(line) > 100 and not line.startswith("|")] == []


@pytest.mark.parametrize("name", flag_tables.PROGRAMS)
def test_each_flag_of_help_has_one_row_and_there_is_no_other(name):
    program, part = flag_tables.PROGRAMS[name], sections(flag_tables.page())[name]
    listed = re.findall(r"^\| `--(\w+)` \|", part, re.MULTILINE)
    flags = {flag.removeprefix("--") for flag in program.build_parser()._option_string_actions if flag != "-h"}
    assert len(listed) == len(set(listed)) > 50
    assert set(listed) == flags - {"help"}


def test_flags_of_the_released_code_are_there():
    listed = set().union(*map(rows_of, sections(flag_tables.page()).values()))
    assert [flag for flag in (*KEPT, *ADDED) if flag not in listed] == []


def test_rows_of_known_flags():
    pretrain, finetune = map(rows_of, sections(flag_tables.page()).values())
    assert pretrain["batch_size"][:2] == ("integer at least 1", "`64`")
    assert finetune["batch_size"][:2] == ("integer at least 1", "`128`")
    assert pretrain["weight_level"][:2] == ("`token`, `pixel`", "`token`")
    assert pretrain["stop_epoch"][:2] == ("N, integer at least 1", "--epochs")
    assert finetune["input_size"][1:] == (
        "the checkpoint's, else 128; floods: the images', a multiple of 128",
        "side of the input",
    )
    assert pretrain["norm_pix_loss"][:2] == finetune["eval"][:2] == ("switch", "off")
    assert finetune["dist_eval"][:2] == ("switch", "on")
    assert finetune["no_dist_eval"] == ("switch", "off", "evaluate on rank 0 alone")
    assert pretrain["mean"][:2] == (
        "VH VV, number",
        "the mean of the checkpoint that the run starts from, else the dataset's",
    )
    assert pretrain["save_epochs"][0] == "N …, integer at least 1"
    assert pretrain["resume"][0] == "auto\\|PATH"
    assert pretrain["inference"][2] == "do not train: draw what these checkpoints reconstruct of the same samples"


def test_tables_of_a_parser_of_ones_own():
    parser = Parser(description="What it does.")
    group = parser.add_argument_group("sizes", "in pixels")
    group.add_argument("--side", type=int, default=3, metavar="PIXELS", help="50 %% of it | or %(default)s")
    group.add_argument("--name", help="of it (default: as the file)")
    group.add_argument("--scale", type=Range(float, above=0), help="of it")
    assert flag_tables.section("x.py", parser).split("### ")[1] == (
        "sizes\nIn pixels.\n\n| flag | values | default | meaning |\n| --- | --- | --- | --- |\n"
        "| `--side` | PIXELS, integer | `3` | 50 % of it \\| or 3 |\n| `--name` | NAME | as the file | of it |\n"
        "| `--scale` | number above 0 | – | of it |\n"
    )


def test_the_program_writes_the_page_or_says_in_one_line_why_not(tmp_path, capsys):
    flag_tables.main(argv("--output", tmp_path / "FLAGS.md"))
    assert (tmp_path / "FLAGS.md").read_text(encoding="utf-8") == flag_tables.page()
    nowhere = tmp_path / "none" / "FLAGS.md"
    assert f"--output {nowhere}: No such file" in refusal(flag_tables.main, ["--output", nowhere], capsys)


def test_defaults_do_not_depend_on_the_machine(monkeypatch):
    page = flag_tables.page()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert flag_tables.page() == page
