"""What it costs to hold an artifact against its proof: time, resident memory, space on disk."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path

from figures import Figure, report

from millhand.proof import digest as digests
from millhand.proof.document import Latency, Proof
from millhand.proof.file import write_proof
from millhand.proof.keys import node_key
from millhand.proof.signature import Keyring, sign
from millhand.proof.verification import Subject, verify

ARTIFACT_BYTES = 256 << 20
RUNS = 20
LIBRARY = ("cryptography", "cffi", "pycparser")
MEMORY = """
import json, sys
from pathlib import Path
from millhand.proof.signature import Keyring
from millhand.proof.verification import Subject, verify
def resident():
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0] in ("RssAnon:", "RssFile:")}
folder, data = map(Path, sys.argv[1:])
subject = Subject(model="press", version=1, folder=folder, artifact="model.onnx", backend="onnxruntime")
verify(subject, Keyring())  # nobody is trusted, so no key is read: all but the library is there
before = resident()
assert verify(subject, Keyring(data)).state == "proved"
after = resident()
print(json.dumps({name: after[name] - before[name] for name in after}))
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder))


def measure(folder: Path) -> int:
    data, small, large = folder / "data", folder / "small", folder / "large"
    for place, size in ((small, 1 << 10), (large, ARTIFACT_BYTES)):
        place.mkdir()
        (place / "model.onnx").write_bytes(bytes(range(256)) * (size // 256))
    time.sleep(digests.SETTLED_NS / 1e9 + 0.1)  # a file that has just been written is never taken from the cache
    subjects = [
        Subject(model="press", version=1, folder=place, artifact="model.onnx", backend="onnxruntime")
        for place in (small, large)
    ]
    key, keyring = node_key(data), Keyring(data)
    digests._cache.clear()
    first_s = timed(subjects[1].digest)
    for subject in subjects:
        write_proof(subject.folder, sign(proof_of(subject), key, "node"))
    again_s = [timed(lambda: verify(subjects[1], keyring)) for _ in range(RUNS)]
    sign_s = [timed(lambda: sign(proof_of(subjects[0]), key, "node")) for _ in range(RUNS)]
    program = [sys.executable, "-c", MEMORY, str(small), str(data)]
    memory = json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    return report(
        "proof",
        [
            Figure("artifact of 256 MiB, first check", first_s * 1e3, "ms"),
            Figure("the same again, p50", statistics.median(again_s) * 1e3, "ms"),
            Figure("signing a proof, p50", statistics.median(sign_s) * 1e3, "ms"),
            Figure("memory after the first signature, anonymous", memory["RssAnon"] / 1e6, "MB"),
            Figure("memory after the first signature, file pages", memory["RssFile"] / 1e6, "MB"),
            Figure("cryptography and what it needs, on disk", installed_bytes() / 1e6, "MB"),
        ],
    )


def proof_of(subject: Subject) -> Proof:
    found = subject.digest()
    latency = tuple(
        Latency(batch=2**n, p50_ms=0.1, p99_ms=0.2, original_p50_ms=0.4, original_p99_ms=0.5) for n in range(4)
    )
    return Proof(
        model=subject.model, version=subject.version, target="cpu", artifact=subject.artifact, sha256=found,
        bytes=1, source_bytes=1, backend=subject.backend, executed=True, passed=True, latency=latency, date="",
    )  # fmt: skip


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def installed_bytes() -> int:
    """Of all files that the packages brought."""
    found = [Path(str(file.locate())) for package in LIBRARY for file in files(package) or ()]
    return sum(path.stat().st_size for path in found if path.exists())


if __name__ == "__main__":
    sys.exit(main())
