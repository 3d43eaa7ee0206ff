"""Choose the tiles of tiles.json by what the compilers report.

    python -m memlib_kernels.tile_search                     print the table in short, as Markdown
    python -m memlib_kernels.tile_search --write [FILE …]    choose again, and write the table
    python -m memlib_kernels.tile_search --check [FILE …]    compile the table's rows again, say what changed

FILE: "norm" for the kernels of norm_kernel.py, and so on; all files without any.

The rule: the candidates of a case are compiled from the largest down, with all optional parts. The first that
spills no register, fits in shared memory and uses the best matrix instruction is taken. Only where no
candidate uses the best instruction, the next one may be used. Where every candidate has a problem, there is
no row, and torch computes rows of this width and wider ones. It takes about two hours of one core.

The table keeps the reports, the release of Triton that made them, and a checksum of each file of kernels that
they were made from. A file that changed needs `--check`, which stores its new checksum if no report changed,
or `--write`. The tests compile some rows of every kernel for every target.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from token import NAME, NUMBER, OP
from tokenize import generate_tokens
from typing import Any

import torch
import triton

from memlib_kernels.ahead_of_time import (
    LEAST_SIDE,
    SHARED_LIMIT,
    Report,
    allowed_products,
    compile_only,
    own_cache,
)
from memlib_kernels.case import Case, size
from memlib_kernels.cases import CASES
from memlib_kernels.roofline import markdown
from memlib_kernels.tiles import ANY, PATH, Tile, stored, table, tile_of, widest_row

Row = dict[str, Any]

FAR = 64  # bytes: on NVIDIA's GPUs a tile that spills more is not tried with fewer stages,
TOO_FAR = 2048  # and one that spills more than twice the registers of a thread not with twice the warps

STEP = 11  # between the rows of samples: no divisor of the number of any kernel's rows


def compiled_report(
    case: Case, width: int, target: str, dtype: torch.dtype, option: str, tile: Tile
) -> Report:
    """The report of a case's kernel with this tile, by its launch code."""
    with compile_only(target, tile, only=case.kernel) as compiled:
        case.start(width, dtype, option)
    (only,) = compiled
    return only.report()


