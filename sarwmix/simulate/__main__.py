# SPDX-License-Identifier: MIT
"""`python -m sarwmix.simulate` writes simulated patches."""

from sarwmix.simulate.patches import main

if __name__ == "__main__":
    main()
