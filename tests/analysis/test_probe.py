# SPDX-License-Identifier: MIT
"""The probe of frozen features: figures known beforehand, votes by hand, splits without a leak, and what it refuses."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import probe
from analysis.probe import hold_out, knn_probabilities, linear_probabilities, read_embeddings
from util.reports import write_features

CLASSES = ["water", "forest", "urban"]


def parts(samples=120, groups=6, dim=8, separable=True, seed=0, first=0, classes=CLASSES):
    """Random labels; separable: the first features are the labels, 10 noise widths apart."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, (samples, len(classes))).astype(np.uint8)
    if classes == probe.FLOOD_CLASSES:
        labels[:, 0] = 1 - labels[:, 1]
    features = random.normal(size=(samples, dim)).astype(np.float32)
    if separable:
        features *= 0.1
        features[:, : len(classes)] += 2 * labels.astype(np.float32) - 1
    number = first + np.arange(samples)
    return {
        "ids": np.array([f"p{n}" for n in number]),
        "groups": np.array([f"g{first}-{n % groups}" for n in number]),
        "labels": labels,
        "features": features,
        "classes": np.array(classes),
    }


def saved(path, **options):
    np.savez(path, **parts(**options))
    return path


def embedded(path, arrays):
    """The file that the finetuning program writes."""
    dataset = SimpleNamespace(
        ids=arrays["ids"],
        groups=arrays["groups"],
        CLASSES=tuple(arrays["classes"].tolist()),
        label_table=lambda: arrays["labels"],
        georeference=lambda: None,
    )
    write_features(path, dataset, torch.from_numpy(arrays["features"]))
    return path


def figures(program, output, *flags):
    status, printed, error = program(probe, *flags, "--output", output)
    assert (status, error) == (0, "")
    return json.loads(output.read_text()), printed


def test_separable_features_tell_every_label(tmp_path, program):
    train, test = saved(tmp_path / "a.npz"), saved(tmp_path / "b.npz", seed=1, first=500)
    document, printed = figures(program, tmp_path / "deep/p.json", "--train", train, "--test", test, "--neighbours", 5)
    assert [result["method"] for result in document["results"]] == ["knn", "linear"]
    for result in document["results"]:
        assert all(result[name] == 1 for name in ("ap_macro", "ap_micro", "f1_macro", "precision_macro"))
        assert result["samples"] == {"train": 120, "test": 120}
        assert result["groups"] == {
            "train": 6,
            "test": 6,
            "shared": 0,
        }
        assert result["encoder"] == str(train) and result["undefined"] == result["one_value_in_training"] == []
    assert (document["neighbours"], document["C"], document["seed"], document["classes"]) == (5, 0.1, None, CLASSES)
    lines = printed.splitlines()
    assert len(lines) == 4 and all(line.startswith("|") and line.endswith("|") for line in lines)
    assert [cell.strip() for cell in lines[2].split("|")[1:6]] == [str(train), "knn", "120", "120", "1.0000"]


def test_random_features_tell_no_more_than_the_prevalence(tmp_path, program):
    one = saved(tmp_path / "a.npz", samples=3000, groups=30, separable=False)
    document, _ = figures(program, tmp_path / "p.json", "--embeddings", one)
    prevalence = parts(samples=3000)["labels"].mean()
    for result in document["results"]:
        assert result["ap_macro"] == pytest.approx(prevalence, abs=0.05)
        assert result["samples"] == {"train": 2100, "test": 900}
        assert result["groups"] == {
            "train": 21,
            "test": 9,
            "shared": 0,
        }
    assert (document["held_out"], document["seed"]) == (0.3, 0)
    assert figures(program, tmp_path / "again.json", "--embeddings", one)[0] == document


def test_floods_are_one_of_two_classes(tmp_path, program):
    one = saved(tmp_path / "a.npz", classes=probe.FLOOD_CLASSES)
    document, printed = figures(program, tmp_path / "p.json", "--embeddings", one)
    for result in document["results"]:
        assert [result[name] for name in ("accuracy", "precision", "recall", "f1")] == [1, 1, 1, 1]
        assert sum(result["confusion"].values()) == result["samples"]["test"] == 40
    assert "accuracy" in printed and "AP" not in printed


def test_votes_of_three_points_by_hand():
    # Cosine similarities to (1, 0), whatever the lengths: 1, 0.8 and 0; two neighbours vote, the third does not.
    train = np.array([[3, 0], [0.4, 0.3], [0, 9]], np.float32)
    labels = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1]], np.uint8)
    near, far = math.exp(1 / 0.07), math.exp(0.8 / 0.07)
    expected = [near / (near + far), far / (near + far), 1]
    assert np.allclose(knn_probabilities(train, labels, np.array([[0.5, 0]], np.float32), 2), [expected], atol=1e-5)
    assert knn_probabilities(train, labels, train, 3).max() == 1


