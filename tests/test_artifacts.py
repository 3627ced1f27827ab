"""What is on disk is complete, and says what made it."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from permllm.artifacts import (
    FORMAT,
    StaleArtifactError,
    checked_file,
    creating_folder,
    fingerprint,
    need_disk,
    read_manifest,
    read_tensors,
    replacing,
    replacing_folder,
    sha256,
    write_json,
    write_manifest,
    write_tensors,
)


def test_an_exception_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half of the new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "record.json"
    with replacing(path) as partial:
        partial.write_text("new")
        assert not path.exists() and partial.parent == path.parent
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_who_has_the_old_file_open_reads_it_to_its_end(tmp_path):
    path = tmp_path / "record.json"
    path.write_text("old")
    with path.open() as reader:
        with replacing(path) as partial:
            partial.write_text("new")
        assert reader.read() == "old" and path.read_text() == "new"


def test_a_record_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_tensors_read_back_as_they_were_written(tmp_path):
    tensors = {
        "transposed": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).t(),
        "learned": torch.nn.Parameter(torch.tensor([1.0, float("nan"), -0.0])),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "bits": torch.tensor([[0, 255]], dtype=torch.uint8),
        "scalar": torch.tensor(3),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("content", [None, b"", b"not tensors"])
def test_tensors_that_cannot_be_read_say_what_to_do(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StaleArtifactError, match=r"x\.safetensors cannot be read .*run the stage that writes it again"):
        read_tensors(path)


def test_half_a_tensor_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"weight": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StaleArtifactError):
        read_tensors(path)


def test_a_manifest_reads_back_with_the_versions_that_made_it(tmp_path):
    write_manifest(tmp_path, "prune", {"seed": 3})
    record = read_manifest(tmp_path, "prune")
    assert (record["kind"], record["format"], record["seed"]) == ("prune", FORMAT, 3)
    assert record["versions"]["torch"] == torch.__version__ and {"permllm", "transformers", "python"} < record["versions"].keys()


def test_a_manifest_of_another_kind_is_refused(tmp_path):
    write_manifest(tmp_path, "calibrate", {})
    with pytest.raises(StaleArtifactError, match="is a calibrate artifact of format 3, but this version reads prune artifacts of format 3"):
        read_manifest(tmp_path, "prune")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_are_as_readable_as_the_user_wants(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "weights.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("other", [FORMAT + 1, 0, None])
def test_a_manifest_of_another_format_is_refused_and_says_how_to_renew_it(tmp_path, other):
    write_json(tmp_path / "manifest.json", {"kind": "prune", "format": other})
    with pytest.raises(StaleArtifactError, match=rf"of format {other}, but .*; run the prune stage again with `dvc repro --force`"):
        read_manifest(tmp_path, "prune")


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3"])
def test_a_folder_without_a_readable_manifest_is_not_complete(tmp_path, text):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StaleArtifactError, match="prune"):
        read_manifest(tmp_path, "prune")


def test_a_record_cannot_change_the_kind_and_the_format_of_its_manifest(tmp_path):
    write_manifest(tmp_path, "prune", {"kind": "calibrate", "format": 99, "versions": {}, "checksum": ""})
    assert read_manifest(tmp_path, "prune")["versions"] != {}


def test_a_manifest_that_changed_is_refused(tmp_path):
    write_manifest(tmp_path, "prune", {"seed": 3})
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 7'))
    with pytest.raises(StaleArtifactError, match=r"manifest.json is damaged: .*; run the prune stage again"):
        read_manifest(tmp_path, "prune")


def test_a_file_that_is_not_as_it_was_written_is_refused(tmp_path):
    path = tmp_path / "layer"
    path.write_bytes(b"content")
    write_manifest(tmp_path, "prune", {}, {"layer": sha256(path)})
    manifest = read_manifest(tmp_path, "prune")
    assert checked_file(tmp_path, manifest, "layer") == path
    path.write_bytes(b"contemt")
    with pytest.raises(StaleArtifactError, match="layer has another SHA-256 than its manifest: its contents changed; run the prune stage again"):
        checked_file(tmp_path, manifest, "layer")
    path.unlink()
    with pytest.raises(StaleArtifactError, match="layer is missing; run the prune stage again"):
        checked_file(tmp_path, manifest, "layer")


def test_what_dead_processes_left_half_written_is_removed_and_what_others_write_stays(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True).stdout.strip()
    names = [f".record.json.{dead}.partial", f".record.json.{os.getppid()}.partial", f".record.json.more.{dead}.partial"]
    for name in names:
        (tmp_path / name).touch()
    write_json(tmp_path / "record.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"record.json", *names[1:]}


def test_equal_parts_have_equal_fingerprints(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    shutil.copy(tmp_path / "a", tmp_path / "b")
    parts = [{"x": 1, "y": [2]}, torch.arange(6).view(2, 3).t(), "text", None]
    copies = [{"y": [2], "x": 1}, torch.arange(6).view(2, 3).t().contiguous(), "text", None]
    found = fingerprint([*parts, tmp_path / "a"])
    assert found == fingerprint([*copies, tmp_path / "b"])
    assert len(found) == 16 and int(found, 16) >= 0


def test_every_change_of_content_changes_the_fingerprint(tmp_path):
    for name, content in {"a": b"content", "b": b"Content", "c": b"content\0"}.items():
        (tmp_path / name).write_bytes(content)
    variants = [
        [],
        [{}],
        [{"x": 1}],
        [{"x": 1.5}],
        [{"x": "1"}],
        [{"x": 1}, {"x": 1}],
        [{"y": 1}],
        ["x", "y"],
        ["xy"],
        ["y", "x"],
        [torch.zeros(2)],
        [torch.zeros(2, 1)],
        [torch.zeros(2, dtype=torch.int32)],
        [torch.tensor([0.0, -0.0])],
        [torch.tensor([0.0, 1e-45])],
        [torch.zeros(2, dtype=torch.bool)],
        *([tmp_path / name] for name in "abc"),
    ]
    assert len({fingerprint(parts) for parts in variants}) == len(variants)


def test_a_tensor_without_dimensions_has_a_fingerprint():
    assert fingerprint([torch.tensor(1.0)]) != fingerprint([torch.tensor(2.0)])


def test_a_tensor_inside_a_record_is_not_cut_short():
    first, second = torch.zeros(5000), torch.zeros(5000)
    second[2500] = 1
    try:
        fingerprints = {fingerprint([{"weight": first}]), fingerprint([{"weight": second}])}
    except TypeError:
        return  # refusing is as good: tensors and files go in as parts of their own
    assert len(fingerprints) == 2


def test_a_disk_with_too_little_room_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(2_000_000_000))
    with pytest.raises(OSError, match=r"no space left for .*: about 3\.50 GB are needed and 2\.00 GB are free"):
        need_disk(tmp_path / "not" / "yet" / "there", 3_500_000_000)
    need_disk(tmp_path, 2_000_000_000)


def test_a_relative_folder_that_is_not_there_yet_can_be_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    need_disk((tmp_path / "new").relative_to(tmp_path), 1)


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "prune"
    for name in ("first", "second"):
        with replacing_folder(folder) as new:
            assert list(new.iterdir()) == []
            (new / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [folder]


def test_an_exception_leaves_the_old_folder_and_the_next_try_starts_empty(tmp_path):
    folder = tmp_path / "prune"
    with replacing_folder(folder) as new:
        (new / "old").write_text("old")
    with pytest.raises(RuntimeError), replacing_folder(folder) as new:
        (new / "half").write_text("half")
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["old"]
    with replacing_folder(folder) as new:
        assert list(new.iterdir()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_created_folder_appears_whole_or_not_at_all(exists, tmp_path):
    folder = tmp_path / "packed"
    if exists:
        folder.mkdir()
    with pytest.raises(RuntimeError), creating_folder(folder) as new:
        (new / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.rglob("*")) == ([folder] if exists else [])
    with creating_folder(folder) as new:
        (new / "whole").write_text("whole")
    assert list(tmp_path.rglob("*")) == [folder, folder / "whole"]


def test_a_folder_that_holds_something_is_never_replaced(tmp_path):
    folder, file = tmp_path / "full", tmp_path / "file"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    file.write_text("mine")
    for path in (folder, file):
        with pytest.raises(ValueError, match=f"{path} exists and is not an empty folder"), creating_folder(path):
            pass
    with pytest.raises(OSError), creating_folder(tmp_path / "race") as new:
        (new / "whole").write_text("whole")
        (tmp_path / "race").mkdir()
        (tmp_path / "race" / "mine").write_text("filled meanwhile")
    assert (tmp_path / "race" / "mine").exists() and len(list(tmp_path.iterdir())) == 3


def test_a_relative_folder_can_be_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with creating_folder((tmp_path / "new" / "folder").relative_to(tmp_path)):
        pass
    assert (tmp_path / "new" / "folder").is_dir()


def test_sha256_is_that_of_the_contents(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
