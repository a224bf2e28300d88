#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# A complete account of the code on this machine's GPU: its tests, a training that is killed and continued, finetuning, speed,
# memory, losses, a profile. Needs no data and no network, and sets nothing up.
#   bash scripts/gpu_report.sh                      8 minutes, into output/gpu_report
#   bash scripts/gpu_report.sh --minutes 20 --out DIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m benchmarks.gpu_report "$@"
