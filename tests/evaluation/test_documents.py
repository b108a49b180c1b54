"""What of a file is counted: windows of a text, the assistant's turns of a chat, answers to prompts."""

from __future__ import annotations

import json

import pytest

from balora_plugin.evaluation.documents import read_documents
from balora_plugin.evaluation.prompts import alpaca


def rows_in(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def counted_text(document, tokenizer):
    return tokenizer.decode([i for i, c in zip(document.ids, document.counted, strict=True) if c])


def test_windows_hold_every_token_once(tmp_path, tokenizer):
    text = "The quick brown fox jumps over the lazy dog."
    (tmp_path / "a.txt").write_text(text)
    documents = read_documents(str(tmp_path / "a.txt"), tokenizer, 10).documents
    assert [len(document.ids) for document in documents] == [10, 10, 10, 10, 9]
    assert all(document.ids[0] == tokenizer.bos_token_id and not document.counted[0] for document in documents)
    assert "".join(counted_text(document, tokenizer) for document in documents) == text
    assert len(read_documents(str(tmp_path / "a.txt"), tokenizer, 10, limit=2).documents) == 2


def test_the_assistants_turns_are_counted(tmp_path, tokenizer):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "bye"},
    ]
    (document,) = read_documents(rows_in(tmp_path / "a.jsonl", {"messages": messages}), tokenizer, 99).documents
    assert tokenizer.decode(document.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert counted_text(document, tokenizer) == "hello</s>bye</s>"


def test_answers_are_counted_and_prompts_are_not(tmp_path, tokenizer):
    path = rows_in(
        tmp_path / "a.jsonl",
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "", "completion": "so"},
        {"instruction": "Add.", "input": "1, 1", "output": "2"},
        {"text": "all of it"},
    )
    first, bare, instructed, text = read_documents(path, tokenizer, 999).documents
    assert counted_text(first, tokenizer) == "2</s>" and tokenizer.decode(first.ids) == "1+1=2</s>"
    assert counted_text(bare, tokenizer) == "so</s>" and bare.ids[0] == tokenizer.bos_token_id
    asked = tokenizer(alpaca("Add.", "1, 1"))["input_ids"]
    assert list(instructed.ids[: len(asked)]) == asked and counted_text(instructed, tokenizer) == "2</s>"
    assert counted_text(text, tokenizer) == "all of it"


def test_what_is_cut_and_left_out_is_said(tmp_path, tokenizer):
    path = rows_in(
        tmp_path / "a.jsonl",
        {"prompt": "abcdefgh", "completion": "x"},
        {"prompt": "ab", "completion": "xyzxyzxyz"},
        {"prompt": "ab", "completion": "x"},
    )
    reading = read_documents(path, tokenizer, 6)
    assert [len(document.ids) for document in reading.documents] == [6, 4]
    assert (reading.cut, reading.dropped) == (2, 1)
    assert [remark.split()[0] for remark in reading.remarks()] == ["2", "1"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "?"}], "row 1 has the keys question: write messages"),
        ([{"text": 3}], "text is no text"),
        ([{"messages": [{"role": "user", "content": "hi"}]}], "no message has the role assistant"),
        ([{"messages": "hi"}], "no list of mappings"),
        ([], "holds no row"),
        ([{"prompt": "abcdefghijkl", "completion": "x"}], "raise --context"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, tokenizer, rows, said):
    with pytest.raises(ValueError, match=said):
        read_documents(rows_in(tmp_path / "a.jsonl", *rows), tokenizer, 8)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        read_documents(rows_in(tmp_path / "a.jsonl", {"messages": messages}), other, 99)


def test_files_that_are_not_text_are_named(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        read_documents(str(tmp_path / "a.txt"), tokenizer, 8)
    with pytest.raises(ValueError, match="there is no file"):
        read_documents(str(tmp_path / "b.txt"), tokenizer, 8)
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        read_documents(str(tmp_path / "c.jsonl"), tokenizer, 8)
