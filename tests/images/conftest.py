"""Where the kits for packages and nodes lie."""
"""What the tests of images and bundles share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).parent / "kit"))
for _folder in (Path(__file__).parent / "kit", Path(__file__).parents[2] / "edge_images"):
    sys.path.insert(0, os.fspath(_folder))
