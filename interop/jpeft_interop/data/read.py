"""Files of examples: .txt (documents apart by blank lines), .jsonl (`text` or `messages`), .csv (`text`, `label`).

Every row is used or named in an error; none is skipped. Fields that nothing uses are noted in the records.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jpeft.strict_json import open_file, parse_json_object
from jpeft_interop.data.errors import DataError
from jpeft_interop.data.read_conversation import conversation, unused
from jpeft_interop.data.records import Document, Labelled, Record

SHOWN = 10  # fields, in an error
T = TypeVar("T")
Rows = Iterator[tuple[str, Mapping[str, Any]]]


def read(path: str | Path, *, whole: bool = False) -> list[Record]:
    r"""What a language model learns: all documents and conversations of a file, in its order.

    Args:
      path: a .txt, .jsonl (`text`, or `messages` and what chat templates read beside them, `tools` and `documents`) or
        .csv (`text`) file, UTF-8.
      whole: a .txt file is one document; otherwise blank lines part documents.

    Raises:
      DataError: a row has neither text nor messages, or the file is none of the three; names file and line.
      OSError: the file can't be read.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "a.txt"
      >>> _ = path.write_text("one\n\ntwo\n")
      >>> [record.text for record in read(path)]
      ['one', 'two']
    """
    return parse(_content(Path(path)), Path(path), whole)


def read_labelled(path: str | Path) -> list[Labelled]:
    """What a classifier learns: all texts of a .csv or .jsonl file with `text` and `label`, in its order.

    Raises:
      DataError: a row lacks either, or the file is neither of the two; names file and line.
      OSError: the file can't be read.
    """
    return parse_labelled(_content(Path(path)), Path(path))


def parse(content: bytes, path: Path, whole: bool = False) -> list[Record]:
    """`read`, of what is in the file; `path` names it in errors, and its ending says which kind it is."""
    return _some(path, [_unlabelled(row, where) for where, row in _rows(content, path, whole)])


def parse_labelled(content: bytes, path: Path) -> list[Labelled]:
    """`read_labelled`, of what is in the file."""
    if path.suffix == ".txt":
        raise DataError(f"{path}: classification needs labels, which a .txt has not; give a .csv with text and label")
    return _some(path, [_labelled(row, where) for where, row in _rows(content, path, False)])


def _content(path: Path) -> bytes:
    path.stat()  # an OSError, where it is not there
    with os.fdopen(open_file(path, DataError), "rb") as file:
        return file.read()


def _some(path: Path, records: list[T]) -> list[T]:
    if not records:
        raise DataError(f"{path} holds no examples")
    return records


def _rows(content: bytes, path: Path, whole: bool) -> Rows:
    match path.suffix:
        case ".txt":
            return _documents(content, path, whole)
        case ".jsonl":
            return _json_lines(content, path)
        case ".csv":
            return _csv_rows(content, path)
    raise DataError(f"{path}: expected a file that ends in .txt, .jsonl or .csv; found {path.suffix or 'no ending'!r}")


def _text_of(content: bytes, path: Path) -> str:
    """The file's text, its line ends as they are."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: expected UTF-8; found byte {error.object[error.start]:#04x}") from None


def _documents(content: bytes, path: Path, whole: bool) -> Rows:
    text = _text_of(content, path).replace("\r\n", "\n")
    if whole:
        found = text.lstrip()
        lines = text.count("\n", 0, len(text) - len(found)) + 1
        yield from [(f"{path}:{lines}", {"text": found.rstrip()})] if found else []
        return
    document: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""]):
        if line and not line.isspace():
            document.append(line)
        elif document:
            yield f"{path}:{number - len(document) + 1}", {"text": "\n".join(document).rstrip()}
            document = []


def _json_lines(content: bytes, path: Path) -> Rows:
    for number, line in enumerate(_text_of(content, path).split("\n"), 1):
        if line and not line.isspace():
            where = f"{path}:{number}"
            yield where, parse_json_object(line.encode(), where, DataError)


def _csv_rows(content: bytes, path: Path) -> Rows:
    text = _text_of(content, path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    limit = csv.field_size_limit(len(text) + 1)  # csv's own, 131,072 characters, is too short for documents
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if header is None:
                header = _header(row, where)
            elif len(row) == len(header):
                yield where, dict(zip(header, row, strict=True))
            elif row:
                raise DataError(f"{where}: expected {len(header)} fields, as the header has; found {len(row)}")
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _header(row: list[str], where: str) -> list[str]:
    if "text" not in row or len(set(row)) != len(row):
        raise DataError(
            f"{where}: expected a header that names each column once, `text` among them; found {row!s:.300}"
        )
    return row


def _unlabelled(row: Mapping[str, Any], where: str) -> Record:
    if "messages" in row and "text" in row:
        raise DataError(f"{where}: expected `text` or `messages`; found both")
    if "messages" in row:
        return conversation(row, where)
    return Document(_text(row, where, "`text` or `messages`"), where, unused(row, "text"))


def _labelled(row: Mapping[str, Any], where: str) -> Labelled:
    text, label = _text(row, where, "`text` and `label`"), row.get("label")
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise DataError(f"{where}: expected a `label`, a string or an integer; found {label!r:.100}")
    return Labelled(text, label, where, unused(row, "text", "label"))


def _text(row: Mapping[str, Any], where: str, expected: str) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise DataError(f"{where}: expected {expected}; found {_fields(row)}")
    if not text.strip():
        raise DataError(f"{where}: the text is empty")
    return text


def _fields(row: Mapping[str, Any]) -> str:
    shown = [f"{name:.60} ({type(value).__name__})" for name, value in list(row.items())[:SHOWN]]
    return ", ".join([*shown, "…"] if len(row) > SHOWN else shown) or "no fields"
