"""What a node has recorded of one model's inputs: `<data_dir>/recorded/<model>.npz`. Python 3.10 (workshop)."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from millhand.errors import InputError

if TYPE_CHECKING:
    from millhand.serving.manifest import Manifest

FOLDER = "recorded"
WINDOW_END_NS, ASSET, SEEN, SOURCE = "@window_end_ns", "@asset", "@seen", "@source"
"""Members beside the inputs; no input's name is likely to begin like them."""


@dataclass(frozen=True)
class Recorded:
    """A uniform sample of the rows that the pipeline asked a model about. Rows lie in no order."""

    inputs: Mapping[str, NDArray[Any]]
    """Input name -> array with the batch first."""
    window_end_ns: NDArray[np.int64]
    """(rows,) the end of each row's window, nanoseconds since 1970."""
    assets: Sequence[str]
    """(rows,) the asset of each row."""
    seen: int
    """How many rows it is a sample of."""
    source: str
    """`source_of` the model.toml that made the rows; another one's rows are of another kind."""

    @property
    def rows(self) -> int:
        return len(self.window_end_ns)

    @classmethod
    def read(cls, path: Path) -> Recorded:
        """Raises InputError where the file is damaged, FileNotFoundError where there is none."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            found = cls(
                window_end_ns=np.asarray(arrays.pop(WINDOW_END_NS), np.int64),
                assets=[str(name) for name in arrays.pop(ASSET)],
                seen=int(arrays.pop(SEEN)),
                source=str(arrays.pop(SOURCE)),
                inputs=arrays,
            )
        except FileNotFoundError:
            raise
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"'{path}' cannot be read: {type(error).__name__}: {error}",
                hint="delete it ('millhand model recorded NAME --forget'); it fills again",
            ) from error
        if not arrays or {len(found.assets), *(len(array) for array in arrays.values())} != {found.rows}:
            raise InputError(f"'{path}' cannot be read: its arrays differ in length", hint="delete it; it fills again")
        return found

    def encode(self) -> bytes:
        """The file. `np.savez` would refuse an input called `file`."""
        facts = {WINDOW_END_NS: self.window_end_ns, ASSET: self.assets, SEEN: self.seen, SOURCE: self.source}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, array in {**self.inputs, **facts}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        return buffer.getvalue()

    def facts(self) -> dict[str, Any]:
        """What people want to know of it."""
        return {
            "rows": self.rows,
            "seen": self.seen,
            "bytes": sum(array.nbytes for array in self.inputs.values()),
            "since_ns": int(self.window_end_ns.min()) if self.rows else None,
            "until_ns": int(self.window_end_ns.max()) if self.rows else None,
            "assets": {name: self.assets.count(name) for name in sorted(set(self.assets))},
            "inputs": {name: list(array.shape[1:]) for name, array in self.inputs.items()},
        }


def recorded_path(data_dir: Path, model: str) -> Path:
    """Where a model's rows lie. Raises InputError for what is no model's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", model):
        raise InputError(f"'{model}' is no name of a model", hint="'millhand model list' shows them")
    return data_dir / FOLDER / f"{model}.npz"


def source_of(manifest: Manifest) -> str:
    """Changes with all that model.toml says of how an input comes about: inputs, window and features."""
    told = {
        "inputs": [(tensor.name, tensor.datatype, tensor.shape) for tensor in manifest.inputs],
        "window": manifest.window and manifest.window.model_dump(mode="json"),
        "features": manifest.features.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
