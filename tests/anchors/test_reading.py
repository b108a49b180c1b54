"""Anchor data in every form that it may have, and one line where it has none of them."""

from __future__ import annotations

import json

import datasets
import pytest

from balora_plugin import BaLoraConfig
from balora_plugin.anchors.reading import Anchor, check_anchors, read_anchors
from balora_plugin.anchors.tokens import length_limit, token_documents
from balora_plugin.config import RegularizerConfig

CHAT = [{"role": "user", "content": "What is 2?"}, {"role": "assistant", "content": "A number"}]
ROWS = [{"text": "one"}, {"messages": CHAT}, {"prompt": "three", "other": 1}, {"prompt": CHAT[:1]}, {"text": ""}]
READ = [Anchor("one"), Anchor(CHAT), Anchor("three", True), Anchor(CHAT[:1], True)]


def written(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def test_every_form_is_read(tmp_path):
    lines = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n")
    whole = written(tmp_path, "a.json", "  " + json.dumps(ROWS))
    plain = written(tmp_path, "a.txt", "one\nstill one\n\n \n\nthree\n")
    assert list(read_anchors(lines)) == list(read_anchors(whole)) == list(read_anchors(ROWS)) == READ
    assert list(read_anchors(plain)) == [Anchor("one\nstill one"), Anchor("three")]
    texts = datasets.Dataset.from_list([{"id": 1, "text": "one"}])
    texts.to_parquet(str(tmp_path / "a.parquet"))
    texts.save_to_disk(str(tmp_path / "saved"))
    for data in (texts, ["one"], str(tmp_path / "a.parquet"), str(tmp_path / "saved")):
        assert list(read_anchors(data)) == [Anchor("one")]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "", "holds no text: name a file with at least one document"),
        ("a.txt", " \n\n", "holds no text"),
        ("a.jsonl", '{"question": "x", "answer": "y"}', "row 0 has no text, messages or prompt.*columns question, ans"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', "row 1 has no text, messages or prompt"),
        ("a.jsonl", '{"text": "x"}\nplain words', "line 2 is no JSON: write one object a line"),
        ("a.txt", None, "there is no such file: write the path of one"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_loads(name, text, said, tmp_path):
    path = str(tmp_path / name) if text is None else written(tmp_path, name, text)
    with pytest.raises(ValueError, match=rf"^anchor_data='{path}'.*{said}"):
        check_anchors(path, "a tokenizer")


def test_a_directory_that_is_no_data_set_is_not_crawled(tmp_path, monkeypatch):
    def crawls(*args, **kwargs):
        raise AssertionError("the directory was given to datasets")

    monkeypatch.setattr(datasets, "load_dataset", crawls)
    written(tmp_path, "code.py", "x")
    with pytest.raises(ValueError, match=r"is a directory without a data file \(.jsonl, .*\): name a file"):
        check_anchors(str(tmp_path), "a tokenizer")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ValueError, match="is a directory without a data file"):
        check_anchors(tmp_path.name, "a tokenizer")  # which could be a name on the hub too
    with pytest.raises(ValueError, match=r"anchor_data='/usr' is a directory of more than 1000 files: name the file"):
        check_anchors("/usr", "a tokenizer")


def test_other_refusals(tmp_path):
    path = written(tmp_path, "a.txt", "words")
    with pytest.raises(ValueError, match=r"anchor_data='.*a.txt' needs a tokenizer: pass processing_class="):
        check_anchors(path, None)
    check_anchors("somebody/some_text", "a tokenizer")  # the hub is asked later
    with pytest.raises(ValueError, match=r"anchor_data='somebody/some_text' is no file here, and no data set that"):
        list(read_anchors("somebody/some_text"))
    with pytest.raises(TypeError, match=r"anchor_data=3 must be a file, or data with a length"):
        RegularizerConfig(anchor_data=3)
    with pytest.raises(
        TypeError, match=r"anchor_data must be .*not a dict of 'train': name one split, as anchor_data=d"
    ):
        RegularizerConfig(anchor_data={"train": ["words"]})  # a DatasetDict too: its rows would be its keys
    with pytest.raises(TypeError, match=r"anchor_data=<generator.*must be a file, or data with a length"):
        RegularizerConfig(anchor_data=(text for text in "ab"))
    with pytest.raises(ValueError, match=r"anchor_data='a' with task='nlu': the consistency of a classifier"):
        RegularizerConfig(anchor_data="a").resolved("nlu")
    for fraction in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"anchor_fraction=.* must be a finite number from 0 to 1"):
            RegularizerConfig(anchor_fraction=fraction)


def test_settings_with_data_in_memory_are_text_in_a_file():
    """What is read back is no data: it has to be passed again."""
    terms = RegularizerConfig(anchor_data=datasets.Dataset.from_list(ROWS[:1]))
    values = json.loads(json.dumps(terms.to_dict()))
    assert values["anchor_data"] == "<Dataset of 1 rows>"
    assert terms.resolved("nlg").anchor_data is terms.anchor_data
    again = RegularizerConfig.from_dict(values)
    saved = BaLoraConfig(regularizers=terms).to_settings()  # the data themselves are in no file of an adapter
    assert saved["config"]["regularizers"]["anchor_data"] == "<Dataset of 1 rows>"
    with pytest.raises(ValueError, match=r"anchor_data='<Dataset of 1 rows>' was an object of an earlier run: pass it"):
        check_anchors(again.anchor_data, "a tokenizer")


def test_documents_as_tokens(tokenizer):
    documents, total = token_documents(["abc", "", *ROWS[1:4], "x" * 50], tokenizer, limit=20, tokens=None)
    assert total == 5 and len(documents) == 5
    written_out = {tokenizer.decode(ids) for ids in documents}
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert {"abc", "three", "x" * 20, prompt} <= written_out
    assert max(map(len, documents)) == 20
    again, _ = token_documents(["abc", "", *ROWS[1:4], "x" * 50], tokenizer, limit=20, tokens=None)
    assert [a.tolist() for a in again] == [a.tolist() for a in documents]  # one order, in every run
    fewer, total = token_documents(["abcd"] * 10, tokenizer, limit=None, tokens=13)
    assert (len(fewer), total) == (3, 10)
    tokenizer.chat_template, kept = None, tokenizer.chat_template
    with pytest.raises(ValueError, match=r"anchor_data='<list of 1 rows>' holds chats.*chat template cannot write"):
        token_documents([{"messages": CHAT}], tokenizer, limit=None, tokens=None)
    tokenizer.chat_template = kept


def test_the_length_limit_is_the_runs_own(tokenizer):
    assert length_limit(64, tokenizer, 128) == 64
    assert length_limit(None, tokenizer, 128) == 128  # its own says 1e30
    assert length_limit(None, None, None) is None
