# SPDX-License-Identifier: MIT
"""Evaluates pretrained encoders quickly: kNN and logistic regression on their frozen features.

    python -m analysis.probe --train train.npz --test test.npz --output probe.json
    python -m analysis.probe --embeddings a.npz b.npz --held_out 0.3 --seed 0      # two encoders, split by groups

The files are those of `main_finetune.py --embed`. Nothing is tuned on the test samples. No sample is in both training
and test set, and no group (an acquisition, a flood folder) is, unless --allow_shared_groups is given.
"""

import sys
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tabulate import tabulate

from analysis.programs import writing
from analysis.runs import FLOOD, MULTILABEL
from common.command_line import Parser, Range, positive, positive_int
from common.errors import DataError, data_error
from common.files import write_json
from common.packages import load
from util.metrics import flood_metrics, multilabel_metrics

FLOOD_CLASSES = ["no flood", "flood"]  # exclusive classes; all others are independent labels
TEMPERATURE = 0.07  # of the kNN votes; Wu et al. 2018
# Measured on synthetic features (512, power-law spectrum; 200 to 5000 training samples; frequent and rare labels): AP
# is best at C = 0.01 to 0.1 and lower at scikit-learn's default 1, which overfits. F1 is lower below 0.1, where the
# penalty keeps the probabilities of rare labels below the threshold.
PENALTY = 0.1
MAX_ITER = 2000
HELD_OUT = 0.3


# ---- Data ----------------------------------------------------------------------------------------


class Embeddings(NamedTuple):
    """Features of N samples with K labels."""

    path: str
    ids: np.ndarray  # (N,) str
    groups: np.ndarray  # (N,) str, the acquisition or folder
    labels: np.ndarray  # (N, K) uint8, 0 or 1
    features: np.ndarray  # (N, C) float32
    classes: list  # K names

    def take(self, rows):
        return self._replace(
            ids=self.ids[rows], groups=self.groups[rows], labels=self.labels[rows], features=self.features[rows]
        )


