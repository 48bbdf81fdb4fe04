"""The commands that a page shows, and whether what they print is what the page says.

A block that starts with ```console holds commands, each after a prompt: `$ ` runs as anybody, `# ` as root. What
follows a command is what it prints: each line must come, in this order; `...` stands for anything, alone on a line for
lines. A backslash at a line's end goes on. Every block runs on a node that the page sets up, from its top to its
end; `console here` runs on the machine of the test as well, `console jetson` only on a node dressed as one. A comment
`<!-- file: PATH -->` above a block says that its text lies in that file then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

FENCE = re.compile(r"^```(.*)$")
FILE = re.compile(r"^<!-- file: (\S+) -->$")
PROMPT = re.compile(r"^([$#]) (.*)$")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass
class Block:
    """A fenced block; `file` is where its text belongs, if it belongs anywhere."""

    page: str
    line: int
    info: str
    text: list[str] = field(default_factory=list)
    file: str = ""

    @property
    def place(self) -> str:
        """`here`, `node`, or nothing where the block holds no commands."""
        words = self.info.split()
        return "" if not words or words[0] != "console" else (words[1] if len(words) > 1 else "node")


@dataclass
class Command:
    """One command of a page and what it shall print."""

    page: str
    line: int
    text: str
    output: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text}"

    def missing(self, printed: str) -> str:
        """The first line of the page's output that did not come in its order; empty where all came."""
        lines = iter([line.rstrip() for line in printed.splitlines()])
        for wanted in self.output:
            if wanted.strip() == "...":
                continue
            pattern = re.compile(".*".join(map(re.escape, wanted.rstrip().split("..."))))
            if not any(pattern.fullmatch(line) for line in lines):
                return wanted
        return ""


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    found: list[Block] = []
    inside, file = False, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if fence and not inside:
            found.append(Block(page.name, number, fence[1].strip(), file=file))
            inside = True
        elif fence:
            inside, file = False, ""
        elif inside:
            found[-1].text.append(line)
        elif line:
            named = FILE.match(line)
            file = named[1] if named else ""
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a block. Raises ValueError where text stands before the first prompt."""
    found: list[Command] = []
    goes_on = False
    for number, line in enumerate(block.text, block.line + 1):
        prompt = PROMPT.match(line)
        if goes_on:
            found[-1].text += "\n" + line
        elif prompt:
            found.append(Command(block.page, number, prompt[2]))
        elif found:
            found[-1].output.append(line)
        else:
            raise ValueError(f"{block.page}:{number}: output before any command: {line}")
        goes_on = line.endswith("\\") and (goes_on or prompt is not None)
    return found


def inline(page: Path) -> list[str]:
    """The inline code of a page, outside of blocks."""
    prose: list[str] = []
    inside = False
    for line in page.read_text().splitlines():
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            prose.append(line)
    return INLINE.findall("\n".join(prose))
