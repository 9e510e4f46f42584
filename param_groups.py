"""Kinds of parameters: parameter groups of the optimizer, and gradient norms for the log."""

import re

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.utils import get_total_norm

# Parameters of learned univariate functions: coefficients of any basis, and scales.
_FUNCTION = re.compile(
    r"(.*\.)?(weight_numerator|weight_denominator|weight_coefficients|coefficients|scale_base|scale_basis|output_scale)"
)
# A parameter is of the first kind whose pattern is found in its name.
KINDS = {
    "karat": re.compile(r"(^|\.)operator\.|^karat\."),
    "kan": _FUNCTION,
    "head": re.compile(r"^(head|head_dist|fc|classifier)\."),
    "attention": re.compile(r"\.attn\."),
    "mlp": re.compile(r"\.mlp\."),
    "embed_norm": re.compile("embed|_token$|norm"),
    "other": re.compile(""),
}


def kind(name: str) -> str:
    """karat (all parameters of an operator), kan (functions elsewhere), head, attention, mlp, embed_norm or other."""
    return next(kind for kind, pattern in KINDS.items() if pattern.search(name))


def optimizer_groups(
    model: nn.Module, weight_decay: float, decay_functions: bool, karat_lr_scale: float | None = None
) -> list[dict]:
    """Parameter groups with weight decay on matrices only: not on biases, norms, embeddings and learned functions.

    With `decay_functions` learned functions decay as well.

    With `karat_lr_scale` the operators of Kolmogorov-Arnold attention form further groups, after the others. Their
    learning rate is always that multiple of the others' rate: timm's schedulers multiply by a group's lr_scale.
    """
    no_decay = set(getattr(model, "no_weight_decay", set)())
    if not decay_functions:
        no_decay |= {name for name, _ in model.named_parameters() if _FUNCTION.fullmatch(name)}
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_decay)
    if karat_lr_scale is None:
        return groups
    operators = {p for name, p in model.named_parameters() if kind(name) == "karat"}
    others = [{**group, "params": [p for p in group["params"] if p not in operators]} for group in groups]
    for group in groups:
        group |= {"params": [p for p in group["params"] if p in operators], "lr_scale": karat_lr_scale}
    return [group for group in others + groups if group["params"]]


class GradNorms:
    """Norms of the gradients by kind of parameter, kept on the device until `last` or `mean` reads them.

    In a distributed run all processes have the same gradients, hence the same norms.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, list[nn.Parameter]] = {}
        trainable = [(kind(name), p) for name, p in model.named_parameters() if p.requires_grad]
        for name, parameter in sorted(trainable, key=lambda pair: list(KINDS).index(pair[0])):
            self.parameters.setdefault(name, []).append(parameter)
        self.device = trainable[0][1].device
        self.reset()

    def reset(self) -> None:
        self.norms = torch.zeros(len(self.parameters), device=self.device)
        # Sum of the norms of each kind, then the number of steps.
        self.sums = torch.zeros(len(self.parameters) + 1, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def update(self) -> None:
        """Measure the gradients of this optimizer step; a step with a gradient that is not finite counts in no mean."""
        gradients = [[p.grad for p in group if p.grad is not None] for group in self.parameters.values()]
        self.norms = torch.stack([get_total_norm(group).to(self.device, torch.float32) for group in gradients])
        step = torch.cat((self.norms, self.norms.new_ones(1))).double()
        self.sums += torch.where(self.norms.isfinite().all(), step, 0.0)

    def last(self) -> dict[str, float]:
        return dict(zip(self.parameters, self.norms.tolist()))

    def mean(self) -> dict[str, float]:
        *sums, steps = self.sums.tolist()
        return {kind: total / max(1.0, steps) for kind, total in zip(self.parameters, sums)}
