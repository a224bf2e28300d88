# SPDX-License-Identifier: MIT
"""Results of finetunings from every kind of file that they are left in: console logs, run folders, log.txt, tables."""

import json

import pytest

from analysis.console_log import NoResult, lines_of, parse
from analysis.results import (
    Result,
    find_logs,
    read_console_log,
    read_epoch_log,
    read_results,
    read_run_folder,
    read_table,
    write_table,
)
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

PERCENT = (
    PIPE.replace("0.7141", "71.41")
    .replace("0.8391", "83.91")
    .replace("0.6443", "64.43")
    .replace("0.7384", "73.84")
    .replace("0.6912", "69.12")
    .replace("0.7705", "77.05")
)
TURNED = """| Average | AVERAGE PRECISION | F1 SCORE | PRECISION |
|---------|-------------------|----------|-----------|
| **Macro** | 0.7141 | 0.6443 | 0.6912 |
| **Micro** | 0.8391 | 0.7384 | 0.7705 |"""
GRID = """+-------------------+---------+---------+
| Metric            |   Macro |   Micro |
+===================+=========+=========+
| Average Precision |  0.7141 |  0.8391 |
+-------------------+---------+---------+
| F1 Score          |  0.6443 |  0.7384 |
+-------------------+---------+---------+
| Precision         |  0.6912 |  0.7705 |
+-------------------+---------+---------+"""
PSQL = """+-------------------+---------+---------+
| Metric            |   Macro |   Micro |
|-------------------+---------+---------|
| Average Precision |  0.7141 |  0.8391 |
| F1 Score          |  0.6443 |  0.7384 |
| Precision         |  0.6912 |  0.7705 |
+-------------------+---------+---------+"""
INDEXED = """|    | metric            | macro  | micro  |
|---:|:------------------|:-------|:-------|
|  0 | average precision | 71.41% | 83.91% |
|  1 | f1-score          | 64.43% | 73.84% |
|  2 | precision         | 69.12% | 77.05% |"""
ONE_ROW = """| mAP (macro) | mAP (micro) | F1_macro | F1_micro | Precision macro | Precision micro |
|---|---|---|---|---|---|
| 0.7141 | 0.8391 | 0.6443 | 0.7384 | 0.6912 | 0.7705 |"""
FLOODS = """| Metric    | Value   |
|:----------|:--------|
| Accuracy  | 0.9100  |
| Precision | 0.8200  |
| Recall    | 0.7300  |
| F1 Score  | 0.7700  |"""


# ---- Console logs --------------------------------------------------------------------------------


@pytest.mark.parametrize("table", (PIPE, PERCENT, TURNED, GRID, PSQL, INDEXED, ONE_ROW))
def test_tables_of_the_released_code_in_every_form(tmp_path, table):
    result = read_console_log(written(tmp_path, "a.log", released(table)))
    assert result.metrics == pytest.approx(SCORES) and result.malformed == 0
    assert (result.start, result.checkpoint, result.pretraining_epochs) == ("pretrained", "/ckpt/checkpoint_64.pth", 64)
    assert (result.seed, result.epoch, result.share, result.split, result.output_dir) == (3, 37, None, None, "./out/a")


def test_flags_may_take_a_line_each_and_lines_may_have_a_prefix(tmp_path):
    text = released(PIPE, NAMESPACE.replace(", ", ",\n").replace("_64", "-16"))
    result = read_console_log(written(tmp_path, "a.log", text))
    assert (result.seed, result.pretraining_epochs, result.output_dir) == (3, 16, "./out/a")
    tagged = "".join(
        f"[1,0]<stdout>:{line}\n[1,1]<stdout>:{line.replace('0.7141', '0.1111').replace('seed=3', 'seed=4')}\n"
        for line in text.splitlines()
    )
    by_shell = "".join(f"pretrained: {line}\n" for line in text.splitlines())
    for other in (tagged, by_shell, text.replace("\n", "\r\n")):
        assert read_console_log(written(tmp_path, "b.log", other)) == Result(
            **{**vars(result), "source": str(tmp_path / "b.log")}
        )


def test_what_ours_began_with(tmp_path):
    def read(start, **flags):
        result = read_console_log(written(tmp_path, "a.log", ours(start=start, **flags)))
        assert result.metrics == SCORES and (result.epoch, result.split) == (1, "test")
        return result.start, result.checkpoint, result.pretraining_epochs, result.share, result.seed

    assert read("random initialisation") == ("random", None, None, 1.0, 0)
    assert read(
        "initialised from p/best.pth (epochs: 64), with a new head", finetune="p/best.pth", train_fraction=0.5, seed=2
    ) == ("pretrained", "p/best.pth", 64, 0.5, 2)
    assert read("initialised from p/checkpoint_4.pth, with a new head; resampled: x", finetune="p/checkpoint_4.pth")[
        :3
    ] == ("pretrained", "p/checkpoint_4.pth", 4)
    assert read("initialised from p/best.pth, with a new head", finetune="p/best.pth")[2] is None
    # A run that goes on without naming its start logs "random initialisation" before it loads the checkpoint.
    assert read("random initialisation\ncontinuing c.pth after epoch 3", finetune=None, resume="auto")[0] is None


