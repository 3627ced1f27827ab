"""What an unfinished stage has done: its finished parts, in a folder named after all that decides them."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from torch import Tensor

from permllm.artifacts import fingerprint, sha256, versions, write_json, write_tensors

LOCK = ".lock"
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def alone_in(home: Path) -> Iterator[None]:
    """Keep every other process out of a folder. When the body succeeds nothing is left of it, else all that is finished stays.

    Raises:
        ValueError: if another process is at work here.
    """
    with _locked(home):
        try:
            yield
        except BaseException:
            if not any(path.name != LOCK for path in home.iterdir()):
                shutil.rmtree(home, ignore_errors=True)
            raise
        shutil.rmtree(home, ignore_errors=True)


def _locked(home: Path) -> TextIO:
    """Return the open file that locks a folder; the system frees it when the process ends, however it does."""
    while True:
        home.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # who was alone here has just ended, and removed the folder: once more
            lock = (home / LOCK).open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.close()
                raise ValueError(f"another process is at work in {home}; wait until it has ended, or stop it") from error
            if os.path.samestat(os.fstat(lock.fileno()), (home / LOCK).stat()):
                return lock
            lock.close()


@dataclass(frozen=True)
class Scratch:
    """The parts of a stage that are finished: decoder layers, a file of tensors and a record each, and named results."""

    folder: Path

    @classmethod
    def open(cls, home: Path, parts: Iterable[Any]) -> Self:
        """Return what an interrupted run left, or an empty one. Half-written files and damaged layers are removed.

        Args:
            home: of this work; the process is `alone_in` it.
            parts: all that decides the result, as for `fingerprint`. What other parts left in `home` is removed.
        """
        folder = home / fingerprint([*parts, versions()])
        folder.mkdir(parents=True, exist_ok=True)
        for stale in home.iterdir():
            if stale.is_dir() and stale != folder:
                logger.info("%s: what other code, settings or inputs left is removed", home)
                shutil.rmtree(stale)
        for half_written in folder.glob(".*.partial"):
            half_written.unlink()
        scratch = cls(folder)
        whole = next((index for index in range(len(scratch)) if not scratch._is_whole(index)), len(scratch))
        for index in range(whole, len(scratch)):
            logger.warning("%s: layer %d is damaged, or follows one that is; it is done again", home, index)
            scratch._record(index).unlink()
        return scratch

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
        return _read(self._record(index))["record"]

    def keep(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Put a finished layer on the disk; its record comes last."""
        write_tensors(self.file(index), tensors)
        _write(self._record(index), {"sha256": sha256(self.file(index)), "record": dict(record)})

    def deliver(self, folder: Path) -> dict[str, str]:
        """Put the files of all finished layers into a folder too, as links where both lie on one disk; return the SHA-256 of each."""
        for index in range(len(self)):
            target = folder / layer_name(index)
            try:
                os.link(self.file(index), target)
            except OSError:
                shutil.copyfile(self.file(index), target)
                with target.open("rb") as copied:
                    os.fsync(copied.fileno())
        return {layer_name(index): _read(self._record(index))["sha256"] for index in range(len(self))}

    def has(self, name: str) -> bool:
        """Return whether the result of that name is finished."""
        return _read(self._result(name)) is not None

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a result, of JSON's types: the one that an interrupted run left, or a new one that is put on the disk."""
        if not self.has(name):
            _write(self._result(name), {"result": compute()})
        return _read(self._result(name))["result"]

    def _record(self, index: int) -> Path:
        return self.file(index).with_suffix(".json")

    def _result(self, name: str) -> Path:
        return self.folder / f"result_{name}.json"

    def _is_whole(self, index: int) -> bool:
        record = _read(self._record(index))
        return record is not None and self.file(index).is_file() and sha256(self.file(index)) == record["sha256"]


def layer_name(index: int) -> str:
    """Return the name of a decoder layer's file, here and in the results."""
    return f"layer_{index:03d}.safetensors"


def _write(path: Path, record: Mapping[str, Any]) -> None:
    write_json(path, {**record, "checksum": fingerprint([record])})


def _read(path: Path) -> dict[str, Any] | None:
    """Return a record; None if it is missing or damaged."""
    try:
        record = json.loads(path.read_text())
        checksum = record.pop("checksum")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return record if checksum == fingerprint([record]) else None
