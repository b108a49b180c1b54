"""What a run says of its terms: the sums behind the log keys, warnings about terms that hardly act, NaN and inf."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import TERMS, RegularizerConfig
from ..objective.request import AnchorTerm, StepOutput, StepRequest

NEGLIGIBLE_SHARE = 1e-3
VISIBLE_SHARE = 0.01  # of the task's gradient: from about here on a term's effect is seen
# a share of the consistency at weight 1 below it is rounding: the student still is the teacher, at any weight
ROUNDING_SHARE = 1e-6
MEASURED = ("drift", "entropy")  # beside the terms: in evaluation with monitor, the drift with drift_target too
_VALUES = ("task", *TERMS)

Warn = Callable[[str, str], None]
Reduce = Callable[[Tensor, str], Tensor]


def _of_anchors(term: AnchorTerm | None) -> dict[str, Tensor]:
    """What a micro-batch adds to the sums for its anchors."""
    if term is None:
        return {}
    mean = {"anchor_consistency": term.consistency, "anchor_consistency_count": term.tokens}
    return {**mean, "weighted_anchors": term.loss, "anchor_steps": term.part}


class TermMetrics:
    """Collects the terms of micro-batches; tensors stay on their device until a log asks for them.

    Args:
        config: The effective settings.
        warn: warn(key, message), which says each key once.
        outputs: How many a classifier has; None for a language model.
    """

    def __init__(self, config: RegularizerConfig, warn: Warn, outputs: int | None = None) -> None:
        self.config = config
        self._warn = warn
        self._outputs = outputs
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self.counted: Tensor | None = None  # tokens, or a classifier's samples, of all of this training
        self._bad: Tensor | None = None  # the first optimizer step at which each value was not finite, else inf

    @property
    def recorded(self) -> bool:
        """True once a micro-batch of training was recorded."""
        return self._bad is not None

    def recorded_in(self, mode: str) -> bool:
        """Returns whether `mode`, "train" or "eval", has sums since they were taken or cleared."""
        return bool(self._sums[mode])

    def begin(self) -> None:
        """Forgets an earlier training of the same trainer, one that NaN or an interruption ended too."""
        self.clear("train")
        self.counted = self._bad = None

    def clear(self, mode: str) -> None:
        self._sums[mode] = {}

    def record(self, out: StepOutput, request: StepRequest, mode: str, step: int) -> None:
        """Adds a micro-batch of optimizer step `step` (from 1) to the sums of `mode`, "train" or "eval"."""
        assert out.loss is not None and out.task is not None and out.count is not None
        lambdas = request.lambdas
        values: dict[str, Tensor] = {"task": out.task, "count": out.count, "tokens": out.loss.detach()}
        if out.consistency is not None:
            values |= {"consistency": out.consistency, "consistency_count": out.met_teacher}
        values |= _measured(out, request.monitor)
        if out.diversity is not None and request.measured.diversity:
            standing = out.count if out.diversity_count is None else out.diversity_count
            values |= {"diversity": out.diversity, "diversity_count": standing, "diversity_inert": standing == 0}
        if out.svd is not None and out.svd_used_k is not None:
            used, k = out.svd_used_k, self.config.svd_top_k
            clamped = (used > 0) & (used < (k or 1))
            if out.svd_count is None:
                values |= {"svd": out.svd, "svd_count": used > 0, "weighted_svd": lambdas.svd * out.svd}
            else:  # a sum over samples, in the loss already
                values |= {"svd": out.svd, "svd_count": out.svd_count, "svd_used": used * out.svd_count}
            values |= {"svd_inert": used == 0, "svd_clamped": clamped, "svd_clamped_k": used * clamped}
        values |= _of_anchors(out.anchors)
        values["batches"] = torch.ones_like(out.loss)
        if out.shares is not None:
            for name, share, weight in zip(TERMS, out.shares, lambdas, strict=True):
                if weight:  # a schedule may hold a term back for now
                    values |= {f"share_{name}": share, f"share_{name}_count": torch.ones_like(out.loss)}
        sums = self._sums[mode]
        wide = torch.float32 if out.loss.device.type == "mps" else torch.float64
        for key, value in values.items():
            value = value.detach().to(wide)
            sums[key] = sums[key] + value if key in sums else value
        if mode == "train":
            count = out.count.detach().to(wide)
            self.counted = count if self.counted is None else self.counted + count
            self._watch(values, step)

    def take(self, mode: str, reduce: Reduce, *, judge: bool) -> dict[str, float]:
        """The log keys since the last call, reduced over ranks; empties the sums.

        Args:
            reduce: reduce(tensor, "sum") over ranks, as accelerate's.
            judge: Whether the shares have been measured late enough to be judged.
        """
        sums, self._sums[mode] = self._sums[mode], {}
        if not sums:
            return {}
        # every rank walks the same keys, whether or not its own batches had a term
        keys = ["task", "count", "tokens", "batches", "weighted_svd", "svd_inert", "svd_clamped", "svd_clamped_k"]
        keys += ["svd_used", "diversity_inert", "weighted_anchors", "anchor_steps"]
        keys += [f"{what}{name}{suffix}" for what in ("", "share_") for name in TERMS for suffix in ("", "_count")]
        keys += [f"{name}{suffix}" for name in MEASURED for suffix in ("", "_count")]
        keys += ["anchor_consistency", "anchor_consistency_count"]
        zero = torch.zeros_like(sums["task"])
        packed = reduce(torch.stack([sums.get(key, zero) for key in keys]), "sum")
        total = defaultdict(float, zip(keys, packed.tolist(), strict=True))
        count = max(total["count"], 1.0)
        logs = {"balora/task": total["task"] / count}
        for name in (*TERMS, *MEASURED, "anchor_consistency"):
            if total[f"{name}_count"]:
                logs[f"balora/{name}"] = total[name] / total[f"{name}_count"]
        if total["svd_used"]:
            logs["balora/svd_used_k"] = total["svd_used"] / total["svd_count"]
        logs["balora/loss"] = total["tokens"] / count + total["weighted_svd"] / max(total["batches"], 1.0)
        if total["anchor_steps"]:  # each micro-batch is a part of a step
            logs["balora/loss"] += total["weighted_anchors"] / total["anchor_steps"]
        shares = {n: total[f"share_{n}"] / total[f"share_{n}_count"] for n in TERMS if total[f"share_{n}_count"]}
        logs |= {f"balora/share_{name}": value for name, value in shares.items()}
        if judge:
            self._warn_negligible(shares)
        if self.config.lambda_svd:  # monitored at weight 0 it acts nowhere
            self._warn_svd(total)
        if self.config.lambda_diversity:
            self._warn_diversity(total)
        return logs

    def _watch(self, values: dict[str, Tensor], step: int) -> None:
        """Notes, without waiting for the device, at which step a value first was NaN or inf."""
        zero = torch.zeros_like(values["task"])
        finite = torch.isfinite(torch.stack([values.get(name, zero).detach().to(zero.dtype) for name in _VALUES]))
        now = torch.where(finite, torch.inf, float(step))
        self._bad = now if self._bad is None else torch.minimum(self._bad, now)

    def first_bad(self, gather: Callable[[Tensor], Tensor]) -> tuple[str, int] | None:
        """(term, optimizer step from 1) of the first value of training that was NaN or inf on any rank; None if none.

        Waits for the device, and for the other ranks (`gather` concatenates a tensor over them).
        """
        if self._bad is None:
            return None
        steps = gather(self._bad.unsqueeze(0)).amin(dim=0).tolist()
        # a student of NaN makes every term NaN: then the task is named
        worst = min(range(len(steps)), key=lambda i: steps[i])
        return None if steps[worst] == float("inf") else (_VALUES[worst], int(steps[worst]))

    def _warn_svd(self, total: dict[str, float]) -> None:
        """Said at the log, not at the step: what a batch held is known on the device alone until then."""
        config = self.config
        if total["svd_inert"]:
            few = "a single counted token or sample"
            if config.task == "nlu":
                few = "a single sample or a single output" + (
                    " (two, centred)" if "centered" in str(config.svd_input) else ""
                )
            self._warn(
                "svd_inert",
                f"the SVD term cannot act on {few}: it was left out of such micro-batches "
                f"({total['svd_inert']:.0f} so far). {self._more_rows('svd')}",
            )
        if (
            total["svd_clamped"] and config.svd_norm != "nuclear"
        ):  # classifiers: nothing is clamped, but nothing told apart
            self._warn(
                "svd_all",
                f"svd_top_k={config.svd_top_k} is not below min(rows, columns) of a micro-batch's matrix: all its "
                f"singular values count as signal, so that svd_norm={config.svd_norm!r} rewards "
                f"{'large' if config.svd_norm == 'none' else 'equal'} ones in any direction. Set svd_top_k lower, or "
                "svd_input='features' where the classes are few.",
            )
        elif total["svd_clamped"]:
            used = total["svd_clamped_k"] / total["svd_clamped"]
            self._warn(
                "svd_clamped",
                f"svd_top_k={config.svd_top_k} is not below min(rows, columns) of a micro-batch's matrix, where the "
                f"nuclear ratio is constant and trains nothing: used one less than that there ({used:.0f} on average). "
                + (
                    "Set svd_top_k lower, or svd_input='features' where the classes are few."
                    if config.task == "nlu" and config.svd_input != "features"
                    else "Set svd_top_k lower or the batch size higher."
                ),
            )

    def _warn_diversity(self, total: dict[str, float]) -> None:
        config = self.config
        if config.task == "nlu" and total["diversity_inert"]:
            self._warn(
                "diversity_inert",
                "the diversity term, a covariance, cannot act on a single sample or a single output: it was left out "
                f"of such micro-batches ({total['diversity_inert']:.0f} so far). {self._more_rows('diversity')}",
            )

    def _more_rows(self, term: str) -> str:
        """What gives a term of a batch's matrix something to act on: of one column no batch is large enough."""
        source, weight = str(getattr(self.config, f"{term}_input")), f"lambda_{term}"
        columns = None if self._outputs is None or source == "features" else self._outputs - ("centered" in source)
        features = "" if self.config.task != "nlu" or source == "features" else f"set {term}_input='features', "
        off = f"set {weight}=0 (now {getattr(self.config, weight)})."
        if columns is not None and columns < 2:
            return f"This classifier has {self._outputs} output{'' if self._outputs == 1 else 's'}: {features}or {off}"
        return f"Raise the batch size, {features}or {off}"

    def _warn_negligible(self, shares: dict[str, float]) -> None:
        held = self.config.holds
        small = {
            name: share
            for name, share in shares.items()
            if share < NEGLIGIBLE_SHARE and held(name) is None and not self._still_the_teacher(name, share)
        }
        if small:
            listed = ", ".join(self._in_words(name, share) for name, share in small.items())
            self._warn(
                "negligible",
                f"these terms carry less than {NEGLIGIBLE_SHARE:g} of the task's gradient and hardly act: {listed}. "
                "Raise them to see an effect, or set them to 0 to save their cost.",
            )

    def _still_the_teacher(self, name: str, share: float) -> bool:
        """Whether a share is that of a student whose weights have not moved yet, which says nothing of the weight."""
        return name == "consistency" and share < ROUNDING_SHARE * (self.config.lambda_consistency or 0.0)

    def _in_words(self, name: str, share: float) -> str:
        """A weight, its share of the gradient, and the weight that would carry VISIBLE_SHARE of it."""
        weight = getattr(self.config, f"lambda_{name}")
        needed = f"; {weight * VISIBLE_SHARE / share:.1g} would carry {VISIBLE_SHARE:.0%}" if share > 0 else ""
        return f"lambda_{name}={weight:g} ({share:.0e}{needed})"


def _measured(out: StepOutput, monitored: bool) -> dict[str, Tensor]:
    """The sums that a micro-batch measured beside its terms."""
    if out.drift is None or out.count is None:
        return {}
    values = {"drift": out.drift, "drift_count": out.met_teacher}
    if not monitored or out.entropy is None:
        return values
    return {**values, "entropy": out.entropy, "entropy_count": out.count}
