"""Triton's own clients pass over every endpoint of a node."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conformance_kit import TOKEN
from environments import environment

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first run makes the environment
def test_triton_s_clients_pass(node):
    python = environment(HERE / "requirements-tritonclient.txt") / "python"
    command = [python, HERE / "tritonclient_conformance.py", "--http", node.http.removeprefix("http://")]
    command += ["--grpc", node.grpc, "--token", TOKEN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    wrong = {
        f"{client}: {name}": said
        for client, checks in found["clients"].items()
        for name, said in checks.items()
        if said not in ("ok", "-")
    }
    assert wrong == {}
    assert found["failed"] == 0
    assert len(found["clients"]) == 4
    assert found["checks"] >= 100
    assert node.agent.call("state")["ready"]