def wanted(case: Case, target: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The matrix instructions that a case may use, the best first."""
    return allowed_products(target, dtype) if case.multiplies else ("none",)


def choose(
    case: Case, width: int, dtypes: tuple[torch.dtype, ...], target: str, narrower: Row | None = None
) -> list[Row]:
    """Rows of the first candidate that has no problem in any of these dtypes. No rows if none is left.

    narrower: the row of the next smaller width: neither is its tile exceeded, nor its instruction.
    """
    report = cache(partial(compiled_report, case, width, target))
    parts = [(dtype, option) for option in case.options for dtype in dtypes]
    tiles, products = case.tiles(target, width), wanted(case, target, dtypes[0])
    if narrower is not None and case.multiplies:
        tiles = [tile for tile in tiles if size(tile) <= size(tile_of(narrower))]
        products = products[
            products.index(next(iter(narrower["reports"].values()))["product"].split(" ")[0]) :
        ]
    for product in products:
        hopeless = set()
        for tile in tiles:
            shape = tile.n, tile.m, tile.warps
            if shape in hopeless or max(tile.n, tile.m) < LEAST_SIDE.get(product, 0):
                continue
            reports = (report(*part, tile) for part in parts)
            bad = next((found for found in reports if found.problems(target, (product,))), None)
            if bad is None:
                return [
                    {"kernel": case.kernel, "width": width, "dtype": name_of(dtype), "target": target}
                    | asdict(tile)
                    | {"reports": {option: report(dtype, option, tile).to_json() for option in case.options}}
                    for dtype in dtypes
                ]
            if bad.spills > FAR and target.startswith("sm_"):
                hopeless.add(shape)
            if bad.spills > TOO_FAR and target.startswith("sm_"):
                hopeless.add((tile.n, tile.m, 2 * tile.warps))
    return []


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write(files: Collection[str], path: Path = PATH) -> None:
    """Choose the rows of these files' kernels again, keep the others', and write the table."""
    order = [case.kernel for case in CASES]
    rows = [row for row in table() if file_of(row["kernel"]) not in files]
    for case in CASES:
        if file_of(case.kernel) not in files:
            continue
        for target in SHARED_LIMIT:
            for dtypes in case.dtypes:
                rows += rows_of_widths(case, dtypes, target)
    store(sorted(rows, key=lambda row: order.index(row["kernel"])), files, path)


def store(rows: list[Row], files: Collection[str], path: Path = PATH) -> None:
    """Write the table, a row a line, with the checksums that these files have now."""
    sums = checksums()
    head = {
        "triton": triton.__version__,
        "checksums": {name: sums[name] if name in files else stored()["checksums"][name] for name in sums},
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(head)[:-1]}, "tiles": [\n{lines}\n]}}\n')


def file_of(kernel: str) -> str:
    """The file of a kernel: "attention" of "attention_backward_keys"."""
    return next(name for name in checksums() if kernel.startswith(f"{name}_"))


@cache
def checksums() -> dict[str, str]:
    """Of each file of kernels, by its names, numbers and operators: without comments and strings."""
    found = {}
    for path in sorted(PATH.parent.glob("*_kernel.py")):
        with path.open() as file:
            tokens = [token for token in generate_tokens(file.readline) if token.type in (NAME, NUMBER, OP)]
        code = " ".join(token.string for token in tokens)
        found[path.stem.removesuffix("_kernel")] = sha256(code.encode()).hexdigest()[:16]
    return found


def rows_of_widths(case: Case, dtypes: tuple[torch.dtype, ...], target: str) -> list[Row]:
    """The rows of all widths, from the narrowest to the first that no tile serves."""
    rows: list[Row] = []
    for width in case.widths:
        chosen = choose(case, width, dtypes, target, rows[-1] if rows else None)
        print(case.kernel, width, dtypes, target, *map(tile_of, chosen[:1]), file=sys.stderr)
        if not chosen:
            break
        rows += chosen
    return rows


def samples(target: str) -> list[tuple[Row, str]]:
    """Rows and options that the tests compile: two of each kernel.

    Targets and kernels take turns, so that all targets together compile every option, width and dtype.
    """
    turn, found = list(SHARED_LIMIT).index(target), []
    for i, case in enumerate(CASES):
        rows = [row for row in table() if (row["kernel"], row["target"]) == (case.kernel, target)]
        for k in (2 * turn + i, 2 * turn + i + 1):
            found.append((rows[k * STEP % len(rows)], case.options[k % len(case.options)]))
    return found


def drift(row: Row, option: str) -> str:
    """What the compiler reports now that the row does not say, or an empty string."""
    case = next(case for case in CASES if case.kernel == row["kernel"])
    dtype = getattr(torch, row["dtype"])
    found = compiled_report(case, row["width"], row["target"], dtype, option, tile_of(row)).to_json()
    if found == row["reports"][option]:
        return ""
    where = ", ".join(str(row[key]) for key in ("kernel", "width", "dtype", "target"))
    return (
        f"{where}, {option}: {found}, and the table says {row['reports'][option]}. If a kernel or Triton has "
        f"changed: python -m memlib_kernels.tile_search --write {file_of(row['kernel'])}"
    )


def check(files: Collection[str]) -> list[str]:
    """`drift` of every row and option of these files' kernels. Without any, their checksums are stored."""
    rows = [row for row in table() if file_of(row["kernel"]) in files]
    changed = [found for row in rows for option in row["reports"] if (found := drift(row, option))]
    if not changed:
        store(table(), files)
    return changed


def summary() -> str:
    """The table in Markdown: what it holds, and of each kernel the widest rows up to 128, a target a column.

    A cell says n x m of the tile / warps / stages, the matrix instruction, and the most registers with any
    optional part.
    """
    reports = [report for row in table() for report in row["reports"].values()]
    spilled = sum(report["spills"] > 0 for report in reports)
    counts = f"{len(CASES)} kernels, {len(table()):,} rows, {len(reports):,} reports"
    lines = [["kernel", "width", "dtype", *SHARED_LIMIT], ["---"] * (3 + len(SHARED_LIMIT))]
    for case in CASES:
        width = max(width for width in case.widths if width <= 128)
        for dtypes in case.dtypes:
            key = case.kernel, width, name_of(dtypes[-1])
            cells = {
                row["target"]: cell(row)
                for row in table()
                if (row["kernel"], row["width"], row["dtype"]) == key
            }
            line = [cells.get(target, "torch") for target in SHARED_LIMIT]
            lines.append([case.kernel, "any" if width == ANY else str(width), key[2], *line])
    return f"{counts}, {spilled} with spilled registers.\n\n{markdown(lines)}"


def cell(row: Row) -> str:
    """A row in short."""
    reports = row["reports"].values()
    products = " ".join(sorted({report["product"].split(" ")[0] for report in reports}))
    registers = max(report["registers"] for report in reports)
    return f"{row['n']}x{row['m']}/{row['warps']}/{row['stages']} {products} {registers}".replace(" none", "")


def left_to_torch() -> str:
    """What has no clean tile, as a list in Markdown."""
    found: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for operation in dict.fromkeys(case.operation for case in CASES):
        cases = [case for case in CASES if case.operation == operation]
        for dtype in (name_of(dtype) for dtypes in cases[0].dtypes for dtype in dtypes):
            for target in SHARED_LIMIT:
                limit = widest_row(operation, dtype, target)
                if limit < max(max(case.widths) for case in cases):
                    found[operation, dtype, limit].append(target)
    return "\n".join(
        f"- `{operation}` of {dtype} wider than {limit} on {', '.join(targets)}"
        for (operation, dtype, limit), targets in found.items()
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Choose the tiles of kernels by what the compilers report.")
    parser.add_argument("--write", nargs="*", metavar="FILE", help="choose again and write tiles.json")
    parser.add_argument("--check", nargs="*", metavar="FILE", help="compile the rows and say what changed")
    given = parser.parse_args(arguments)
    files = (given.check or []) + (given.write or []) or list(checksums())
    unknown = sorted(set(files) - set(checksums()))
    if unknown:
        parser.error(f"no {unknown[0]}_kernel.py: the files of kernels are {', '.join(checksums())}")
    if given.check is not None:
        with own_cache():
            sys.exit("\n".join(check(files)) or None)
    if given.write is not None:
        with own_cache():
            write(files)
    else:
        print(summary(), left_to_torch(), sep="\n\n")


if __name__ == "__main__":
    main()
