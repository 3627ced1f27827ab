"""`permllm pack`, `unpack` and `audit`: paths in, JSON out, errors in one line and nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows import audit, cli, pack, unpack
from permllm.models.families import adapter_of
from permllm.sparsity.mask import nm_mask
from permllm.sparsity.pattern import NMPattern


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_tokenizer):
    """A LLaMA whose weights are 2:4 as they lie, without a record."""
    model = tiny_model("llama")
    for layer in adapter_of(model).layers(model):
        for linear in adapter_of(model).linears(layer).values():
            linear.weight.masked_fill_(~nm_mask(linear.weight.abs(), NMPattern(2, 4)), 0.0)
    model.save_pretrained(tmp_path / "pruned")
    tiny_tokenizer.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def fails(command, arguments):
    with pytest.raises(SystemExit) as stopped:
        command.main([str(argument) for argument in arguments])
    return stopped.value.code  # a text: Python prints it to standard error and exits with 1


def test_pack_audit_and_unpack_print_what_they_found(checkpoint, tmp_path, capsys):
    packed, unpacked = str(tmp_path / "packed"), str(tmp_path / "unpacked")
    pack.main([str(checkpoint), packed, "--pattern", "2:4"])
    assert json.loads(capsys.readouterr().out)["bytes"] < (checkpoint / "model.safetensors").stat().st_size
    audit.main([packed, "--source", str(checkpoint)])
    found = json.loads(capsys.readouterr().out)
    assert (found["form"], found["targets"], found["sparsity"], found["compared"]) == ("packed", 21, {"2:4": 0.5}, True)
    unpack.main([packed, unpacked])
    assert (tmp_path / "unpacked" / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()


def test_errors_name_the_command_and_leave_nothing(checkpoint, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert fails(pack, [checkpoint, tmp_path / "packed"]).startswith(f"permllm pack: {checkpoint} has no record permllm/")
    assert fails(pack, [checkpoint, tmp_path / "packed", "--pattern", "1:4"]).startswith("permllm pack: ")
    assert fails(pack, [checkpoint, tmp_path / "packed", "--pattern", "4:2"]).startswith("permllm pack: pattern 4:2 needs 0 < N < M")
    assert (
        fails(pack, [checkpoint, checkpoint])
        == f"permllm pack: {checkpoint} exists and is not an empty folder; give another name, or remove it first"
    )
    assert "is not a packed checkpoint" in fails(unpack, [checkpoint, tmp_path / "unpacked"])
    assert fails(audit, [tmp_path / "nowhere"]).startswith("permllm audit: ")
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_line_ends_with_one(checkpoint, tmp_path, repository):
    code = "import sys; from flows.cli import main; sys.argv[0] = 'permllm'; main()"
    command = [sys.executable, "-c", code, "audit", str(checkpoint)]
    finished = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert finished.returncode == 1 and finished.stdout == ""
    assert finished.stderr.splitlines()[-1].startswith(f"permllm audit: {checkpoint} has no record permllm/")


def test_every_command_has_its_file(repository):
    assert all(Path(repository / "flows" / f"{name}.py").is_file() for name in (*cli.STAGES, *cli.COMMANDS))
