"""The stack's test takes the queries from the compose files' test; a container's GPU is dressed as a node's is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [os.fspath(HERE), os.fspath(HERE.parent / "images/kit")]