def test_the_start_is_what_a_log_without_flags_says(tmp_path):
    table = clocked(f"Best Results Summary: Epoch 2\n{PIPE}")
    assert read_console_log(written(tmp_path, "a.log", table)).start is None
    assert read_console_log(written(tmp_path, "a.log", clocked("random initialisation") + table)).start == "random"
    result = read_console_log(
        written(tmp_path, "a.log", clocked("Load pre-trained checkpoint from: x/checkpoint-9.pth") + table)
    )
    assert (result.start, result.pretraining_epochs) == ("pretrained", 9)
    # The released program has '' as default: with it a continued run says nothing of its start.
    again = released(PIPE, "Namespace(finetune='', resume='out/checkpoint.pth')")
    assert read_console_log(written(tmp_path, "a.log", again)).start is None
    assert read_console_log(written(tmp_path, "a.log", released(PIPE) + again)).start == "pretrained"
    assert (
        read_console_log(written(tmp_path, "a.log", released(PIPE, "Namespace(finetune='', resume='')"))).start
        == "random"
    )


def test_the_last_complete_summary_counts(tmp_path):
    first, better = released(PIPE.replace("0.7141", "0.5")), released(PIPE, epoch=40)
    assert read_console_log(written(tmp_path, "a.log", first + better)).metrics["ap_macro"] == 0.7141
    assert read_console_log(written(tmp_path, "a.log", better + first)).metrics["ap_macro"] == 0.5
    cut = released(PIPE.replace("0.7141", "0.5"), epoch=41)
    cut = cut[: cut.index("| Precision")]
    result = read_console_log(written(tmp_path, "a.log", better + cut))
    assert result.epoch == 40 and result.metrics == SCORES
    # Of one that has only a cut table, what is there counts.
    assert read_console_log(written(tmp_path, "a.log", cut)).metrics == {
        name: SCORES[name] if name != "ap_macro" else 0.5 for name in ("ap_macro", "ap_micro", "f1_macro", "f1_micro")
    }


def test_floods_and_missing_values(tmp_path):
    result = read_console_log(written(tmp_path, "a.log", ours({**FLOOD_SCORES, "recall": None})))
    assert result.metrics == {**FLOOD_SCORES, "recall": None} and result.malformed == 0
    assert read_console_log(written(tmp_path, "a.log", released(FLOODS))).metrics == FLOOD_SCORES
    assert (
        read_console_log(written(tmp_path, "a.log", released(FLOODS.replace("0.9100", "1.0")))).metrics["accuracy"] == 1
    )
    weighted = (
        PIPE.replace("Micro |", "Micro | Weighted |")
        .replace("--------:|\n", "--------:|---|\n")
        .replace("1 |\n", "1 | 0.3 |\n")
        .replace("4 |\n", "4 | 0.3 |\n")
        + " 0.3 |"
    )
    assert read_console_log(written(tmp_path, "a.log", released(weighted))).metrics == SCORES


def test_malformed_lines_are_counted_and_stop_nothing(tmp_path):
    def malformed(text):
        return read_console_log(written(tmp_path, "a.log", text)).malformed

    good = ours()
    assert malformed(good) == 0
    assert malformed(clocked('flags: {"seed": 0, "tra') + good) == 1
    assert malformed(good + clocked("Best Results Summary: Epoch 3")) == 1
    assert malformed(good + clocked(f"Best Results Summary: Epoch 3\n{PIPE.replace('0.7141', '0.7x41')}")) == 1
    assert malformed(good + clocked(f"Best Results Summary: Epoch 3\n{PIPE.replace('0.7141', '714.1')}")) == 1
    assert malformed(good + clocked(f"Best Results Summary: Epoch 3\n{PIPE.replace('  0.8391 |', '')}")) == 1
    assert malformed(good + clocked(f"Best Results Summary: Epoch x\n{PIPE}")) == 1
    path = tmp_path / "bytes.log"
    path.write_bytes(b"\xff\xfe\x80 broken\n" + good.encode().replace(b"Training time", b"\xc3\x28 Training\x00 time"))
    assert read_console_log(path).metrics == SCORES


def test_lines_of_others_may_stand_in_a_table_but_not_another_table():
    lines = PIPE.splitlines()
    text = "\n".join(
        [
            "Best Results Summary: Epoch 1",
            "",
            "a warning",
            *lines[:3],
            "[1,1]<stderr>:a warning",
            "a warning",
            *lines[3:],
        ]
    )
    assert parse(lines_of(text)).summary["metrics"] == SCORES
    assert parse(lines_of("Best Results Summary: Epoch 1\n" + "a line\n" * 4 + PIPE)).summary is None


