"""Choose the tiles of tiles.json by what the compilers report.

    python -m memlib_kernels.tile_search                       print the table in short, as Markdown
    python -m memlib_kernels.tile_search --write [KERNEL …]    choose again, for all kernels or those named

The rule: the candidates of a case are compiled from the largest down, with all optional parts. The first that
spills no register, fits in shared memory and uses the best matrix instruction is taken. The table keeps the
reports, and the tests compare them with what is compiled then.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memlib_kernels.ahead_of_time import SHARED_LIMIT, Report, allowed_products, compile_only, own_cache
from memlib_kernels.cases import CASES, Case
from memlib_kernels.tiles import PATH, Tile, table

Row = dict[str, Any]


def compiled_report(
    case: Case, width: int, dtype: torch.dtype, target: str, option: str, tile: Tile | None = None
) -> Report:
    """The report of a case's kernel, by its launch code. tile: None for the table's."""
    with compile_only(target, tile, only=case.kernel) as compiled:
        case.start(width, dtype, option)
    (only,) = compiled
    return only.report()


def wanted(case: Case, target: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The matrix instructions that a case may use, the best first."""
    return allowed_products(target, dtype) if case.multiplies else ("none",)


def choose(case: Case, width: int, dtype: torch.dtype, target: str) -> Row:
    """The row of the first candidate without a problem. Raises LookupError if none is left."""
    seen: dict[tuple[Tile, str], Report] = {}
    for product in wanted(case, target, dtype):
        for tile in case.tiles(target):
            reports = {}
            for option in case.options:
                if (tile, option) not in seen:
                    seen[tile, option] = compiled_report(case, width, dtype, target, option, tile)
                if seen[tile, option].problems(target, (product,)):
                    break
                reports[option] = seen[tile, option].to_json()
            else:
                where = {"kernel": case.kernel, "width": width, "dtype": name_of(dtype), "target": target}
                return where | asdict(tile) | {"reports": reports}
    raise LookupError(f"{case.kernel}, width {width}, {dtype}, {target}: every candidate has a problem")


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
            for dtype in case.dtypes:
                for width in case.widths:
                    rows.append(choose(case, width, dtype, target))
                    print(json.dumps(rows[-1]), file=sys.stderr)
        rows.sort(key=lambda row: order.index(row["kernel"]))
        path.write_text('{"tiles": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n")


def summary() -> str:
    """The table in Markdown: for each kernel, target and dtype the tiles n x m / warps / stages by width."""
    cells: dict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    products: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for row in table():
        key = row["kernel"], row["target"], row["dtype"]
        cells[key][row["width"]] = f"{row['n']}x{row['m']}/{row['warps']}/{row['stages']}"
        products[key].update(report["product"] for report in row["reports"].values())
    widths = sorted({width for by_width in cells.values() for width in by_width})
    lines = [["kernel", "target", "dtype", "product", *map(str, widths)]]
    lines.append(["---"] * len(lines[0]))
    for key, by_width in cells.items():
        named = ", ".join(sorted(products[key]))
        lines.append([*key, named, *(by_width.get(width, "") for width in widths)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Choose the tiles of kernels by what the compilers report.")
    parser.add_argument("--write", nargs="*", metavar="KERNEL", help="choose again and write tiles.json")
    given = parser.parse_args(arguments)
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