def read_embeddings(path):
    """The Embeddings in a .npz or .parquet file. Raises DataError for other files and features that are not finite."""
    try:
        data = Embeddings(str(path), *(_read_parquet if Path(path).suffix == ".parquet" else _read_npz)(path))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; write it with main_finetune.py --embed") from None
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or 'cannot be read'}; name a file of main_finetune.py --embed"
        ) from None
    except (ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
        raise DataError(f"{path}: not a file that main_finetune.py --embed wrote; write it again") from None
    samples = len(data.ids)
    shapes = [part.shape for part in (data.ids, data.groups, data.labels)]
    if shapes != [(samples,), (samples,), (samples, len(data.classes))] or data.features.shape[:-1] != (samples,):
        raise DataError(f"{path}: ids, groups, labels, features and classes do not fit together; write the file again")
    if not data.features.size:
        raise DataError(f"{path}: no sample or no feature in it; embed a split that is not empty")
    if not np.isin(data.labels, (0, 1)).all():
        raise DataError(f"{path}: labels other than 0 and 1; write the file again")
    if data.classes == FLOOD_CLASSES and not (data.labels.sum(1) == 1).all():
        raise DataError(
            f"{path}: samples with both or neither of the labels {' and '.join(FLOOD_CLASSES)}; write the file again"
        )
    bad = data.ids[~np.isfinite(data.features).all(1)].tolist()
    if bad:
        raise data_error(
            f"{path}: features of {len(bad)} samples are not finite",
            bad,
            "embed them with --amp off, or check the checkpoint",
        )
    return data._replace(labels=data.labels.astype(np.uint8))


def _read_npz(path):
    arrays = np.load(path)
    return (
        arrays["ids"].astype(str),
        arrays["groups"].astype(str),
        arrays["labels"],
        arrays["features"].astype(np.float32),
        arrays["classes"].astype(str).tolist(),
    )


def _read_parquet(path):
    frame = pd.read_parquet(path)
    labels = [name for name in frame if name.startswith("label: ")]
    features = [f"feature {k}" for k in range(sum(name.startswith("feature ") for name in frame))]
    return (
        frame["id"].to_numpy(str),
        frame["group"].to_numpy(str),
        frame[labels].to_numpy(),
        frame[features].to_numpy(np.float32),
        [name.removeprefix("label: ") for name in labels],
    )


def hold_out(data, share, seed):
    """Splits the Embeddings of one file by groups: (train, test), test with a share of the groups, drawn by seed.

    Raises DataError if one of them would be empty.
    """
    count = len(np.unique(data.groups))
    if count < 2:
        raise DataError(
            f"{data.path}: all samples are of one group, so none can be held out; name another file with --test"
        )
    try:
        draw = scikit_learn("model_selection").GroupShuffleSplit(1, test_size=share, random_state=seed)
        train, test = next(draw.split(data.features, groups=data.groups))
    except ValueError:
        raise DataError(
            f"--held_out {share:g}: none of the {count} groups of {data.path} would be left to train on; lower it"
        ) from None
    return data.take(train), data.take(test)


def refuse_leaks(train, test, allow_shared_groups=False):
    """Raises DataError unless both are of one encoder and dataset, without common samples or groups."""
    if train.features.shape[1] != test.features.shape[1]:
        raise DataError(
            f"{test.path}: {test.features.shape[1]} features a sample, but {train.features.shape[1]} in "
            f"{train.path}; embed both with one checkpoint"
        )
    if train.classes != test.classes:
        raise DataError(f"{test.path}: other classes than in {train.path}; embed both from one dataset")
    shared = np.intersect1d(train.ids, test.ids).tolist()
    if shared:
        raise data_error(
            f"{test.path}: {len(shared)} samples are in the training set of {train.path} too",
            shared,
            "test on samples that are not trained on",
        )
    shared = [] if allow_shared_groups else shared_groups(train, test)
    if shared:
        raise data_error(
            f"{test.path}: {len(shared)} groups are in {train.path} too",
            shared,
            "neighbouring patches of one acquisition have similar labels: hold out whole groups (--embeddings), or add "
            "--allow_shared_groups for splits that are separated on the ground instead, as the official ones of "
            "BigEarthNet v2 are",
        )


def shared_groups(train, test):
    return np.intersect1d(train.groups, test.groups).tolist()


def refuse_unlike_tests(pairs):
    """Raises DataError unless all (train, test) pairs are tested on the same samples with the same classes."""
    first = pairs[0][1]
    for _, test in pairs[1:]:
        if test.classes != first.classes or not np.array_equal(np.sort(test.ids), np.sort(first.ids)):
            raise DataError(
                f"{test.path}: tested on other samples or classes than {first.path}; encoders compare only on "
                "the same ones, so probe it alone"
            )


def scikit_learn(module):
    """A module of scikit-learn. Raises DataError if it is not installed."""
    return load(f"sklearn.{module}", "probing features")


# ---- Methods -------------------------------------------------------------------------------------

# From features (N, C) and labels (N, K) of the training samples, and features (M, C) of the queries, to probabilities
# (M, K), float64.


def knn_probabilities(features, labels, queries, neighbours):
    """The vote of the nearest training samples by cosine similarity s: p_k = Σ exp(s/0.07)·label_k / Σ exp(s/0.07).

    Source: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018,
    arXiv 1805.01978.
    """
    neighbourhood = scikit_learn("neighbors").NearestNeighbors(n_neighbors=neighbours, metric="cosine")
    search = neighbourhood.fit(features)
    distances, nearest = search.kneighbors(queries)  # (M, neighbours); s = 1 - distance
    votes = np.exp((1 - distances.astype(np.float64)) / TEMPERATURE)
    shares = np.einsum("mn,mnk->mk", votes / votes.sum(1, keepdims=True), labels[nearest])
    return shares.clip(0, 1)  # rounding may exceed 1


def linear_probabilities(features, labels, queries, penalty):
    """A logistic regression for each label on standardised features. Returns (probabilities, {k: warning of its fit}).

    penalty: C, the inverse strength of the L2 penalty. The probability of a label that is constant in training is its
    value.
    """
    scaler = scikit_learn("preprocessing").StandardScaler().fit(features.astype(np.float64))
    regression = scikit_learn("linear_model").LogisticRegression
    features, queries = (scaler.transform(part.astype(np.float64)) for part in (features, queries))
    probabilities, complaints = np.empty((len(queries), labels.shape[1])), {}
    for k, label in enumerate(labels.T):
        if label.min() == label.max():
            probabilities[:, k] = label[0]
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = regression(C=penalty, max_iter=MAX_ITER).fit(features, label)
        if caught:
            complaints[k] = str(caught[0].message).splitlines()[0].rstrip(":")
        probabilities[:, k] = model.predict_proba(queries)[:, 1]
    return probabilities, complaints


def probe(train, test, method, neighbours, penalty):
    """(metrics of one method on the test samples, {k: warning}). "undefined" has names of classes. Raises DataError."""
    if method == "knn":
        probabilities, complaints = knn_probabilities(train.features, train.labels, test.features, neighbours), {}
    else:
        probabilities, complaints = linear_probabilities(train.features, train.labels, test.features, penalty)
    probabilities, labels = torch.from_numpy(probabilities), torch.from_numpy(test.labels)
    if test.classes == FLOOD_CLASSES:
        return flood_metrics(probabilities, labels[:, 1]), complaints
    try:
        metrics = multilabel_metrics(probabilities, labels)
    except ValueError as error:
        raise DataError(f"{test.path}: {error}; embed another split") from None
    return {**metrics, "undefined": [test.classes[k] for k in metrics["undefined"]]}, complaints


# ---- Program -------------------------------------------------------------------------------------


def check_flags(args):
    """Raises DataError for flags that contradict each other."""
    trained, tested = len(args.train or []), len(args.test or [])
    if not (args.embeddings or (trained and tested)):
        raise DataError("--train with --test, or --embeddings alone, must name the files")
    if args.embeddings and (trained or tested):
        raise DataError("--embeddings contradicts --train and --test: it is both; use one or the other")
    if trained != tested:
        raise DataError(
            f"--train names {trained} files, but --test {tested}: name one of each for each encoder, in one order"
        )
    if args.embeddings and args.allow_shared_groups:
        raise DataError("--allow_shared_groups: --embeddings holds out whole groups; leave the flag out")
    if not args.embeddings and args.held_out is not None:
        raise DataError("--held_out: --test says already what to test on; leave the flag out")
    scikit_learn("linear_model")  # before any work


def read_pairs(args, held_out):
    """The (train, test) Embeddings of each encoder. Raises DataError if they cannot be used or compared."""
    if args.embeddings:
        pairs = [hold_out(read_embeddings(path), held_out, args.seed) for path in args.embeddings]
    else:
        pairs = [(read_embeddings(train), read_embeddings(test)) for train, test in zip(args.train, args.test)]
    for train, test in pairs:
        refuse_leaks(train, test, args.allow_shared_groups)
        if "knn" in args.method and args.neighbours > len(train.ids):
            raise DataError(
                f"--neighbours {args.neighbours}: {train.path} gives only {len(train.ids)} training samples; lower it"
            )
    refuse_unlike_tests(pairs)
    return pairs


def describe(train, test):
    """What the metrics were measured on, for JSON."""
    share = train.labels.mean(0)
    return {
        "encoder": train.path,
        "test": test.path,
        "features": train.features.shape[1],
        "samples": {"train": len(train.ids), "test": len(test.ids)},
        "groups": {
            "train": len(np.unique(train.groups)),
            "test": len(np.unique(test.groups)),
            "shared": len(shared_groups(train, test)),
        },
        "one_value_in_training": [name for name, mean in zip(train.classes, share) if mean in (0, 1)],
    }


def print_table(results, classes):
    """Prints a row per encoder and method."""
    labels = FLOOD if classes == FLOOD_CLASSES else MULTILABEL
    rows = [
        (
            result["encoder"],
            result["method"],
            *result["samples"].values(),
            *("–" if result[name] is None else f"{result[name]:.4f}" for name in labels),
        )
        for result in results
    ]
    headers = ["encoder", "method", "train", "test", *labels.values()]
    print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True))


