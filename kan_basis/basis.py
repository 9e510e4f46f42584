"""What a basis is: a family of univariate functions phi(x; theta) with P learnable coefficients each.

theta (..., P) broadcasts against x, so that one definition serves element-wise use (the MLP of a KAT: theta shared by a group of channels) and
edge-wise use (the attention of KArAt: theta[head, r, N] for every pair of an input and an output). A basis holds options, such as the degree, and
no parameters.
"""

import inspect

import torch
from torch import Tensor

INITS = ("published", "scaled")
BASES: dict[str, type["Basis"]] = {}


def register(name: str):
    """Class decorator: enters a basis under `name`. Raises: ValueError if the name is taken."""

    def enter(cls: type["Basis"]) -> type["Basis"]:
        if name in BASES:
            raise ValueError(f"there is a basis '{name}' already: {BASES[name].__name__}")
        BASES[name] = cls
        cls.name = name
        return cls

    return enter


def make_basis(name: str, **options) -> "Basis":
    """The basis called `name`, or with the published spelling, FourierBasis for fourier. Raises: ValueError for an unknown name."""
    key = name.removesuffix("Basis").lower()
    if key not in BASES:
        raise ValueError(f"unknown basis '{name}'; there are: {', '.join(sorted(BASES))}")
    return BASES[key](**options)


def make_basis_of(name: str, **options) -> "Basis":
    """`make_basis` with those of the options that this basis knows: models have options for all of them."""
    cls = BASES.get(name.removesuffix("Basis").lower())
    known = inspect.signature(cls).parameters if cls else ()
    return make_basis(name, **{option: value for option, value in options.items() if option in known})


class Basis:
    """A family of functions. Subclasses set `num_coefficients` P and define `__call__`, or `features` if they are linear."""

    name: str
    num_coefficients: int
    linear = False  # in its coefficients: phi(x; theta) = sum_k features(x)_k theta_k

    @property
    def working_set(self) -> int:
        """Elements that exist for each x while its features are built, roughly."""
        return self.num_coefficients

    def __call__(self, x: Tensor, theta: Tensor) -> Tensor:
        """phi(x; theta): x (...), theta (..., P), broadcast against each other without P; the dtype of x and theta promoted.

        Raises: ValueError if theta does not end in P coefficients.
        """
        self.check(theta)
        return (self.features(x) * theta).sum(-1).to(torch.promote_types(x.dtype, theta.dtype))

    def check(self, theta: Tensor) -> None:
        """Raises: ValueError if theta does not end in P coefficients."""
        if theta.shape[-1] != self.num_coefficients:
            raise ValueError(
                f"theta must have {self.num_coefficients} coefficients in its last dimension, not {tuple(theta.shape)}"
            )

    def features(self, x: Tensor, dim: int = -1) -> Tensor:
        """(...) -> (..., P), linear bases only; P at `dim` < 0 of the result."""
        raise TypeError(f"the {self.name} basis is not linear in its coefficients: it has no features")

    @torch.no_grad()
    def reset_(self, theta: Tensor, init: str = "published", fan_in: int = 1) -> Tensor:
        """Fills theta in place.

        published: what the papers describe, without regard to how many functions are summed up. scaled: the sum of `fan_in` functions
        of independent x ~ N(0, 1) has variance 1.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items() if not isinstance(v, Tensor))})"


def mean_square(f, width: float = 8.0, points: int = 4001) -> float:
    """E[f(x)^2] for x ~ N(0, 1), by quadrature; f takes and returns float64 tensors (points, ...)."""
    x = torch.linspace(-width, width, points, dtype=torch.float64, device="cpu")
    density = torch.exp(-x * x / 2)
    y = f(x)
    weights = density.reshape(-1, *[1] * (y.ndim - 1))
    return ((weights * y * y).sum(0) / density.sum()).mean().item()


def check_init(init: str, fan_in: int = 1) -> None:
    """Raises: ValueError for an unknown init or fan_in < 1."""
    if init not in INITS:
        raise ValueError(f"unknown init '{init}'; there are: {', '.join(INITS)}")
    check_positive(fan_in=fan_in)


def check_positive(**values: int) -> None:
    """Raises: ValueError that names the first value that is no integer from 1 on."""
    for name, value in values.items():
        if not isinstance(value, int):
            raise ValueError(f"{name} must be an integer, not {value}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