def test_linear_probe_does_not_depend_on_scale_or_offset_of_features():
    arrays = parts(separable=False)
    train, labels, queries = (
        arrays["features"][:80].astype(float),
        arrays["labels"][:80],
        arrays["features"][80:].astype(float),
    )
    scale, offset = np.logspace(-3, 3, 8), np.arange(8)
    expected, _ = linear_probabilities(train, labels, queries, 1.0)
    moved, _ = linear_probabilities(train * scale + offset, labels, queries * scale + offset, 1.0)
    assert np.allclose(moved, expected, atol=1e-4)
    assert 0.01 < expected.std(0).min()


def test_held_out_groups_are_whole_and_drawn_by_the_seed(tmp_path):
    data = read_embeddings(saved(tmp_path / "a.npz", groups=10))
    draws = []
    for seed in range(5):
        train, test = hold_out(data, 0.3, seed)
        assert not set(train.groups) & set(test.groups) and len(set(test.groups)) == 3
        assert sorted([*train.ids, *test.ids]) == sorted(data.ids)
        assert np.array_equal(test.features, data.features[np.isin(data.ids, test.ids)])
        draws.append(frozenset(test.groups))
    assert len(set(draws)) > 1


def test_both_formats_of_the_finetuning_program_read_alike(tmp_path):
    arrays = parts()
    npz, parquet = (read_embeddings(embedded(tmp_path / name, arrays)) for name in ("a.npz", "a.parquet"))
    assert npz.classes == parquet.classes == CLASSES
    for name in ("ids", "groups", "labels", "features"):
        one, other = getattr(npz, name), getattr(parquet, name)
        assert one.dtype == other.dtype and np.array_equal(one, other) and np.array_equal(one, arrays[name])


def test_encoders_compare_on_the_same_test_samples(tmp_path, program):
    first = saved(tmp_path / "a.npz")
    arrays = parts(separable=False, dim=5) | {key: parts()[key] for key in ("labels", "ids", "groups")}
    other = embedded(tmp_path / "b.parquet", arrays)
    document, _ = figures(program, tmp_path / "p.json", "--embeddings", first, other, "--method", "knn")
    good, random = document["results"]
    assert (good["encoder"], random["encoder"]) == (str(first), str(other))
    assert good["ap_macro"] == 1 > random["ap_macro"]
    assert (good["features"], random["features"]) == (8, 5) and good["samples"] == random["samples"]


def test_a_class_absent_in_training_or_test(tmp_path, program):
    train, test = parts(), parts(seed=1, first=500)
    train["labels"][:, 0] = test["labels"][:, 1] = 0
    np.savez(tmp_path / "a.npz", **train)
    np.savez(tmp_path / "b.npz", **test)
    document, _ = figures(program, tmp_path / "p.json", "--train", tmp_path / "a.npz", "--test", tmp_path / "b.npz")
    for result in document["results"]:
        prevalence = test["labels"][:, 0].mean()
        assert result["per_class"]["ap"] == [pytest.approx(prevalence), None, 1]
        assert result["per_class"]["recall"][0] == 0
        assert result["undefined"] == ["forest"] and result["one_value_in_training"] == ["water"]
    labels = np.ones((4, 2), np.uint8)
    assert (linear_probabilities(np.eye(4), labels, np.eye(4), 1.0)[0] == 1).all()


