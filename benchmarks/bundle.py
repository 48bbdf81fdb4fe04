"""A bare Debian chroot to its first prediction, from an offline bundle alone: seconds and megabytes.

python benchmarks/bundle.py BUNDLE --key plant.public.pem [--base minbase.tar]

Needs root, and debootstrap where no --base is given. The chroot has a network namespace of its own, in which
no device is up.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from figures import Figure, parser, progress, report

INSTALL = Path(__file__).parents[1] / "agent/millhand/bundle/install.sh"
FEATURES = 44
CONFIG = """
[node]
id = "bare"
data_dir = "/var/lib/millhand"

[models]
load = ["rig-fault"]

[plugins.rig]
"""
ASK = f"""
export MILLHAND_CONFIG=/etc/millhand/millhand.toml
install -d -o millhand -g millhand /run/millhand
setpriv --reuid=millhand --regid=millhand --init-groups millhand run >/root/agent.log 2>&1 &
agent=$!
for try in $(seq 300); do
  seq -s, {FEATURES} | millhand predict rig-fault --format csv >/root/prediction 2>&1 && break
  sleep 0.2
done
cat /root/prediction
kill $agent
wait $agent
"""


def arguments() -> argparse.Namespace:
    found = parser(__doc__)
    found.add_argument("bundle", type=Path)
    found.add_argument("--key", type=Path, required=True, help="the plant's public key")
    found.add_argument("--base", type=Path, help="a tar of a minbase chroot, in place of debootstrap")
    return found.parse_args()


def bare(root: Path, base: Path | None) -> None:
    """Make the bare system."""
    if base is not None:
        root.mkdir()
        subprocess.run(["tar", "-xf", base, "-C", root], check=True)
    else:
        command = ["debootstrap", "--variant=minbase", "bookworm", str(root), "http://deb.debian.org/debian"]
        subprocess.run(command, check=True, capture_output=True)


def inside(root: Path, script: str) -> str:
    """Run a script in the chroot, without a network; what it printed."""
    mounts = f"mount -t proc proc {root}/proc && mount -t tmpfs tmpfs {root}/run && "
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c"]
    mounts += f'exec chroot {root} sh -ec "$1"'
    done = subprocess.run([*command, mounts, "sh", script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script[:60]} … ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def megabytes(root: Path) -> float:
    """What the chroot takes on disk, 10^6 bytes."""
    said = subprocess.run(["du", "-xs", "--block-size=1", root], capture_output=True, text=True, check=True).stdout
    return int(said.split()[0]) / 1e6


def main() -> int:
    given = arguments()
    with tempfile.TemporaryDirectory(prefix="millhand-bare-") as folder:
        root = Path(folder) / "root"
        progress("making a bare system ...")
        bare(root, given.base)
        shutil.copy(given.key, root / "root/plant.public.pem")
        shutil.copy(INSTALL, root / "root/install.sh")
        before = megabytes(root)
        shutil.copy(given.bundle, root / "root/node.bundle")
        progress("installing ...")
        began_s = time.monotonic()
        log = inside(root, "cd /root; sh install.sh node.bundle --key plant.public.pem --yes")
        installed_s = time.monotonic()
        (root / "etc/millhand/millhand.toml").write_text(CONFIG)
        answer = inside(root, ASK)
        predicted_s = time.monotonic()
        (root / "root/node.bundle").unlink()
        after = megabytes(root)
    figures = [
        Figure("bare chroot to first prediction", round(predicted_s - began_s, 1), "s", "<= 120"),
        Figure("of that the install", round(installed_s - began_s, 1), "s"),
        Figure("disk that it takes", round(after - before, 1), "MB", "<= 350"),
        Figure("the bundle", round(given.bundle.stat().st_size / 1e6, 1), "MB"),
    ]
    return report("bundle", figures, log=log.splitlines(), answer=answer.splitlines())


if __name__ == "__main__":
    raise SystemExit(main())
