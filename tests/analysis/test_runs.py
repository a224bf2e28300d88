# SPDX-License-Identifier: MIT
"""Results of finetunings from every kind of input: console logs, run folders, log.txt, tables."""

import json

import pytest

from analysis.runs import MULTICLASS, NoResult, Result, find_inputs, metrics_in, read_input, read_results, table_of
from tests.helpers.result_logs import (
    FLOOD_SCORES,
    NAMESPACE,
    PIPE,
    SCORES,
    clocked,
    ours,
    released,
    run_folder,
    written,
)

FLOODS = """| Metric    | Value   |
|:----------|:--------|
| Accuracy  | 0.9100  |
| Precision | 0.8200  |
| Recall    | 0.7300  |
| F1 Score  | 0.7700  |"""
LINES = PIPE.splitlines()
SUMMARY = "Best Results Summary: Epoch 3\n"


@pytest.fixture
def read(tmp_path):
    """read(text, name) → the one Result of a file with this text."""

    def read(text, name="a.log"):
        (result,) = read_input(written(tmp_path, name, text))
        return result

    return read


def facts(result, *names):
    return tuple(getattr(result, name) for name in names)


def reason(path):
    with pytest.raises(NoResult) as error:
        read_input(path)
    return str(error.value)


# ---- Console logs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    (
        released(PIPE),
        released(PIPE, NAMESPACE.replace(", ", ",\n")),  # a line for each flag
        "".join(f"pretrained: {line}\n" for line in released(PIPE).splitlines()),
        "".join(  # mpirun --tag-output: rank 1 logs other values
            f"[1,0]<stdout>:{line}\n[1,1]<stdout>:{line.replace('0.7141', '0.1111').replace('seed=3', 'seed=4')}\n"
            for line in released(PIPE).splitlines()
        ),
        released(PIPE).replace("\n", "\r\n"),
        # An additional column, and lines of other programs in the table.
        released("\n".join(f"{line} {cell} |" for line, cell in zip(LINES, ("Weighted", "---", "0.3", "0.3", "0.3")))),
        released("\n".join(["", "a warning", *LINES[:3], "[1,1]<stderr>:a warning", "a warning", *LINES[3:]])),
        b"\xff\xfe\x80 broken\n" + released(PIPE).encode().replace(b"Training time", b"\xc3\x28 Training\0 time"),
    ),
)
def test_a_log_of_the_released_code(read, tmp_path, text):
    assert read(text) == Result(
        str(tmp_path / "a.log"), "pretrained", "/ckpt/checkpoint_64.pth", 64, seed=3, epoch=37, metrics=SCORES,
        output_dir="./out/a",
    )  # fmt: skip


@pytest.mark.parametrize(
    "start, flags, expected",
    (
        ("random initialisation", {}, ("random", None, None, 1.0, 0)),
        (
            "initialised from p/best.pth (epochs: 64), with a new head",
            {"finetune": "p/best.pth", "train_fraction": 0.5, "seed": 2},
            ("pretrained", "p/best.pth", 64, 0.5, 2),
        ),
        (
            "initialised from p/checkpoint_4.pth, with a new head; resampled: x",
            {"finetune": "p/checkpoint_4.pth"},
            ("pretrained", "p/checkpoint_4.pth", 4, 1.0, 0),
        ),
        (
            "initialised from p/best.pth, with a new head",
            {"finetune": "p/best.pth"},
            ("pretrained", "p/best.pth", None, 1.0, 0),
        ),
        (  # more digits than int() converts
            f"initialised from p/checkpoint_{'9' * 5000}.pth, with a new head",
            {"finetune": f"p/checkpoint_{'9' * 5000}.pth"},
            ("pretrained", f"p/checkpoint_{'9' * 5000}.pth", None, 1.0, 0),
        ),
        # A continued run that does not name its start logs "random initialisation" before it loads the checkpoint.
        (
            "random initialisation\ncontinuing c.pth after epoch 3",
            {"finetune": None, "resume": "auto"},
            (None, None, None, 1.0, 0),
        ),
    ),
)
def test_a_log_of_ours(read, start, flags, expected):
    result = read(ours(start=start, **flags))
    assert facts(result, "start", "checkpoint", "pretraining_epochs", "share", "seed") == expected
    assert facts(result, "metrics", "epoch", "split", "malformed") == (SCORES, 1, "test", 0)


