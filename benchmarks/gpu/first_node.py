"""A node with an NVIDIA GPU from bare to its first prediction on the card, by the offline bundle.

    sudo python benchmarks/gpu/first_node.py BUNDLE --key plant.public.pem

The node is the one that this runs on: as root, with NVIDIA's driver, CUDA 13 and cuDNN 9, without millhand. The bundle
is installed in a network namespace without a device, the node set up and checked, the agent started as its unit starts
it. Both shipped models of the rig must compute on the card alone, by their own load's count of nodes; NVML's list of
processes is shown. Then candidates of one are built and judged on the card, and the demo does its main job there.
At the end the package is purged.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from card import Card, Cards
from figures import Figure, parser, progress, report

INSTALL = Path(__file__).parents[2] / "agent/millhand/bundle/install.sh"
MILLHAND = "/usr/bin/millhand"
CONFIG, LOG = Path("/etc/millhand/millhand.toml"), Path("/tmp/agent.log")
MODELS = {"rig-fault": 44, "rig-wave": 2 * 2048}
"""Model -> values of a row."""
BUILT = "rig-wave"
CUDA = "CUDAExecutionProvider"
DEADLINE_S = 120.0
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
AGENT = ["setpriv", "--reuid=millhand", "--regid=millhand", "--init-groups", MILLHAND, "run"]


class Node:
    """This machine, its commands logged."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def run(self, *words: str, codes: tuple[int, ...] = (0,), text: str = "") -> str:
        """Run a command to its end; what it printed. Ends the script where it fails."""
        done = subprocess.run(words, input=text, capture_output=True, text=True, env=ENVIRONMENT, check=False)
        self.log += [f"# {' '.join(words)}", *done.stdout.splitlines(), *done.stderr.splitlines()]
        if done.returncode not in codes:
            raise SystemExit("\n".join([*self.log[-60:], f"ended with {done.returncode}"]))
        return done.stdout

    def millhand(self, *words: str, codes: tuple[int, ...] = (0,)) -> Any:
        """What `millhand --json …` says."""
        return json.loads(self.run(MILLHAND, "--json", *words, codes=codes))


def predict(model: str) -> str | None:
    """The label of a row that counts up; None while the model does not serve."""
    values = [round(i % 97 / 97, 3) for i in range(MODELS[model])]
    shape = [1, len(values)] if model == "rig-fault" else [1, 2, 2048]
    name = "features" if model == "rig-fault" else "waveform"
    request = {"inputs": [{"name": name, "datatype": "FP32", "shape": shape, "data": values}]}
    words = [MILLHAND, "--json", "predict", model, "--format", "json"]
    asked = json.dumps(request)
    done = subprocess.run(words, input=asked, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    return None if done.returncode else str(json.loads(done.stdout)["predictions"][0]["label"])


def first_label(model: str, agent: subprocess.Popen[bytes]) -> str:
    """Ask until there is an answer."""
    end = time.monotonic() + DEADLINE_S
    while (label := predict(model)) is None:
        if agent.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"'{model}' did not answer: {LOG.read_text()[-3000:]}")
        time.sleep(0.2)
    return label


def set_up(node: Node) -> None:
    """A node that serves the models, as a technician sets it up."""
    answers = Path("/tmp/answers.toml")
    answers.write_text('node = "press-7"\n')
    node.run(MILLHAND, "setup", "--answers", str(answers), "--no-check")
    with CONFIG.open("a") as file:
        file.write(f"\n[models]\nload = {json.dumps(list(MODELS))}\n\n[plugins.rig]\n\n[plugins.quantize]\n")
    node.run("install", "-d", "-o", "millhand", "-g", "millhand", "/run/millhand")


