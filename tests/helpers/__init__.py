# SPDX-License-Identifier: MIT
"""What several test files need."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
