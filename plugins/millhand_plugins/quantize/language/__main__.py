"""The command: a GGUF file in, one on a 4-bit grid out, and what that costs in perplexity."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from millhand.errors import InputError, MillhandError
from millhand_plugins.quantize.grid import Grid, affine, symmetric
from millhand_plugins.quantize.language.blocks import round_annealed, round_nearest
from millhand_plugins.quantize.language.gguf_file import BLOCK, TYPES, GgufFile, Rounded
from millhand_plugins.quantize.language.net import gguf_rows, load
from millhand_plugins.quantize.language.text import batches, perplexity, read_text, windows
from millhand_plugins.quantize.rounding import Annealing

HELD_SHARE = 4
"""One window of so many is held out, to judge."""


@dataclass(frozen=True)
class Report:
    """Perplexity on held-out windows."""

    original: float
    nearest: float
    annealed: float

    @property
    def recovered(self) -> float | None:
        """Share of the loss of rounding to nearest that learned rounding takes back; None where nothing was lost."""
        lost = self.nearest - self.original
        return (self.nearest - self.annealed) / lost if lost > 0 else None


def make_grid(kind: str, weights: object) -> Grid:
    """The grid of a GGUF type for weights [outputs, inputs] (a torch tensor)."""
    import torch

    make = {"q4_0": symmetric, "q4_1": affine}[kind]
    return make(weights, 4, BLOCK, half=True, xp=torch)


def quantize(
    source: Path, target: Path | None, text: str, kind: str, device: str, schedule: Annealing, rows: int
) -> Report:
    """Round `source` onto the grid of `kind`, write `target`, and measure. Raises MillhandError."""
    file = GgufFile(source)
    model, tokenizer = load(source, device)
    found = windows(tokenizer, text)
    held, calibration = found[::HELD_SHARE], found[[n for n in range(len(found)) if n % HELD_SHARE]][:rows]
    if not len(calibration):
        raise InputError(f"the text has {len(found)} windows of {found.shape[1]} tokens", hint="give a longer text")
    judged, parts = batches(held, device), batches(calibration, device)
    original = perplexity(model, judged)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    round_nearest(model, lambda weights: make_grid(kind, weights))
    nearest = perplexity(model, judged)
    model.load_state_dict(kept)
    changed: dict[str, Rounded] = {}
    steps = round_annealed(model, parts, lambda weights: make_grid(kind, weights), schedule, show)
    for name, integers, grid in steps:
        short = name.split(".")[2]
        in_order = [gguf_rows(model, short, values).cpu().numpy() for values in (integers, grid.scale, grid.offset)]
        stored = Grid(in_order[1], in_order[2], grid.low, grid.high, grid.block)
        changed[name] = Rounded(in_order[0], stored, kind)
    annealed = perplexity(model, judged)
    if target is not None:
        file.write(target, changed)
    return Report(original, nearest, annealed)


def show(share: float, step: str) -> None:
    """Progress, one line that is written over on a terminal."""
    if sys.stderr.isatty():
        click.echo(f"\r{100 * share:5.1f} %  {step:<40}", nl=share >= 1, err=True)


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--text", required=True, type=click.Path(path_type=Path), help="UTF-8 text like what it will read.")
@click.option("--kind", default="q4_0", type=click.Choice(TYPES), help="GGUF's 4-bit grid.")
@click.option("--device", default="cpu", help="cpu, or cuda.")
@click.option("--steps", default=1000, type=click.IntRange(1), help="Steps of the annealing for each matrix.")
@click.option("--rows", default=128, type=click.IntRange(1), help="Windows of 512 tokens to calibrate on, at most.")
def main(source: Path, target: Path, text: Path, kind: str, device: str, steps: int, rows: int) -> None:
    """Round SOURCE, a GGUF file of float16, float32 or 8 bits, and write it to TARGET."""
    try:
        report = quantize(source, target, read_text(text), kind, device, Annealing(steps=steps), rows)
    except MillhandError as error:
        click.echo(f"Error: {error.message}\nTry: {error.hint}", err=True)
        raise SystemExit(1) from error
    click.echo(
        f"perplexity {report.original:.3f}, rounded to nearest {report.nearest:.3f}, "
        f"learned rounding {report.annealed:.3f}"
    )
    click.echo(json.dumps({**asdict(report), "recovered": report.recovered}))


if __name__ == "__main__":
    main()
