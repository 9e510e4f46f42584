"""Learnable univariate functions, each defined once in plain PyTorch."""
from kan_basis.rational import GroupRational, rational

__all__ = ["GroupRational", "rational"]
