"""Class names and their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jpeft_interop.data.errors import DataError
from jpeft_interop.data.records import Label, Labelled


@dataclass(frozen=True)
class Labels:
    """Class names, at their numbers; `config.json` calls this `id2label`.

    Example:
      >>> Labels(("bad", "good")).id2label
      {0: 'bad', 1: 'good'}
    """

    names: tuple[str, ...]

    @property
    def id2label(self) -> dict[int, str]:
        """Names by number."""
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        """Numbers by name."""
        return {name: number for number, name in enumerate(self.names)}

    def id_of(self, label: Label, where: str) -> int:
        """The number of a label.

        Raises:
          DataError: it is none of these.
        """
        if str(label) not in self.label2id:
            raise DataError(f"{where}: expected one of the labels {', '.join(self.names)}; found {label!r}")
        return self.label2id[str(label)]


def labels_of(records: Sequence[Labelled]) -> Labels:
    """The labels of some texts, sorted: numbers by value where all are whole numbers, else names by letter.

    Raises:
      DataError: fewer than two.

    Example:
      >>> labels_of([Labelled("a", "10", "f:1"), Labelled("b", 9, "f:2")]).names
      ('9', '10')
    """
    found = {str(record.label) for record in records}
    names = tuple(sorted(found, key=int) if all(map(_is_whole, found)) else sorted(found))
    if len(names) < 2:
        raise DataError(f"{records[0].where}: expected at least two different labels; found only {_one(names)}")
    return Labels(names)


def _is_whole(name: str) -> bool:
    return name.lstrip("-").isdecimal()


def _one(names: Iterable[str]) -> str:
    return repr(next(iter(names)))
