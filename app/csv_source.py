"""Rows out of a CSV file of unknown make: what is not said about it is detected."""

from __future__ import annotations

import codecs
import csv
import io
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple, TextIO

import charset_normalizer

from app.errors import UnusableFile

DELIMITERS = ",;\t|"
SAMPLE = 1 << 20  # bytes to tell the encoding from
BYTE_ORDER_MARKS = {  # UTF-32's little-endian one begins as UTF-16's does
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Row(NamedTuple):
    """A row: the line it begins on, from 1; its cells; and what is wrong with it, if anything."""

    line: int
    cells: Sequence[str]
    fault: str = ""


@contextmanager
def open_csv(
    file: BinaryIO, required: Collection[str], encoding: str = "", delimiter: str = ""
) -> Iterator[CsvSource]:
    """Yield a file's rows; detect its encoding and its delimiter if they are not given.

    Raises UnusableFile where they cannot be told, or where a required column is missing.
    """
    with io.BufferedReader(file, SAMPLE) as stream:  # type: ignore[type-var]
        encoding = encoding or detect_encoding(stream.peek(SAMPLE)[:SAMPLE])
        # With or without a byte order mark.
        codec = "utf-8-sig" if encoding == "utf-8" else encoding
        # A byte that the encoding does not know becomes a lone surrogate, which is then noticed.
        with io.TextIOWrapper(stream, codec, errors="surrogateescape", newline="") as text:
            yield CsvSource(text, encoding, required, delimiter)


class CsvSource:
    """A CSV text with a header, read as a stream.

    ``encoding``, ``delimiter`` and ``header``, its names trimmed and in lower case, are known at
    once.
    """

    def __init__(
        self, text: TextIO, encoding: str, required: Collection[str], delimiter: str
    ) -> None:
        self.encoding = encoding
        self._lines = _Lines(text)
        first = next(self._lines, "")
        self.delimiter = delimiter or detect_delimiter(first, required)
        self.header = _names(first, self.delimiter)
        _require_columns(self.header, required)

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows; of one that is not CSV the first line is the only cell.

        Raises UnusableFile where the encoding cannot be followed any further.
        """
        reader = csv.reader(self._lines, delimiter=self.delimiter, strict=True)
        while True:
            line = self._lines.begin_row()
            try:
                cells = next(reader, None)
            except csv.Error as error:
                # Perhaps a quote that nothing closes: do not lose the lines after it as well.
                yield Row(line, [self._lines.give_back()], f"not CSV: {error}")
                continue
            if cells is None:
                return
            if cells:
                yield Row(line, cells, self._fault(cells))

    def _fault(self, cells: Sequence[str]) -> str:
        if len(cells) != len(self.header):
            return f"{len(cells)} cells under a header of {len(self.header)}"
        if not all(map(_is_decoded, cells)):
            return f"bytes that are not {self.encoding}"
        return ""


class _Lines:
    """The lines of a text; those of the row at hand can be given back."""

    def __init__(self, text: TextIO) -> None:
        self.text = text
        self.returned: deque[str] = deque()
        self.row: list[str] = []
        self.number = 0

    def begin_row(self) -> int:
        """Forget the lines of the last row; return the number of the next line."""
        self.row.clear()
        return self.number + 1

    def give_back(self) -> str:
        """Return the first line of the row at hand; the others will come again."""
        first, *others = self.row
        self.returned.extendleft(reversed(others))
        self.number -= len(others)
        return first

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = self.returned.popleft() if self.returned else next(self.text)
        except UnicodeError as error:
            raise UnusableFile(f"after line {self.number} it is not {error.args[0]}") from error
        self.row.append(line)
        self.number += 1
        return line


def detect_encoding(sample: bytes) -> str:
    """Return the encoding that a file which begins so is in; UTF-8 goes before all others."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if sample.startswith(mark):
            return encoding
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        lines = sample[: sample.rfind(b"\n") + 1]  # the sample may end within a character
        best = charset_normalizer.from_bytes(lines or sample).best()
        if best is None:
            raise UnusableFile("its encoding cannot be told; give it") from None
        return best.encoding
    return "utf-8"


def detect_delimiter(header: str, required: Collection[str]) -> str:
    """Return the delimiter with which the header has the required columns."""
    for delimiter in DELIMITERS:
        if set(required) <= set(_names(header, delimiter)):
            return delimiter
    raise UnusableFile(f"its first line must name the columns, {' and '.join(required)} at least")


def _names(header: str, delimiter: str) -> list[str]:
    try:
        (cells,) = csv.reader([header], delimiter=delimiter)
    except csv.Error as error:
        raise UnusableFile(f"its first line is not CSV: {error}") from error
    return [cell.strip().casefold() for cell in cells]


def _require_columns(header: Sequence[str], required: Collection[str]) -> None:
    if missing := [name for name in required if name not in header]:
        raise UnusableFile(f"its first line names no column {' and no '.join(missing)}")
    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
        raise UnusableFile(f"its first line names {', '.join(repeated)} more than once")


def _is_decoded(cell: str) -> bool:
    return cell.isascii() or not any("\udc80" <= character <= "\udcff" for character in cell)
