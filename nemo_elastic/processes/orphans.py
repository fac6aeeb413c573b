"""A child process that ends when its parent does, also when the parent is killed and can tell nobody.

Linux only (`prctl(PR_SET_PDEATHSIG)`, man 2 prctl); elsewhere nothing is done.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent dies. To be called in the child, first thing.

    Args:
        parent: the process that started this one; if it is gone already, this one ends here.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(128 + signal.SIGKILL)
