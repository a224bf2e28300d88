# SPDX-License-Identifier: MIT
"""The trainings of the study: every kind of weights with every seed, what uses what, what is left out, how they end."""

import shlex
import subprocess
import sys
from itertools import chain

import pytest

from analysis.weight_study_runs import STUDY, Step, main, plan, run_jobs
from tests.helpers import ROOT
from util.recipe import SETTINGS, Gpus, read_settings, recipe, settled


def value(words, flag):
    return words[words.index(flag) + 1]


def planned(*extra, simulated=False, **given):
    study = plan(settled(STUDY, given), list(extra), simulated)
    return study, [step.command for step in chain.from_iterable(study.jobs)]


REAL = {"DATA_PATH": "/d", "FLOOD_PATH": "/f", "SEEDS": "3 4", "MODELS_PATH": "/m", "MODEL": "large", "EPOCH": "32"}


def test_every_kind_is_pretrained_with_every_seed_and_what_comes_out_is_used():
    study, commands = planned("--weight_clip", "99", **REAL, RANKS="4")
    runs = [words for words in commands if "scripts/run_local.sh" in words]
    assert all(value(words, "--ranks") == "4" for words in runs) and study.before == []
    pretrained = [words for words in runs if value(words, "--task_type") == "pretrain"]
    kinds = {
        tuple(value(words, f"--{name}") for name in ("weight_mode", "weight_level", "seed")) for words in pretrained
    }
    assert len(pretrained) == len(kinds) == 10 and ("none", "pixel", "3") not in kinds
    assert {kind[2] for kind in kinds} == {"3", "4"}
    assert all(words[-3:] == ["--", "--weight_clip", "99"] for words in pretrained)
    assert all(value(words, "--data_path") == "/d" for words in pretrained)
    floods = [words for words in runs if value(words, "--task_type") == "finetune"]
    assert len(floods) == 12 and all(value(words, "--data_path") == "/f" for words in floods)
    assert sum("random" in words for words in floods) == 2
    embedded = [value(words, "--finetune") for words in commands if "--embed" in words]
    assert embedded.count("/m/pretrain_benv2_large_shared_avg_pixel_seed4/checkpoint_32.pth") == 2
    assert len(embedded) == 20 and study.after[0].command[2:4] == ["analysis.weight_study", "/m"]


def test_the_folders_are_those_of_the_recipes():
    study, _ = planned(**REAL)
    for job in study.jobs[:5]:
        values = settled(SETTINGS, read_settings(SETTINGS, job[0].command[2:], {}).values)
        made = recipe(values, 1, Gpus(), dry_run=True)
        assert {step.unless for step in job} == {"", f"{made.folder}/probe.json"}
        assert job[-1].command[2:4] == ["--task_type", "finetune"]


def test_without_data_scenes_and_floods_are_simulated_and_the_model_is_tiny():
    study, commands = planned("--clip_grad", "2", simulated=True, SEEDS="0", KINDS="none/token")
    assert [step.command[2] for step in study.before] == ["sarwmix.simulate", "sarwmix.simulate.flood"]
    pretraining, *_, flood, from_random = commands
    assert value(pretraining, "--data_path") == "output/weight_study/simulated"
    assert pretraining[-2:] == [
        "--clip_grad",
        "2",
    ]
    for words in (pretraining, flood, from_random):
        named = [value(words, f"--{name}") for name in ("model", "epoch", "batch_size", "accum_iter")]
        assert named == ["tiny", "11", "8", "1"]


def test_without_floods_only_pretraining_is_probed():
    _, commands = planned(DATA_PATH="/d", SEEDS="0")
    assert len(commands) == 5 * 4 and not any("sen12flood" in words for words in commands)


def note(path, text, status=0):
    code = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
    return [sys.executable, "-c", code, str(path), text, str(status)]


def test_steps_run_in_order_and_what_is_there_is_not_done_again(tmp_path):
    log, done = tmp_path / "log", tmp_path / "log"
    run_jobs(
        [[Step(note(log, "a")), Step(note(log, "b"), str(done)), Step(note(log, "c"))], [], [Step(note(log, "d"))]], 1
    )
    assert log.read_text() in ("acd", "dac")
    run_jobs([[Step(note(tmp_path / f"job{n}", "x"))] for n in range(5)], 2)
    assert len(list(tmp_path.glob("job*"))) == 5


@pytest.mark.parametrize("end, status", [("sys.exit(3)", 3), ("os.kill(os.getpid(), 15)", 143)])
def test_one_that_fails_ends_the_others(tmp_path, end, status):
    fifo = tmp_path / "fifo"
    subprocess.run(["mkfifo", fifo], check=True)
    waiting = [sys.executable, "-c", "import sys; open(sys.argv[1])", str(fifo)]  # for a writer that never comes
    failing = [sys.executable, "-c", f"import os, sys; {end}"]
    with pytest.raises(SystemExit) as ended:
        run_jobs([[Step(waiting)], [Step(failing), Step(note(tmp_path / "later", ""))]], 2)
    assert ended.value.code == status and not (tmp_path / "later").exists()


def test_the_script_shows_what_it_would_start():
    flags = ["--data_path", "/d", "--models_path", "/m", "--seeds", "3", "--kinds", "none/token"]
    result = subprocess.run(
        ["bash", ROOT / "scripts" / "weight_study.sh", "--dry_run", *flags], cwd="/", text=True, capture_output=True
    )
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0 and len(lines) == 5, result.stderr
    assert lines[0][1] == "scripts/run_local.sh" and lines[-1][2:4] == ["analysis.weight_study", "/m"]


@pytest.mark.parametrize("flags, words", [("--jobs 0", "JOBS=0"), ("--data_path /none", "no such folder")])
def test_what_cannot_be_meant_is_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        main([".", *flags.split()])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("weight_study.sh: error: ") and words in said.err
