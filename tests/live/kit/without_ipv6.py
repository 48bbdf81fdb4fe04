"""Become a command for which the kernel has no IPv6: socket(AF_INET6) ends with EAFNOSUPPORT, as after ipv6.disable=1.

A filter of seccomp(2) does it, for all its children too. No right is needed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys

SOCKET_CALL = {"x86_64": 41, "aarch64": 198}
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
ALLOW, ERRNO = 0x7FFF0000, 0x00050000  # linux/seccomp.h
NUMBER, FIRST_ARGUMENT = 0, 16  # offsets in struct seccomp_data


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def forbid() -> None:
    """Raises OSError where the kernel takes no filter."""
    steps = [
        (LOAD_WORD, 0, 0, NUMBER),
        (JUMP_IF_EQUAL, 0, 3, SOCKET_CALL[os.uname().machine]),
        (LOAD_WORD, 0, 0, FIRST_ARGUMENT),
        (JUMP_IF_EQUAL, 0, 1, socket.AF_INET6),
        (RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = Program(len(steps), ctypes.cast(code, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    no_rights = libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if no_rights or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    forbid()
    os.execvp(sys.argv[1], sys.argv[1:])
