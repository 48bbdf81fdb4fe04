"""Who frees the library's objects: we do, in order, and never the garbage collector. Python 3.10.

An exception keeps the frames that it came through, and they keep their local variables, until the garbage collector
comes by. It may come by inside a callback of the library, which holds a lock then; freeing a builder takes the same
lock and waits for ever (seen with TensorRT-RTX 1.7.1). So frames are dropped where an error leaves the code that has
such objects in its variables.
"""

from __future__ import annotations


def drop_frames(error: BaseException) -> None:
    """Forget the frames of an error, and of those that led to it. Raise it anew by its name, not by a bare `raise`."""
    left: list[BaseException] = [error]
    seen: set[int] = set()
    while left:
        one = left.pop()
        if id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            left += [other for other in (one.__cause__, one.__context__) if other is not None]