@pytest.mark.parametrize(
    "before, expected",
    (
        ("", (None, None)),
        (clocked("random initialisation"), ("random", None)),
        (clocked("Load pre-trained checkpoint from: x/checkpoint-9.pth"), ("pretrained", 9)),
        (clocked("Namespace(finetune='', resume='')"), ("random", None)),
        # '' is the default of the released code: a continued run does not say how it began.
        (clocked("Namespace(finetune='', resume='out/checkpoint.pth')"), (None, None)),
        (released(PIPE) + clocked("Namespace(finetune='', resume='out/checkpoint.pth')"), ("pretrained", 64)),
    ),
)
def test_the_start_of_a_run(read, before, expected):
    assert facts(read(before + clocked(SUMMARY + PIPE)), "start", "pretraining_epochs") == expected


def test_the_last_complete_summary_counts(read):
    first, better = released(PIPE.replace("0.7141", "0.5")), released(PIPE, epoch=40)
    assert read(first + better).metrics["ap_macro"] == 0.7141
    assert read(better + first).metrics["ap_macro"] == 0.5
    cut = released(PIPE.replace("0.7141", "0.5"), epoch=41)
    cut = cut[: cut.index("| Precision")]
    assert facts(read(better + cut), "epoch", "metrics") == (40, SCORES)
    assert read(cut).metrics == {"ap_macro": 0.5, "ap_micro": 0.8391, "f1_macro": 0.6443, "f1_micro": 0.7384}


@pytest.mark.parametrize(
    "text, scores",
    (
        (ours({**FLOOD_SCORES, "recall": None}), {**FLOOD_SCORES, "recall": None}),
        (released(FLOODS), FLOOD_SCORES),
        (released(FLOODS.replace("0.9100", "1.0")), {**FLOOD_SCORES, "accuracy": 1}),
    ),
)
def test_floods_and_missing_values(read, text, scores):
    assert facts(read(text), "metrics", "malformed") == (scores, 0)


@pytest.mark.parametrize(
    "text",
    (
        clocked('flags: {"seed": 0, "tra') + ours(),
        ours() + clocked(SUMMARY),
        ours() + clocked(SUMMARY + PIPE.replace("0.7141", "0.7x41")),
        ours() + clocked(SUMMARY + PIPE.replace("0.7141", "714.1")),
        ours() + clocked(SUMMARY + PIPE.replace("  0.8391 |", "")),
        ours() + clocked(SUMMARY.replace("3", "x") + PIPE),
    ),
)
def test_malformed_lines_are_counted_and_skipped(read, text):
    assert facts(read(text), "metrics", "malformed") == (SCORES, 1)


@pytest.mark.parametrize(
    "text, why",
    (
        (clocked('flags: {"mask_ratio": 0.5}\nEpoch [0/2]'), "pretraining log"),
        (clocked("Epoch [0/2]"), "no Best Results Summary: not finished"),
        (SUMMARY + "a line\n" * 4 + PIPE, "no Best Results Summary: not finished"),
        ("Dear diary,\n", "holds no line of a training log"),
        ("\0", "not a text file"),
        ('{"epoch": 0, "train_loss": 1.0}\n', "pretraining log"),
        ('{"epoch": 4, "test_mAP": 0.99}', "no epoch with test_ap_macro or test_accuracy"),
        ("log,ap_macro\nx,many\n", "a table without a readable row"),
    ),
)
def test_files_without_a_result_say_why(tmp_path, text, why):
    assert reason(written(tmp_path, "a", text)) == why


# ---- log.txt, run folders, tables ----------------------------------------------------------------


