"""CSV files of all kinds, and what is wrong with some."""

from __future__ import annotations

import csv
import io
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.csv_source import Row, detect_encoding, open_csv
from app.errors import UnusableFile

REQUIRED = ("name", "department")


class Read(NamedTuple):
    """What was found in a file."""

    encoding: str
    delimiter: str
    header: list[str]
    rows: list[Row]


def read(content: bytes, encoding: str = "", delimiter: str = "") -> Read:
    with open_csv(io.BytesIO(content), REQUIRED, encoding, delimiter) as source:
        return Read(source.encoding, source.delimiter, source.header, list(source))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_the_one_that_makes_sense_of_the_header(delimiter: str) -> None:
    """Names are trimmed, in any case and order; a quoted one may hold another delimiter."""
    header = delimiter.join([" Department ", '"a,b;c"', "NAME"])
    found = read(f"{header}\nSales{delimiter}x{delimiter}Ann\n".encode())
    assert found.delimiter == delimiter
    assert found.header == ["department", "a,b;c", "name"]
    assert found.rows == [Row(2, ["Sales", "x", "Ann"])]


@pytest.mark.parametrize(
    ("encoding", "detected"),
    [
        ("ascii", "utf-8"),
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8-sig"),
        ("utf-16", "utf-16"),
        ("utf-32", "utf-32"),
        ("cp1252", "cp125"),
    ],
)
def test_the_encoding_is_detected(encoding: str, detected: str) -> None:
    """From a byte order mark, as UTF-8, or else from what looks like writing."""
    name = "Mueller" if encoding == "ascii" else "J\u00fcrgen M\u00fcller-L\u00fcdenscheidt"
    rows = f"{name},Gesch\u00e4ftsf\u00fchrung\n" if encoding != "ascii" else f"{name},Sales\n"
    found = read(("name,department\n" + rows * 20).encode(encoding))
    assert found.encoding.startswith(detected)
    assert {row.cells[0] for row in found.rows} == {name}


def test_a_given_encoding_and_delimiter_are_taken() -> None:
    """Nothing is detected then."""
    found = read("name:department\nJ\u00fcrgen:X\n".encode("cp850"), "cp850", ":")
    assert found.rows == [Row(2, ["J\u00fcrgen", "X"])]


def test_an_encoding_that_cannot_be_told_has_to_be_given() -> None:
    """Bytes that are no writing."""
    with pytest.raises(UnusableFile, match="encoding cannot be told"):
        read(bytes([0x81, 0x8D, 0x00, 0xFE, 0x90, 0x9D] * 50))


@pytest.mark.parametrize(
    ("header", "delimiter", "message"),
    [
        ("", "", "must name the columns, name and department"),
        ("name,title", "", "must name the columns"),
        ("name,title", ",", "no column department"),
        ("x", ",", "no column name and no department"),
        ("name,department,NAME", "", "names name more than once"),
    ],
)
def test_a_header_that_will_not_do_is_refused(header: str, delimiter: str, message: str) -> None:
    """What it lacks is said."""
    with pytest.raises(UnusableFile, match=message):
        read(f"{header}\nA,B\n".encode(), delimiter=delimiter)


def test_each_row_has_the_line_it_begins_on() -> None:
    """Cells may hold line ends, and empty lines are nothing."""
    content = b'name,department,note\r\nA,S,"one\r\ntwo"\r\n\r\n\r\nB,S,\r\nC,S,x'
    assert read(content).rows == [
        Row(2, ["A", "S", "one\r\ntwo"]),
        Row(6, ["B", "S", ""]),
        Row(7, ["C", "S", "x"]),
    ]


def test_a_row_of_another_length_has_a_fault() -> None:
    """A file that was cut off in the middle of a row, for one."""
    rows = read(b"name,department\nA,S,x\nB").rows
    assert [row.fault for row in rows] == [
        "3 cells under a header of 2",
        "1 cells under a header of 2",
    ]


def test_a_quote_that_nothing_closes_costs_its_own_line_only() -> None:
    """However many lines were read in search of its end."""
    lines = "".join(f"P{number},S\n" for number in range(50))
    rows = read(f'name,department\n"A,S\n{lines}B,"S"x\nC,S\n'.encode()).rows
    faults = [(row.line, row.cells, row.fault) for row in rows if row.fault]
    assert [(line, cells) for line, cells, _ in faults] == [(2, ['"A,S\n']), (53, ['B,"S"x\n'])]
    assert all(fault.startswith("not CSV: ") for *_, fault in faults)
    assert [row.line for row in rows] == list(range(2, 55))


def test_bytes_that_are_not_of_the_encoding_are_a_fault_of_their_row() -> None:
    """The others are read; where the encoding is lost altogether the file ends."""
    content = b"name,department\nA,S\n\xff\xfeB,S\nC,S\n"
    rows = read(content, "utf-8").rows
    assert [row.fault for row in rows] == ["", "bytes that are not utf-8", ""]
    cut = "name,department\nA,S\n".encode("utf-16") + b"\x00"
    with pytest.raises(UnusableFile, match="after line 2 it is not utf-16"):
        read(cut)


@pytest.mark.parametrize("shift", ["", "x"])
@pytest.mark.parametrize("encoding", ["utf-8", "euc_kr"])
def test_a_sample_may_end_within_a_character(encoding: str, shift: str) -> None:
    """The first mebibyte is looked at, wherever that ends."""
    row = "\uae40\ucca0\uc218,\uc601\uc5c5\ubd80\n".encode(encoding)
    content = f"name,department{shift}\n".encode() + row * ((1 << 20) // len(row) + 10)
    found = detect_encoding(content[: 1 << 20])
    assert "\uae40\ucca0\uc218" in content.decode(found)


def test_a_byte_order_mark_does_not_hide_the_first_column() -> None:
    """Also where the encoding is given."""
    assert read(b"\xef\xbb\xbfname,department\nA,S\n", "utf-8").rows == [Row(2, ["A", "S"])]


def test_a_header_that_is_no_csv_is_refused() -> None:
    """A file of another kind, in one line."""
    with pytest.raises(UnusableFile, match="first line is not CSV"):
        read(b"x" * 200_000)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=8)


@given(st.lists(st.tuples(cells, cells).filter(any), max_size=6))
def test_what_csv_writes_is_read(rows: list[tuple[str, str]]) -> None:
    """Quotes, delimiters and all."""
    text = io.StringIO()
    csv.writer(text).writerows([REQUIRED, *rows])
    found = read(text.getvalue().encode()).rows
    assert [tuple(row.cells) for row in found] == rows
    assert not any(row.fault for row in found)
