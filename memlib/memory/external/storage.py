"""A store on disk: a folder of immutable files, and a manifest that lists them.

    store.json                  options of the store; its files with sizes and checksums
    rows-000003.safetensors     rows added by save number 3: keys, values, chunks' means, by stream
    tables-000003.safetensors   serials, evictions, retrieval weights, sketches of encoders, indexes

A save writes new files, flushes them to disk, replaces the manifest atomically, then deletes files that the
new manifest does not list. A kill at any time leaves the old or the new manifest with all of its files.
Opening checks the size and SHA-256 of all files. Rows are then read from memory-mapped files when needed;
new rows stay in memory until the next save.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from memlib.config import IndexConfig
from memlib.files import write_bytes
from memlib.memory.external.columns import Shape
from memlib.memory.external.index import SearchIndex
from memlib.memory.external.store import Store, StoreError

FORMAT = "memlib-store-1"
MANIFEST = "store.json"
ROWS, TABLES = ("keys", "values", "means"), ("serial", "gone", "retrieved", "encoder")
MANY_PARTS = 16  # a stream with this many files is rewritten into one


def save_store(store: Store, folder: str | os.PathLike[str]) -> None:
    """Save to a new folder, or to the folder that the store was opened from or last saved to.

    In the latter case only new rows and the tables are written. Raises StoreError if the folder holds another
    store, or if another process has saved this store since.
    """
    target = Path(folder).resolve()
    target.mkdir(parents=True, exist_ok=True)
    known = store.saved[1] if store.saved and store.saved[0] == target else None
    check_unchanged(target, known)
    version = known["version"] + 1 if known else 1
    rows_file, tables_file = f"rows-{version:06d}.safetensors", f"tables-{version:06d}.safetensors"
    parts, rows = new_rows(store, rows_file, known is not None)
    named = {part["file"] for stream in parts.values() for part in stream} - {rows_file}
    described = {name: known["files"][name] for name in sorted(named)} if known else {}
    if rows:
        described[rows_file] = put(target / rows_file, rows)
    described[tables_file] = put(target / tables_file, tables(store))
    manifest = describe(store, version, parts, described)
    write_bytes(target / MANIFEST, json.dumps(manifest, indent=1).encode())
    for number, stream in store.streams.items():
        stream.parts = parts[number]
    store.saved = (target, manifest)
    for file in target.iterdir():
        if file.name.startswith(("rows-", "tables-", f"{MANIFEST}.")) and file.name not in described:
            file.unlink()


def open_store(folder: str | os.PathLike[str], index: IndexConfig | None = None) -> Store:
    """Open a saved store with memory-mapped rows; index: search options, the saved ones if None.

    Raises StoreError for a folder without a store and for any missing or changed file.
    """
    source = Path(folder).resolve()
    manifest = read_manifest(source)
    opened = {name: check_file(source / name, entry) for name, entry in manifest["files"].items()}
    store = Store(Shape(**manifest["shape"]), index or IndexConfig(**manifest["index"]))
    store.next_stream = manifest["next_stream"]
    (table,) = (tensors for name, tensors in opened.items() if name.startswith("tables-"))
    store.encoders = [table[f"encoder.{i}"] for i in range(manifest["encoders"])]
    for key, entry in manifest["streams"].items():
        stream = store.streams[int(key)] = store.empty()
        stream.length, stream.forgotten, stream.parts = entry["length"], entry["forgotten"], entry["parts"]
        for column in row_columns(store):
            mapped = [opened[part["file"]][f"{key}.{column}"] for part in entry["parts"] if part[column]]
            getattr(stream, column).map(mapped)
        for column in TABLES:
            getattr(stream, column).append(table.get(f"{key}.{column}", torch.empty(0)))
        stream.evicted = int((~stream.live).sum())
        if asdict(store.index) == manifest["index"]:
            stream.indexes = saved_indexes(store, table, key, entry["trained_on"])
    store.saved = (source, manifest)
    return store


def row_columns(store: Store) -> tuple[str, ...]:
    """Names of the row columns to save; without chunks, the means are the keys and are not saved."""
    return ROWS if store.shape.chunk > 1 else ROWS[:2]


def new_rows(
    store: Store, file: str, go_on: bool
) -> tuple[dict[int, list[dict[str, Any]]], dict[str, Tensor]]:
    """Each stream's parts after this save, and the rows for the new file."""
    parts, rows = {}, {}
    for number, stream in store.streams.items():
        old = stream.parts if go_on and len(stream.parts) < MANY_PARTS else []
        part: dict[str, Any] = {"file": file}
        for name in row_columns(store):
            column = getattr(stream, name)
            added = column.rows(sum(p[name] for p in old), len(column))
            part[name] = len(added)
            if len(added):
                rows[f"{number}.{name}"] = added.contiguous()
        parts[number] = [*old, part] if part["keys"] or part.get("means") else old
    return parts, rows


