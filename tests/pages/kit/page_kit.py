"""Pages in headless Chromium."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium is not installed (apt-get install chromium)"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
)  # fmt: skip


def laid_out_px(page: str, width_px: int, folder: Path) -> tuple[int, int]:
    """(width of what is laid out, width there is for it) of a page in a window of this width, in CSS pixels."""
    probe = "<script>document.title = document.documentElement.scrollWidth + '/' + innerWidth</script></body>"
    (folder / "page.html").write_text(page.replace("</body>", probe))
    frame = folder / "frame.html"  # headless windows are at least 500 pixels wide; a frame can be a phone's width
    frame.write_text(
        f'<iframe id="page" src="page.html" width="{width_px}" height="900"></iframe><script>'
        "document.getElementById('page').onload = event => "
        "{ document.body.append(event.target.contentDocument.title) }</script>"
    )
    run = subprocess.run(
        ["chromium", *FLAGS, f"--user-data-dir={folder}/profile", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = re.search(r"(\d+)/(\d+)", run.stdout.split("</iframe>")[1])
    assert found is not None, run.stdout
    return int(found[1]), int(found[2])
