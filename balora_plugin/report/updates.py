"""Pictures of what training moved, read from the adapter's file: the singular values of each layer's update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .drawing import Look, Picture
from .groups import Group
from .runs import Run


@dataclass(frozen=True)
class Spectra:
    """The update of one adapter: {name of a layer: its singular values, falling}; of experts those of the first."""

    layers: dict[str, list[float]]

    @property
    def norm(self) -> float:
        """Returns the Frobenius norm over all layers."""
        return sum(value**2 for values in self.layers.values() for value in values) ** 0.5

    @property
    def effective_rank(self) -> float:
        """Returns the mean over layers of exp(entropy of the singular values over their sum)."""
        import numpy as np

        found = []
        for values in self.layers.values():
            p = np.asarray(values) / max(sum(values), 1e-300)
            p = p[p > 0]
            found.append(float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0)
        return sum(found) / max(len(found), 1)


def spectra_of(run: Run) -> Spectra | str:
    """Returns the spectra of a run's adapter, or in words why there are none."""
    from ..export.algebra import singular_values
    from ..export.lora_file import read_adapter
    from ..export.residual_start import raw_start

    if run.adapter is None:
        return "no adapter lies there, so its update is not drawn"
    try:
        adapter = read_adapter(run.adapter)
    except (ValueError, OSError) as error:
        return str(error)
    start = raw_start(adapter)
    if start is not None:
        return f"its file, of init_lora_weights={start!r}, belongs to a residual base and does not say what moved"
    layers = {}
    for name, update in sorted(adapter.updates.items(), key=lambda item: in_order(item[0])):
        values = singular_values(*update.factors(), update.scaling)[0]
        layers[_short(name)] = [float(value) for value in values]
    return Spectra(layers)


def of_updates(group: Group, found: Spectra) -> Picture:
    """The spectra of one group's first run, a line a layer, from the first (dark) to the last (bright)."""

    def draw(figure: Any, look: Look) -> None:
        import matplotlib as mpl

        axes = figure.subplots()
        colours = mpl.colormaps["viridis"]
        last = max(len(found.layers) - 1, 1)
        for place, values in enumerate(found.layers.values()):
            shown = [value for value in values if value > 1e-7 * max(values[0], 1e-300)]
            axes.plot(range(1, len(shown) + 1), shown, lw=0.9, color=colours(0.15 + 0.8 * place / last))
        axes.set_yscale("log")
        axes.set_xlabel("place")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("singular value")

    return Picture(
        f"update_{_file(group.label)}",
        f"Update: {group.label}",
        f"{len(found.layers)} layers of {group.runs[0].name}, the first dark, the last bright. Norm {found.norm:.3g}, "
        f"mean effective rank {found.effective_rank:.3g}.",
        draw,
    )


def updates(groups: Sequence[Group]) -> Iterator[Picture | str]:
    """The picture of each group's first run, or a line on why there is none."""
    for group in groups:
        found = spectra_of(group.runs[0])
        yield f"{group.runs[0].name}: {found}" if isinstance(found, str) else of_updates(group, found)


def in_order(name: str) -> list[tuple[int, str]]:
    """Returns what names of layers are sorted by: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").removeprefix("model.")


def _file(label: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in label)
