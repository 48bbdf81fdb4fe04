"""The first process of each job: `python -m millhand.workshop.supervisor '<JSON>'`. Standard library only, Python 3.10.

It forks before anything heavy is imported; the child does the work, in native libraries that may hang or crash, and the
parent waits for it beside the caller's pipe. When the caller leaves, be it by kill -9, the pipe closes and the whole
process group ends, with whatever processes the libraries started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1
LIFELINE = 0
"""Standard input: a pipe that nobody writes to; its end means that the caller is gone."""
FIRST_TO_GO = "1000"
"""Where memory runs out the kernel takes these processes, not the agent (proc(5), oom_score_adj)."""


def main() -> None:
    """Entry point of the process, which leads a process group of its own."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _end_with(parent)
        _work()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the child; what it leaves behind ends with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _leave(_wait(child))


def _wait(child: int) -> int:
    """The child's wait status; ends the group where the caller leaves before."""
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(LIFELINE, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if ended in ready:
            return os.waitpid(child, 0)[1]
        if not os.read(LIFELINE, 1):
            os.killpg(0, signal.SIGKILL)


def _leave(status: int) -> None:
    """End as the child ended."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the child has written its own
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when the supervisor dies first."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123
        file.write(FIRST_TO_GO)


def _work() -> None:
    """Do the job. Standard output is for its lines alone: what libraries print there goes to standard error."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), LIFELINE)
    lines = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    from millhand.workshop.jobs import work

    status = work(sys.argv[1], lines)
    lines.close()
    sys.stderr.flush()
    os._exit(status)  # native libraries may hang or crash at the interpreter's end, when all is said


if __name__ == "__main__":
    main()
