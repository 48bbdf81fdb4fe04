"""What the images weigh: apparent sizes, counted in the built files.

`Dockerfile.x86`, built as `make test-images` builds it, on Ubuntu 24.04 from its own archive. The parts of NVIDIA's
base images are not in these figures, nor compression, which a registry adds. The budget is for the image without a
GPU's wheels, which are NVIDIA's libraries for the most part.

    sudo python benchmarks/image_size.py > benchmarks/results/image_size.json
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from figures import Figure, parser, progress, report

from millhand import __version__

ROOT = Path(__file__).parents[1]
sys.path.insert(0, os.fspath(ROOT / "edge_images"))

from millhand_images.engine import Engine, missing  # noqa: E402 - the builder is no part of the wheel

MEGABYTE = 1e6
BUDGET_MB = 500
"""What millhand and the system packages that it needs may add to a base."""
WHOLE, ENVIRONMENT = "", "opt/millhand"
VARIANTS = {"cpu": f"<= {BUDGET_MB}", "gpu": ""}


def bytes_below(folder: Path) -> int:
    """Apparent bytes of the regular files below a folder, each counted once however many names it has."""
    seen: dict[tuple[int, int], int] = {}
    for where, _, names in os.walk(folder):
        for name in names:
            found = Path(where, name).lstat()
            seen[found.st_dev, found.st_ino] = found.st_size
    return sum(seen.values())


def sizes(engine: Engine, image: str) -> dict[str, float]:
    """Megabytes of the whole image and of its environment."""
    with engine.mounted(image) as root:
        return {part: bytes_below(root / part) / MEGABYTE for part in (WHOLE, ENVIRONMENT)}


def main() -> int:
    """Build, count, print. Exits with 2 where images cannot be built."""
    parser(__doc__).parse_args()
    if missing():
        progress(missing())
        return 2
    engine = Engine(ROOT / "build/images")
    base = engine.base()
    base_mb = sizes(engine, base)[WHOLE]
    figures = [Figure("base, Ubuntu 24.04 by debootstrap (minbase)", round(base_mb, 1), "MB")]
    for variant, goal in VARIANTS.items():
        name = f"x86, {variant.upper()}"
        progress(name)
        tag = f"localhost/millhand-x86-{variant}:test"
        given = {"VARIANT": variant, "VERSION": __version__, "BASE_IMAGE": base}
        engine.build(ROOT / "Dockerfile.x86", given, tag)
        found = sizes(engine, tag)
        figures.append(Figure(f"{name}: the image", round(found[WHOLE], 1), "MB"))
        figures.append(Figure(f"{name}: the environment in /opt/millhand", round(found[ENVIRONMENT], 1), "MB"))
        added = round(found[WHOLE] - base_mb, 1)
        figures.append(Figure(f"{name}: added to the base", added, "MB", goal))
    return report("image_size", figures)


if __name__ == "__main__":
    sys.exit(main())
