"""One stage with a DVC remote that several clones share: what others made is pulled, what is made here is pushed.

`python -m flows.remote REMOTE STAGE` does between a pull and a push what `dvc repro --single-item STAGE` does; DVC's own command
pulls from the default remote only. A remote that cannot be reached costs a warning: work goes on, and results stay in
DVC's cache until `dvc push --run-cache` or a later run of the stage sends them.
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from flows.processes import die_with_parent
from permllm.lookup import lookup

logger = logging.getLogger("dvc.permllm")  # with DVC's handlers and format


def check_remote(name: str) -> None:
    """Refuse a remote that this clone does not have.

    Raises:
        ValueError: with the remotes it has.
    """
    from dvc.repo import Repo  # takes most of a second

    with Repo() as repo:
        remotes = repo.config["remote"]
    if not remotes:
        raise ValueError(f"there is no DVC remote {name!r}: `dvc remote add {name} URL` adds it")
    lookup(remotes, name, "DVC remote")


def repro(remote: str, address: str, force: bool) -> None:
    """Pull what the stage would make, run it if nobody has, and push its outputs and DVC's record of the run."""
    from dvc.repo import Repo

    with Repo(config={"core": {"remote": remote}}, _wait_for_lock=True) as repo:
        can_pull = False
        with _going_on(remote, "nothing is pulled from it"):
            _reach(repo, remote)
            can_pull = True
        repo.reproduce(address, single_item=True, force=force, pull=can_pull)
        with _going_on(remote, f"the result stays here; `dvc push --run-cache --remote {remote}` sends it later"):
            _reach(repo, remote)
            repo.push(targets=[address], remote=remote, run_cache=True)


@contextlib.contextmanager
def _going_on(remote: str, what: str) -> Iterator[None]:
    """Make a warning of a failure of the remote."""
    try:
        yield
    except Exception as error:  # every kind of remote has its own
        logger.warning("remote '%s' cannot be reached: %s: %s", remote, error, what)


def _reach(repo: Any, remote: str) -> None:
    """Fail if the remote does not answer, or is a folder that is not there: DVC would make one where a disk is not mounted."""
    system, folder = repo.cloud.get_remote(remote).fs, repo.cloud.get_remote(remote).path
    if not system.exists(folder) and system.protocol == "local":
        raise FileNotFoundError(f"there is no folder {folder}; mount or make it")


def main(argv: list[str] | None = None) -> None:
    """Run a stage as a command."""
    from dvc.exceptions import DvcException

    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m flows.remote", description=repro.__doc__)
    parser.add_argument("remote", help="name of a DVC remote")
    parser.add_argument("address", help="stage, such as prune@llama-5m-2:4-wanda")
    parser.add_argument("--force", action="store_true", help="run the stage even if it did not change")
    try:
        repro(**vars(parser.parse_args(argv)))
    except DvcException as error:
        causes = [error]
        while causes[-1].__cause__:
            causes.append(causes[-1].__cause__)
        sys.exit(": ".join(map(str, causes)))


if __name__ == "__main__":
    main()