def test_the_best_epoch_of_a_log_of_epochs(read):
    entries = [
        {"epoch": epoch, "test_ap_macro": score, "test_f1_macro": 0.25, "evaluated_split": "val"}
        for epoch, score in ((0, 0.9), (1, 0.7), (2, 0.8), (0, 0.1), (3, None))
    ]
    damaged = ['{"epoch": 4, "test_mAP": 0.99}', '{"epoch": 5, "te', '{"epoch": -1, "test_ap_macro": 1}', "[" * 100_000]
    result = read("\n".join([*map(json.dumps, entries), *damaged]))
    assert facts(result, "epoch", "split", "malformed") == (2, "val", 4)
    assert [result.metrics[name] for name in ("ap_macro", "f1_macro", "precision_micro")] == [0.8, 0.25, None]
    floods = read('{"epoch": 0, "test_accuracy": 0.5}\n{"epoch": 1, "test_accuracy": 0.8, "test_f1": 0.2}\n')
    assert floods.epoch == 1 and floods.metrics == {"accuracy": 0.8, "precision": None, "recall": None, "f1": 0.2}


ORIGIN = {"checkpoint": "p/checkpoint.pth", "epochs": 64, "flags": {}}


@pytest.mark.parametrize(
    "left, expected",
    (
        (
            {"origin": ORIGIN, "finetune": "p/checkpoint.pth", "seed": 5, "train_fraction": 0.25},
            ("pretrained", "p/checkpoint.pth", 64, 0.25, 5),
        ),
        # Older runs have no record of the checkpoint.
        ({"finetune": "p/checkpoint_8.pth"}, ("pretrained", "p/checkpoint_8.pth", 8, 1.0, 0)),
        ({}, ("random", None, None, 1.0, 0)),
        # A continued run need not name its start again.
        (
            {
                "finetune": None,
                "resume": "auto",
                "earlier": [{"flags": {"finetune": "p/checkpoint.pth"}, "initialised_from": ORIGIN}],
            },
            ("pretrained", "p/checkpoint.pth", 64, 1.0, 0),
        ),
        ({"finetune": None, "resume": "c.pth"}, (None, None, None, 1.0, 0)),
    ),
)
def test_run_folders(tmp_path, left, expected):
    (result,) = read_input(run_folder(tmp_path / "run", **left))
    assert facts(result, "start", "checkpoint", "pretraining_epochs", "share", "seed") == expected
    assert facts(result, "metrics", "epoch", "split") == (SCORES, 7, "test")


def test_a_run_folder_without_a_test_split(tmp_path):
    (result,) = read_input(run_folder(tmp_path / "run", split="none"))
    assert facts(result, "source", "start", "epoch", "split") == (str(tmp_path / "run"), "random", 0, "val")
    assert result.metrics["ap_macro"] == 0.5


@pytest.mark.parametrize(
    "name, text, why",
    (
        ("eval_test.json", "{", "eval_test.json: not a JSON object; the file is damaged"),
        ("eval_test.json", "{}", "eval_test.json: has neither ap_macro nor accuracy"),
        ("eval_test.json", None, "no eval_test.json: running"),
        ("run.json", '{"flags": {"mask_ratio": 0.5, "finetune": ""}}', "run folder of a pretraining"),
        ("run.json", "[1]", "run.json: not a JSON object; the file is damaged"),
        ("run.json", '{"flags": 1}', "run.json: has no flags; not a run folder"),
    ),
)
def test_run_folders_without_a_result_say_why(tmp_path, name, text, why):
    folder = run_folder(tmp_path / "a", outcome="running")
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    assert reason(folder) == why


def test_a_table_is_read_as_it_was_written(tmp_path):
    results = [
        Result("a.log", "pretrained", "p.pth", 64, 0.5, 0, 3, "test", SCORES),
        Result("b, c", "random", share=1.0, metrics=FLOOD_SCORES),
    ]
    assert read_input(written(tmp_path, "t.csv", table_of(results).to_csv(index=False))) == results


def test_a_table_is_read_as_it_was_corrected(read):
    result = read(
        "\ufefflog,mine,start,pretraining_epochs,share,ap_macro,ap_micro\r\n"
        "x,?,pretrained,64.0,50,71.4,83\r\ny,,,,,,\r\nz,,maybe,1,1,0.5,0.5\r\n"
    )
    assert facts(result, "source", "start", "pretraining_epochs", "share", "malformed") == (
        "x",
        "pretrained",
        64,
        0.5,
        2,
    )
    assert result.metrics["ap_macro"] == pytest.approx(0.714) and result.metrics["f1_macro"] is None


