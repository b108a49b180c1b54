"""Check an adapter against its base: the files' hashes, the base's hash and, of causal LMs, a stored probe's logits.

Exit code 0: nothing differs; 1: something does; 2: the command line or a file cannot be used.

  balora verify outputs/ba-lora --base Qwen/Qwen2.5-0.5B
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._models import CLASSES, DTYPES, load_base, quiet
from ._options import Argument, Option, Values, Words

if TYPE_CHECKING:
    from ..checkpoint.location import AdapterFiles
    from ..pretrained.identity import BaseIdentity
    from ..pretrained.probe import Probe

HELP = "check an adapter's files and whether a model is the base it was trained on"

_LOADING, _STOCK = "loading in stock PEFT", "adapter in stock PEFT"
_APART = "This adapter and this base do not belong together, or files were changed."
_LOADED_OTHERWISE = (
    "They belong together, but this release of unmodified PEFT makes something else of them: load the adapter with "
    "balora_plugin.BaLoraModel, or merge it (balora export --merge)."
)


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    subject: str
    text: str
    mismatch: bool = False
    compared: bool = True  # False: a remark


PARAMETERS = (
    Argument("adapter", metavar="ADAPTER", help="directory of the adapter"),
    Option("--base", required=True, metavar="MODEL", help="the base model: a directory or a hub id"),
    Option(
        "--dtype",
        type=Words([*DTYPES, "auto"]),
        help="load the base in this dtype (default: as it was trained on)",
    ),
)


def run(args: Values) -> int:
    """Runs the subcommand; returns its exit code."""
    with quiet():
        checks = verify(args.adapter, args.base, args.dtype)
    width = max(len(check.subject) for check in checks)
    for check in checks:
        print(f"{'MISMATCH' if check.mismatch else '':8}  {check.subject:{width}}  {check.text}")
    wrong = {check.subject for check in checks if check.mismatch}
    if wrong:
        print(_LOADED_OTHERWISE if wrong <= {_LOADING, _STOCK} else _APART)
        return 1
    compared = any(check.compared for check in checks)
    print("OK" if compared else "Nothing is recorded to compare with: not verified.")
    return 0


def verify(adapter: str, base: str, dtype: str | None = None) -> list[Check]:
    """Runs all checks of an adapter directory against the base model `base`.

    Raises:
        ValueError: no adapter, no model, or one that does not load.
    """
    from ..checkpoint.location import AdapterFiles
    from ..checkpoint.settings import read_settings
    from ..export import lora_file
    from ..export.residual_start import raw_start
    from ..pretrained.identity import BaseIdentity, base_identity, compare
    from ..pretrained.probe import stored_probe

    files = AdapterFiles(adapter)
    settings = read_settings(files)
    checks = _files(files, settings)
    if any(check.mismatch for check in checks):
        return [*checks, Check("not loaded", "because its files are not those that were saved", compared=False)]
    config, _ = lora_file.read_lora_config(files)
    task = lora_file.task_type_of(config)
    if task not in CLASSES:
        return [*checks, Check("base", f"not compared: task_type={task} has no base of its own class", compared=False)]
    origin = settings
    if settings is None:
        found = lora_file.read_adapter(adapter)
        origin, start = found.origin, raw_start(found)
        if origin is None and start is not None:
            text = (
                f"a raw {start} adapter belongs to a residual base: balora export {adapter} --initial DIR converts it"
            )
            return [*checks, Check("not loaded", text, compared=False)]
    recorded = BaseIdentity.from_settings(origin)
    quantization = recorded.quantization if recorded is not None and dtype is None else None
    as_trained = recorded.dtype if recorded is not None else "auto"
    model = load_base(base, dtype or as_trained, quantization, task, trained=(origin or {}).get("base_class"))
    if task != "CAUSAL_LM":  # no probe of its logits: the hash alone
        here = base_identity(model)
        remark = Check("probe", f"none for task_type={task}: logits are not compared", compared=False)
        return [*checks, _base(compare(recorded, here), recorded, here), remark]
    delta = settings is not None and settings["delta_form"]
    stored = stored_probe(files, settings)
    return [*checks, *_model(adapter, model, recorded, stored, delta, (settings or {}).get("probe"))]


def _files(files: AdapterFiles, settings: dict[str, Any] | None) -> list[Check]:
    from ..checkpoint.settings import changed_files

    if settings is None:
        text = "no ba_lora.json: the adapter's own files cannot be checked"
        return [Check("files", text, compared=False)]
    if not settings["sha256"]:
        raise ValueError(f"{str(files)!r} holds settings and no weights yet: its training has not saved.")
    changed = changed_files(settings, files)
    if not changed:
        return [Check("files", f"{len(settings['sha256'])} files as they were saved")]
    return [Check(name, what, mismatch=True) for name, what in changed.items()]


def _model(
    adapter: str,
    model: Any,
    recorded: BaseIdentity | None,
    stored: Probe | None,
    delta: bool,
    about: dict[str, Any] | None,
) -> list[Check]:
    """Checks the base's hash, then logits: base, adapter through unmodified PEFT, adapter through our own class."""
    from peft import PeftModel

    from ..adapter.model import BaLoraModel
    from ..pretrained import probe
    from ..pretrained.identity import base_identity, compare
    from ..pretrained.quantised_experts import dequantise_experts

    if stored is not None and stored.vocabulary != probe.vocabulary_of(model):
        return [_vocabulary(probe.vocabulary_of(model) or 0, stored.vocabulary)]  # its hash would say "another model"
    here = base_identity(model)
    verdict = compare(recorded, here)
    checks = [_base(verdict, recorded, here)]
    dequantise_experts(model)  # to what they compute with: stock PEFT adapts no parameter that is stored quantised
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            stock = PeftModel.from_pretrained(model, adapter)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            text = f"does not fit this model: {' '.join(str(error).split())[:200]}"
            return [*checks, Check("adapter", text, mismatch=True)]
    missing = [str(w.message) for w in heard if "missing adapter keys" in str(w.message)]
    if missing:
        checks.append(_left_out(missing[0], adapter))
    quantised = recorded is not None and recorded.quantization != here.quantization
    allowed = probe.tolerance(here.dtype, recorded.dtype if recorded else here.dtype, quantised=quantised)
    base_logits = probe.base_logits(stock.get_base_model())
    adapted = probe.adapted_logits(stock, "default")
    if stored is None or base_logits is None or adapted is None:
        why = (about or {}).get("note") or "none is stored"
        checks.append(Check("probe", f"{why}: logits cannot be compared", compared=False))
        return checks
    if stored.base is not None:
        checks.append(_logits("base's logits", base_logits, stored.base, allowed))
    if stored.adapted is None:
        text = f"not stored with the adapter ({(about or {}).get('note')}): only its base is checked"
        return [*checks, Check("adapter's logits", text, compared=False)]
    checks.append(_logits(_STOCK, adapted, stored.adapted, allowed))
    if delta:
        again = BaLoraModel.from_pretrained(stock.unload(), adapter)
        logits = probe.adapted_logits(again, "default")
        assert logits is not None
        checks.append(_logits("adapter in BA-LoRA", logits, stored.adapted, allowed))
    moved = probe.discrepancy(stored.adapted, stored.base) if stored.base is not None else 0.0
    checks.append(Check("for scale", f"the adapter moves these logits by {moved:.2g}", compared=False))
    return checks


