"""Tensors and records on disk: a file that exists is complete, and says what made it.

Every write goes to a temporary name in the same folder, is flushed to the disk and then renamed.
A manifest carries the format version; reading another version is refused.
"""

import contextlib
import glob
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML, YAMLError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 3
MANIFEST = "manifest.json"
WRITTEN_ENTRIES = ("files", "kind", "format", "versions", "checksum")  # of a manifest, whatever its record says


class StaleArtifactError(ValueError):
    """An artifact that another version of the software, or another input, made."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the body succeeds, and vanishes when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode  # what the user's umask says; safetensors writes files that only their owner may read
        yield partial
        partial.chmod(mode)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors.

    Raises:
        OSError: if the disk is full or cannot be written.
    """
    with replacing(path) as partial:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written ({error})") from error


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read every tensor of a safetensors file.

    Raises:
        StaleArtifactError: if the file is missing or not readable.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # safetensors raises its own class, and OSError, for a file that is not whole
        raise StaleArtifactError(f"{path} cannot be read ({error}); run the stage that writes it again") from error


def write_json(path: Path, record: Any) -> None:
    """Write a record as JSON that reads well in a diff."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def read_yaml(path: Path) -> Any:
    """Read YAML 1.2, as DVC does. In 1.1, 2:4 without quotes is the number 124.

    Raises:
        ValueError: if the file is missing or no YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(path.read_text())
    except (OSError, YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with replacing(path) as partial:
        partial.write_text(text)


def write_manifest(folder: Path, kind: str, record: Mapping[str, Any], files: Mapping[str, str] | None = None) -> None:
    """Write the manifest that makes `folder` a complete artifact of the given kind. Write it last.

    Args:
        record: what it says; `WRITTEN_ENTRIES` are left out of it.
        files: the SHA-256 of the artifact's files, by name: who reads one compares, see `checked_file`.
    """
    content = {name: value for name, value in record.items() if name not in WRITTEN_ENTRIES}
    content |= {"files": dict(files or {}), "kind": kind, "format": FORMAT, "versions": versions()}
    write_json(folder / MANIFEST, {**content, "checksum": fingerprint([content])})


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Read the manifest of an artifact, and refuse what this version did not write.

    Raises:
        StaleArtifactError: if the folder has no manifest, one of another kind or format version, or one that changed since.
    """
    path = folder / MANIFEST
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StaleArtifactError(f"{folder} is not a complete {kind} artifact ({error}); run the {kind} stage again") from error
    found = (record.get("kind"), record.get("format")) if isinstance(record, dict) else (None, None)
    if found != (kind, FORMAT):
        raise StaleArtifactError(
            f"{path} is a {found[0]} artifact of format {found[1]}, but this version reads {kind} artifacts of format {FORMAT}; "
            f"run the {kind} stage again with `dvc repro --force`"
        )
    if record.get("checksum") != fingerprint([{name: value for name, value in record.items() if name != "checksum"}]):
        raise StaleArtifactError(f"{path} is damaged: its checksum is of other contents; run the {kind} stage again with `dvc repro --force`")
    return record


def checked_file(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """Return the path of an artifact's file, after comparing its contents with the hash in the manifest.

    Raises:
        StaleArtifactError: if the file is missing, or is not the one that was written.
    """
    path = folder / name
    if not path.is_file() or sha256(path) != manifest["files"].get(name):
        problem = "has another SHA-256 than its manifest: its contents changed" if path.is_file() else "is missing"
        raise StaleArtifactError(f"{path} {problem}; run the {manifest['kind']} stage again with `dvc repro --force`")
    return path


def versions() -> dict[str, str]:
    """Return the versions that decide a result."""
    return {"permllm": version("permllm"), "torch": torch.__version__, "transformers": version("transformers"), "python": platform.python_version()}


def fingerprint(parts: Iterable[Any]) -> str:
    """Return a hash of records, tensors and files (given as `Path`), 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        elif isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_fingerprint(*packages: str) -> str:
    """Return a hash of the source files of some packages below `permllm`: results of other code are not taken up."""
    root = Path(__file__).parent
    return fingerprint([path for package in packages for path in sorted((root / package).rglob("*.py"))])


def need_disk(folder: Path, needed_bytes: int) -> None:
    """Refuse to start when the disk cannot hold what is about to be written.

    Raises:
        OSError: with the free and the needed bytes.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            f"no space left for {folder}: about {needed_bytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            "free some space or link the data folder to a larger disk"
        )


def unfinished(folder: Path) -> Path:
    """Return where the folder that will take the place of `folder` is being written."""
    return folder.with_name(f".{folder.name}.partial")


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the body succeeds.

    What was there stays when the body fails or the process dies; a new try starts empty. One process at a time.
    """
    partial, old = unfinished(folder), folder.with_name(f".{folder.name}.old.partial")
    if old.exists() and not folder.exists():  # the process died between the two renames below
        old.rename(folder)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def creating_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` when the body succeeds, and vanishes when it fails.

    Raises:
        ValueError: if there is something of that name already, other than an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; give another name, or remove it first")
    partial = _partial(folder.absolute())
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)  # takes the place of an empty folder, never of one that was filled meanwhile
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: Path) -> Path:
    """Return this process's temporary name for a path; what processes that died left under theirs is removed."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        process = leftover.name.removeprefix(f".{path.name}.").removesuffix(".partial")
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True