# ---- Folders -------------------------------------------------------------------------------------


def test_a_search_takes_each_run_once(tmp_path):
    run_folder(tmp_path / "output/ft", output_dir="output/ft")
    run_folder(tmp_path / "output/other", output_dir="output/other")
    for name, text in {
        "logs/ft.log": ours(output_dir="output/ft"),
        "logs/ft_before.log": ours({**SCORES, "ap_macro": 0.3}, output_dir="output/ft"),
        "logs/on.log": ours(output_dir="output/ft", finetune=None),  # a continued part
        "logs/seed1.log": ours(output_dir="output/ft", seed=1),  # another run, which was overwritten
        "logs/tuned.log": ours(output_dir="output/ft", finetune="p.pth"),
        "logs/released.log": released(PIPE),
        "out/a/log.txt": '{"epoch": 3, "test_ap_macro": 0.6}\n',  # of released.log: output_dir ./out/a
        "logs/cut.log": clocked("Epoch [0/2]"),
        "logs/.hidden.log": ours(),
        "logs/README": "a text\n",
        "logs/table.csv": "log,ap_macro\nx,0.5\n",
        "logs/checkpoint.pth": "PK\x03\x04\0\0",
    }.items():
        written(tmp_path, name, text)
    results, skipped = read_results([tmp_path, tmp_path / "logs/released.log"])
    assert [result.source.removeprefix(f"{tmp_path}/") for result in results] == [
        "logs/released.log",
        "logs/seed1.log",
        "logs/tuned.log",
        "output/ft",
        "output/other",
    ]
    folder = f"log of the run folder {tmp_path}/output/ft"
    assert {skip.path.removeprefix(f"{tmp_path}/"): skip.reason for skip in skipped} == {
        "logs/cut.log": "no Best Results Summary: not finished",
        "logs/ft.log": folder,
        "logs/on.log": folder,
        "logs/ft_before.log": f"{folder}, which has other figures: a log of an earlier run?",
        "out/a/log.txt": "of a run whose console log is read",
    }


def test_a_run_folder_may_contain_other_logs_and_a_pattern_selects(tmp_path):
    folder = run_folder(tmp_path / "ft")
    written(folder, "inner/b.log", released(PIPE))
    written(folder, "a.txt", released(PIPE))
    names = {str(path.relative_to(tmp_path)): named for path, named in find_inputs([tmp_path])}
    assert names == {"ft": False, "ft/a.txt": False, "ft/inner/b.log": False}
    assert [path.name for path, _ in find_inputs([tmp_path], "*.log")] == ["b.log"]
    assert [(path.name, named) for path, named in find_inputs([folder], "*.log")] == [("ft", True), ("b.log", False)]


def test_files_that_are_named_are_accounted_for(tmp_path):
    texts = {"c.pth": "PK\x03\x04\0\0", "README": "a text\n", "t.csv": "log,ap_macro\nx,0.5\n"}
    results, skipped = read_results([written(tmp_path, name, text) for name, text in texts.items()])
    assert [result.source for result in results] == ["x"]
    assert [skip.reason for skip in skipped] == ["not a text file", "holds no line of a training log"]
    with pytest.raises(ValueError, match="nowhere: does not exist"):
        read_results([tmp_path / "nowhere"])


def test_one_label_of_each_image(read, tmp_path):
    """A class per image has an accuracy as floods do, and is told apart by its macro means."""
    metrics = {"accuracy": 0.7, "f1_macro": 0.6, "precision_macro": 0.5, "recall_macro": 0.4}
    table = "\n".join(
        f"[03:00:00.1] | {name} | {value} |"
        for name, value in (
            ("Metric", "Value"),
            ("Accuracy", 0.7),
            ("F1 Macro", 0.6),
            ("Precision Macro", 0.5),
            ("Recall Macro", 0.4),
        )
    )
    result = read(f"[03:00:00.0] Best Results Summary: Epoch 3\n{table}\n")
    assert result.metrics == metrics and result.task is MULTICLASS
    assert (
        metrics_in({"test_loss": 1.0, **{f"test_{name}": value for name, value in metrics.items()}}, "test_") == metrics
    )
