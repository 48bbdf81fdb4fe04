"""Where the kit for pages lies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "pages" / "kit"))
