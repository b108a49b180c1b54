"""The same terms from hidden states, never holding rows x vocabulary logits. Imports torch alone."""

from .factor import HeadFactor
from .head_spectrum import head_spectral_term
from .loss import TopLogProbs
from .spectrum import matrix_spectral_term, spectral_ratio, spectral_term
from .tokens import TokenTerms, token_terms
from .top import top_log_probs

__all__ = [
    "HeadFactor",
    "TokenTerms",
    "TopLogProbs",
    "head_spectral_term",
    "matrix_spectral_term",
    "spectral_ratio",
    "spectral_term",
    "token_terms",
    "top_log_probs",
]