def build_parser():
    parser = Parser(__doc__.splitlines()[0], "analysis.probe")
    group = parser.add_argument_group("data", "one file, or pair of files, for each encoder to compare")
    group.add_argument("--train", nargs="+", metavar="FILE", help="embeddings to train on, .npz or .parquet")
    group.add_argument("--test", nargs="+", metavar="FILE", help="embeddings to test on, in the order of --train")
    group.add_argument("--embeddings", nargs="+", metavar="FILE", help="embeddings to split by groups")
    group.add_argument(
        "--held_out",
        type=Range(float, above=0, below=1),
        metavar="SHARE",
        help=f"with --embeddings: share of the groups to test on (default: {HELD_OUT})",
    )
    group.add_argument(
        "--seed",
        type=Range(int, at_least=0, below=2**32),
        default=0,
        help="with --embeddings: seed of the draw of these groups",
    )
    group.add_argument(
        "--allow_shared_groups",
        action="store_true",
        help="allow --train and --test to share groups, for splits that are separated on the ground and not by "
        "acquisition, such as the official ones of BigEarthNet v2",
    )
    group = parser.add_argument_group("methods")
    group.add_argument(
        "--method", nargs="+", choices=("knn", "linear"), default=["knn", "linear"], help="(default: both)"
    )
    group.add_argument(
        "--neighbours", type=positive_int, default=20, metavar="K", help="knn: training samples that vote"
    )
    group.add_argument(
        "--C", type=positive, default=PENALTY, help="linear: inverse strength of the L2 penalty, as in scikit-learn"
    )
    parser.add_argument("--output", metavar="JSON", help="file to write with all metrics, sizes and settings")
    return parser


def run(args):
    """Probes all encoders, prints the table and writes --output. Raises DataError."""
    held_out = HELD_OUT if args.held_out is None else args.held_out
    pairs, results = read_pairs(args, held_out), []
    for train, test in pairs:
        for method in dict.fromkeys(args.method):
            metrics, complaints = probe(train, test, method, args.neighbours, args.C)
            results.append({**describe(train, test), "method": method, **metrics})
            for k, complaint in complaints.items():
                print(
                    f"probe: warning: {train.path}: linear, class {test.classes[k]}: {complaint}; "
                    "a lower --C converges sooner",
                    file=sys.stderr,
                )
    classes = pairs[0][1].classes
    print_table(results, classes)
    if args.output:
        document = {
            "held_out": held_out if args.embeddings else None,
            "seed": args.seed if args.embeddings else None,
            "neighbours": args.neighbours,
            "temperature": TEMPERATURE,
            "C": args.C,
            "classes": classes,
            "results": results,
        }
        remedy = "the table above is complete, name another file"
        with writing(args.output, "--output", remedy):
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            write_json(args.output, document)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_checked(argv, check_flags)
    with parser.input_errors():
        run(args)


if __name__ == "__main__":
    main()
