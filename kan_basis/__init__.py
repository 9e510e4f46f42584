"""Learnable univariate functions, each defined once in plain PyTorch."""

from kan_basis.attention import attention, fourier_attention
from kan_basis.basis import BASES, Basis, make_basis, option, register
from kan_basis.chebyshev import ChebyshevBasis
from kan_basis.fourier import FourierBasis
from kan_basis.group import GroupBasis, group_basis
from kan_basis.group_rational import GroupRational, presets
from kan_basis.radial import RadialBasis
from kan_basis.rational import RationalBasis, rational
from kan_basis.spline import SplineBasis
from kan_basis.wavelet import WaveletBasis

__all__ = [
    "BASES",
    "Basis",
    "ChebyshevBasis",
    "FourierBasis",
    "GroupBasis",
    "GroupRational",
    "RadialBasis",
    "RationalBasis",
    "SplineBasis",
    "WaveletBasis",
    "attention",
    "fourier_attention",
    "group_basis",
    "make_basis",
    "option",
    "presets",
    "rational",
    "register",
]
