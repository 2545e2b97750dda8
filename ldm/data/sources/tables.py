"""Metadata files: tables of picture paths and captions, as people and other programs write them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.captions import SampleError, json_of, spoken
from ldm.data.sources.item import Reject
from ldm.errors import ConfigError
from ldm.text import reading

PATH_COLUMNS = ("file_name", "filename", "path", "image_path", "file", "image")
CAPTION_COLUMNS = ("caption", "text", "TEXT", "title", "prompt")
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_LONGEST = 1 << 24  # characters of a cell; csv's own limit is 131,072
_MOST_LINES = 1000  # that a quoted cell of a .tsv goes over


@dataclass
class Table:
    """The captions of a metadata file by the paths it names, and the rows that could not be used."""

    captions: dict[str, str] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)


Row = tuple[str, dict[str, Any] | SampleError]  # (line 7, column -> cell, or why it has none)


def read_table(path: Path) -> Table:
    """A metadata file; ConfigError for a file that cannot be read or names none of the known columns.

    A row that cannot be used (unreadable json, other columns than the first line's, a caption that is no text, a
    picture that has a caption already) is a Reject that names the line. A row without a caption says nothing.
    """
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise ConfigError(f"{path}: captions come as .jsonl, .csv, .tsv or .parquet.")
    if suffix == ".parquet":
        rows = list(_parquet(path))
    else:
        lines = reading.lines(reading.read_text(path, "").rstrip("\r\n"))
        rows = list({".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv}[suffix](lines, path))
    columns = list(dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row))
    where = next((name for name in PATH_COLUMNS if name in columns), None)
    what = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if where is None or what is None:
        named = ", ".join(str(name) for name in columns[:20]) or "none"
        bad = next((f" ({line}: {row})" for line, row in rows if isinstance(row, SampleError)), "")
        raise ConfigError(
            f"{path} has the columns {named}{bad}; it needs one of {', '.join(PATH_COLUMNS)} and one"
            f" of {', '.join(CAPTION_COLUMNS)}."
        )
    table = Table()
    for line, row in rows:
        try:
            _enter(table, row, where, what)
        except SampleError as error:
            table.rejects.append(Reject(reading.printable(f"{path.name}, {line}"), error.reason, str(error)))
    return table


def _enter(table: Table, row: dict[str, Any] | SampleError, where: str, what: str) -> None:
    if isinstance(row, SampleError):
        raise row
    name, caption = row.get(where), spoken(row.get(what), what)
    if not isinstance(name, str) or not name.strip():
        raise SampleError("row without a path", f"{where} holds no path: {str(name)[:40]!r}")
    if not caption:
        return
    if table.captions.setdefault(name, caption) != caption:
        raise SampleError("second caption of a picture", f"{name} has a caption already; the first counts")


def _jsonl(lines: Sequence[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"line {number}", json_of(line)
            except SampleError as error:
                yield f"line {number}", error


def _csv(lines: Sequence[str], path: Path) -> Iterator[Row]:
    """RFC 4180. A quotation mark in the wrong place moves the ends of all later rows: that is an error of the file."""
    csv.field_size_limit(max(_LONGEST, csv.field_size_limit()))
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    header: list[str] | None = None
    first = 1
    try:
        for cells in reader:
            if any(cells) and header is None:
                header = _header(cells, path)
            elif any(cells) and header is not None:
                yield f"line {first}", _row(cells, header)
            first = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(
            f"{path}, lines {first} to {reader.line_num}: {error}. A cell that holds a comma, a line break or begins"
            ' with a quotation mark stands in quotation marks, those inside it doubled: "a ""lamp"", lit".'
        ) from None


def _tsv(lines: Sequence[str], path: Path) -> Iterator[Row]:
    """A line is a row. A quotation mark is a character like others, but around a whole cell it is not part of it.

    So both ways of writing are read: without any quoting (img2dataset), and csv's. A row that has other than the
    header's number of cells may go on in the next lines, if those are no rows and quotation marks say so.
    """
    csv.field_size_limit(max(_LONGEST, csv.field_size_limit()))
    header: list[str] | None = None
    at = 0
    while at < len(lines):
        number, used = at + 1, 1
        if not lines[at].strip():
            at += 1
            continue
        if header is None:
            header = _header([_unquoted(cell) for cell in lines[at].split("\t")], path)
        else:
            cells, used = _tsv_row(lines, at, len(header))
            yield f"line {number}", _row(cells, header)
        at += used


def _tsv_row(lines: Sequence[str], at: int, n: int) -> tuple[list[str], int]:
    """(cells, lines used) of the row that begins here."""
    plain = lines[at].split("\t")
    quoted = [i for i, cell in enumerate(plain) if cell.startswith('"') and _unquoted(cell) == cell]
    if not quoted:
        return [_unquoted(cell) for cell in plain], 1
    for end in range(at + 1, min(at + _MOST_LINES, len(lines)) + 1):
        if end > at + 1 and lines[end - 1].count("\t") == n - 1:
            break  # this one is a row by itself
        if end == at + 1 and len(plain) == n:
            continue  # complete as it stands; only following lines that are no rows can say otherwise
        try:
            found = list(csv.reader(["\n".join(lines[at:end])], delimiter="\t", strict=True))
        except csv.Error:
            continue
        if len(found) == 1 and len(found[0]) == n:
            return found[0], end - at
    return [_unquoted(cell) for cell in plain], 1


def _unquoted(cell: str) -> str:
    """A cell without the quotation marks around all of it, those inside halved; as it is where none are around it."""
    inner = cell[1:-1]
    whole = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else cell


def _header(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    for name in (*PATH_COLUMNS, *CAPTION_COLUMNS):
        if names.count(name) > 1:
            raise ConfigError(f"{path}: the column {name} is there {names.count(name)} times: which one is meant?")
    return names


def _row(cells: list[str], header: list[str]) -> dict[str, Any] | SampleError:
    while len(cells) > len(header) and not cells[-1]:
        cells = cells[:-1]
    if len(cells) != len(header):
        return SampleError("row of other columns", f"{len(cells)} cells, the first line names {len(header)} columns")
    return dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pandas

        records = pandas.read_parquet(path).to_dict("records")
    except Exception as error:  # pyarrow raises whatever its parser meets
        raise ConfigError(f"{path} is unreadable: {' '.join(str(error).split())[:300]}") from None
    for number, record in enumerate(records, 1):
        yield f"row {number}", {str(k): v.tolist() if hasattr(v, "tolist") else v for k, v in record.items()}
