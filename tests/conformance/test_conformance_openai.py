"""OpenAI's own client passes over the gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from environments import environment

sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "gateway" / "kit"))

from gateway_kit import MODEL, Site, until

from millhand.serving.openai.tokens import add_token

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first run makes the environment
def test_openai_s_client_passes(tmp_path):
    python = environment(HERE / "requirements-openai.txt") / "python"
    token = add_token(tmp_path / "tokens", "client", "operator")
    site = Site(tmp_path, tokens_file=tmp_path / "tokens").start()
    try:
        until(lambda: site.get("/health").status_code == 200)
        command = [python, HERE / "openai_conformance.py", "--url", site.url, "--model", MODEL, "--token", token]
        done = subprocess.run([*command, "--scripted"], capture_output=True, text=True, timeout=120, check=False)
    finally:
        site.stop()
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert {name: said for name, said in found.items() if said != "ok"} == {}
    assert len(found) >= 15
