"""What a run says of its terms: the sums behind the log keys, warnings about terms that hardly act, NaN and inf."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import TERMS, RegularizerConfig
from ..objective.request import StepOutput
from ..schedules import Lambdas

NEGLIGIBLE_SHARE = 1e-3
_VALUES = ("task", *TERMS)

Warn = Callable[[str, str], None]
Reduce = Callable[[Tensor, str], Tensor]


class TermMetrics:
    """Collects the terms of micro-batches; tensors stay on their device until a log asks for them.

    Args:
        config: The effective settings.
        warn: warn(key, message), which says each key once.
    """

    def __init__(self, config: RegularizerConfig, warn: Warn) -> None:
        self.config = config
        self._warn = warn
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._bad: Tensor | None = None  # the first optimizer step at which each value was not finite, else inf

    @property
    def recorded(self) -> bool:
        """True once a micro-batch of training was recorded."""
        return self._bad is not None

    def clear(self, mode: str) -> None:
        self._sums[mode] = {}

    def record(self, out: StepOutput, lambdas: Lambdas, mode: str, step: int) -> None:
        """Adds a micro-batch of optimizer step `step` (from 1) to the sums of `mode`, "train" or "eval"."""
        assert out.loss is not None and out.task is not None and out.count is not None
        values: dict[str, Tensor] = {"task": out.task, "count": out.count, "tokens": out.loss.detach()}
        if out.consistency is not None:
            values |= {"consistency": out.consistency, "consistency_count": out.count}
        if out.diversity is not None and lambdas.diversity:
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
        values |= {"batches": torch.ones_like(out.loss), **_drift(out)}
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
        keys += ["svd_used", "diversity_inert", "drift", "drift_count"]
        keys += [f"{what}{name}{suffix}" for what in ("", "share_") for name in TERMS for suffix in ("", "_count")]
        zero = torch.zeros_like(sums["task"])
        packed = reduce(torch.stack([sums.get(key, zero) for key in keys]), "sum")
        total = defaultdict(float, zip(keys, packed.tolist(), strict=True))
        count = max(total["count"], 1.0)
        logs = {"balora/task": total["task"] / count}
        for name in (*TERMS, "drift"):
            if total[f"{name}_count"]:
                logs[f"balora/{name}"] = total[name] / total[f"{name}_count"]
        if total["svd_used"]:
            logs["balora/svd_used_k"] = total["svd_used"] / total["svd_count"]
        logs["balora/loss"] = total["tokens"] / count + total["weighted_svd"] / max(total["batches"], 1.0)
        shares = {n: total[f"share_{n}"] / total[f"share_{n}_count"] for n in TERMS if total[f"share_{n}_count"]}
        logs |= {f"balora/share_{name}": value for name, value in shares.items()}
        if judge:
            self._warn_negligible(shares)
        self._warn_svd(total)
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
            features = ""
            if config.task == "nlu":
                few = "a single sample or a single output" + (
                    " (two, centred)" if "centered" in str(config.svd_input) else ""
                )
                features = " set svd_input='features'," if config.svd_input != "features" else ""
            self._warn(
                "svd_inert",
                f"the SVD term cannot act on {few}: it was left out of such micro-batches "
                f"({total['svd_inert']:.0f} so far). Raise the batch size,{features} or set lambda_svd=0 (now "
                f"{config.lambda_svd}).",
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
            features = " set diversity_input='features'," if config.diversity_input != "features" else ""
            self._warn(
                "diversity_inert",
                "the diversity term, a covariance, cannot act on a single sample or a single output: it was left out "
                f"of such micro-batches ({total['diversity_inert']:.0f} so far). Raise the batch size,{features} or "
                f"set lambda_diversity=0 (now {config.lambda_diversity}).",
            )

    def _warn_negligible(self, shares: dict[str, float]) -> None:
        held = self.config.holds
        small = {name: share for name, share in shares.items() if share < NEGLIGIBLE_SHARE and held(name) is None}
        if small:
            listed = ", ".join(
                f"lambda_{name}={getattr(self.config, f'lambda_{name}'):g} ({share:.0e})"
                for name, share in small.items()
            )
            self._warn(
                "negligible",
                f"these terms carry less than {NEGLIGIBLE_SHARE:g} of the task's gradient and hardly act: {listed}. "
                "Raise them to see an effect, or set them to 0 to save their cost.",
            )


def _drift(out: StepOutput) -> dict[str, Tensor]:
    """The drift and what it counts, where a micro-batch measured it."""
    return {} if out.drift is None or out.count is None else {"drift": out.drift, "drift_count": out.count}
