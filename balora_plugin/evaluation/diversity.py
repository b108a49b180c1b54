"""How varied generated texts are: distinct-n."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .figures import RATIO, Figure


def ngram_counts(text: str, n: int) -> tuple[int, int]:
    """Returns (different n-grams, n-grams) of a text's words, which are what white space separates."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)), len(grams)


def diversity_figures(task: str, texts: Mapping[str, Sequence[str]]) -> list[Figure]:
    """Returns distinct-1 and distinct-2 within a text, over all texts, and the mean number of words, by side."""
    figures = []
    for n in (1, 2):
        counts = {side: [ngram_counts(text, n) for text in each] for side, each in texts.items()}
        figures.append(Figure(task, f"distinct_{n}", counts, RATIO))
    words = {side: [float(len(text.split())) for text in each] for side, each in texts.items()}
    return [*figures, Figure(task, "words", words)]
