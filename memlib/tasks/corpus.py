"""Load documents with the `datasets` library into one array of bytes; offline by default."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from memlib.config import TextConfig

if TYPE_CHECKING:
    from datasets import Dataset

SEPARATOR = 0
READERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


def read_corpus(config: TextConfig) -> np.ndarray:
    """Read the text into [t] uint8: UTF-8 bytes of all documents, each followed by byte 0; t <= max_bytes.

    Raises ValueError if the dataset is missing, cannot be read, lacks the text column or is empty.
    """
    path = Path(config.dataset).expanduser()
    with _datasets_settings(offline=not config.download):
        if config.dataset == "python-stdlib":
            parts = [_standard_library()]
        elif path.exists():
            parts = _local(path)
        elif path.suffix in READERS or config.dataset.startswith((".", "/", "~")):
            raise ValueError(f"task.text.dataset = {config.dataset!r}: no such file or folder")
        else:
            parts = [_hub(config)]
        joined = _join((text for part in parts for text in _column(part, config)), config.max_bytes)
    if not joined:
        raise ValueError(f"task.text.dataset = {config.dataset!r}: holds no text; choose another")
    return np.frombuffer(joined, dtype=np.uint8)


def _join(documents: Iterable[str | None], max_bytes: int) -> bytes:
    """Concatenate documents as bytes, each followed by the separator, up to max_bytes."""
    joined = bytearray()
    for document in documents:
        content = (document or "").encode(errors="replace").replace(b"\0", b"")
        if content:
            joined += content + bytes([SEPARATOR])
        if len(joined) >= max_bytes:
            joined[max_bytes - 1 :] = bytes([SEPARATOR])
            break
    return bytes(joined)


def _column(dataset: Dataset, config: TextConfig) -> Iterable[str | None]:
    if config.text_field not in dataset.column_names:
        raise ValueError(
            f"task.text.text_field = {config.text_field!r}: {config.dataset} has the columns "
            f"{', '.join(dataset.column_names)}; name one of them"
        )
    kind = getattr(dataset.features[config.text_field], "dtype", "a structure")
    if kind not in ("string", "large_string"):
        raise ValueError(
            f"task.text.text_field = {config.text_field!r}: holds {kind} in {config.dataset}, "
            "not text; name another column"
        )
    return dataset[config.text_field]


def _standard_library() -> Dataset:
    """The interpreter's own top-level modules, sorted by name: real text that needs no download."""
    from datasets import Dataset

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return Dataset.from_dict({"file": [file.name for file in files], "text": texts})


def _local(path: Path) -> list[Dataset]:
    """One dataset for each file type: of a file, or of all readable files in a folder, sorted by path."""
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    kinds: dict[str, list[str]] = {}
    for file in files:
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden and (kind := READERS.get(file.suffix.lower())):
            kinds.setdefault(kind, []).append(str(file))
    if not kinds:
        raise ValueError(
            f"task.text.dataset = {str(path)!r}: nothing to read; known are {', '.join(READERS)}"
        )
    readers = {
        "text": lambda names, **where: Dataset.from_text(
            names, sample_by="document", encoding_errors="replace", **where
        ),
        "json": Dataset.from_json,
        "csv": Dataset.from_csv,
        "parquet": Dataset.from_parquet,
    }
    try:
        with TemporaryDirectory() as scratch:
            return [
                readers[kind](names, cache_dir=scratch, keep_in_memory=True) for kind, names in kinds.items()
            ]
    except (DatasetsError, ValueError) as error:
        raise ValueError(
            f"task.text.dataset = {str(path)!r}: cannot be read; repair the file ({error.__cause__ or error})"
        ) from error


def _hub(config: TextConfig) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(config.dataset, config.subset, split=config.split)
    except (OSError, ValueError, DatasetsError) as error:
        missing = (
            "could not be fetched; check the name, subset, split and the connection"
            if config.download
            else "is not a local file, and this subset and split are not in the local cache of hub "
            "datasets; set task.text.download: true to fetch it, or use python-stdlib or a file"
        )
        raise ValueError(
            f"task.text.dataset = {config.dataset!r} (subset {config.subset}, "
            f"split {config.split}) {missing} ({error})"
        ) from error


@contextmanager
def _datasets_settings(offline: bool) -> Iterator[None]:
    """Temporarily disable progress bars and download counts, and the network if `offline`.

    The settings are global to the process, so they are restored on exit.
    """
    import datasets

    settings = {"HF_UPDATE_DOWNLOAD_COUNTS": False} | ({"HF_HUB_OFFLINE": True} if offline else {})
    before = {name: getattr(datasets.config, name) for name in settings}
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for name, value in settings.items():
        setattr(datasets.config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(datasets.config, name, value)
        if not bars:
            datasets.enable_progress_bars()
