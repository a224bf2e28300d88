# SPDX-License-Identifier: MIT
"""What the programs of this package share: flags, one-line errors, exit statuses."""

import logging
import os
import sys
import traceback
from concurrent.futures.process import BrokenProcessPool

from common.command_line import Parser
from common.errors import DataError
from common.startup import missing_package
from common.workers import Crew


class Command(Parser):
    """The parser of a program that is started with `python -m`."""

    def __init__(self, module, description):
        super().__init__(description, module)


def add_workers_flag(group):
    group.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes of each MPI rank, or of the one machine; the files do not depend on it",
    )


def run_command(parser, work, argv=None):
    """Parse the flags and call work(args, crew). Bad input, a DataError or OSError, is one line and exit status 2.

    Every rank calls this; the rank an error happened on reports it.
    """
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: must be at least 1")
    try:
        crew = Crew.start(args.workers)
    except DataError as error:
        parser.error(str(error))
    logging.basicConfig(
        level=logging.INFO if crew.is_main else logging.WARNING, format="%(asctime)s %(message)s", datefmt="[%H:%M:%S]"
    )
    try:
        work(args, crew)
    except (DataError, OSError, BrokenProcessPool) as error:
        line, status = str(error), 2
        if isinstance(error, BrokenProcessPool):
            line, status = (
                "a worker process was killed, perhaps for want of memory; run again, with fewer --workers if so",
                1,
            )
        if getattr(error, "reported_by", crew.rank) == crew.rank:
            sys.stderr.write(f"{parser.prog}: error: {' '.join(line.split())}\n")
        sys.exit(status)
    except KeyboardInterrupt:
        sys.stderr.write(f"{parser.prog}: interrupted; run it again to go on\n")
        sys.exit(130)
    except Exception as error:
        line = missing_package(error)
        if line is None:
            traceback.print_exc()
        else:
            sys.stderr.write(f"{parser.prog}: error: {line}\n")
        crew.abort()
        sys.exit(1 if line is None else 2)
