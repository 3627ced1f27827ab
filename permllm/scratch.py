"""What an unfinished stage has done: its finished decoder layers, in a folder named after all that decides them."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from permllm.artifacts import fingerprint, versions, write_json, write_tensors


@dataclass(frozen=True)
class Scratch:
    """The decoder layers that are finished: a file of tensors and a record each, the record written last."""

    folder: Path

    @classmethod
    @contextlib.contextmanager
    def open(cls, home: Path, parts: Iterable[Any]) -> Iterator[Self]:
        """Yield what an interrupted run left, or an empty one. When the body succeeds nothing is left, else all of it stays.

        Args:
            home: of this work; only one process may be at it.
            parts: all that decides the result, as for `fingerprint`. What other parts left in `home` is removed.

        Raises:
            ValueError: if another process is at work here.
        """
        home.mkdir(parents=True, exist_ok=True)
        folder = home / fingerprint([*parts, versions()])
        with (home / ".lock").open("w") as lock:  # the system frees it when the process ends, however it does
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process is at work in {home}; wait until it has ended, or stop it") from error
            for stale in home.iterdir():
                if stale.is_dir() and stale != folder:
                    shutil.rmtree(stale)
            folder.mkdir(exist_ok=True)
            yield cls(folder)
            shutil.rmtree(home, ignore_errors=True)

    def __len__(self) -> int:
        """Return how many layers are finished, from the first one."""
        index = 0
        while self._record(index).is_file():
            index += 1
        return index

    def file(self, index: int) -> Path:
        """Return the file of a layer's tensors."""
        return self.folder / layer_name(index)

    def record(self, index: int) -> dict[str, Any]:
        """Return the record of a finished layer."""
        return json.loads(self._record(index).read_text())

    def keep(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Put a finished layer on the disk."""
        write_tensors(self.file(index), tensors)
        write_json(self._record(index), dict(record))

    def deliver(self, folder: Path) -> None:
        """Put the files of all finished layers into a folder too: as links where both lie on one disk."""
        for index in range(len(self)):
            target = folder / layer_name(index)
            try:
                os.link(self.file(index), target)
            except OSError:
                shutil.copyfile(self.file(index), target)
                with target.open("rb") as copied:
                    os.fsync(copied.fileno())

    def _record(self, index: int) -> Path:
        return self.file(index).with_suffix(".json")


def layer_name(index: int) -> str:
    """Return the name of a decoder layer's file, here and in the results."""
    return f"layer_{index:03d}.safetensors"
