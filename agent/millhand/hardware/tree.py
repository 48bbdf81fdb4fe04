"""A file tree that facts are read from: the live `/`, or a recorded root that holds any subset of it."""

from __future__ import annotations

from pathlib import Path

FILE_BYTES_CAP = 4 << 20


class Tree:
    """Reads small files below a root. Whatever cannot be read is None: one missing file costs one fact."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.live = root == Path("/")

    def text(self, path: str) -> str | None:
        """The content of `path` (relative to the root) without surrounding white space or NUL, else None."""
        try:
            with self._locate(path).open("rb") as file:
                data = file.read(FILE_BYTES_CAP)
        except (OSError, ValueError):
            return None
        return data.decode("utf-8", "replace").strip("\0 \t\r\n")

    def number(self, path: str) -> int | None:
        """The content of `path` as a whole number, else None."""
        text = self.text(path)
        try:
            return int(text, 0) if text else None
        except ValueError:
            return None

    def glob(self, pattern: str) -> list[str]:
        """The paths that match, relative to the root, sorted by name with numbers in order."""
        try:
            found = [str(path.relative_to(self.root)) for path in self.root.glob(pattern)]
        except (OSError, ValueError):
            return []
        return sorted(found, key=lambda path: (len(path), path))

    def exists(self, path: str) -> bool:
        try:
            return self._locate(path).exists()
        except (OSError, ValueError):
            return False

    def _locate(self, path: str) -> Path:
        """Raises ValueError where a link of a recorded tree leads out of it: it must not show this machine's facts."""
        located = self.root / path
        if not self.live and not located.resolve().is_relative_to(self.root.resolve()):
            raise ValueError(path)
        return located
