"""Where the kits for packages and nodes lie, and that for the pages' commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))
sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "docs/kit"))
