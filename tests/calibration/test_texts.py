import json

import pytest

from permllm.calibration.texts import TextSource, read_documents


def write_lines(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_text_files_are_documents_in_the_order_of_their_names(tmp_path):
    for name, text in {"b.txt": "second", "a.txt": "first", "c.md": "no match"}.items():
        (tmp_path / name).write_text(text)
    assert list(read_documents(TextSource(files=f"{tmp_path}/*.txt")).items()) == [("a", "first"), ("b", "second")]


def test_every_line_of_a_jsonl_file_is_a_document(tmp_path):
    write_lines(tmp_path / "x.jsonl", json.dumps({"text": "one"}), json.dumps({"text": "two é"}, ensure_ascii=False))
    assert read_documents(TextSource(files=f"{tmp_path}/x.jsonl")) == {"x:1": "one", "x:2": "two é"}


def test_a_key_names_the_text_and_joined_keys_join_it(tmp_path):
    write_lines(tmp_path / "x.jsonl", json.dumps({"start": "Once", "end": " again"}))
    source = f"{tmp_path}/x.jsonl"
    assert read_documents(TextSource(files=source, key="start")) == {"x:1": "Once"}
    assert read_documents(TextSource(files=source, key="start+end")) == {"x:1": "Once again"}


@pytest.mark.parametrize("line", ["not json", '{"other": "x"}', '["text"]', '{"text": 3}', '{"text": null}', ""])
def test_a_line_that_cannot_be_read_is_named_with_its_file(tmp_path, line):
    write_lines(tmp_path / "x.jsonl", json.dumps({"text": "fine"}), line)
    with pytest.raises(ValueError, match=r"x\.jsonl line 2 is not a JSON object with text under 'text'"):
        read_documents(TextSource(files=f"{tmp_path}/*.jsonl"))


def test_empty_texts_are_named(tmp_path):
    (tmp_path / "full.txt").write_text("text")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty text in empty;"):
        read_documents(TextSource(files=f"{tmp_path}/*.txt"))


def test_a_jsonl_file_without_a_line_holds_no_text(tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(TextSource(files=f"{tmp_path}/x.jsonl"))


def test_a_glob_that_matches_nothing_is_named(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"no text file matches '.*\*\.txt'"):
        read_documents(TextSource(files=f"{tmp_path}/*.txt"))


@pytest.mark.parametrize("settings", [{}, {"files": "*.txt", "hub": "c4"}])
def test_a_source_is_either_files_or_hub(settings):
    with pytest.raises(ValueError, match="needs either files or hub"):
        TextSource(**settings)


def test_an_unknown_hub_text_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown hub text 'c5': choose one of c4, pile, wikitext2"):
        TextSource(hub="c5")


def test_files_of_one_name_in_different_folders_are_different_documents(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.txt").write_text(folder)
    assert sorted(read_documents(TextSource(files=f"{tmp_path}/*/1.txt")).values()) == ["a", "b"]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"])
def test_only_a_newline_ends_a_jsonl_line(tmp_path, separator):
    text = f"one{separator}two"
    write_lines(tmp_path / "x.jsonl", json.dumps({"text": text}, ensure_ascii=False))
    assert read_documents(TextSource(files=f"{tmp_path}/x.jsonl")) == {"x:1": text}


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt"):
        read_documents(TextSource(files=f"{tmp_path}/*.txt"))


def test_the_shipped_prose_can_be_read(repository):
    if not (repository / "data" / "prose").is_dir():
        pytest.skip("no data/prose in this working tree")
    odd, even = (read_documents(TextSource(files=f"{repository}/data/prose/*_*[{digits}].txt")) for digits in ("13579", "02468"))
    assert len(odd) == len(even) == 54 and not odd.keys() & even.keys()
