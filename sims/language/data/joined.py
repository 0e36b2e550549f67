"""A table and what is added to it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sims.language.data.arrow import ArrowTable
from sims.language.data.rows import Table

RAW = "raw"  # the column that holds the text of a row that could not be read
Added = Mapping[str, Any] | None


def check_names(new: Sequence[str], old: Sequence[str], overwrite: Collection[str]) -> None:
    twice = [name for name in new if name in old and name not in overwrite]
    if twice:
        raise ValueError(f"the data have a column {', '.join(map(repr, twice))} already: overwrite it or drop it first")


class Joined:
    """A table and what is added to it, row by row or batch by batch."""

    def __init__(
        self,
        table: Table,
        added: Iterator[Added],
        new: tuple[str, ...],
        overwrite: frozenset[str],
        drop: frozenset[str],
    ) -> None:
        self.table, self.added, self.new, self.overwrite, self.drop = table, added, new, overwrite, drop

    def rows(self) -> Iterator[dict[str, Any]]:
        for row in self.table.rows():
            extra = self._next(row.where)
            if extra is not None:
                check_names(self.new, [x for x in row.values if x in self.new], self.overwrite)
                yield {k: v for k, v in {**row.values, **extra}.items() if k not in self.drop}
        self._end()

    def batches(self) -> Iterator[tuple[Any, list[Mapping[str, Any]]]]:
        """(pyarrow.Table, what is added to each of its rows) of the rows that stay."""
        assert isinstance(self.table, ArrowTable)
        seen = 0
        for batch in self.table.batches():
            extras = [self._next(f"row {seen + i}") for i in range(len(batch))]
            seen += len(batch)
            stays = [extra is not None for extra in extras]
            yield batch if all(stays) else batch.filter(stays), [x for x in extras if x is not None]
        self._end()

    def _next(self, where: str) -> Added:
        try:
            extra = next(self.added)
        except StopIteration:
            raise ValueError(f"added must have one item for each row, they end before {where}") from None
        if extra is not None and extra.keys() != set(self.new):
            raise ValueError(f"added must name {', '.join(self.new)} for each row, {where} has {', '.join(extra)}")
        return extra

    def _end(self) -> None:
        if next(self.added, self) is not self:
            raise ValueError("added must have one item for each row, there are more than the table has rows")

    @property
    def names(self) -> tuple[str, ...]:
        """Old and new, for a format that names them once."""
        return tuple(x for x in dict.fromkeys((*self.table.columns, *self.new)) if x not in self.drop)