def test_logs_without_a_result_say_why(tmp_path):
    def reason(text):
        with pytest.raises(NoResult) as error:
            read_console_log(written(tmp_path, "a.log", text))
        return str(error.value)

    assert reason(clocked('flags: {"mask_ratio": 0.5}\nEpoch [0/2]')) == "pretraining log"
    assert reason(clocked("Epoch [0/2]")) == "no Best Results Summary: not finished"
    assert reason("Dear diary,\n") == "nothing in it is of a training log"
    with pytest.raises(NoResult, match="No such file"):
        read_console_log(tmp_path / "none.log")


# ---- Log.txt, run folders, tables ----------------------------------------------------------------


def test_the_best_epoch_of_a_log_of_epochs(tmp_path):
    def entry(epoch, score, **more):
        return json.dumps(
            {
                "train_loss": 0.5,
                "epoch": epoch,
                "test_ap_macro": score,
                "test_f1_macro": 0.25,
                "evaluated_split": "val",
                **more,
            }
        )

    lines = [
        entry(0, 0.9),
        entry(1, 0.7),
        entry(2, 0.8),
        entry(0, 0.1),
        entry(3, None),
        '{"epoch": 4, "test_mAP": 0.99}',
        '{"epoch": 5, "te',
    ]
    result = read_epoch_log(written(tmp_path, "log.txt", "\n".join(lines)))
    assert (result.epoch, result.split, result.malformed) == (2, "val", 2)
    assert (
        result.metrics["ap_macro"] == 0.8
        and result.metrics["f1_macro"] == 0.25
        and result.metrics["precision_micro"] is None
    )
    floods = "\n".join(
        json.dumps({"epoch": epoch, "test_accuracy": score, "test_f1": 1 - score})
        for epoch, score in enumerate((0.5, 0.8, 0.6))
    )
    result = read_epoch_log(written(tmp_path, "log.txt", floods))
    assert result.epoch == 1 and result.metrics["f1"] == pytest.approx(0.2)
    for text, reason in (
        ('{"epoch": 0, "train_loss": 1.0}\n', "pretraining log"),
        (lines[5], "no epoch with test_ap_macro"),
    ):
        with pytest.raises(NoResult, match=reason):
            read_epoch_log(written(tmp_path, "log.txt", text))


def test_run_folders_old_and_new(tmp_path):
    origin = {"checkpoint": "p/checkpoint.pth", "epochs": 64, "flags": {}}
    result = read_run_folder(
        run_folder(tmp_path / "new", origin=origin, finetune="p/checkpoint.pth", seed=5, train_fraction=0.25)
    )
    assert (
        result.start,
        result.checkpoint,
        result.pretraining_epochs,
        result.share,
        result.seed,
        result.epoch,
        result.split,
    ) == ("pretrained", "p/checkpoint.pth", 64, 0.25, 5, 7, "test")
    assert result.metrics == SCORES
    old = read_run_folder(run_folder(tmp_path / "old", finetune="p/checkpoint_8.pth"))
    assert (old.start, old.pretraining_epochs) == ("pretrained", 8)
    assert read_run_folder(run_folder(tmp_path / "random")).start == "random"
    # What continued a run need not say what it had started from.
    first = {"flags": {"finetune": "p/checkpoint.pth"}, "initialised_from": origin}
    went_on = read_run_folder(run_folder(tmp_path / "on", finetune=None, resume="auto", earlier=[first]))
    assert (went_on.start, went_on.pretraining_epochs) == ("pretrained", 64)
    assert read_run_folder(run_folder(tmp_path / "on", finetune=None, resume="c.pth")).start is None
    without = read_run_folder(run_folder(tmp_path / "val", split="none"))
    assert (without.split, without.epoch, without.metrics["ap_macro"], without.start) == ("val", 0, 0.5, "random")


def test_run_folders_without_a_result_say_why(tmp_path):
    def reason(folder):
        with pytest.raises(NoResult) as error:
            read_run_folder(folder)
        return str(error.value)

    folder = run_folder(tmp_path / "a", outcome="running")
    (folder / "eval_test.json").write_text("{")
    assert reason(folder) == "eval_test.json: not a JSON object; the file is damaged"
    (folder / "eval_test.json").unlink()
    assert reason(folder) == "no eval_test.json: running"
    (folder / "run.json").write_text('{"flags": {"mask_ratio": 0.5, "finetune": ""}}')
    assert reason(folder) == "run folder of a pretraining"
    (folder / "run.json").write_text("[1]")
    assert reason(folder).startswith("run.json: not a JSON object")


