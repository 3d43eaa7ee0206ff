"""Choose the tiles of tiles.json by what the compilers report.

    python -m memlib_kernels.tile_search                       print the table in short, as Markdown
    python -m memlib_kernels.tile_search --write [KERNEL …]    choose again, for all kernels or those named
    python -m memlib_kernels.tile_search --check               compile all again, say what changed

The rule: the candidates of a case are compiled from the largest down, at width 64 with all optional parts.
The first that spills no register, fits in shared memory and uses the best matrix instruction is taken. Only
where no candidate uses the best instruction, the next one may be used. It takes about an hour of one core.

The table keeps the reports. `--check` compiles all of them again; the tests compile every row, and the
optional parts for one width and dtype.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from memlib_kernels.ahead_of_time import SHARED_LIMIT, Report, allowed_products, compile_only, own_cache
from memlib_kernels.cases import CASES, Case
from memlib_kernels.roofline import markdown
from memlib_kernels.tiles import PATH, Tile, table

Row = dict[str, Any]

FAR = 64  # bytes: a tile that spills more is not tried with fewer stages


def compiled_report(
    case: Case, width: int, target: str, dtype: torch.dtype, option: str, tile: Tile | None = None
) -> Report:
    """The report of a case's kernel, by its launch code. tile: None for the table's."""
    with compile_only(target, tile, only=case.kernel) as compiled:
        case.start(width, dtype, option)
    (only,) = compiled
    return only.report()


def wanted(case: Case, target: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The matrix instructions that a case may use, the best first."""
    return allowed_products(target, dtype) if case.multiplies else ("none",)


def choose(case: Case, width: int, dtypes: tuple[torch.dtype, ...], target: str) -> list[Row]:
    """Rows of the first candidate that has no problem in any of these dtypes. LookupError if none is left."""
    report = cache(partial(compiled_report, case, width, target))
    options = case.parts(width)
    parts = [(dtype, option) for option in options for dtype in dtypes]
    for product in wanted(case, target, dtypes[0]):
        hopeless = set()
        for tile in case.tiles(target):
            shape = tile.n, tile.m, tile.warps
            if shape in hopeless:
                continue
            reports = (report(*part, tile) for part in parts)
            bad = next((found for found in reports if found.problems(target, (product,))), None)
            if bad is None:
                return [
                    {"kernel": case.kernel, "width": width, "dtype": name_of(dtype), "target": target}
                    | asdict(tile)
                    | {"reports": {option: report(dtype, option, tile).to_json() for option in options}}
                    for dtype in dtypes
                ]
            if bad.spills > FAR:
                hopeless.add(shape)
    raise LookupError(f"{case.kernel}, width {width}, {dtypes}, {target}: every candidate has a problem")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write(kernels: list[str], path: Path = PATH) -> None:
    """Choose the rows of these kernels again, keep the others', and write the table, a row a line."""
    rows = table()
    order = [case.kernel for case in CASES]
    for case in CASES:
        if case.kernel not in kernels:
            continue
        rows = [row for row in rows if row["kernel"] in order and row["kernel"] != case.kernel]
        for target in SHARED_LIMIT:
            for dtypes in case.dtypes:
                for width in case.widths:
                    rows += choose(case, width, dtypes, target)
                    print(json.dumps(rows[-1]), file=sys.stderr)
        rows.sort(key=lambda row: order.index(row["kernel"]))
        path.write_text('{"tiles": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n")


def samples(target: str) -> list[tuple[Row, str]]:
    """Rows and options that the tests compile: every row's first option, and all at width 64 in bfloat16."""
    return [
        (row, option)
        for row in table()
        if row["target"] == target
        for i, option in enumerate(row["reports"])
        if i == 0 or (row["width"], row["dtype"]) == (64, "bfloat16")
    ]


def drift(row: Row, option: str) -> str:
    """What the compiler reports now that the row does not say, or an empty string."""
    case = next(case for case in CASES if case.kernel == row["kernel"])
    dtype = getattr(torch, row["dtype"])
    found = compiled_report(case, row["width"], row["target"], dtype, option).to_json()
    if found == row["reports"][option]:
        return ""
    where = ", ".join(str(row[key]) for key in ("kernel", "width", "dtype", "target"))
    return (
        f"{where}, {option}: {found}, and the table says {row['reports'][option]}. If a kernel or Triton has "
        f"changed: python -m memlib_kernels.tile_search --write {row['kernel']}"
    )


def check() -> list[str]:
    """`drift` of every row and option."""
    return [found for row in table() for option in row["reports"] if (found := drift(row, option))]


def summary(width: int = 128) -> str:
    """One width of the table in Markdown: a kernel and dtype a row, a target a column.

    A cell says n x m of the tile / warps / stages, the matrix instruction, and the most registers with any
    optional part.
    """
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in table():
        if row["width"] == width:
            reports = row["reports"].values()
            products = " ".join(sorted({report["product"].split(" ")[0] for report in reports}))
            registers = max(report["registers"] for report in reports)
            tile = f"{row['n']}x{row['m']}/{row['warps']}/{row['stages']}"
            cells[row["kernel"], row["dtype"]][row["target"]] = f"{tile} {products} {registers}"
    lines = [["kernel", "dtype", *SHARED_LIMIT], ["---"] * (2 + len(SHARED_LIMIT))]
    for key, by_target in cells.items():
        lines.append([*key, *(by_target.get(target, "") for target in SHARED_LIMIT)])
    return markdown(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Choose the tiles of kernels by what the compilers report.")
    parser.add_argument("--write", nargs="*", metavar="KERNEL", help="choose again and write tiles.json")
    parser.add_argument("--check", action="store_true", help="compile all rows and say what changed")
    given = parser.parse_args(arguments)
    if given.check:
        with own_cache():
            changed = check()
        sys.exit("\n".join(changed) or None)
    if given.write is None:
        print(summary())
        return
    known = [case.kernel for case in CASES]
    unknown = sorted(set(given.write) - set(known))
    if unknown:
        parser.error(f"no case for {', '.join(unknown)}: cases.py has {', '.join(known)}")
    with own_cache():
        write(given.write or known)


if __name__ == "__main__":
    main()
