#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Sets up everything the programs and the tests need, in .venv at the root of the checkout.
#   bash scripts/setup.sh                       everything
#   bash scripts/setup.sh --minimal             what pretraining and finetuning need, without root, MPI, GDAL, LMDB, Zarr and tests
#   bash scripts/setup.sh --keep_minimal        the same after a --minimal, else everything
#   PYTHON=python3.12 bash scripts/setup.sh     another interpreter (3.11 or newer)
# Can be run again: what exists and works is not changed. INSTALL.md explains each step. System packages are installed with
# apt-get, as root or with passwordless sudo. Open MPI and GDAL are optional: without them it warns and continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '3,/^set /{/^set /d;s/^# \{0,1\}//;p}' scripts/setup.sh; }
say() { printf '[setup] %s\n' "$*"; }
warn() { printf '[setup] warning: %s\n' "$*" >&2; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 2; }

minimal='' keep=''
for word in "$@"; do
    case "$word" in
        --minimal) minimal=yes ;;
        --keep_minimal) keep=yes ;;
        -h|--help) usage; exit 0 ;;
        *) die "$word: there is no such argument; see --help" ;;
    esac
done
PYTHON=${PYTHON:-python3}
VENV_PYTHON=.venv/bin/python
STAMP=.venv/.set-up-for

# Identify a finished set-up. Full: these two files, the interpreter, and the system's compiler, Open MPI and GDAL.
fingerprint() {
    { cat scripts/setup.sh requirements.txt; "$PYTHON" -VV; command -v g++ mpicc || true; mpirun --version || true
      gdal-config --version || true; } 2>/dev/null | sha256sum
}
minimal_fingerprint() { echo "minimal $(cat scripts/setup.sh pyproject.toml <("$PYTHON" -VV) | sha256sum)"; }
has() { command -v "$1" >/dev/null; }

command -v "$PYTHON" >/dev/null || die "no $PYTHON found; install Python 3.11 or newer, or set PYTHON=/path/to/python"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || die "$PYTHON is older than 3.11; install a newer Python, or set PYTHON=/path/to/python"

if [ -x "$VENV_PYTHON" ]; then
    found=$(cat $STAMP 2>/dev/null || true)
    if [ "$found" = "$(fingerprint)" ]; then exit 0; fi
    if [ -n "$keep" ] && [[ $found = minimal* ]]; then minimal=yes; fi
    if [ -n "$minimal" ] && [ "$found" = "$(minimal_fingerprint)" ]; then exit 0; fi
fi