def on_card(node: Node, cards: Cards, agent: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What the agent and the driver say of the served models."""
    shown = {model: node.millhand("model", "show", model)["accelerator"] for model in MODELS}
    children = {child.pid for child in psutil.Process(agent.pid).children(recursive=True)}
    listed = cards.pids()
    return {
        "proofs": {model: next(iter(proof.values()), {}) for model, proof in shown.items()},
        "of_agent": sorted(children & set().union(*listed.values())) if listed else None,
    }


def arguments() -> argparse.Namespace:
    """The bundle and the key that it must be signed by."""
    found = parser(__doc__)
    found.add_argument("bundle", type=Path)
    found.add_argument("--key", type=Path, required=True, help="the plant's public key")
    return found.parse_args()


def main() -> int:
    given = arguments()
    if os.geteuid() != 0 or shutil.which("millhand", path=ENVIRONMENT["PATH"]):
        raise SystemExit("needs root on a node without millhand")
    node, card, cards = Node(), Card(True), Cards(True)
    before_mib = card.used_mib() or 0.0
    offline = ["unshare", "--net", "sh", str(INSTALL), str(given.bundle), "--key", str(given.key)]
    progress("what the bundle would change ...")
    node.run(*offline)
    progress("installing ...")
    began_s = time.monotonic()
    installed = node.run(*offline, "--yes")
    installed_s = time.monotonic() - began_s
    set_up(node)
    progress("checking ...")
    checked = node.millhand("check", codes=(0, 3, 4))
    check_s = time.monotonic() - began_s - installed_s
    begun_s = time.monotonic()
    with LOG.open("wb") as log:
        agent = subprocess.Popen(AGENT, env=ENVIRONMENT, stderr=log, stdout=log)
    try:
        labels = {model: first_label(model, agent) for model in MODELS}
        predicted_s = time.monotonic() - begun_s
        seen = on_card(node, cards, agent)
        served_mib = card.used_mib() or 0.0
        hardware, match = node.millhand("hw", "show"), node.millhand("profile", "match")
    finally:
        agent.terminate()
        code = agent.wait(60)
    cards.await_free(before_mib, 10.0)
    left_mib = (card.used_mib() or 0.0) - before_mib
    built = node.millhand("model", "build", BUILT)
    outcomes = Counter(outcome["state"] for outcome in built["outcomes"] if outcome["name"] != "original")
    demo = node.millhand("demo", "--output", "/tmp/millhand-demo")
    lost = demo["telemetry"]["lost"] + demo["telemetry"]["duplicates"]
    node.run("dpkg", "--purge", "millhand")
    on_cpu = sum(proof.get("nodes", 0) - proof.get("gpu_nodes", 0) for proof in seen["proofs"].values())
    proved = sum(proof.get("provider") == CUDA for proof in seen["proofs"].values())
    figures = [
        Figure("no millhand to the first predictions on the card", round(installed_s + predicted_s, 1), "s"),
        Figure("of that the install", round(installed_s, 1), "s"),
        Figure("millhand check", round(check_s, 1), "s"),
        Figure("errors of check", checked["errors"], "", "== 0"),
        Figure("models that compute on the card", proved, "", f"== {len(MODELS)}"),
        Figure("nodes of them that run on the CPU", on_cpu, "", "== 0"),
        Figure("memory with both models served", round(served_mib - before_mib), "MiB"),
        Figure("memory left when the agent has ended", round(left_mib, 1), "MiB", "<= 1"),
        Figure("exit code of the agent after SIGTERM", code, "", "== 0"),
        Figure(f"candidates of {BUILT} built and passed on the card", outcomes["passed"], ""),
        Figure(f"candidates of {BUILT} that failed their gate or proof", outcomes["failed"] + outcomes["refused"], ""),
        Figure(f"energy of an inference of {BUILT}, by NVML", round(built["own_proof"]["energy_mj"], 1), "mJ"),
        Figure("demo: answers produced", demo["telemetry"]["produced"], ""),
        Figure("demo: of them lost or doubled", lost, "", "== 0"),
        Figure("demo: reading to prediction, p99", demo["latency_ms"]["p99"], "ms"),
        Figure("the bundle", round(given.bundle.stat().st_size / 1e6, 1), "MB"),
    ]
    return report(
        "gpu_first_node",
        figures,
        device=card.facts,
        labels=labels,
        seen=seen,
        accelerators=[gpu["name"] for gpu in hardware["accelerators"]],
        problems=hardware["problems"],
        profile=match["profile"],
        findings=checked["findings"],
        installed=installed.splitlines(),
        built=built,
        demo={key: demo[key] for key in ("profile", "scale", "alerts", "telemetry", "latency_ms")},
    )


if __name__ == "__main__":
    sys.exit(main())
