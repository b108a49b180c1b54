"""A user's rows: every format, what is wrong with a file by line, a held-out part by a fixed rule."""

from __future__ import annotations

import json
import random

import pytest

from balora_plugin.report.before_after import AskedOfModels
from balora_plugin.samples.jsonl import Samples, read_samples
from balora_plugin.samples.rendering import as_trained, question_of, text_of
from balora_plugin.samples.split import split

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture
def written(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
        return str(path)

    return write


class Tokenizer:
    """What is used of one."""

    def __init__(self, template=None):
        self.chat_template = template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


@pytest.mark.parametrize(
    ("row", "plain", "chat"),
    [
        ({"text": "a b"}, "a b", "a b"),
        ({"prompt": "p ", "completion": "c"}, "p c", "p c"),
        ({"messages": CHAT}, "hi\n\nhello", "<user>hi<assistant>hello"),
        ({"instruction": "do", "output": "done"}, "do\n\ndone", "<user>do<assistant>done"),
        ({"instruction": "do", "input": "it", "output": "done"}, "do\n\nit\n\ndone", "<user>do\n\nit<assistant>done"),
        ({"instruction": "do", "input": "", "output": "done"}, "do\n\ndone", "<user>do<assistant>done"),
    ],
)
def test_every_format_is_read_as_the_model_reads_it(row, plain, chat, written):
    samples = read_samples(written(row, row))
    assert (samples.task, len(samples.rows)) == ("lm", 2)
    assert text_of(samples.rows[0], Tokenizer()) == plain
    assert text_of(samples.rows[0], Tokenizer("template")) == chat
    trained = as_trained(samples.rows[0], Tokenizer())
    assert set(trained) <= {"text", "prompt", "completion"} and all(isinstance(v, str) for v in trained.values())


def test_a_question_is_asked_as_a_user_asks():
    assert question_of("why?", Tokenizer()) == "why?"
    assert question_of("why?", Tokenizer("template")) == "<user>why?<assistant>"
    assert question_of("why?", Tokenizer("template"), plain=True) == "why?"


def test_rows_say_how_questions_are_asked():
    def asked(row):
        return AskedOfModels("base", Samples("lm", [row], "")).plain

    assert asked({"text": "a"}) and asked({"prompt": "a", "completion": "b"})
    messages = [{"role": "user", "content": "a"}]
    assert not asked({"messages": messages}) and not asked({"prompt": messages, "completion": messages})
    assert not AskedOfModels("base", None, ("why?",)).plain


def test_labels_are_classes_by_name_or_number_or_scores(written):
    words = read_samples(written({"text": "a", "label": "no"}, {"text": "b", "label": "yes"}))
    assert (words.classes, [row["label"] for row in words.rows]) == (("no", "yes"), [0, 1])
    numbers = read_samples(
        written({"sentence1": "a", "sentence2": "b", "label": 7}, {"sentence1": "c", "sentence2": "d", "label": 3})
    )
    assert (numbers.classes, numbers.columns, [row["label"] for row in numbers.rows]) == (
        ("3", "7"),
        ("sentence1", "sentence2"),
        [1, 0],
    )
    scores = read_samples(written({"text": "a", "label": 0.5}, {"text": "b", "label": 2}))
    assert (scores.classes, scores.outputs, [row["label"] for row in scores.rows]) == ((), 1, [0.5, 2.0])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (['{"text": "a"}', '{"text": '], "line 3 is not JSON"),
        (["[1]"], "line 1 is a list"),
        ([{"words": "a"}], "line 1 has the columns words: write one of `text`"),
        ([{"text": "a"}, {"prompt": "b", "completion": "c"}], "line 3 has no 'text'"),
        ([{"text": ""}], "'text' is '', not text"),
        ([{"text": "a"}, {"text": 3}], "line 3: 'text' is 3, not text"),
        ([{"messages": []}], "'messages' is no list"),
        ([{"messages": [{"role": "bot", "content": "x"}]}], "is no message"),
        ([{"messages": CHAT[:1]}], "nothing to learn"),
        ([{"label": 1, "body": "a"}], "no text column known by name"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": "x"}], "words and numbers"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], "no second class"),
        ([{"text": "a", "label": None}], "'label' is None"),
        ([{"text": "a", "label": 1}, {"text": "b"}], "line 3 has no 'label'"),
        ([], "holds no row"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(rows, said, written):
    with pytest.raises(ValueError, match=r"rows\.jsonl") as caught:
        read_samples(written(*rows))
    assert said in str(caught.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"--data .* is no file"):
        read_samples(str(tmp_path / "not there"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        read_samples(str(tmp_path / "binary"))


def test_the_held_out_part_is_the_same_in_any_order(written):
    rows = [{"text": f"row {n}"} for n in range(20)] + [{"text": "row 3"}]
    train, held = split(read_samples(written(*rows)), 0.2)
    random.Random(0).shuffle(rows)
    again, same = split(read_samples(written(*rows)), 0.2)
    texts = [{row["text"] for row in part.rows} for part in (train, held, again, same)]
    assert texts[0] == texts[2] and texts[1] == texts[3]
    assert not texts[0] & texts[1], "equal rows are on one side"
    assert len(texts[1]) == 4 and len(train.rows) + len(held.rows) == 21


def test_each_class_gives_its_share(written):
    rows = [{"text": f"a {n}", "label": "a"} for n in range(18)] + [{"text": f"b {n}", "label": "b"} for n in range(2)]
    train, held = split(read_samples(written(*rows)), 0.2)
    assert sorted(row["label"] for row in held.rows) == [0, 0, 0, 0, 1]
    assert sum(row["label"] for row in train.rows) == 1


def test_too_few_rows_are_said(written):
    train, held = split(read_samples(written({"text": "a"}, {"text": "b"})), 0.2)
    assert (len(train.rows), len(held.rows)) == (1, 1)
    train, held = split(read_samples(written({"text": "a", "label": 0}, {"text": "b", "label": 1})), 0.2)
    assert (len(train.rows), len(held.rows)) == (1, 1)
    with pytest.raises(ValueError, match="one distinct row"):
        split(read_samples(written({"text": "a"}, {"text": "a"})), 0.2)


def test_only_a_line_feed_ends_a_row(tmp_path):
    """JSON may hold what Unicode calls a line's end as it is."""
    path, text = tmp_path / "rows.jsonl", "a\u2028b\x85c"
    path.write_text(f"{json.dumps({'text': text}, ensure_ascii=False)}\r\n" * 2, encoding="utf-8", newline="")
    assert [row["text"] for row in read_samples(str(path)).rows] == [text] * 2


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_a_score_that_is_no_number_is_refused_by_its_line(value, written):
    path = written('{"text": "a", "label": 0.5}', f'{{"text": "b", "label": {value}}}')
    with pytest.raises(ValueError, match=r"line 3: 'label' is (nan|inf), no finite number"):
        read_samples(path)