def tables(store: Store) -> dict[str, Tensor]:
    """The tensors of the tables file: one value per row, sketches, and indexes that are slow to build."""
    found = {f"encoder.{i}": sketch for i, sketch in enumerate(store.encoders)}
    for number, stream in store.streams.items():
        for name in TABLES:
            if len(stream.serial):
                found[f"{number}.{name}"] = getattr(stream, name).newest.contiguous()
        if store.index.kind != "flat":
            for head, index in enumerate(stream.indexes):
                found[f"{number}.index.{head}"] = torch.from_numpy(index.to_bytes())
    return found


def saved_indexes(store: Store, table: dict[str, Tensor], key: str, trained_on: int) -> list[SearchIndex]:
    """Load a stream's saved indexes, if any."""
    indexes = []
    for head in range(store.shape.heads):
        if f"{key}.index.{head}" in table:
            indexes.append(SearchIndex(store.index, store.shape.key_dim))
            indexes[-1].from_bytes(table[f"{key}.index.{head}"].numpy(), trained_on)
    return indexes


def describe(
    store: Store, version: int, parts: dict[int, list[dict[str, Any]]], files: dict[str, Any]
) -> dict[str, Any]:
    """Build the manifest, including its own checksum."""
    manifest = {
        "format": FORMAT,
        "version": version,
        "shape": asdict(store.shape),
        "index": asdict(store.index),
        "next_stream": store.next_stream,
        "encoders": len(store.encoders),
        "streams": {
            str(number): {
                "length": stream.length,
                "forgotten": stream.forgotten,
                "parts": parts[number],
                "trained_on": stream.indexes[0].trained_on if stream.indexes else 0,
            }
            for number, stream in store.streams.items()
        },
        "files": files,
    }
    return {**manifest, "sha256": seal(manifest)}


def seal(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def put(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write tensors to one file; returns its entry for the manifest."""
    data = to_safetensors(tensors)
    write_bytes(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        whole = manifest["format"] == FORMAT and manifest["sha256"] == seal(manifest)
    except FileNotFoundError:
        raise StoreError(
            f"{folder}: no store here ({MANIFEST} is missing); save one with save_store"
        ) from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise StoreError(f"{path}: damaged, or not a store ({FORMAT}); restore the folder from a copy")
    return manifest


def check_file(path: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    """Open a file's tensors, memory-mapped; raises StoreError unless size and checksum match."""
    remedy = "restore the folder from a copy"
    if not path.is_file():
        raise StoreError(f"{path}: missing; {remedy}")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise StoreError(f"{path}: {size} bytes, not {entry['bytes']}: truncated or extended; {remedy}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise StoreError(f"{path}: altered since it was saved (checksum); {remedy}")
    with safe_open(path, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def check_unchanged(folder: Path, known: dict[str, Any] | None) -> None:
    """Raise StoreError if saving would overwrite data that this store has not loaded."""
    if not (folder / MANIFEST).exists():
        return
    if known is None:
        raise StoreError(f"{folder}: holds a store; open it with open_store, or save to another folder")
    if read_manifest(folder)["sha256"] != known["sha256"]:
        raise StoreError(f"{folder}: saved by another process since it was opened; open it again")