def test_a_table_is_read_as_it_was_written_and_as_it_was_corrected(tmp_path):
    results = [
        Result("a.log", "pretrained", "p.pth", 64, 0.5, 0, 3, "test", SCORES),
        Result("b, c", "random", share=1.0, metrics=FLOOD_SCORES),
    ]
    write_table(tmp_path / "t.csv", results)
    back = read_table(tmp_path / "t.csv")
    assert back == results
    by_hand = (
        "\ufefflog,mine,start,pretraining_epochs,share,ap_macro,ap_micro\r\nx,?,pretrained,64.0,50,71.4,83\r\ny,,,,,,\r\n"
        "z,,maybe,1,1,0.5,0.5\r\n"
    )
    (result,) = read_table(written(tmp_path, "t.csv", by_hand))
    assert (result.source, result.start, result.pretraining_epochs, result.share, result.malformed) == (
        "x",
        "pretrained",
        64,
        0.5,
        2,
    )
    assert result.metrics["ap_macro"] == pytest.approx(0.714) and result.metrics["f1_macro"] is None
    with pytest.raises(NoResult, match="without a readable row"):
        read_table(written(tmp_path, "t.csv", "log,ap_macro\nx,many\n"))


# ---- Folders -------------------------------------------------------------------------------------


def test_a_search_takes_each_run_once(tmp_path):
    run_folder(tmp_path / "output/ft", output_dir="output/ft")
    run_folder(tmp_path / "output/other", output_dir="output/other")
    written(tmp_path, "logs/ft.log", ours(output_dir="output/ft"))
    written(tmp_path, "logs/ft_before.log", ours({**SCORES, "ap_macro": 0.3}, output_dir="output/ft"))
    written(tmp_path, "logs/on.log", ours(output_dir="output/ft", finetune=None))  # a part that went on
    written(tmp_path, "logs/seed1.log", ours(output_dir="output/ft", seed=1))  # another run, which was overwritten
    written(tmp_path, "logs/tuned.log", ours(output_dir="output/ft", finetune="p.pth"))
    written(tmp_path, "logs/released.log", released(PIPE))
    written(
        tmp_path, "out/a/log.txt", '{"epoch": 3, "test_ap_macro": 0.6}\n'
    )  # that of released.log: output_dir ./out/a
    written(tmp_path, "logs/cut.log", clocked("Epoch [0/2]"))
    written(tmp_path, "logs/.hidden.log", ours())
    written(tmp_path, "logs/README", "a text\n")
    written(tmp_path, "logs/table.csv", "log,ap_macro\nx,0.5\n")
    (tmp_path / "logs/checkpoint.pth").write_bytes(b"PK\x03\x04\0\0")
    results, skipped = read_results([tmp_path, tmp_path / "logs/released.log"])
    assert [result.source.removeprefix(f"{tmp_path}/") for result in results] == [
        "logs/released.log",
        "logs/seed1.log",
        "logs/tuned.log",
        "output/ft",
        "output/other",
    ]
    reasons = {skip.path.removeprefix(f"{tmp_path}/"): skip.reason for skip in skipped}
    assert reasons == {
        "logs/cut.log": "no Best Results Summary: not finished",
        "logs/ft.log": f"log of the run folder {tmp_path}/output/ft",
        "logs/on.log": f"log of the run folder {tmp_path}/output/ft",
        "logs/ft_before.log": f"log of the run folder {tmp_path}/output/ft, which has other figures: a log of an earlier run?",
        "out/a/log.txt": "of a run whose console log is read",
    }


def test_a_run_folder_may_hold_others_logs_and_a_pattern_chooses(tmp_path):
    folder = run_folder(tmp_path / "ft")
    written(folder, "inner/b.log", released(PIPE))
    written(folder, "a.txt", released(PIPE))
    names = {str(path.relative_to(tmp_path)): named for path, named in find_logs([tmp_path])}
    assert names == {"ft": False, "ft/a.txt": False, "ft/inner/b.log": False}
    assert [path.name for path, _ in find_logs([tmp_path], "*.log")] == ["b.log"]
    assert [(path.name, named) for path, named in find_logs([folder], "*.log")] == [("ft", True), ("b.log", False)]


def test_files_that_are_named_are_accounted_for(tmp_path):
    (tmp_path / "c.pth").write_bytes(b"PK\x03\x04\0\0")
    paths = [
        tmp_path / "c.pth",
        written(tmp_path, "README", "a text\n"),
        written(tmp_path, "t.csv", "log,ap_macro\nx,0.5\n"),
    ]
    results, skipped = read_results(paths)
    assert [result.source for result in results] == ["x"]
    assert [skip.reason for skip in skipped] == ["not a text file", "nothing in it is of a training log"]
    with pytest.raises(ValueError, match="nowhere: does not exist"):
        read_results([tmp_path / "nowhere"])
