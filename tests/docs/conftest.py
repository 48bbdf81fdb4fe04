"""Where the kits for pages' commands and for nodes lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path

for kit in ("docs", "images"):
    sys.path.insert(0, os.fspath(Path(__file__).parents[1] / kit / "kit"))
