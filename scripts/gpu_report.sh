#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Tests and measures the code on this machine's GPU: tests, a training that is killed and continued, finetuning, speed, memory,
# losses, a profile. Needs no data, no network and no set-up.
#   bash scripts/gpu_report.sh                      8 minutes, into output/gpu_report
#   bash scripts/gpu_report.sh --minutes 20 --out DIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m benchmarks.gpu_report "$@"
