"""ba_lora.json, whoever wrote it: read as what it has to be, or refused in one line that names file and key."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest

from balora_plugin import BaLoraConfig
from balora_plugin.checkpoint.integrity import checkpoint_flaw, is_finished
from balora_plugin.checkpoint.location import AdapterFiles
from balora_plugin.checkpoint.names import SETTINGS_FILE
from balora_plugin.checkpoint.settings import changed_files, read_settings
from balora_plugin.pretrained.identity import BaseIdentity

pytestmark = pytest.mark.hosts

EARLIER = Path(__file__).parents[1] / "data" / "before_layout"
WHOLE = json.loads((EARLIER / "causal_lm" / "checkpoint-4" / SETTINGS_FILE).read_text(encoding="utf-8"))
OTHERS = [None, True, 7, -1, 2.5, "", "text", [], [1], ["a", []], {}, {"a": 1}, {"a": {"b": []}}]
ESCAPES = ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "C:x", "a\nb"]


def paths(values, before=()):
    """The path of keys to every value of the file, lists' entries aside."""
    for key, value in values.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from paths(value, (*before, key))


def changed(path, value):
    values = copy.deepcopy(WHOLE)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return values


def texts():
    """(name, text) of malformed files: every key of every other type, or gone; names that lead elsewhere; no JSON."""
    for path in paths(WHOLE):
        for value in (KeyError, *OTHERS):
            yield f"{'.'.join(path)}={value!r}", json.dumps(changed(path, value))
    for name in ESCAPES:
        yield f"sha256 of {name!r}", json.dumps(changed(("sha256", name), "0" * 64))
    whole = json.dumps(WHOLE)
    for text in ("", "{", "[]", "7", "null", '"text"', "[" * 10**5, '{"a":' * 10**5, whole[:-9], whole + "}", "\ud800"):
        yield f"text {text[:9]!r}", text
    deep = "{" + '"a": {' * 40 + "}" * 41
    yield "deep", whole[:-1] + f', "more": {deep}' + "}"
    yield "twice", whole[:-1] + ', "r": 1, "r": 2}'
    yield "nan", whole[:-1] + ', "more": NaN}'
    yield "large", whole[:-1] + ', "more": "' + "x" * (17 << 20) + '"}'
    draw = random.Random(0)
    for number in range(300):
        place, what = draw.randrange(len(whole)), chr(draw.randrange(1, 256))
        yield f"byte {number}", whole[:place] + what + whole[place + 1 :]


def use(directory):
    """What the package does with a settings file."""
    files = AdapterFiles(str(directory))
    settings = read_settings(files)
    changed_files(settings, files)
    identity = BaseIdentity.from_settings(settings)
    str(identity)
    assert (settings["delta_form"] in (True, False)) and settings.get("ranks", []) is not None
    config = BaLoraConfig.from_pretrained(str(directory))
    assert config.lora_alpha / config.r > 0


def refusal(directory):
    """What a ValueError says of it; None where it is read."""
    try:
        use(directory)
    except ValueError as error:
        return str(error)
    return None


def test_every_malformed_file_is_one_line_or_read(tmp_path):
    path = tmp_path / SETTINGS_FILE
    refused = 0
    for name, text in texts():
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        if (said := refusal(tmp_path)) is not None:
            refused += 1
            assert str(tmp_path) in said and SETTINGS_FILE in said, name
            assert "\n" not in said and len(said) < 600, name
        assert not is_finished(str(tmp_path))
        checkpoint_flaw(str(tmp_path))
    assert refused > 128


@pytest.mark.parametrize("name", ESCAPES)
def test_names_stay_inside_the_directory(name, tmp_path):
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(changed(("sha256", name), "0" * 64)))
    with pytest.raises(ValueError, match="sha256"):
        read_settings(AdapterFiles(str(tmp_path)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("delta_form",), "yes"),
        (("config",), []),
        (("config", "r"), "8"),
        (("config", "lora_alpha"), True),
        (("config", "rank_pattern"), {"q_proj": 0}),
        (("config", "regularizers", "lambda_svd"), -1),
        (("base_digests",), {"weights": "x"}),
        (("base_dtype",), "x"),
        (("ranks",), [-1]),
        (("sha256",), KeyError),
    ],
)
def test_the_key_is_named(path, value, tmp_path):
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(changed(path, value)))
    with pytest.raises(ValueError, match=SETTINGS_FILE) as caught:
        use(tmp_path)
    assert path[0] in str(caught.value) and path[-1] in str(caught.value)


def test_unknown_keys_and_every_earlier_file_are_read(tmp_path):
    (tmp_path / SETTINGS_FILE).write_text(json.dumps({**WHOLE, "from_the_future": {"a": [1, None, 2.5]}}))
    assert read_settings(AdapterFiles(str(tmp_path)))["from_the_future"] == {"a": [1, None, 2.5]}
    earlier = list(EARLIER.glob(f"*/*/{SETTINGS_FILE}"))
    assert len(earlier) == 4
    for path in earlier:
        assert read_settings(AdapterFiles(str(path.parent))) == json.loads(path.read_text(encoding="utf-8"))
