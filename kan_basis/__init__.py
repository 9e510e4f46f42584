"""Learnable univariate functions, each defined once in plain PyTorch."""

from kan_basis.basis import BASES, make_basis
from kan_basis.fourier import FourierBasis
from kan_basis.group import GroupBasis, group_basis
from kan_basis.pade import RationalBasis
from kan_basis.rational import GroupRational, rational
from kan_basis.spline import SplineBasis
from kan_basis.wavelet import WaveletBasis

__all__ = [
    "BASES",
    "FourierBasis",
    "GroupBasis",
    "GroupRational",
    "RationalBasis",
    "SplineBasis",
    "WaveletBasis",
    "group_basis",
    "make_basis",
    "rational",
]
