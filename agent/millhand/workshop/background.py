"""The command line at the lowest priority, no longer than the agent lives that started it.

`python -m millhand.workshop.background PID WORDS`: PID is the agent's, WORDS are those of `millhand`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

NICE_LAST = 19
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Entry point of the process. What it starts inherits the priority."""
    import psutil

    from millhand.cli import main as millhand

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the agent is gone")
    os.nice(NICE_LAST)
    with contextlib.suppress(OSError, psutil.Error):  # some containers forbid it
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    millhand(sys.argv[2:])


if __name__ == "__main__":
    main()
