"""Open data sets with the `datasets` library: local files, or a hub data set; offline by default.

`field` in these functions is the configuration's path, for error messages: "task.text".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

READERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


class Source(Protocol):
    """The options that say which data set is read."""

    dataset: str
    subset: str | None
    split: str
    download: bool


def open_dataset(source: Source, field: str) -> list[Dataset]:
    """Load a data set: one part for each file type of a folder, else one part.

    Raises ValueError if it is missing or cannot be read.
    """
    path = local_path(source, field)
    with datasets_settings(offline=not source.download):
        return _local(path, field) if path else [_hub(source, field)]


def open_stream(source: Source, field: str) -> IterableDataset:
    """Open a data set for reading in order, without loading it.

    Raises ValueError if it is missing or cannot be read, or if a folder holds files of several types.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = local_path(source, field)
    if path is None:
        if not source.download:
            raise ValueError(
                f"{field}.dataset = {source.dataset!r}: is not a local file, and a streamed hub dataset is "
                f"fetched while it is read; set {field}.download: true, or {field}.streaming: false to "
                "search the local cache of hub datasets"
            )
        return _hub(source, field, streaming=True)
    kinds = _files(path, field)
    if len(kinds) > 1:
        raise ValueError(
            f"{field}.dataset = {str(path)!r}: holds files of the types {', '.join(kinds)}, but a stream has "
            f"one type; name a folder with one, or set {field}.streaming: false"
        )
    ((kind, names),) = kinds.items()
    options = {"sample_by": "document", "encoding_errors": "replace"} if kind == "text" else {}
    try:
        with datasets_settings(offline=True):
            return load_dataset(kind, data_files=names, split="train", streaming=True, **options)
    except (OSError, ValueError, DatasetsError) as error:
        raise unreadable(source.dataset, field, error) from error


def local_path(source: Source, field: str) -> Path | None:
    """The local file or folder that a source names, or None for a hub dataset.

    Raises ValueError for what looks like a local path but does not exist.
    """
    path = Path(source.dataset).expanduser()
    if path.exists():
        return path
    if path.suffix in READERS or source.dataset.startswith((".", "/", "~")):
        raise ValueError(f"{field}.dataset = {source.dataset!r}: no such file or folder")
    return None


def unreadable(dataset: str, field: str, error: Exception) -> ValueError:
    """The error for a data set that is there but damaged."""
    return ValueError(
        f"{field}.dataset = {dataset!r}: cannot be read; repair the file or the connection "
        f"({error.__cause__ or error})"
    )


def _files(path: Path, field: str) -> dict[str, list[str]]:
    """The readable files of a path by type, sorted by path; raises ValueError if there are none."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    kinds: dict[str, list[str]] = {}
    for file in files:
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden and (kind := READERS.get(file.suffix.lower())):
            kinds.setdefault(kind, []).append(str(file))
    if not kinds:
        raise ValueError(f"{field}.dataset = {str(path)!r}: nothing to read; known are {', '.join(READERS)}")
    return kinds


def _local(path: Path, field: str) -> list[Dataset]:
    """One dataset for each file type: of a file, or of all readable files in a folder."""
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    readers = {
        "text": lambda names, **where: Dataset.from_text(
            names, sample_by="document", encoding_errors="replace", **where
        ),
        "json": Dataset.from_json,
        "csv": Dataset.from_csv,
        "parquet": Dataset.from_parquet,
    }
    kinds = _files(path, field)
    try:
        with TemporaryDirectory() as scratch:
            return [
                readers[kind](names, cache_dir=scratch, keep_in_memory=True) for kind, names in kinds.items()
            ]
    except (DatasetsError, ValueError) as error:
        raise unreadable(str(path), field, error) from error


def _hub(source: Source, field: str, streaming: bool = False) -> Dataset | IterableDataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(source.dataset, source.subset, split=source.split, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        missing = (
            "could not be fetched; check the name, subset, split and the connection"
            if source.download
            else "is not a local file, and this subset and split are not in the local cache of hub "
            f"datasets; set {field}.download: true to fetch it, or use a local file"
        )
        raise ValueError(
            f"{field}.dataset = {source.dataset!r} (subset {source.subset}, split {source.split}) {missing} "
            f"({error})"
        ) from error


@contextmanager
def datasets_settings(offline: bool) -> Iterator[None]:
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
