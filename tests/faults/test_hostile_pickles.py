# SPDX-License-Identifier: MIT
"""Pickles made to do harm: each is refused without being run."""

import argparse
import codecs
import copyreg
import functools
import importlib
import io
import json
import marshal
import operator
import os
import pathlib
import pickle
import shutil
import subprocess
import tarfile
import timeit
import traceback
from collections import OrderedDict

import numpy as np
import pytest
import torch

from common.errors import UsageError
from tests.helpers import ROOT
from tests.helpers.damage import exported, kept, put, zip_of
from tests.helpers.inputs import CHECKPOINT_USES, USES
from tests.helpers.runs import is_refused
from util.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

CONFIG = json.dumps({"args": {}, "input": {}, "epoch": 0})


class Call:
    """Is pickled as a call, which is made where it is unpickled. more: further parts of what __reduce__ returns."""

    def __init__(self, function, *args, more=()):
        self.parts = function, args, *more

    def __reduce__(self):
        return self.parts

    def __call__(self):
        """Only so that pickle takes what a call gives for something that can be called."""


class Woken:
    """Acts when its state comes back."""

    def __init__(self, mark):
        self.mark = mark

    def __setstate__(self, state):
        os.mkdir(state["mark"])


class HostileTensor(torch.Tensor):
    __setstate__ = Woken.__setstate__


def hostile_tensor(mark):
    tensor = torch.ones(1).as_subclass(HostileTensor)
    tensor.mark = mark
    return tensor


def make_folder(mark):
    os.mkdir(mark)


def set_state(_, mark):
    os.mkdir(mark)


def python(mark):
    return f"__import__('os').mkdir({mark!r})"


def in_state(mark):
    namespace = argparse.Namespace()
    namespace.model = Call(os.mkdir, mark)
    return namespace


# name → mark → an object that makes the folder `mark` when it is unpickled
CALLS = {
    "os.mkdir": lambda mark: Call(os.mkdir, mark),
    "os.system": lambda mark: Call(os.system, f"mkdir '{mark}'"),
    "os.spawnvp": lambda mark: Call(os.spawnvp, os.P_WAIT, "mkdir", ["mkdir", mark]),
    "subprocess.call": lambda mark: Call(subprocess.call, ["mkdir", mark]),
    "subprocess.check_output": lambda mark: Call(subprocess.check_output, ["mkdir", mark]),
    "builtins.eval": lambda mark: Call(eval, python(mark)),
    "builtins.exec": lambda mark: Call(exec, python(mark)),
    "builtins.open": lambda mark: Call(open, mark, "w"),
    "builtins.getattr": lambda mark: Call(Call(getattr, Call(importlib.import_module, "os"), "mkdir"), mark),
    "functools.partial": lambda mark: Call(functools.partial(os.mkdir, mark)),
    "functools.reduce": lambda mark: Call(functools.reduce, os.makedirs, [mark, 0o777]),
    "operator.methodcaller": lambda mark: Call(operator.methodcaller("mkdir"), pathlib.PosixPath(mark)),
    "operator.attrgetter": lambda mark: Call(Call(operator.attrgetter("mkdir"), pathlib.PosixPath(mark))),
    "marshal.loads": lambda mark: Call(exec, Call(marshal.loads, marshal.dumps(compile(python(mark), "", "exec")))),
    "codecs.decode": lambda mark: Call(eval, Call(codecs.decode, codecs.encode(python(mark), "rot13"), "rot13")),
    "timeit.timeit": lambda mark: Call(timeit.timeit, python(mark), "pass", timeit.default_timer, 1),
    "shutil.copytree": lambda mark: Call(shutil.copytree, str(ROOT / "LICENSES"), mark),
    "pickle.loads": lambda mark: Call(pickle.loads, pickle.dumps(Call(os.mkdir, mark))),
    "torch.storage._load_from_bytes": lambda mark: Call(torch.storage._load_from_bytes, in_bytes(Call(os.mkdir, mark))),
    "torch._utils._rebuild_parameter": lambda mark: Call(
        torch._utils._rebuild_parameter, torch.ones(1), False, OrderedDict(a=Call(os.mkdir, mark))
    ),
    "torch._tensor._rebuild_from_type_v2": lambda mark: Call(
        torch._tensor._rebuild_from_type_v2, os.mkdir, torch.Tensor, (mark,), None
    ),
    "a subclass of Tensor": hostile_tensor,
    "a class with __setstate__": Woken,
    "a class without __reduce__ of its own": lambda mark: Call(
        copyreg._reconstructor, Woken, object, None, more=({"mark": mark},)
    ),
    "the state of a Namespace": in_state,
    "the items of a list": lambda mark: Call(list, more=(None, iter([Call(os.mkdir, mark)]))),
    "the items of a dict": lambda mark: Call(OrderedDict, more=(None, None, iter([("model", Call(os.mkdir, mark))]))),
    "a setter of state": lambda mark: Call(OrderedDict, more=(mark, None, None, set_state)),
    "an array of objects": lambda mark: np.array([Call(os.mkdir, mark)], object),
    "a function of this module": lambda mark: Call(make_folder, mark),
}


