"""The table `[plugins.knowledge]`."""

from __future__ import annotations

from pydantic import Field

from millhand.validation import StrictTable


class KnowledgeConfig(StrictTable):
    file_bytes_cap: int = Field(default=64 << 20, ge=1024)
    """A larger file is refused."""
    files_cap: int = Field(default=5000, ge=1)
    """A folder with more files is refused."""
    pages_cap: int = Field(default=2000, ge=1)
    """A PDF with more pages is refused."""
    text_characters_cap: int = Field(default=20_000_000, ge=1000)
    """A file with more text is refused."""
    passages_cap: int = Field(default=50_000, ge=1)
    """Passages of all sources together; each takes about 4 KB on disk and 1.5 KB of memory."""
    passage_characters: int = Field(default=700, ge=100, le=4000)
    """How long a passage may become; the embedder reads about 1000 characters."""
    pdf_timeout_s: float = Field(default=120, gt=0)
    """A PDF that takes longer to read is refused."""
    pdf_memory_bytes_cap: int = Field(default=1 << 30, ge=256 << 20)
    """Address space of the process that reads a PDF."""
