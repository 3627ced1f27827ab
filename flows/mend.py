"""Mend what a killed dvc leaves behind: `python -m flows.mend`.

DVC writes its lock files in place, so a kill at that moment leaves them empty or cut off: without `dvc.lock` no stage has run,
and without the list of who reads and writes what (`.dvc/tmp/rwlock`) no command of DVC works. The flow mends them by itself.
"""

import json
import logging
import shutil
import sys
from pathlib import Path

from ruamel.yaml import YAML, YAMLError

from permllm.artifacts import replacing

LOCK_FILES = ("dvc.lock", "flows/studies/dvc.lock")
COPIES = "sound"  # below .dvc/tmp
CONFLICT = "<<<<<<< "  # of git: for a person to solve

logger = logging.getLogger(__name__)


def mend(root: Path = Path()) -> list[str]:
    """Put back lock files that are cut off as they were when last seen whole, and keep a copy of those that are whole.

    What DVC recorded after that copy it finds again in its cache of runs. Other commands of DVC wait meanwhile.

    Returns:
        What was mended.

    Raises:
        ValueError: if a lock file is cut off and there is no copy of it.
    """
    from dvc.lock import make_lock
    from dvc.repo import Repo  # takes most of a second
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    with Repo(str(root), _wait_for_lock=True) as repo:
        temporary = Path(repo.tmp_dir)
        temporary.mkdir(exist_ok=True)
        hardlink = repo.config["core"].get("hardlink_lock", False)
        guard = make_lock(str(temporary / RWLOCK_LOCK), tmp_dir=repo.tmp_dir, hardlink_lock=hardlink, wait=True)
        with repo.lock:
            mended = [name for name in LOCK_FILES if (root / name).exists() and _put_back(root / name, temporary / COPIES / name)]
            with guard:
                mended += [RWLOCK_FILE] if _remove_unless_whole(temporary / RWLOCK_FILE) else []
    for name in mended:
        logger.warning("%s was cut off when dvc was killed, and is mended", name)
    return mended


def _put_back(path: Path, copy: Path) -> bool:
    """Restore a lock file from its copy if it is cut off, else keep a copy."""
    content = path.read_text()
    if CONFLICT in content or (copy.exists() and copy.read_text() == content):
        return False
    is_whole = _is_whole(content)
    if not is_whole and not copy.exists():
        raise ValueError(f"{path} is cut off: a kill met DVC as it wrote it; `git checkout {path}` and run again, DVC has later results in its cache")
    old, new = (path, copy) if is_whole else (copy, path)
    with replacing(new) as partial:
        shutil.copy(old, partial)
    return not is_whole


def _is_whole(content: str) -> bool:
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        record = YAML(typ="safe").load(content)
        COMPILED_LOCKFILE_SCHEMA(record)
    except (YAMLError, Invalid):
        return False
    return "stages" in record and content.endswith("\n")


def _remove_unless_whole(path: Path) -> bool:
    """Remove DVC's list of locks if it is cut off: nobody can have a lock while no dvc can read it."""
    if not path.exists():
        return False
    try:
        json.loads(path.read_text())
    except json.JSONDecodeError:
        path.unlink()
        return True
    return False


def main() -> None:
    """Mend as a command."""
    logging.basicConfig(format="mend: %(message)s")
    try:
        mend()
    except ValueError as error:
        sys.exit(f"mend: {error}")


if __name__ == "__main__":
    main()
