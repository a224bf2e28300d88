# SPDX-License-Identifier: MIT
import common.startup  # noqa: F401 (first: puts the environment of programs right)
