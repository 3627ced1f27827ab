"""A fast part of the fault campaign: ten kills, and the faults that take no server."""

import json
import subprocess
import sys

import pytest

from flows.faults import FAULTS

pytestmark = pytest.mark.slow

FAST = [fault for fault in FAULTS if fault.startswith(("disk full midway", "flipped bit: checkpoint", "read-only"))]


@pytest.fixture(scope="module")
def record(tmp_path_factory, repository):
    """What the command writes."""
    path = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, "-m", "flows.faults", "--kills", "10", "--seed", "1", "--result", path, "--faults", *FAST]
    subprocess.run(command, cwd=repository, check=False)
    return json.loads(path.read_text())


def test_ten_kills_at_random_moments_lose_nothing_and_spoil_nothing(record):
    assert (record["kills"], record["lost"], record["wrong"], record["problems"]) == (10, 0, 0, [])


def test_every_fault_is_refused_or_mended_with_equal_bytes(record):
    outcomes = record["faults"]
    assert list(outcomes) == FAST
    assert all(outcome.endswith("; bytes equal") or outcome.startswith("not tried") for outcome in outcomes.values()), outcomes
