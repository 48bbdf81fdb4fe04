"""Files as passages: Markdown, text, CSV and PDF, each passage with the page and line it begins at.

A file comes from anywhere: it is size-capped before it is read, refused where it is not what its name says, and a PDF
is opened in a process of its own.
"""

from __future__ import annotations

import csv
import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from millhand.errors import InputError
from millhand_plugins.knowledge.pdf import pdf_pages
from millhand_plugins.knowledge.settings import KnowledgeConfig

MARKDOWN, TEXT, TABLE, PDF = (".md", ".markdown"), (".txt", ".text", ".log"), (".csv", ".tsv"), (".pdf",)
SUFFIXES = (*MARKDOWN, *TEXT, *TABLE, *PDF)
DELIMITERS = ",;\t|"
FIELD_CHARACTERS_CAP = 1_000_000
TITLE_CHARACTERS_CAP = 200
HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*\s*$")


@dataclass(frozen=True)
class Piece:
    """One passage of a file, before it is stored."""

    text: str
    title: str = ""
    page: int = 0
    line: int = 0


def read_bytes(path: Path, config: KnowledgeConfig) -> bytes:
    """The whole of a regular file. Raises InputError naming the file and the remedy."""
    try:
        # A pipe or a device could block for ever; what is opened is what is looked at.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(number, "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise InputError(f"'{path}' is not a regular file", hint="give a file or a folder")
            data = file.read(config.file_bytes_cap + 1)
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}", hint="check path and permissions") from error
    if len(data) > config.file_bytes_cap:
        raise InputError(
            f"'{path}' has {about.st_size:,} bytes, at most {config.file_bytes_cap:,} are read",
            hint="split it, or raise [plugins.knowledge] file_bytes_cap",
        )
    return data


def read_pieces(path: Path, data: bytes, config: KnowledgeConfig) -> list[Piece]:
    """What a file says, in passages. Raises InputError where it cannot be read as what its name says."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"'{path}': '{suffix}' is not a kind of file that is read", hint=f"known: {', '.join(SUFFIXES)}"
        )
    if not data.strip(b"\0\t\n\r \xef\xbb\xbf"):
        raise InputError(f"'{path}' is empty", hint="give a file with text")
    if suffix in PDF:
        found = _of_pdf(path, data, config)
    else:
        text = _decode(path, data)
        if len(text) > config.text_characters_cap:
            raise _too_long(path, config)
        if suffix in TABLE:
            found = _of_table(path, text, config)
        else:
            found = _of_lines(text.splitlines(), config.passage_characters, markdown=suffix in MARKDOWN)
    pieces = list(found)
    if not pieces:
        raise InputError(f"'{path}' holds no text", hint="a scan needs text recognition (OCR) first")
    return pieces


def pieces_of_text(text: str, config: KnowledgeConfig) -> list[Piece]:
    """A text that is no file, such as a past order."""
    return list(_of_lines(text.splitlines(), config.passage_characters))


def _decode(path: Path, data: bytes) -> str:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"'{path}' is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}",
            hint="save it as UTF-8, for example: iconv -f cp1252 -t utf-8",
        ) from error
    if "\0" in text:
        raise InputError(f"'{path}' is not text: it holds zero bytes", hint="give Markdown, text, CSV or PDF")
    return text


def _too_long(path: Path, config: KnowledgeConfig) -> InputError:
    return InputError(
        f"'{path}' has more than {config.text_characters_cap:,} characters of text",
        hint="split it, or raise [plugins.knowledge] text_characters_cap",
    )


# ---- lines ----------------------------------------------------------------------------------------------------------


def _of_lines(
    lines: list[str], size: int, *, page: int = 0, title: str = "", markdown: bool = False
) -> Iterator[Piece]:
    """Paragraphs, packed until a passage is full; a heading begins a new one and names it."""
    headings: list[str] = []
    held: list[str] = []
    begun, characters, fenced = 0, 0, False

    def close() -> Iterator[Piece]:
        for text in _split("\n".join(held).strip(), size):
            yield Piece(text, (" > ".join(headings) or title)[:TITLE_CHARACTERS_CAP], page, begun)

    for number, line in enumerate(lines, 1):
        fenced ^= markdown and line.lstrip().startswith("```")
        heading = HEADING.match(line[:1000]) if markdown and not fenced else None
        long_enough = not line.strip() and characters > size * 2 // 3
        if heading or long_enough or characters + len(line) > size:
            yield from close()
            held, characters = [], 0
        if heading:
            headings[len(heading[1]) - 1 :] = [heading[2]]
        elif line.strip() or held:
            begun = begun if held else number
            held.append(line.rstrip())
            characters += len(held[-1]) + 1
    yield from close()


def _split(text: str, size: int) -> Iterator[str]:
    """Cut a text that is one long line, at a space where there is one."""
    begin = 0
    while begin < len(text):
        end = begin + size
        if end < len(text):
            space = text.rfind(" ", begin + size // 2, end)
            end = end if space < 0 else space
        if part := text[begin:end].strip():
            yield part
        begin = end


# ---- tables ---------------------------------------------------------------------------------------------------------


def _of_table(path: Path, text: str, config: KnowledgeConfig) -> Iterator[Piece]:
    """A passage for each row, `column: value` each; the first line names the columns."""
    first = text.split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=first.count)
    csv.field_size_limit(FIELD_CHARACTERS_CAP)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        columns = [name.strip() for name in next(reader, [])]
        line = reader.line_num + 1
        for row in reader:
            cells = [
                f"{columns[at] if at < len(columns) and columns[at] else f'column {at + 1}'}: {cell.strip()}"
                for at, cell in enumerate(row)
                if cell.strip()
            ]
            for part in _split("; ".join(cells), config.passage_characters):
                yield Piece(part, path.stem[:TITLE_CHARACTERS_CAP], 0, line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"'{path}', line {line}: {error}", hint="mend the row, or its quotes") from error


# ---- PDF ------------------------------------------------------------------------------------------------------------


def _of_pdf(path: Path, data: bytes, config: KnowledgeConfig) -> Iterator[Piece]:
    characters = 0
    for number, text in pdf_pages(path, data, config):
        characters += len(text)
        if characters > config.text_characters_cap:
            raise _too_long(path, config)
        yield from _of_lines(text.splitlines(), config.passage_characters, page=number, title=path.stem)
