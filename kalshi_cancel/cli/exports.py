"""Writes the audit log to files: lines of JSON, CSV, or Parquet.

Each row is one entry: ``id``, ``at`` (ISO 8601 UTC), ``kind``, ``hash`` and ``body``, the JSON as it was
hashed. An export can be gone on with where it ends.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from kalshi_cancel.cli.exits import UsageError
from kalshi_cancel.model.times import utc_text
from kalshi_cancel.store.audit import Noted

FORMATS = ("jsonl", "csv", "parquet")
COLUMNS = ("id", "at", "kind", "hash", "body")
ROWS_AT_ONCE = 500
ROWS_IN_GROUP = 2_000  # of a Parquet file: what is held in memory


class Export(Protocol):
    """Where an export goes; ``first_id`` and ``last_id`` are of the entries it has, empty for none."""

    first_id: str
    last_id: str

    def write(self, entries: Iterable[Noted]) -> None:
        """Takes these on, oldest first."""


@contextmanager
def opened(kind: str, path: Path | None, *, resume: bool) -> Iterator[Export]:
    """An export to a file, or to stdout for None; raises UsageError.

    A file that there is is gone on with when told so, and else refused. What was written is on the disk at
    the end of the body.
    """
    if path is not None and path.exists() and not resume:
        raise UsageError(f"{path} exists already: use --resume to continue it")
    make = _parquet if kind == "parquet" else _lines
    try:
        with make(kind, path) as export:
            yield export
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UsageError(f"{path or 'stdout'}: {error.strerror or error}") from None


# --- lines ------------------------------------------------------------------------------------------------

_FIRST_CELL = {
    "jsonl": re.compile(rb'\{"id":"([0-9]+-[0-9]+)",'),
    "csv": re.compile(rb"([0-9]+-[0-9]+),"),
}
_HEADER = ",".join(COLUMNS).encode() + b"\n"
_TAIL_BYTES = 1 << 20  # in which the last line is looked for first


@contextmanager
def _lines(kind: str, path: Path | None) -> Iterator[Export]:
    if path is None:
        yield _Lines(sys.stdout.buffer, kind, is_new=True)
        sys.stdout.buffer.flush()
        return
    with path.open("r+b" if path.exists() else "x+b") as file:
        first_id, last_id = _ends(file, kind, path)
        yield _Lines(file, kind, first_id, last_id, is_new=file.tell() == 0)
        file.flush()
        os.fsync(file.fileno())


class _Lines:
    def __init__(
        self, file: BinaryIO, kind: str, first_id: str = "", last_id: str = "", *, is_new: bool
    ) -> None:
        self.first_id, self.last_id = first_id, last_id
        self._file = file
        self._text = _csv if kind == "csv" else _json
        if is_new and kind == "csv":
            file.write(_HEADER)

    def write(self, entries: Iterable[Noted]) -> None:
        for portion in _portions(entries, ROWS_AT_ONCE):
            self._file.write(self._text(portion).encode("utf-8", "backslashreplace"))
            self.first_id = self.first_id or portion[0].entry_id
            self.last_id = portion[-1].entry_id


def _json(portion: Sequence[Noted]) -> str:
    lines = []
    for noted in portion:
        cells = dict(zip(COLUMNS[:-1], _cells(noted), strict=False))
        lines.append(json.dumps(cells, separators=(",", ":"))[:-1] + f',"body":{_body_json(noted)}}}\n')
    return "".join(lines)


def _body_json(noted: Noted) -> str:
    """The body as it is; what somebody has spoilt as a JSON text."""
    try:
        json.loads(noted.body)
    except (ValueError, RecursionError):
        return json.dumps(noted.body)
    return _in_one_line(noted.body)


def _csv(portion: Sequence[Noted]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(_in_one_line, _cells(each)) for each in portion)
    return text.getvalue()


def _in_one_line(text: str) -> str:
    return text.replace("\r", " ").replace("\n", " ")


def _ends(file: BinaryIO, kind: str, path: Path) -> tuple[str, str]:
    """The ids of the first and the last row; leaves the file where the next one goes.

    A last line that was cut off goes: its entry is exported again.
    """
    size, tail_bytes = file.seek(0, os.SEEK_END), _TAIL_BYTES
    while True:
        start = max(size - tail_bytes, 0)
        file.seek(start)
        tail = file.read()
        whole = tail[: tail.rfind(b"\n") + 1]
        last_line = whole[whole.rfind(b"\n", 0, -1) + 1 :]
        if start == 0 or len(last_line) < len(whole):
            break
        tail_bytes *= 2
    file.seek(0)
    head = file.readline() if whole else b""
    if kind == "csv" and whole:
        if head != _HEADER:
            raise UsageError(f"{path} is no export in this format")
        head = file.readline() if last_line != _HEADER else b""
        last_line = last_line if head else b""
    ids = [_id_in(line, kind, path) if line else "" for line in (head, last_line)]
    file.seek(start + len(whole))
    file.truncate()
    return ids[0], ids[1]


def _id_in(line: bytes, kind: str, path: Path) -> str:
    found = _FIRST_CELL[kind].match(line)
    if found is None:
        raise UsageError(f"{path} is no export in this format")
    return found[1].decode()


# --- Parquet ----------------------------------------------------------------------------------------------


@contextmanager
def _parquet(_kind: str, path: Path | None) -> Iterator[Export]:
    """Written beside the file and put in its place at the end: a Parquet file cannot be added to."""
    try:
        import pyarrow as pa  # noqa: PLC0415 - large, and needed for this only
        from pyarrow import parquet  # noqa: PLC0415 - the same
    except ImportError:
        raise UsageError("parquet needs pyarrow: pip install 'kalshi-cancel[parquet]'") from None
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    if path is None:
        if sys.stdout.isatty():
            raise UsageError("parquet is not for a terminal: name a file with --out")
        with parquet.ParquetWriter(pa.PythonFile(_Sink(sys.stdout.buffer), mode="w"), schema) as writer:
            yield _Rows(pa, writer)
        sys.stdout.buffer.flush()
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            with parquet.ParquetWriter(file, schema) as writer:
                rows = _Rows(pa, writer)
                if path.exists():
                    rows.copy(parquet.ParquetFile(path))
                yield rows
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except pa.ArrowInvalid:
        raise UsageError(f"{path} is no export in this format") from None
    finally:
        partial.unlink(missing_ok=True)


class _Rows:
    def __init__(self, pa: Any, writer: Any) -> None:
        self.first_id = self.last_id = ""
        self._pa = pa
        self._writer = writer

    def copy(self, older: Any) -> None:
        if not older.schema_arrow.equals(self._writer.schema):
            raise self._pa.ArrowInvalid("other columns")
        for group in range(older.num_row_groups):
            table = older.read_row_group(group)
            ids = table.column("id")
            self.first_id = self.first_id or ids[0].as_py()
            self.last_id = ids[-1].as_py()
            self._writer.write_table(table)

    def write(self, entries: Iterable[Noted]) -> None:
        for portion in _portions(entries, ROWS_IN_GROUP):
            rows = [_cells(noted) for noted in portion]
            columns = [[_valid(row[at]) for row in rows] for at in range(len(COLUMNS))]
            self._writer.write_table(self._pa.table(columns, schema=self._writer.schema))
            self.first_id = self.first_id or portion[0].entry_id
            self.last_id = portion[-1].entry_id


class _Sink:
    """A pipe as pyarrow wants its files: one that knows where it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._written = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self._written += self._file.write(data)
        return len(data)

    def tell(self) -> int:
        return self._written

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True  # stdout stays open


def _valid(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


# --- rows -------------------------------------------------------------------------------------------------


def _cells(noted: Noted) -> tuple[str, ...]:
    return (noted.entry_id, utc_text(noted.at_ms / 1000), noted.kind, noted.hash, noted.body)


def _portions(entries: Iterable[Noted], most: int) -> Iterator[list[Noted]]:
    remaining = iter(entries)
    while portion := list(islice(remaining, most)):
        yield portion
