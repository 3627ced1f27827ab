"""Mend what a killed dvc leaves behind: `python -m flows.mend`.

DVC writes its lock files in place, so a kill at that moment leaves them empty or cut off: without `dvc.lock` no stage has run,
and without the list of who reads and writes what (`.dvc/tmp/rwlock`) no command of DVC works. The flow mends them by itself.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
from ruamel.yaml import YAML, YAMLError

from permllm.artifacts import replacing

LOCK_FILES = ("dvc.lock", "flows/studies/dvc.lock")
COPIES = "sound"  # below .dvc/tmp
CONFLICT = re.compile(r"^(<<<<<<< |=======$|>>>>>>> )", re.MULTILINE)  # of git: for a person to solve
DVC = ("dvc", "flows.remote")  # words of a command that takes locks of DVC

logger = logging.getLogger(__name__)


def mend(root: Path = Path()) -> list[str]:
    """Put back lock files that are cut off as they were when last seen whole, and keep a copy of those that are whole.

    What DVC recorded after that copy it finds again in its cache of runs, but for stages with outputs in git, such as
    `report`: these run again. Where another command of DVC is at work, it is left to that.

    Returns:
        What was mended; what was there instead lies beside the copy.

    Raises:
        ValueError: if a lock file is cut off and there is no copy of it.
    """
    from dvc.lock import LockError, make_lock
    from dvc.repo import Repo  # takes most of a second
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    with Repo(str(root)) as repo:
        temporary = Path(repo.tmp_dir)
        temporary.mkdir(exist_ok=True)
        guard = make_lock(str(temporary / RWLOCK_LOCK), tmp_dir=repo.tmp_dir, hardlink_lock=repo.config["core"].get("hardlink_lock", False))
        try:
            with repo.lock:
                mended = [name for name in LOCK_FILES if (root / name).exists() and _put_back(root / name, temporary / COPIES / name)]
                with guard:
                    mended += [RWLOCK_FILE] if _remove_unless_whole(temporary / RWLOCK_FILE, root) else []
        except LockError:
            return []
    for name in mended:
        logger.warning("%s was cut off when dvc was killed, and is mended", name)
    return mended


def _put_back(path: Path, copy: Path) -> bool:
    """Restore a lock file from its copy if it is cut off, else keep a copy."""
    content, known = path.read_text(), copy.read_text() if copy.exists() else None
    if content == known or CONFLICT.search(content):
        return False
    is_cut = _is_cut(content, known, path)
    if is_cut and known is None:
        raise ValueError(f"{path} is cut off: a kill met DVC as it wrote it; `git checkout {path}` and run again, DVC has later results in its cache")
    if is_cut:
        _copy(path, copy.with_suffix(".cut"))
    _copy(*(copy, path) if is_cut else (path, copy))
    return is_cut


def _copy(path: Path, to: Path) -> None:
    with replacing(to) as partial:
        shutil.copy(path, partial)


def _is_cut(content: str, known: str | None, path: Path) -> bool:
    """Whether a lock file is the beginning of one: not whole in itself, or with the first stages of what is known and no others.

    The second may be meant: then it is as git has it.
    """
    stages = _stages(content)
    if stages is None:
        return True
    if known is None:
        return False
    before = _stages(known)
    if not known.startswith(content) and (stages == before or stages != before[: len(stages)]):
        return False
    return subprocess.run(["git", "show", f":./{path.name}"], cwd=path.parent, capture_output=True, text=True).stdout != content


def _stages(content: str) -> list[str] | None:
    """Return the stages of a lock file in their order; None if it is not whole."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        record = YAML(typ="safe").load(content)
        COMPILED_LOCKFILE_SCHEMA(record)
    except (YAMLError, Invalid):
        return None
    return list(record["stages"]) if "stages" in record and content.endswith("\n") else None


def _remove_unless_whole(path: Path, root: Path) -> bool:
    """Remove DVC's list of locks if it is cut off; not while another dvc is at work, whose locks were in it."""
    if not path.exists():
        return False
    try:
        json.loads(path.read_text())
    except json.JSONDecodeError:
        if any(_is_dvc(process, root) for process in psutil.process_iter(["pid", "cwd", "cmdline"])):
            return False
        path.unlink()
        return True
    return False


def _is_dvc(process: psutil.Process, root: Path) -> bool:
    words = {Path(word).name for word in process.info["cmdline"] or ()}
    return process.info["pid"] != os.getpid() and process.info["cwd"] == str(root.resolve()) and bool(words & {*DVC})


def main() -> None:
    """Mend as a command."""
    logging.basicConfig(format="mend: %(message)s")
    try:
        mend()
    except ValueError as error:
        sys.exit(f"mend: {error}")


if __name__ == "__main__":
    main()
