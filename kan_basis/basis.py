"""A basis: a family of univariate functions phi(x; theta) with P learnable coefficients each.

theta (..., P) broadcasts against x. One definition therefore serves element-wise use (the MLP of a KAT, where a group
of channels shares theta) and edge-wise use (the attention of KArAt, with theta[head, r, N] for every pair of an input
and an output).

A basis is a frozen dataclass without parameters. Its fields are its options. The command line, the checks of what fits
which basis, equality and repr all follow from the fields, so that a new basis is one file:

    @register("monomial")
    @dataclass(frozen=True)
    class MonomialBasis(Basis):
        order: int = option(3, "highest power", minimum=1)
        linear = True
        ...
"""

import math
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

INITS = ("published", "scaled")
BASES: dict[str, type["Basis"]] = {}


KEYWORDS = {"minimum", "choices", "increasing", "metavar", "attention_name", "mlp_default", "mlp_only"}


def option(default: Any, help: str, **metadata) -> Any:
    """Field of a basis.

    Args:
        default: a number, a string or a tuple of numbers; its type is the type of the option.
        help: what the option means, for --help.
        minimum: smallest value.
        increasing: the option is a range, two finite numbers in increasing order.
        choices: function that lists the values.
        metavar: names of the values of a tuple, for --help.
        attention_name: what the option is called in attention, if that is not the name of the field.
        mlp_default: default in an MLP, if that is another one.
        mlp_only: the option has no meaning in attention.
    """
    if unknown := metadata.keys() - KEYWORDS:
        raise TypeError(f"an option has no {', '.join(unknown)}")
    return field(default=default, metadata={"help": help, **metadata})


def register(name: str):
    """Class decorator that enters a basis under `name`.

    Raises: ValueError if the name is taken or not in lower case, or an option is a switch or has another type than its
        namesake of another basis.
    """

    def enter(cls: type["Basis"]) -> type["Basis"]:
        if name in BASES:
            raise ValueError(f"there is a basis '{name}' already: {BASES[name].__name__}")
        if name != name.lower():
            raise ValueError(f"the name of a basis must be in lower case, not '{name}'")
        cls.name = name
        for use in USES:
            known = {option: f for other in BASES.values() for option, f in other.options(use).items()}
            for option, f in cls.options(use).items():
                if isinstance(f.default, bool):
                    raise ValueError(f"option {option} of the {name} basis is a switch: use a string with choices")
                if option in known and _shape(known[option].default) != _shape(f.default):
                    raise ValueError(f"option {option} of the {name} basis has another type than in another basis")
        BASES[name] = cls
        return cls

    return enter


def basis_class(name: str) -> type["Basis"]:
    """The class of the basis `name`; the name of the class, such as FourierBasis, stands for it, too.

    Raises: ValueError for an unknown name.
    """
    key = str(name).lower()
    for known, cls in BASES.items():
        if key in (known, cls.__name__.lower()):
            return cls
    raise ValueError(f"unknown basis '{name}'; there are: {', '.join(sorted(BASES))}")


def make_basis(name: str, **options) -> "Basis":
    """The basis called `name`. Raises: ValueError for an unknown name, TypeError for an unknown option."""
    return basis_class(name)(**options)


def option_names(use: str) -> set[str]:
    """Names of all options that some basis has in a "mlp" or in "attention"."""
    return {option for cls in BASES.values() for option in cls.options(use)}


def make_basis_for(use: str, name: str, options: dict[str, Any]) -> "Basis":
    """The basis of a model's attention or MLP, from the model's options.

    Args:
        use: "attention" or "mlp".
        name: of the basis.
        options: by their names in a model, such as wavelet_type in attention and mlp_wavelet in an MLP.
    Raises: ValueError for an option that this basis does not have.
    """
    cls = basis_class(name)
    known = cls.options(use)
    for option in options.keys() - known.keys():
        takers = [other.__name__ for other in BASES.values() if option in other.options(use)]
        raise ValueError(f"{option} is an option of {' or '.join(sorted(takers))}, not of {cls.__name__}")
    return cls(**{f.name: options.get(name, default_of(f, use)) for name, f in known.items()})


def default_of(f: Field, use: str) -> Any:
    """The default of an option in attention or MLP."""
    return f.metadata.get("mlp_default", f.default) if use == "mlp" else f.default


def choices_of(f: Field) -> list[str]:
    """The values of an option that has choices, otherwise none."""
    return f.metadata.get("choices", list)()


USES = ("attention", "mlp")


