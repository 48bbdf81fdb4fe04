"""The node does what its OpenAPI document says, whatever it is asked: schemathesis over every operation."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conformance_kit import TOKEN
from environments import environment

HERE = Path(__file__).parent
# What fits the schema may still not fit the model, and bytes that are no JSON may be a tensor.
EXCLUDED = ("positive_data_acceptance", "negative_data_rejection", "object_level_authorization")
SECONDS = 45
OPERATIONS = 18


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)  # the first run makes the environment
def test_answers_are_as_the_openapi_document_says(node, tmp_path):
    command = [environment(HERE / "requirements-schemathesis.txt") / "st", "--config-file", HERE / "schemathesis.toml"]
    command += ["run", f"{node.http}/v2/openapi.json", "--phases", "examples,coverage,fuzzing"]
    command += ["--checks", "all", "--exclude-checks", ",".join(EXCLUDED), "--max-time", SECONDS, "--seed", 4]
    command += ["--continue-on-failure"]
    command += ["--header", f"Authorization: Bearer {TOKEN}", "--report-json-path", tmp_path / "report.json"]
    command += ["--generation-database", "none", "--no-color"]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=3 * SECONDS, check=False
    )
    print(done.stdout)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failures"] == [], done.stdout
    assert report["errors"] == []
    assert done.returncode == 0
    assert report["operations"]["tested"] == report["operations"]["total"] == OPERATIONS
    assert report["test_cases"]["generated"] > 500
    rates = report["valid_rates"]
    assert rates["POST /v2/models/{model}/infer"]["examples"]["accepted"] >= 10  # the document's own examples
    assert node.agent.call("state")["ready"]
