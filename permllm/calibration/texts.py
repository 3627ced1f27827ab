"""Documents to calibrate on and to evaluate on: text files, JSON lines, or a data set of the hub."""

import glob
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from permllm.lookup import lookup


@dataclass(frozen=True)
class HubText:
    """Where the text of a hub data set lies.

    Attributes:
        path, name: as `datasets.load_dataset` takes them.
        field: the column with the text.
        splits: the data set's name of the `train` and `test` parts.
        data_files: files to read instead of the whole part.
    """

    path: str
    name: str | None
    field: str
    splits: dict[str, str]
    data_files: dict[str, str] | None = None


# The files of C4 that SparseGPT, Wanda and PermLLM calibrate on; the whole data set holds 300 GB.
HUB_TEXTS = {
    "c4": HubText(
        "allenai/c4", None, "text", {"train": "train", "test": "validation"},
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "text", {"train": "train", "test": "test"}),
    "pile": HubText("monology/pile-uncopyrighted", None, "text", {"train": "train", "test": "test"}),
}  # fmt: skip


@dataclass(frozen=True)
class TextSource:
    """A collection of documents. Give `files` or `hub`, not both.

    Attributes:
        files: a glob of text files (one document each) or of `.jsonl` files (one document a line).
        key: for `.jsonl` files, the key of the text; `a+b` joins two.
        hub: `c4`, `wikitext2` or `pile`.
        split: of a hub data set, `train` or `test`.
        documents: read at most so many from a hub data set; None for all.

    Raises:
        ValueError: if the combination makes no sense.
    """

    files: str | None = None
    key: str | None = None
    hub: str | None = None
    split: str = "train"
    documents: int | None = None

    def __post_init__(self) -> None:
        if (self.files is None) == (self.hub is None):
            raise ValueError(f"a text source needs either files or hub, not files={self.files!r} and hub={self.hub!r}")
        given = [name for name in (("split", "documents") if self.files else ("key",)) if getattr(self, name) not in (None, "train")]
        if given:
            raise ValueError(f"{', '.join(given)} has no meaning for {'files' if self.files else 'a hub data set'}; take it out")
        if self.hub is not None:
            lookup(HUB_TEXTS, self.hub, "hub text")

    def __str__(self) -> str:
        return self.files or f"{self.hub}/{self.split}"

    def paths(self) -> list[Path]:
        """Return the files in the order of their names, none for a hub data set.

        Raises:
            ValueError: if the glob matches nothing.
        """
        if self.files is None:
            return []
        paths = sorted(Path(name) for name in glob.glob(self.files, recursive=True) if Path(name).is_file())
        if not paths:
            raise ValueError(f"no text file matches {self.files!r}; give a glob of text files or of .jsonl files")
        return paths


def read_documents(source: TextSource) -> dict[str, str]:
    """Return the documents of a source by name, in a fixed order.

    Raises:
        ValueError: if there is no text, or a line cannot be read (file and line are named).
    """
    documents = dict(_hub_documents(source) if source.files is None else _file_documents(source))
    empty = [name for name, text in documents.items() if not text.strip()]
    if source.files is not None and empty:
        raise ValueError(f"empty text in {', '.join(empty)}; take it out of {source.files!r} or fill it")
    if not documents:
        raise ValueError(f"{source} holds no text")
    return documents


def _file_documents(source: TextSource) -> Iterator[tuple[str, str]]:
    paths = source.paths()
    stems = Counter(path.stem for path in paths)
    for path in paths:
        name = path.stem if stems[path.stem] == 1 else path.with_suffix("").as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error})") from error
        if path.suffix == ".jsonl":
            yield from _json_lines(path, name, text, source.key)
        else:
            yield name, text


def _json_lines(path: Path, name: str, text: str, key: str | None) -> Iterator[tuple[str, str]]:
    # not splitlines: JSON strings may hold U+2028 and other line separators as they are
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        try:
            record = json.loads(line)
            yield f"{name}:{number}", "".join(record[part] for part in (key or "text").split("+"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is not a JSON object with text under {key or 'text'!r} ({error!r}); set key") from error


def _hub_documents(source: TextSource) -> Iterator[tuple[str, str]]:
    from datasets import load_dataset  # slow to import, and only the hub needs it

    text = HUB_TEXTS[source.hub]
    split = lookup(text.splits, source.split, f"split of {source.hub}")
    rows = load_dataset(text.path, text.name, data_files=text.data_files, split=split, streaming=source.documents is not None)
    for number, row in enumerate(rows):
        if source.documents is not None and number >= source.documents:
            return
        yield f"{source.hub}:{number}", row[text.field]
