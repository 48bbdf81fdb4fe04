"""From a bare Debian 12 to the first prediction, by the Debian package: seconds, and what it takes on disk.

    sudo python benchmarks/first_prediction.py [--package dist/millhand_0.1.0_amd64.deb]

Needs root and debootstrap. The chroot is debootstrap's minbase, with all that apt will ask for already in its cache.
Timed: apt-get installs package and python3.11 from there, `millhand setup`, the agent starts as its unit starts it,
and `millhand predict` answers. Without systemd: no unit is started by it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from figures import Figure, parser, progress, report

SECONDS_GOAL = "<= 120"
MEGABYTES_GOAL = "<= 350"
DEADLINE_S = 300.0
MODEL, FEATURES = "rig-fault", 44
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}


def run(root: Path, *words: str, text: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the chroot to its end."""
    command = ["chroot", str(root), *words]
    return subprocess.run(command, input=text, capture_output=True, text=True, env=ENVIRONMENT, check=check)


def bytes_used(root: Path) -> int:
    """Bytes that the files of one file system take on disk."""
    return int(subprocess.run(["du", "-sx", "-B1", root], capture_output=True, text=True, check=True).stdout.split()[0])


def bare(root: Path, package: Path) -> None:
    """Make the node, with all that apt will ask for in its cache."""
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root], check=True, stdout=subprocess.DEVNULL)
    for name in ("resolv.conf", "hosts"):
        shutil.copy(Path("/etc") / name, root / "etc" / name)
    subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], check=True)
    shutil.copy(package, root / "root/millhand.deb")
    run(root, "apt-get", "update", "-qq")
    run(root, *install("--download-only"))


def install(*options: str) -> list[str]:
    return ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *options, "/root/millhand.deb"]


def predict(root: Path) -> None:
    """Set up, start the agent as the user millhand, and ask the model until it answers."""
    (root / "root/answers.toml").write_text('node = "press-7"\n')
    run(root, "millhand", "setup", "--answers", "/root/answers.toml", "--no-check")
    with (root / "etc/millhand/millhand.toml").open("a") as file:
        file.write("\n[http]\nport = 0\n\n[plugins.rig]\n")
    run(root, "install", "-d", "-o", "millhand", "-g", "millhand", "/run/millhand")
    words = ["setpriv", "--reuid=millhand", "--regid=millhand", "--init-groups", "millhand", "run"]
    agent = subprocess.Popen(["chroot", root, *words], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        row = ",".join(map(str, range(1, FEATURES + 1)))
        end = time.monotonic() + DEADLINE_S
        while run(root, "millhand", "model", "load", MODEL, check=False).returncode:  # until the agent answers
            if time.monotonic() > end:
                raise SystemExit(f"{MODEL} was not loaded within {DEADLINE_S:g} s")
        while run(root, "millhand", "predict", MODEL, "--format", "csv", text=f"{row}\n", check=False).returncode:
            if time.monotonic() > end:
                raise SystemExit(f"{MODEL} did not answer within {DEADLINE_S:g} s")
    finally:
        agent.terminate()
        agent.wait(60)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--package", type=Path, default=next(iter(sorted(Path("dist").glob("*_amd64.deb"))), None))
    package = options.parse_args().package
    if os.geteuid() != 0 or shutil.which("debootstrap") is None or package is None:
        raise SystemExit("needs root, debootstrap (apt-get install debootstrap) and a package (make deb)")
    root = Path(tempfile.mkdtemp(prefix="millhand-node-"))
    root.chmod(0o755)  # the agent's user must be able to read it
    try:
        progress("a bare Debian 12 ...")
        bare(root, package)
        before = bytes_used(root)
        progress("install, set up, predict ...")
        begin = time.monotonic()
        run(root, *install())
        installed_s = time.monotonic() - begin
        predict(root)
        first_s = time.monotonic() - begin
        used = bytes_used(root) - before
    finally:
        subprocess.run(["umount", "--lazy", root / "proc"], check=False)
        shutil.rmtree(root, ignore_errors=True)
    figures = [
        Figure("installed after", round(installed_s, 1), "s"),
        Figure("first prediction after", round(first_s, 1), "s", SECONDS_GOAL),
        Figure("on disk, with Python", round(used / 1e6), "MB", MEGABYTES_GOAL),
        Figure("the package", round(package.stat().st_size / 1e6, 1), "MB"),
    ]
    return report("first_prediction", figures)


if __name__ == "__main__":
    raise SystemExit(main())
