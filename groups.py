"""Parameters by what they are: groups of the optimizer, and gradient norms for the log."""

import re

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

_FUNCTION = re.compile(
    r"(.*\.)?(weight_numerator|weight_denominator|weight_coefficients|coefficients|scale_base|scale_basis|output_scale)"
)
# the first that matches, by search
KINDS = {
    "karat": re.compile(r"(^|\.)operator\.|^karat\."),
    "kan": _FUNCTION,
    "head": re.compile(r"^(head|head_dist|fc|classifier)\."),
    "attention": re.compile(r"\.attn\."),
    "mlp": re.compile(r"\.mlp\."),
    "embed_norm": re.compile("embed|_token$|norm"),
    "other": re.compile(""),
}


def is_function(name: str) -> bool:
    """Whether a parameter belongs to a learned univariate function: coefficients of any basis, and scales."""
    return _FUNCTION.fullmatch(name) is not None


def kind(name: str) -> str:
    """karat (all of an operator), kan (functions elsewhere), head, attention, mlp, embed_norm or other."""
    return next(kind for kind, pattern in KINDS.items() if pattern.search(name))


def optimizer_groups(
    model: nn.Module, weight_decay: float, decay_functions: bool, karat_lr_scale: float | None = None
) -> list[dict]:
    """Weight decay on matrices; none on biases, norms, embeddings, nor (unless `decay_functions`) on learned functions.

    With `karat_lr_scale` the operators of Kolmogorov-Arnold attention are groups of their own, behind the others, whose learning rate is at all times
    so many times that of the others: timm's schedulers multiply by a group's lr_scale.
    """
    no_decay = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if not decay_functions:
        no_decay |= {name for name, _ in model.named_parameters() if is_function(name)}
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_decay)
    if karat_lr_scale is None:
        return groups
    operators = {id(p) for name, p in model.named_parameters() if kind(name) == "karat"}
    split = [
        {
            **group,
            "params": [p for p in group["params"] if (id(p) in operators) == own],
            **({"lr_scale": karat_lr_scale} if own else {}),
        }
        for own in (False, True)
        for group in groups
    ]
    return [group for group in split if group["params"]]


class GradNorms:
    """Norms of the gradients by kind of parameter, kept on the device until `last` or `mean` is asked for.

    In a distributed run gradients are the same in all processes, and so are these.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(kind(name), p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = {
            own: [p for other, p in named if other == own] for own in KINDS if any(other == own for other, _ in named)
        }
        self.device = named[0][1].device
        self.reset()

    def reset(self) -> None:
        self.norms = torch.zeros(len(self.parameters), device=self.device)
        self.sums = torch.zeros(
            len(self.parameters) + 1, dtype=torch.float64, device=self.device
        )  # of each kind, and the number of steps

    @torch.no_grad()
    def update(self) -> None:
        """Measure the gradients of this optimizer step; where one is not finite, the step counts in no mean."""
        self.norms = torch.stack(
            [self._norm([p.grad for p in parameters if p.grad is not None]) for parameters in self.parameters.values()]
        )
        step = torch.cat((self.norms, self.norms.new_ones(1))).double()
        self.sums += torch.where(self.norms.isfinite().all(), step, 0.0)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        norms = torch._foreach_norm(gradients) if gradients else [torch.zeros((), device=self.device)]
        return torch.linalg.vector_norm(torch.stack(norms).float())

    def last(self) -> dict[str, float]:
        return dict(zip(self.parameters, self.norms.tolist()))

    def mean(self) -> dict[str, float]:
        *sums, steps = self.sums.tolist()
        return {kind: total / max(1.0, steps) for kind, total in zip(self.parameters, sums)}
