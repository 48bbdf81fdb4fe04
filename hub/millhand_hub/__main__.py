"""`python -m millhand_hub [--config hub.toml]`: the same as `millhand hub run`."""

from __future__ import annotations

import argparse
from pathlib import Path

from millhand.logs import configure_logs
from millhand_hub.receiver import run
from millhand_hub.settings import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m millhand_hub", description=__doc__)
    parser.add_argument("--config", type=Path, help="the hub's TOML file")
    settings = load_settings(parser.parse_args().config)
    configure_logs(settings.log)
    run(settings)


if __name__ == "__main__":
    main()
