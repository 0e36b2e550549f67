"""Tables in Arrow's formats: Parquet, folders of `datasets`, the hub. pyarrow and datasets are imported when used."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sims.language.data.rows import Row, Table

BATCH = 2048  # rows at a time


class ArrowTable(Table):
    """A table that gives Arrow batches, with the columns' own types."""

    schema: Any  # pyarrow.Schema

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Any]:
        """pyarrow.Table of at most BATCH rows each, the rows start, ..., stop - 1."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.schema.names)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        index = start
        for batch in self.batches(start, stop):
            for values in batch.to_pylist():
                yield Row(index, f"row {index}", values)
                index += 1


class Parquet(ArrowTable):
    """A Parquet file, one row group after the other."""

    kind = "parquet"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        import pyarrow
        import pyarrow.parquet

        self._open = pyarrow.parquet.ParquetFile
        try:
            with self._open(self.path) as file:
                self.schema = file.schema_arrow
                groups = range(file.metadata.num_row_groups)
                self._sizes = [file.metadata.row_group(i).num_rows for i in groups]
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self.path!r} is no Parquet file that can be read: {error}") from error

    def __len__(self) -> int:
        return sum(self._sizes)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Any]:
        first, before = 0, 0
        while first < len(self._sizes) and before + self._sizes[first] <= start:
            before += self._sizes[first]
            first += 1
        # Neither option is the default, and without both a whole row group is held.
        with self._open(self.path, pre_buffer=False, buffer_size=1 << 20) as file:
            pieces = file.iter_batches(BATCH, row_groups=list(range(first, len(self._sizes))))
            yield from _window(pieces, before, start, stop)


def _window(pieces: Iterable[Any], before: int, start: int, stop: int | None) -> Iterator[Any]:
    """The rows start, ..., stop - 1 as tables, of record batches that begin with the row `before`."""
    import pyarrow

    for piece in pieces:
        if stop is not None and before >= stop:
            return
        begin, end = max(start - before, 0), len(piece) if stop is None else min(stop - before, len(piece))
        before += len(piece)
        if begin < end:
            yield pyarrow.Table.from_batches([piece.slice(begin, end - begin)])


class _Dataset(ArrowTable):
    """A `datasets.Dataset`."""

    dataset: Any

    @property
    def schema(self) -> Any:
        return self.dataset.data.schema

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Any]:
        # The files are read and not mapped, as `datasets` has them: mapped pages stay in memory until others need it.
        return _window(self._pieces(), 0, start, stop)

    def _pieces(self) -> Iterator[Any]:
        import pyarrow

        for file in self.files:
            with pyarrow.OSFile(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
                yield from reader

    @property
    def files(self) -> Sequence[Path]:
        return [Path(file["filename"]) for file in self.dataset.cache_files]


class Folder(_Dataset):
    """What `datasets.save_to_disk` wrote; of several data sets the one called `split`."""

    kind = "folder"

    def __init__(self, path: str | Path, split: str | None) -> None:
        super().__init__(path)
        place = Path(path)
        if (place / "dataset_dict.json").is_file():
            names = sorted(x.name for x in place.iterdir() if (x / "state.json").is_file())
            if split is None and len(names) == 1:
                split = names[0]
            if split not in names:
                raise ValueError(f"split must be one of {', '.join(names)} of {self.path!r}, got {split!r}")
            place = place / str(split)
        elif not (place / "state.json").is_file():
            raise ValueError(f"{self.path!r} is a folder, but not one that `datasets` saved (save_to_disk)")
        elif split is not None:
            raise ValueError(f"{self.path!r} holds one data set and no splits, got split={split!r}")
        from datasets import load_from_disk

        self.dataset = load_from_disk(str(place), keep_in_memory=False)


class Hub(_Dataset):
    """A data set of the hub, loaded without any code that comes with it."""

    kind = "hub"

    def __init__(self, path: str | Path, split: str | None) -> None:
        super().__init__(path)
        from datasets import load_dataset

        if "[" in (split or ""):
            raise ValueError(f"split must be a name, got {split!r}: save a part with save_to_disk and give the folder")
        try:
            self.dataset = load_dataset(self.path, split=split or "train", keep_in_memory=False)
        except Exception as error:  # whatever the hub, the network or the builder raise
            raise ValueError(
                f"{self.path!r} is no file or folder here, and as a name on the hub it gives "
                f"{type(error).__name__}: {error}"
            ) from error
