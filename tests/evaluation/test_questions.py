import json
from pathlib import Path

import pytest

from permllm.evaluation.questions import Question, read_questions

GOOD = {"query": "Which is hot?", "choices": ["ice", "fire", "snow", "rain"], "gold": 1}
FILES = {
    "hellaswag": ("hellaswag_subset/hellaswag.json", 1000),
    "arc_easy": ("arc_easy/arc_easy.jsonl", 2376),
    "arc_challenge": ("arc_challenge/arc_challenge.jsonl", 1172),
    "openbookqa": ("openbookqa/openbook_qa.jsonl", 500),
    "rte": ("rte/dev.tsv", 277),
}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("task", FILES)
def test_every_row_of_a_third_party_file_is_a_question(task: str, third_party: Path):
    file, rows = FILES[task]
    assert len(read_questions(task, third_party / "eval" / file)) == rows


@pytest.mark.parametrize(
    ("task", "start", "end", "answer"),
    [
        ("arc_easy", "Question: Which piece of safety equipment", "entering the respiratory system?\nAnswer:", "breathing mask"),
        ("arc_challenge", "Question: An astronomer observes", "increase in rotation?\nAnswer:", "Planetary days will become shorter."),
        ("openbookqa", "There is most likely", " going to be fog around:", "a marsh"),
        ("rte", "Dana Reeve, the widow", "Foundation.\nQuestion: Christopher Reeve had an accident. True or False?\nAnswer:", "False"),
        ("hellaswag", "How to choose an unconventional engagement ring. Determine the colors they prefer. Engagement", "reflects it.", None),
    ],
)
def test_a_third_party_row_becomes_the_prompt_of_lm_eval(task: str, start: str, end: str, answer: str | None, third_party: Path):
    questions = read_questions(task, third_party / "eval" / FILES[task][0])
    question = next(question for question in questions if question.query.startswith(start))
    assert question.query.endswith(end)
    assert answer is None or question.choices[question.gold] == answer


def test_tab_separated_and_parquet_rows_are_the_same_questions(third_party: Path):
    assert read_questions("rte", third_party / "eval/rte/dev.tsv") == read_questions("rte", third_party / "eval/rte/validation.parquet")


def test_hellaswag_is_cleaned_like_lm_eval_cleans_it(third_party: Path):
    from lm_eval.tasks.hellaswag.utils import preprocess

    path = third_party / "eval" / FILES["hellaswag"][0]
    rows = json.loads(path.read_text())["test"]
    for row, question in zip(rows, read_questions("hellaswag", path), strict=True):
        assert list(question.choices) == [preprocess(row["choices"][letter]) for letter in "ABCD"]
        assert question.query.lower() == preprocess(row["question"]).strip().lower()
        assert question.choices[question.gold] == preprocess(row["choices"][row["answer"]])


def test_the_unfinished_sentence_of_a_caption_is_capitalised(tmp_path: Path):
    row = {"question": "A man saws wood. He stops. then he", "choices": {"A": "sits.", "B": "runs."}, "answer": "B"}
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"test": [row]}))
    assert read_questions("hellaswag", path) == [Question("A man saws wood. He stops. Then he", ["sits.", "runs."], 1)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gold": 4}, r"line 2: gold has to be one of 0\.\.3, not 4"),
        ({"gold": "1"}, r"line 2: gold has to be one of 0\.\.3, not '1'"),
        ({"choices": ["ice"]}, r"line 2: the choices have to be two or more texts, not \['ice'\]"),
        ({"choices": None}, "line 2: .*None"),
        ({"query": " "}, "line 2: the query has to be a text"),
    ],
)
def test_a_malformed_row_is_named_with_its_file_and_line(wrong: dict, message: str, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", GOOD, GOOD | wrong)
    with pytest.raises(ValueError, match=f"rows.jsonl .*{message}"):
        read_questions("openbookqa", path)


def test_all_malformed_rows_are_named_at_once_up_to_a_few(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["{", json.dumps({"query": "What?", "choices": ["a", "b"]}), "[]", *["{}"] * 7]))
    with pytest.raises(ValueError, match=r"line 1: .*; line 2 has no 'gold'; line 3: .*; line 4 has no 'query'; line 5 has .*; and 5 more"):
        read_questions("openbookqa", path)


@pytest.mark.parametrize(
    ("task", "file", "content", "message"),
    [
        ("arc", "rows.jsonl", "{}", "unknown zero-shot task 'arc': choose one of arc_challenge, arc_easy"),
        ("arc_easy", "missing.jsonl", None, "there is no file .*missing.jsonl"),
        ("arc_easy", "rows.yaml", "", r"unknown kind of file .*choose one of \.json, \.jsonl, \.parquet, \.tsv"),
        ("arc_easy", "rows.jsonl", "", "rows.jsonl holds no question"),
        ("hellaswag", "rows.json", '{"dev": []}', 'rows.json is not a JSON object with a list under "test"'),
        ("rte", "rows.tsv", "sentence1\tlabel\nIt rains.\t1\n", "line 2 has no 'sentence2'"),
        ("rte", "rows.tsv", "sentence1\tsentence2\tlabel\nIt rains.\tIt is wet.\t-1\n", r"line 2: gold has to be one of 0\.\.1, not -1"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(task: str, file: str, content: str | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_questions(task, tmp_path / file)