# 1. System packages: Open MPI (mpirun, and headers for mpi4py), GDAL (headers for its Python binding), a compiler, venv.
missing=()
find_missing() {
    missing=()
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    if [ -n "$minimal" ]; then return; fi
    has mpirun || missing+=(openmpi-bin)
    has mpicc || missing+=(libopenmpi-dev)
    has gdal-config || missing+=(gdal-bin libgdal-dev)
    has g++ || missing+=(build-essential)
    "$PYTHON" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())' \
        || missing+=(python3-dev)
}
find_missing
failed=''      # if set, no stamp is written, so that another run tries again
if [ ${#missing[@]} -gt 0 ] && [ -z "$minimal" ] && has apt-get; then
    as_root=no
    if [ "$(id -u)" = 0 ]; then as_root=''; elif sudo -n true 2>/dev/null; then as_root='sudo -n'; fi
    if [ "$as_root" != no ]; then
        say "installing system packages: ${missing[*]}"
        # shellcheck disable=SC2086      # one word, or two, or none
        { $as_root apt-get update -qq && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null; } || failed=yes
        find_missing
    fi
fi
if [ ${#missing[@]} -gt 0 ]; then
    remedy="Ask an administrator for 'apt-get install ${missing[*]}', or take them from conda as INSTALL.md shows ('Conda')"
    [[ " ${missing[*]} " != *" python3-venv "* ]] || die "these system packages are missing: ${missing[*]}. $remedy"
    warn "these system packages are missing: ${missing[*]}. Pretraining and finetuning go without them; several ranks under mpirun need" \
        "Open MPI, the warping of SEN12-FLOOD images GDAL, --compile a compiler. $remedy"
fi

# 2. The virtual environment. A PyTorch that already works in the base interpreter (built for this machine's CUDA) is used.
torch_works() {  # an interpreter; torchvision's compiled operators load only beside the torch they were built for
    "$1" -W ignore -c 'import torch, torchvision; v = tuple(map(int, torch.__version__.split(".")[:2])); assert v >= (2, 10)
torchvision.ops.nms(torch.rand(1, 4), torch.rand(1), 0.5)' 2>/dev/null
}
if ! "$VENV_PYTHON" -c '' 2>/dev/null; then
    share=(); if torch_works "$PYTHON"; then share=(--system-site-packages); fi
    say "creating .venv with $("$PYTHON" -V)${share[0]:+, sharing the PyTorch installed with it}"
    "$PYTHON" -m venv --clear "${share[@]}" .venv
fi
pip() { "$VENV_PYTHON" -m pip --disable-pip-version-check "$@"; }

# 3. PyTorch and torchvision, always as a pair from one pip call.
if ! torch_works "$VENV_PYTHON"; then
    say "installing torch and torchvision (minutes, several GB for a CUDA build)"
    pip install -q --upgrade 'torch>=2.10' torchvision
    torch_works "$VENV_PYTHON" \
        || die "torch and torchvision do not load together after 'pip install torch torchvision'; install a matching pair into .venv by hand (INSTALL.md, 'PyTorch first') and run this again"
fi

# 4. The rest.
version="torch $("$VENV_PYTHON" -c 'import torch; print(torch.__version__)')"
if [ -n "$minimal" ]; then
    say "installing the dependencies of pyproject.toml"
    pip install -q -r <("$VENV_PYTHON" -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")')
    minimal_fingerprint > $STAMP
    say "done, the minimal set-up: $version"
    exit
fi

# 5. The full set-up. The wheel of mpi4py finds the system's Open MPI at run time, or else it is compiled against it;
#    GDAL's binding must have the version of the system's library, and is always compiled.
say "installing requirements.txt"
pip install -q -r requirements.txt
done=$version
if has mpirun; then
    mpi=$(mpirun --version | head -n 1) || true
    mpi4py_works() {  # with the MPI that mpirun is of
        "$VENV_PYTHON" -c 'import sys; from mpi4py import MPI; assert ("Open MPI" in MPI.Get_library_version()) == ("Open MPI" in sys.argv[1])' "$mpi" 2>/dev/null
    }
    if ! mpi4py_works; then pip install -q 'mpi4py>=4.0' || true; fi
    if ! mpi4py_works; then
        say "compiling mpi4py for $mpi"
        pip install -q --no-binary mpi4py --no-cache-dir --force-reinstall --no-deps 'mpi4py>=4.0' \
            || { warn "mpi4py could not be compiled, so data are prepared without mpirun; see INSTALL.md"; failed=yes; }
    fi
    done+=", $mpi"
fi
if has gdal-config; then
    gdal_version=$(gdal-config --version)
    if [ "$("$VENV_PYTHON" -W ignore -c 'from osgeo import gdal, gdal_array; print(gdal.__version__)' 2>/dev/null)" != "$gdal_version" ]; then
        say "compiling the GDAL $gdal_version binding"
        { pip install -q setuptools wheel && pip install -q --no-build-isolation --no-cache-dir --force-reinstall --no-deps "GDAL==$gdal_version"; } \
            || { warn "GDAL's binding could not be compiled, so SEN12-FLOOD images cannot be warped; see INSTALL.md"; failed=yes; }
    fi
    done+=", GDAL $gdal_version"
fi

if [ -z "$failed" ]; then fingerprint > $STAMP; fi
say "done: $done"