@dataclass(frozen=True)
class Basis:
    """A family of functions.

    A subclass defines the properties `num_coefficients`, P; `flops`, the FLOPs of one function at one point as its
    paper counts them, where cos, exp and the like count nothing; and `formula`, phi(x) in plain text. It also defines
    `features` if phi is linear in theta (then `linear` is True), or `__call__` if it is not.
    Raises: ValueError for an option of another type, below its minimum or not among its choices.
    """

    name: ClassVar[str]
    linear: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        # A class that redefines phi does not inherit the kernel of another phi.
        for kernel, phi in (("kernel", "features"), ("edge_function", "__call__")):
            of_kernel, of_phi = (next(i for i, c in enumerate(cls.__mro__) if n in vars(c)) for n in (kernel, phi))
            if of_phi < of_kernel:
                setattr(cls, kernel, None)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, float) and not isinstance(value, (int, float)):
                raise ValueError(f"{f.name} must be a number, not {value}")
            if isinstance(f.default, tuple):
                value = _numbers(f, value)
                object.__setattr__(self, f.name, value)
                if "increasing" in f.metadata and not -math.inf < value[0] < value[1] < math.inf:
                    raise ValueError(f"{f.name} must be finite and increasing, not {value}")
            elif isinstance(f.default, int):
                _check_integer(f.name, value, f.metadata.get("minimum"))
            choices = choices_of(f)
            if choices and value not in choices:
                raise ValueError(f"unknown {f.name} '{value}'; there are: {', '.join(sorted(choices))}")

    @property
    def edge_function(self) -> tuple[str, int, int] | None:
        """What the kernels of kan_basis.edges call phi: its name and two degrees. None if they do not know phi."""
        return None

    def scaled(self, theta: Tensor, scale: Tensor) -> Tensor:
        """Coefficients of scale phi: theta (..., P), scale (...) -> (..., P). Bases with an `edge_function` have it."""
        return theta * scale.unsqueeze(-1)

    @classmethod
    def options(cls, use: str) -> dict[str, Field]:
        """The fields by the names that they have as options of a model's attention or MLP."""
        if use == "mlp":
            return {f"mlp_{f.name}": f for f in fields(cls)}
        used = (f for f in fields(cls) if "mlp_only" not in f.metadata)
        return {f.metadata.get("attention_name", f.name): f for f in used}

    @property
    def kernel(self) -> tuple[str, int, float, float] | None:
        """(name, order, low, step), from which the kernels of attention compute the features; None: they cannot.

        Features of the names "radial" and "spline" are functions of (x - low) step.
        """
        return None

    @property
    def working_set(self) -> int:
        """Roughly how many elements exist for each x while its features are built."""
        return self.num_coefficients

    def __call__(self, x: Tensor, theta: Tensor) -> Tensor:
        """phi(x; theta): x (...) and theta (..., P) broadcast against each other without P.

        Returns: the promoted dtype of x and theta; computed in float32 at least.
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
        """The functions that a linear basis sums: (...) -> (..., P), with P at `dim` < 0 of the result."""
        raise TypeError(f"the {self.name} basis is not linear in its coefficients: it has no features")

    def published_std(self, fan_in: int) -> float:
        """Standard deviation of the coefficients in the published initialisation."""
        return 1.0

    @torch.no_grad()
    def reset_(self, theta: Tensor, init: str = "published", fan_in: int = 1) -> Tensor:
        """Fill theta in place with random coefficients.

        published: what the papers describe, N(0, published_std^2).
        scaled: the sum of `fan_in` functions of independent x ~ N(0, 1) has variance 1.
        Raises: ValueError for an unknown init, fan_in < 1, or scaled where the functions are 0 for x ~ N(0, 1).
        """
        check_init(init, fan_in)
        if init == "published":
            return theta.normal_(std=self.published_std(fan_in))
        energy = self.num_coefficients * mean_square(self.features)
        if energy == 0:
            raise ValueError(f"init 'scaled' needs functions that x ~ N(0, 1) reaches, unlike those of {self}")
        return theta.normal_(std=1 / math.sqrt(fan_in * energy))

    @torch.no_grad()
    def zero_(self, theta: Tensor) -> Tensor:
        """Fill theta in place with coefficients of the function that is 0 and can be trained."""
        return theta.zero_()

    def activation(self, num_groups: int, target: str, num_channels: int | None = None, **factory) -> nn.Module:
        """A learnable activation that starts as `target`, with one function of this basis per group of channels."""
        from .group import GroupBasis

        return GroupBasis(self, num_groups, target, num_channels, **factory)


def mean_square(f, points: int = 4001) -> float:
    """E[f(x)^2] for x ~ N(0, 1), by quadrature; f takes and returns float64 tensors (points, ...)."""
    x = torch.linspace(-8, 8, points, dtype=torch.float64, device="cpu")
    density = torch.exp(-x * x / 2)
    y = f(x)
    weights = density.reshape(-1, *[1] * (y.ndim - 1))
    return ((weights * y * y).sum(0) / density.sum()).mean().item()


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def count_groups(num_groups: int, num_channels: int | None) -> int:
    """The number of groups of channels, where 0 or less stands for one per channel.

    Raises: ValueError if the number of channels is needed and missing, or does not divide into the groups.
    """
    if num_groups <= 0 and num_channels is None:
        raise ValueError("one function per channel (num_groups <= 0) needs num_channels")
    groups = num_groups if num_groups > 0 else num_channels
    if num_channels is not None and num_channels % groups:
        raise ValueError(f"{num_channels} channels do not divide into {groups} groups")
    return groups


def check_init(init: str, fan_in: int = 1) -> None:
    """Raises: ValueError for an unknown init or fan_in < 1."""
    if init not in INITS:
        raise ValueError(f"unknown init '{init}'; there are: {', '.join(INITS)}")
    check_positive(fan_in=fan_in)


def check_positive(**values: int) -> None:
    """Raises: ValueError that names the first value that is not an integer of at least 1."""
    for name, value in values.items():
        _check_integer(name, value, 1)


def _check_integer(name: str, value: Any, minimum: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, not {value}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {value}")


def _numbers(f: Field, value: Any) -> tuple:
    """A tuple option from a list or tuple. Raises: ValueError unless it has as many numbers as the default."""
    of_integers = isinstance(f.default[0], int)
    if (
        not isinstance(value, (list, tuple))
        or len(value) != len(f.default)
        or not all(isinstance(v, int if of_integers else (int, float)) for v in value)
    ):
        kind = "integers" if of_integers else "numbers"
        raise ValueError(f"{f.name} must be {len(f.default)} {kind}, not {value}")
    return tuple(value) if of_integers else tuple(map(float, value))


def _shape(default: Any) -> Any:
    """What two options of one name must have in common: the type, of a tuple also the length."""
    return [type(v) for v in default] if isinstance(default, tuple) else type(default)