def _left_out(warning: str, adapter: str) -> Check:
    """Returns why PEFT left tensors of the model as they were: the file lacks them, or PEFT renames them.

    For some architectures it renames what it loads by patterns that are meant for earlier files and fit today's too.
    """
    from safetensors import safe_open

    from ..checkpoint.names import WEIGHTS_FILE

    names = [name.replace(".default.", ".") for name in re.findall(r"'([^']+)'", warning)]
    with safe_open(os.path.join(adapter, WEIGHTS_FILE), framework="pt") as file:
        held = set(file.keys())
    if names and held.issuperset(names):
        text = f"leaves out {len(names)} tensors that the file holds, such as {names[0]}: it looks for other names"
        return Check(_LOADING, text, mismatch=True)
    return Check("adapter", f"lacks tensors for this model: {warning[:200]}", mismatch=True)


def _base(verdict: str, recorded: BaseIdentity | None, here: BaseIdentity) -> Check:
    texts = {
        "same": f"is the recorded one, {here}",
        "config": f"has the recorded weights under another config or release of transformers, {here}: see its logits",
        "dtype": f"is the recorded one in another dtype: recorded {recorded}, here {here}",
        "unclear": f"is quantised otherwise, or float16, which hashes cannot tell: recorded {recorded}, here {here}",
        "other": f"is ANOTHER model: recorded {recorded}, here {here}",
        "unknown": "cannot be told by its hash: none is recorded",
    }
    compared = verdict in ("same", "dtype", "other", "config")
    return Check("base", texts[verdict], mismatch=verdict == "other", compared=compared)


def _vocabulary(here: int, trained: int) -> Check:
    """A base whose vocabulary is not the one of training: tokens are added, and embeddings resized, before it."""
    text = f"has {here} entries here, {trained} when the adapter was trained, {abs(trained - here)} "
    if here < trained:
        text += (
            f"more: name the base as it was prepared for training, with tokens added and resize_token_embeddings"
            f"({trained}), saved; balora export --merge adds the rows by itself where the adapter holds them"
        )
    else:
        text += "fewer: name the base as it was before tokens were added to this one"
    return Check("vocabulary", text, mismatch=True)


def _logits(what: str, logits: Any, recorded: Any, allowed: float) -> Check:
    from ..pretrained.probe import discrepancy

    distance = discrepancy(logits, recorded)
    far = not distance <= allowed
    sign = "more than" if far else "at most"
    text = f"{distance:.1e} from the recorded logits, {sign} the {allowed:g} that rounding explains"
    return Check(what, text, mismatch=far)