def test_a_fit_that_does_not_converge_is_one_line(tmp_path, program, monkeypatch):
    monkeypatch.setattr(probe, "MAX_ITER", 1)
    one = saved(tmp_path / "a.npz", separable=False)
    status, printed, error = program(probe, "--embeddings", one, "--method", "linear", "--C", 100)
    assert status == 0 and "linear" in printed and len(error.splitlines()) == 3
    assert all("a.npz: linear, class" in line and "converge" in line and "--C" in line for line in error.splitlines())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a good file for each kind of bad company."""
    folder = tmp_path_factory.mktemp("probe")
    saved(folder / "a.npz")
    saved(folder / "b.npz", first=500)
    saved(folder / "dim.npz", first=500, dim=7)
    saved(folder / "classes.npz", first=500, classes=CLASSES[::-1])
    saved(folder / "one.npz", groups=1)
    saved(folder / "few.npz", samples=12)
    saved(folder / "twins.npz", samples=30, groups=2)
    same_groups, broken, crooked, both = parts(first=500), parts(), parts(), parts(classes=probe.FLOOD_CLASSES)
    np.savez(folder / "near.npz", **same_groups | {"groups": parts()["groups"]})
    broken["features"][3, 2] = np.nan
    np.savez(folder / "nan.npz", **broken)
    np.savez(folder / "crooked.npz", **crooked | {"labels": crooked["labels"][1:]})
    np.savez(folder / "grey.npz", **crooked | {"labels": crooked["labels"] + 1})
    np.savez(folder / "both.npz", **both | {"labels": both["labels"] | 1})
    np.savez(folder / "empty.npz", **{name: part if name == "classes" else part[:0] for name, part in parts().items()})
    np.savez(folder / "dark.npz", **parts(first=500) | {"labels": np.zeros((120, 3), np.uint8)})
    np.savez(folder / "foreign.npz", images=np.zeros(3))
    np.save(folder / "array", np.zeros(3))
    (folder / "text.npz").write_text("id,label\n")
    (folder / "nothing.npz").touch()
    (folder / "zip.npz").write_bytes(b"PK\3\4 nothing")
    (folder / "text.parquet").write_text("id,label\n")
    pd.DataFrame({"id": ["p"], "feature 0": [1.0]}).to_parquet(folder / "foreign.parquet")
    return folder


REFUSED = {
    "no file named": ("", "--train", "--test", "--embeddings"),
    "train alone": ("--train a.npz", "--test"),
    "both ways": ("--train a.npz --test b.npz --embeddings a.npz", "--embeddings"),
    "unequal numbers": ("--train a.npz a.npz --test b.npz", "--train", "2 files", "--test 1"),
    "shared groups of one file": ("--embeddings a.npz --allow_shared_groups", "--allow_shared_groups"),
    "share of two files": ("--train a.npz --test b.npz --held_out 0.3", "--held_out"),
    "share": ("--embeddings a.npz --held_out 1", "--held_out 1"),
    "share of everything": ("--embeddings twins.npz --held_out 0.9", "--held_out 0.9", "2 groups", "twins.npz"),
    "seed": ("--embeddings a.npz --seed -1", "--seed -1"),
    "no neighbours": ("--embeddings a.npz --neighbours 0", "--neighbours 0"),
    "too many neighbours": ("--embeddings few.npz", "--neighbours 20", "8 training samples", "few.npz"),
    "C": ("--embeddings a.npz --C nan", "--C nan"),
    "missing": ("--embeddings no.npz", "no.npz", "no such file"),
    "missing parquet": ("--embeddings no.parquet", "no.parquet", "no such file"),
    "folder": ("--embeddings .", "directory"),
    "text": ("--embeddings text.npz", "text.npz", "--embed"),
    "nothing": ("--embeddings nothing.npz", "nothing.npz", "--embed"),
    "half a zip": ("--embeddings zip.npz", "zip.npz", "--embed"),
    "npy": ("--embeddings array.npy", "array.npy", "--embed"),
    "other arrays": ("--embeddings foreign.npz", "foreign.npz", "--embed"),
    "text as parquet": ("--embeddings text.parquet", "text.parquet", "--embed"),
    "other columns": ("--embeddings foreign.parquet", "foreign.parquet", "--embed"),
    "lengths": ("--embeddings crooked.npz", "crooked.npz", "fit together"),
    "no sample": ("--embeddings empty.npz", "empty.npz", "no sample"),
    "labels": ("--embeddings grey.npz", "grey.npz", "labels other than 0 and 1"),
    "flood and no flood": ("--embeddings both.npz", "both.npz", "no flood and flood"),
    "not finite": ("--embeddings nan.npz", "nan.npz", "p3", "not finite"),
    "features": ("--train a.npz --test dim.npz", "dim.npz", "7 features", "8 in"),
    "classes": ("--train a.npz --test classes.npz", "classes.npz", "classes"),
    "same samples": ("--train a.npz --test a.npz", "120 samples", "p0", "not trained on"),
    "same groups": ("--train a.npz --test near.npz", "near.npz", "6 groups", "--allow_shared_groups", "on the ground"),
    "one group": ("--embeddings one.npz", "one.npz", "one group", "--test"),
    "other test samples": ("--embeddings a.npz few.npz --method linear", "few.npz", "other samples"),
    "no positive label": ("--train a.npz --test dark.npz", "dark.npz", "positive label"),
    "output": ("--embeddings a.npz --output text.npz/p.json", "--output text.npz/p.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, files, program, monkeypatch):
    flags, *words = REFUSED[case]
    monkeypatch.chdir(files)
    status, _, error = program(probe, *flags.split())
    assert status == 2 and error.startswith("python -m analysis.probe: error: ") and len(error.splitlines()) == 1, error
    assert all(word in error for word in words), error


def test_shared_groups_pass_when_allowed(files, tmp_path, program):
    pair = "--train", files / "a.npz", "--test", files / "near.npz"
    document, _ = figures(program, tmp_path / "p.json", *pair, "--allow_shared_groups")
    assert document["results"][0]["groups"] == {"train": 6, "test": 6, "shared": 6}
