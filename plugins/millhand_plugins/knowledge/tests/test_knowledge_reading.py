"""Files as passages: place and title of each, and what hostile files are told."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from millhand.errors import InputError
from millhand_plugins.knowledge.folders import files_of
from millhand_plugins.knowledge.reading import Piece, read_bytes, read_pieces
from millhand_plugins.knowledge.settings import KnowledgeConfig

CONFIG = KnowledgeConfig()


def pdf_of(contents: Sequence[bytes], filters: str = "") -> bytes:
    """A plain PDF with one content stream a page."""
    bodies = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    kids = []
    for content in contents:
        kids.append(f"{len(bodies) + 1} 0 R")
        bodies.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {len(bodies) + 2} 0 R "
            "/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>".encode()
        )
        bodies.append(f"<< /Length {len(content)} {filters} >>\nstream\n".encode() + content + b"\nendstream")
    bodies[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    table = f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n" + "".join(f"{place:010} 00000 n \n" for place in places)
    return data + f"{table}trailer << /Size {len(bodies) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF".encode()


def lines_of(*lines: str) -> bytes:
    shown = " T* ".join(f"({line}) Tj" for line in lines)
    return f"BT /F1 12 Tf 14 TL 50 700 Td {shown} ET".encode()


def pieces(path: Path, data: bytes, config: KnowledgeConfig = CONFIG) -> list[Piece]:
    path.write_bytes(data)
    return read_pieces(path, read_bytes(path, config), config)


def test_markdown_is_cut_at_headings_that_name_the_passages(tmp_path: Path) -> None:
    text = "# Pump\n\nFirst.\n\n## Seal\nSecond\nline.\n```\n# no heading\n```\n# Motor\nThird.\n"
    found = pieces(tmp_path / "a.md", text.encode())
    assert [(piece.title, piece.line) for piece in found] == [("Pump", 3), ("Pump > Seal", 6), ("Motor", 12)]
    assert "# no heading" in found[1].text


def test_passages_begin_at_their_line_and_no_text_is_lost(tmp_path: Path) -> None:
    lines = [f"line {number} of the manual" for number in range(1, 400)]
    found = pieces(tmp_path / "a.txt", "\n".join(lines).encode())
    assert len(found) > 10
    for piece in found:
        assert piece.text.splitlines()[0] == lines[piece.line - 1]
        assert len(piece.text) <= CONFIG.passage_characters
    assert "\n".join(piece.text for piece in found).splitlines() == lines


def test_a_line_of_ten_megabytes_is_cut_within_bounds(tmp_path: Path) -> None:
    found = pieces(tmp_path / "a.txt", b"word " * 2_000_000)
    assert max(len(piece.text) for piece in found) <= CONFIG.passage_characters
    assert {piece.line for piece in found} == {1}


def test_rows_of_a_parts_list_name_their_columns_and_lines(tmp_path: Path) -> None:
    data = 'number;text;stock\n6309-2RS;"bearing;\nsealed";4\n;;\nV-12;belt;\n'
    found = pieces(tmp_path / "parts.csv", data.encode())
    assert found[0].text == "number: 6309-2RS; text: bearing;\nsealed; stock: 4"
    assert [piece.line for piece in found] == [2, 5]


def test_pages_and_lines_of_a_pdf(tmp_path: Path) -> None:
    data = pdf_of([lines_of("Page one."), lines_of("Gearbox oil", "ISO VG 220")])
    found = pieces(tmp_path / "gearbox.pdf", data)
    assert [(piece.page, piece.line, piece.title) for piece in found] == [(1, 1, "gearbox"), (2, 1, "gearbox")]
    assert found[1].text.split("\n") == ["Gearbox oil", "ISO VG 220"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.pdf", b"%PDF-1.4\nnothing", "not a PDF that can be read"),
        ("b.pdf", b"\x00\xff" * 1000, "not a PDF that can be read"),
        ("c.pdf", pdf_of([b""]), "holds no text"),
        ("d.txt", b"caf\xe9", "not UTF-8 text: byte 3 is 0xe9"),
        ("e.txt", b"a\0b", "holds zero bytes"),
        ("f.txt", b" \n\t", "is empty"),
        ("g.docx", b"PK", r"'\.docx' is not a kind"),
        ("h.csv", b'a,b\n"x,1\n', "line 2"),
        ("i.csv", b"a,b\n" + b"x" * 2_000_000, "field limit|field larger"),
    ],
    ids=lambda value: value if isinstance(value, str) and value[1:2] == "." else "",
)
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pieces(tmp_path / name, data)
    assert caught.value.hint


def test_a_bomb_in_a_pdf_ends_its_reader_and_not_us(tmp_path: Path) -> None:
    squeezer = zlib.compressobj(9)
    bomb = b"".join(squeezer.compress(b" " * (1 << 20)) for _ in range(120)) + squeezer.flush()
    assert len(bomb) < 1_000_000
    with pytest.raises(InputError, match=r"bomb\.pdf"):
        pieces(tmp_path / "bomb.pdf", pdf_of([bomb], "/Filter /FlateDecode"))


def test_a_pdf_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    config = KnowledgeConfig(pdf_timeout_s=0.05)
    with pytest.raises(InputError, match=r"not read within 0\.05 s"):
        pieces(tmp_path / "slow.pdf", pdf_of([lines_of("x")]), config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (KnowledgeConfig(file_bytes_cap=1024), "at most 1,024 are read"),
        (KnowledgeConfig(text_characters_cap=1000), "more than 1,000 characters"),
    ],
    ids=["bytes", "characters"],
)
def test_what_is_too_large_is_refused(tmp_path: Path, config: KnowledgeConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pieces(tmp_path / "a.txt", b"x " * 1000, config)


def test_a_pdf_of_too_many_pages_is_refused(tmp_path: Path) -> None:
    data = pdf_of([lines_of("x")] * 3)
    with pytest.raises(InputError, match="has 3 pages, at most 2"):
        pieces(tmp_path / "a.pdf", data, KnowledgeConfig(pages_cap=2))


def test_links_out_of_the_folder_and_pipes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "manuals"
    (folder / "deep").mkdir(parents=True)
    (folder / "own.md").write_text("own")
    (folder / "deep" / "link.md").symlink_to(folder / "own.md")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "out.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "away").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.txt")
    _, files, refused = files_of(folder, 100)
    assert [file.name for file in files] == ["link.md", "own.md", "pipe.txt"]
    assert [file.name for file, _ in refused] == ["out.txt"]
    with pytest.raises(InputError, match="not a regular file"):
        read_bytes(folder / "pipe.txt", CONFIG)


def test_a_folder_without_files_or_with_too_many_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no file"):
        files_of(tmp_path, 2)
    for number in range(3):
        (tmp_path / f"{number}.md").write_text("x")
    with pytest.raises(InputError, match="more than 2 files"):
        files_of(tmp_path, 2)
    with pytest.raises(InputError, match="does not exist"):
        files_of(tmp_path / "nowhere", 2)
