"""`python -m millhand_hub [--config hub.toml]`: the same as `millhand hub run`."""

from __future__ import annotations

import argparse

from millhand.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m millhand_hub", description="Run the central hub.")
    parser.add_argument("--config", help="the hub's TOML file")
    config = parser.parse_args().config
    main(["hub", "run", *(["--hub-config", config] if config else [])])
