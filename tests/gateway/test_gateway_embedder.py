"""Embeddings by the node's real embedder: all-MiniLM-L6-v2 from the package index, taken up by a running agent."""

from __future__ import annotations

import base64
import subprocess
import sys

import httpx
import numpy as np
import pytest

from millhand.testing import millhand_agents

CONFIG = """
[http]
enabled = false
[gateway]
enabled = true
port = 0
[plugins.knowledge]
[knowledge]
pack = false
"""
TEXTS = ["The bearing runs hot.", "High temperature at the roller bearing.", "The invoice was paid in March."]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_node_s_own_embedder_answers(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    with millhand_agents(tmp_path) as start:
        agent = start(CONFIG)
        command = [sys.executable, "-m", "millhand", "-c", str(agent.config_path), "knowledge", "setup"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
        if "package index" in done.stderr:
            pytest.skip(f"the embedder cannot be had: {done.stderr.strip()[:200]}")
        assert done.returncode == 0 and "finds by meaning now" in done.stdout, done.stderr + done.stdout
        url = f"{agent.call('state')['gateway']}/v1/embeddings"

        def ask(**fields):
            return httpx.post(url, json={"model": "minilm", **fields}, trust_env=False, timeout=120)

        answer = ask(input=TEXTS).json()
        rows = np.array([row["embedding"] for row in answer["data"]])
        assert rows.shape == (3, 384) and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
        near, far = rows[0] @ rows[1], rows[0] @ rows[2]
        assert near > 0.5 > 0.3 > far, "texts that mean the same are nearer"
        alone = np.array(ask(input=TEXTS[0]).json()["data"][0]["embedding"])
        assert alone @ rows[0] > 0.98, "int8 scales are those of the whole request, so vectors differ a little"
        coded = ask(input=TEXTS[0], encoding_format="base64").json()["data"][0]["embedding"]
        assert np.allclose(np.frombuffer(base64.b64decode(coded), "<f4"), alone, atol=1e-6)
        assert ask(input="").status_code == 400 and ask(input="x", model="none").status_code == 404
