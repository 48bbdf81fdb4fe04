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
sys.path.insert(0, os.fspath(Path(__file__).parents[1] / "language" / "kit"))

from gateway_kit import MODEL, Site, until
from smollm_kit import smollm2

from millhand.serving.openai.tokens import add_token
from millhand.testing import millhand_agents

HERE = Path(__file__).parent


CONFIG = """
[models]
paths = ["{models}"]
[http]
enabled = false
[gateway]
port = 0
tokens_file = "{tokens}"
[language]
model = "smollm2"
context_tokens = 1024
slots = 2
threads = 1
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_openai_s_client_passes_with_a_real_model(tmp_path):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    python = environment(HERE / "requirements-openai.txt") / "python"
    model = tmp_path / "language" / "smollm2"
    model.mkdir(parents=True)
    (model / "model.gguf").symlink_to(smollm2())
    (model / "language.toml").write_text('format = "gguf"\nfile = "model.gguf"\ncontext_tokens = 2048\n')
    token = add_token(tmp_path / "tokens", "client", "operator")
    with millhand_agents(tmp_path) as start:
        agent = start(CONFIG.format(models=model.parent, tokens=tmp_path / "tokens"))
        agent.wait(lambda: agent.call("language.show")["state"] == "ready", "the language model", 240)
        url = agent.call("state")["gateway"]
        command = [python, HERE / "openai_conformance.py", "--url", url, "--model", "smollm2", "--token", token]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert {name: said for name, said in found.items() if said != "ok"} == {}
    assert {"chat", "chat_stream", "json_schema", "completions", "errors"} <= set(found)


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
