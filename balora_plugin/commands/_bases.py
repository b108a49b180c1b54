"""The base of an adapter, for the subcommand export: loaded as it was in training, compared with what is recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._models import is_quantised, load_base
from ._options import Values

if TYPE_CHECKING:
    from ..export.lora_file import Adapter
    from ..pretrained.identity import BaseIdentity

MERGE_INTO = ("trained", "full")
_VERDICTS = {
    "same": "the one it was trained on",
    "config": "the weights it was trained on, under another config",
    "dtype": "the one it was trained on, in another dtype",
    "unknown": "no hash of it is recorded: not compared",
    "initial": "the initial adapter's own",
    "resized": "tokens were added to it in training: its hash cannot be compared",
    "unclear": "another form of the one it was trained on",
}


@dataclass(frozen=True)
class Base:
    """A loaded base; `verdict`: how it compares with the recorded one, as [`balora_plugin.pretrained.identity`] says.

    `dequantised`: the quantised weights that were trained on, as floats.
    """

    model: Any
    verdict: str
    recorded: BaseIdentity | None
    dequantised: bool = False

    @property
    def differs(self) -> bool:
        """Returns whether this may compute something else than the base of the training."""
        return self.verdict in ("unclear", "config")

    @property
    def quantization(self) -> dict[str, Any] | None:
        """Returns how the recorded base was quantised."""
        return None if self.recorded is None else self.recorded.quantization


def base_of(args: Values, adapter: Adapter) -> Base:
    """Loads --base for an adapter, and compares it with the base that it was trained on.

    To be merged into, it is in float32: a quantised one dequantised, unless --merge-into asks for the full precision.

    Raises:
        ValueError: another base, one that cannot be merged into, or an adapter of no causal language model.
    """
    from ..export import lora_file, residual_start
    from ..pretrained.identity import BaseIdentity
    from ..pretrained.quantised_experts import dequantise_experts

    if not adapter.language:
        kind = lora_file.task_type_of(adapter.config)
        instead = (
            "A classifier merges with PEFT: PeftModel.from_pretrained(model, adapter).merge_and_unload(), with a model "
            "loaded by AutoModelForSequenceClassification"
            if args.merge
            else "Leave --base out: the weights' error is measured without it"
        )
        raise ValueError(
            f"task_type={kind!r} in {args.adapter!r}: --base is loaded for causal language models only. {instead}."
        )
    recorded = BaseIdentity.from_settings(adapter.origin)
    as_trained = recorded is not None and recorded.quantization is not None and args.merge_into != "full"
    if args.merge and not as_trained and is_quantised(args.base):
        raise ValueError(
            f"--base {args.base} is quantised: rounding the merged weights to 4 or 8 bits swallows small updates. Give "
            "the full-precision model; quantise the merged one afterwards."
        )
    dtype = "auto" if recorded is None else recorded.dtype
    model = load_base(
        args.base,
        "float32" if args.merge and not as_trained else dtype,
        recorded.quantization if recorded is not None and as_trained else None,
        instead="write --merge-into full" if args.merge else "leave --base out",
        trained=(adapter.origin or {}).get("base_class"),
    )
    verdict = compared(args.base, adapter, model, recorded)
    if args.initial is not None:
        residual_start.check_start(model, lora_file.read_adapter(args.initial), str(adapter.config.init_lora_weights))
        verdict = "initial" if verdict == "unknown" else verdict
    dequantise_experts(model)  # to what they compute with: stock PEFT adapts no parameter that is stored quantised
    quantised = getattr(model, "is_quantized", False)
    if args.merge and quantised:
        model = _dequantised(args, model)
    if not quantised or args.merge:
        model = model.float()
    text = f", dequantised from {_how(recorded.quantization)}" if args.merge and quantised and recorded else ""
    print(f"base     {args.base}: {_VERDICTS[verdict]}{text}")
    return Base(model, verdict, recorded, dequantised=args.merge and quantised)


def compared(name: str, adapter: Adapter, model: Any, recorded: BaseIdentity | None) -> str:
    """Returns how the base --base `name` compares with the recorded one, after it got the rows of tokens added in it.

    Raises:
        ValueError: it is another one.
    """
    from ..export.attach import fit_vocabulary
    from ..pretrained import probe
    from ..pretrained.identity import base_identity, compare

    resized = fit_vocabulary(model, adapter)
    if resized is not None:
        print(f"note     the base gets {resized.rows} rows of embedding and head, as it had in training")
    here = base_identity(model)
    verdict = "resized" if resized is not None and not resized.whole else compare(recorded, here)
    distance = None
    stored = stored_probe_of(adapter) if verdict in ("unclear", "config") else None
    if stored is not None:
        logits = probe.base_logits(model)
        distance = None if stored.base is None or logits is None else probe.discrepancy(logits, stored.base)
    if verdict == "other" or (distance is not None and distance > probe.TOLERANCE_QUANTISED):
        raise ValueError(
            f"--base {name}, {here}, is not the base that {adapter.directory!r} was trained on, {recorded}: give that "
            "one (balora verify shows the difference)."
        )
    return verdict


def stored_probe_of(adapter: Adapter) -> Any:
    """Returns the probe that was stored with an adapter, or None."""
    from ..checkpoint.location import AdapterFiles
    from ..pretrained.probe import stored_probe

    return stored_probe(AdapterFiles(adapter.directory), adapter.settings)


def warn_of_mismatch(args: Values, adapter: Adapter, base: Base, model: Any) -> None:
    """Prints how far `model`, the adapter on this base, is from the trained model, where the base is another form.

    A config of another release that computes the same is none.
    """
    from ..export.prediction import from_stored

    if not base.differs:
        return
    loss = from_stored(model, stored_probe_of(adapter))
    if base.verdict == "config" and loss is not None and loss.kl < HARMLESS * loss.moved:
        return
    measured = f"KL {loss}" if loss is not None else "how far cannot be measured: no probe is stored with the adapter"
    print(f"WARNING  this is not the model that was trained: {measured}")
    if base.quantization is not None and args.merge:
        how = _how(base.quantization)
        print(f"         it was trained on weights in {how}: --merge-into trained, the default, merges into those")


HARMLESS = 1e-3  # of what training moved


def _dequantised(args: Values, model: Any) -> Any:
    from ..pretrained.quantised import as_floats

    try:
        return as_floats(model)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise ValueError(
            f"--base {args.base} cannot be dequantised ({error}): give the full-precision model, with "
            "--merge-into full."
        ) from None


def _how(quantization: dict[str, Any] | None) -> str:
    from ..adapter.saved.card import quantisation_in_words

    return quantisation_in_words(quantization)
