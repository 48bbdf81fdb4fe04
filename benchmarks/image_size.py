"""What the images weigh: apparent sizes of every stage and of what lies in them, counted in the built files.

Built as `make test-images` builds them: on Ubuntu 24.04 from its own archive, without a GPU's wheels, for x86-64. The
parts of NVIDIA's base images are not in these figures, nor compression, which a registry adds.

    sudo python benchmarks/image_size.py > benchmarks/results/image_size.json
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from figures import Figure, parser, progress, report

ROOT = Path(__file__).parents[1]
sys.path.insert(0, os.fspath(ROOT / "edge_images"))

from millhand_images.engine import Engine, missing  # noqa: E402 - the builder is no part of the wheel

MEGABYTE = 1e6
IMAGES = {
    "x86, CPU": ("Dockerfile.x86", {"VARIANT": "cpu"}),
    "jetson's steps on x86-64": ("Dockerfile.jetson", {"LOCK": "amd64-python3.12"}),
}
BUDGET_MB = 500
"""What millhand and the system packages that it needs may add to a base."""
PARTS = ("opt/millhand", "usr", "var")


def bytes_below(folder: Path) -> int:
    """Apparent bytes of the regular files below a folder, each counted once however many names it has."""
    seen: dict[tuple[int, int], int] = {}
    for where, _, names in os.walk(folder):
        for name in names:
            found = Path(where, name).lstat()
            seen[found.st_dev, found.st_ino] = found.st_size
    return sum(seen.values())


def sizes(engine: Engine, image: str) -> dict[str, float]:
    """Part -> megabytes; `whole` is all of the image."""
    with engine.mounted(image) as root:
        found = {part: bytes_below(root / part) / MEGABYTE for part in PARTS}
        return {"whole": bytes_below(root) / MEGABYTE, **found}


def main() -> int:
    """Build, count, print. Exits with 2 where images cannot be built."""
    arguments = parser(__doc__).parse_args()
    del arguments
    if missing():
        progress(missing())
        return 2
    engine = Engine(ROOT / "build/images")
    base = engine.base()
    base_mb = sizes(engine, base)["whole"]
    figures = [Figure("base, Ubuntu 24.04 by debootstrap (minbase)", round(base_mb, 1), "MB")]
    for name, (dockerfile, given) in IMAGES.items():
        for stage in ("base", "build", "millhand"):
            progress(f"{dockerfile}, stage {stage}")
            tag = f"localhost/size-{stage}:test"
            engine.build(ROOT / dockerfile, {**given, "BASE_IMAGE": base}, tag, target=stage)
            found = sizes(engine, tag)
            figures.append(Figure(f"{name}: stage {stage}", round(found["whole"], 1), "MB"))
        figures.append(Figure(f"{name}: the environment in /opt/millhand", round(found["opt/millhand"], 1), "MB"))
        added = round(found["whole"] - base_mb, 1)
        figures.append(Figure(f"{name}: added to the base", added, "MB", f"<= {BUDGET_MB}"))
    return report("image_size", figures)


if __name__ == "__main__":
    sys.exit(main())