def in_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


# name → (call) → the object that is saved
PLACES = {
    "top": lambda call: call,
    "model": lambda call: {"model": {"w": torch.ones(1), "evil": call}},
    "args": lambda call: {"model": {"w": torch.ones(1)}, "args": argparse.Namespace(model=call)},
    "optimizer": lambda call: {"model": {}, "optimizer": {"state": {0: {"step": call}}, "param_groups": []}},
    "input": lambda call: {"model": {"w": torch.ones(1)}, "input": {"mean": [call]}},
    "a key": lambda call: {"model": {"w": torch.ones(1)}, "run": {call: 1}},
}


def torch_zip(path, pickled):
    """A file as torch.save makes it, with this pickle."""
    zip_of({"archive/data.pkl": pickled, "archive/byteorder": b"little", "archive/version": b"3\n"})(path)


def text_of(mark):
    return b"V" + mark.encode("raw-unicode-escape") + b"\n"


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def named(module, name):
    """A pickle of protocol 4, within a zip, that calls a function by names that need not exist here."""
    call = b"\x80\x04" + short(module) + short(name) + b"\x93"
    return lambda path, mark: torch_zip(path, call + short(mark) + b"\x85R.")


def with_inst(path, mark):
    put(b"(" + text_of(mark) + b"iposix\nmkdir\n.")(path)


def with_extension(path, mark):
    """A pickle that names a function by a number of the registry of extensions."""
    copyreg.add_extension("posix", "mkdir", 0x7E)
    try:
        put(pickle.dumps(Call(os.mkdir, mark), 2))(path)
    finally:
        copyreg.remove_extension("posix", "mkdir", 0x7E)


class WithPersistentId(pickle.Pickler):
    """Puts a call where PyTorch has the type and the place of a storage."""

    def persistent_id(self, value):
        return ("storage", value.call, "0", "cpu", 1) if isinstance(value, Persistent) else None


class Persistent:
    def __init__(self, call):
        self.call = call


def with_persistent_id(path, mark):
    with open(path, "wb") as file:
        WithPersistentId(file, 2).dump(Persistent(Call(os.mkdir, mark)))


