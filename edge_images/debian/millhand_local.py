"""Packages that the owner lays beside the agent's own win over them: onnxruntime-gpu, a language server, plugins.

Read at each start of the agent's Python, by _millhand_local.pth.
"""

import os
import site
import sys

FOLDER = "/usr/local/lib/millhand/site-packages"

if os.path.isdir(FOLDER) and FOLDER not in sys.path:  # noqa: PTH112 - pathlib is no import for every start
    before = len(sys.path)
    site.addsitedir(FOLDER)
    added = sys.path[before:]
    del sys.path[before:]
    first = next((index for index, name in enumerate(sys.path) if name.endswith("-packages")), before)
    sys.path[first:first] = added