def as_tar(path, mark):
    """The oldest format of PyTorch."""
    pickled = pickle.dumps(Call(os.mkdir, mark), 2)
    with tarfile.open(path, "w") as file:
        for name in ("pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled)
            file.addfile(info, io.BytesIO(pickled))


def npz(path, mark):
    np.savez(path.with_suffix(".npz"), model=np.array([Call(os.mkdir, mark)], object))
    path.with_suffix(".npz").rename(path)


def npy(path, mark):
    with open(path, "wb") as file:
        np.save(file, np.array([Call(os.mkdir, mark)], object), allow_pickle=True)


def saved(make):
    return lambda path, mark: torch.save(make(mark), path)


def saved_as_before(make):
    """In the format of torch before version 1.6."""
    return lambda path, mark: torch.save(make(mark), path, _use_new_zipfile_serialization=False)


def in_args(make):
    return lambda mark: {"model": {}, "args": make(mark)}


def in_place(place):
    return lambda mark: place(Call(os.mkdir, mark))


def with_protocol(number):
    return lambda path, mark: put(pickle.dumps({"model": Call(os.mkdir, mark)}, number))(path)


def in_zip(writer):
    """A file as torch.save makes it, whose pickle is what `writer` writes."""

    def write(path, mark):
        writer(path, mark)
        torch_zip(path, path.read_bytes())

    return write


# name → (path, mark) → None, writes a file that would make the folder `mark`
PICKLES = {
    **{f"{name}, zip": saved(in_args(make)) for name, make in CALLS.items()},
    **{f"{name}, legacy": saved_as_before(make) for name, make in CALLS.items()},
    **{f"in {name}, zip": saved(in_place(place)) for name, place in PLACES.items()},
    **{f"in {name}, legacy": saved_as_before(in_place(place)) for name, place in PLACES.items()},
    **{f"protocol {n}": with_protocol(n) for n in range(6)},
    **{f"protocol {n} within a zip": in_zip(with_protocol(n)) for n in range(6)},
    "INST": with_inst,
    "OBJ": lambda path, mark: put(b"(cposix\nmkdir\n" + text_of(mark) + b"o.")(path),
    "INST within a zip": in_zip(with_inst),
    "an extension": with_extension,
    "an extension within a zip": in_zip(with_extension),
    "a persistent id": in_zip(with_persistent_id),
    "a persistent id, plain": with_persistent_id,
    "a tar": as_tar,
    "an .npz": npz,
    "an .npy": npy,
    "an exported folder": lambda path, mark: exported(CONFIG, pickle.dumps(Call(os.mkdir, mark)))(path),
    "an exported folder with its config": lambda path, mark: exported(pickle.dumps(Call(os.mkdir, mark)))(path),
}
# By names that another system, another version, or a downloaded repository would have.
NAMES = """
    nt:system posix:system os:popen __builtin__:eval builtins:__import__ subprocess:Popen torch.hub:load torch:load
    torch.jit:load torch.package:PackageImporter numpy:load numpy.core.multiarray:_reconstruct numpy:fromfile
    argparse:_os.mkdir argparse:Namespace.__init__.__globals__ collections:OrderedDict.__class__ runpy:run_path
    types:FunctionType pty:spawn ctypes:CDLL webbrowser:open pdb:run code:interact logging.config:fileConfig
    _codecs:decode torch._utils:_import_dotted_name
""".split()
PICKLES |= {name.replace(":", "."): named(*name.split(":")) for name in NAMES}


def unpickled(path):
    """What PyTorch, pickle or NumPy makes of a file when nobody is careful: the control, without which a payload that never acts
    would count as refused. Only for files of this module, whose payload makes an empty folder.
    """
    for load in (
        lambda: torch.load(path, weights_only=False),
        lambda: pickle.loads(path.read_bytes()),
        lambda: np.load(path, allow_pickle=True)["model"],
        lambda: np.load(path, allow_pickle=True),
    ):
        try:
            load()
        except Exception:  # not of this kind, or it fails after the call was made
            continue


ALONE = ("protocol 0", "protocol 5", "INST", "OBJ", "an .npz", "an .npy")
SURE = [name for name in PICKLES if name.endswith((", zip", ", legacy")) or name in ALONE]


@pytest.mark.parametrize("case", SURE)
def test_a_hostile_pickle_is_one(case, tmp_path):
    PICKLES[case](tmp_path / "bad.pth", str(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()
    unpickled(tmp_path / "bad.pth")
    assert (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("case", PICKLES)
def test_hostile_pickles_are_refused_unrun(case, tmp_path, count):
    path, mark = tmp_path / "bad.pth", tmp_path / "ran"
    PICKLES[case](path, str(mark))
    try:
        outcome = load_checkpoint(path)
    except UsageError as error:
        outcome = str(error)
    except Exception:
        outcome = traceback.format_exc()
    good = isinstance(outcome, str) and len(outcome.splitlines()) == 1 and "bad.pth" in outcome and not mark.exists()
    assert count("hostile pickles refused", good), outcome
    assert "refused" in outcome or case != "os.mkdir, zip"


@pytest.mark.parametrize("use", CHECKPOINT_USES)
@pytest.mark.parametrize("case", ("os.mkdir, zip", "builtins.eval, legacy", "protocol 2", "an exported folder"))
def test_programs_refuse_hostile_pickles_unrun(case, use, base, start, tmp_path, count):
    path, mark = tmp_path / "bad.pth", tmp_path / "ran"
    PICKLES[case](path, str(mark))
    before = kept(tmp_path)
    result = start(CHECKPOINT_USES[use], data=base("v2"), out=tmp_path / "run", checkpoint=path)
    good = is_refused(result, "bad.pth") and kept(tmp_path) == before and not mark.exists()
    assert count("hostile pickles refused", good), result


@pytest.mark.parametrize("how", (npy, npz))
def test_images_of_objects_are_refused_unrun(how, base, start, tmp_path, count):
    shutil.copytree(base("floods"), tmp_path / "data")
    how(tmp_path / "data" / "images" / "0002" / "d1.npy", str(tmp_path / "ran"))
    result = start(USES["finetune floods"], data=tmp_path / "data", out=tmp_path / "run")
    good = is_refused(result, "0002/d1.npy", "pairs_train.csv:5") and not (tmp_path / "ran").exists()
    assert count("hostile pickles refused", good), result
