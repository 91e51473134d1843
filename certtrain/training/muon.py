"""Muon for a whole network: torch's takes matrices alone, so the other parameters go to AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from certtrain.affine_layers import affine_weights, classifier_tensors
from certtrain.config.arguments import optimizer_arguments
from certtrain.errors import UsageError

Group = dict[str, Any]  # parameters, under "params", and what an optimizer is to do with them

BY = "optimizer"  # of a group: the name of the class of torch.optim that takes its parameters


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for groups that `groups_for_muon` has marked so, AdamW for the others, one learning rate for both.

    (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".) So that one rate serves both,
    Muon's steps have the size of AdamW's unless `adjust_lr_fn` says otherwise (Liu et al. 2025, arXiv 2502.16982).

    Args:
        groups: of parameters, each with BY.
        lr: the learning rate.
        arguments: Muon's; `weight_decay` is AdamW's, too.
    """

    def __init__(self, groups: Iterable[Group], lr: float = 1e-3, **arguments: Any) -> None:
        arguments = {"adjust_lr_fn": "match_rms_adamw", **arguments}
        decay = {"weight_decay": arguments["weight_decay"]} if "weight_decay" in arguments else {}
        of = {"Muon": arguments, "AdamW": optimizer_arguments(torch.optim.AdamW, decay)}
        groups = list(groups)
        self._inner: dict[str, torch.optim.Optimizer] = {}
        for name, settings in of.items():
            own = [group for group in groups if group[BY] == name]
            if own:
                self._inner[name] = getattr(torch.optim, name)(own, lr=lr, **settings)
        super().__init__([group for inner in self._inner.values() for group in inner.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override] # returns no loss
        """A step of each; `closure` is not supported."""
        assert closure is None
        for name, inner in self._inner.items():
            inner.state = self.state  # shared with what was loaded last, too
            inner.param_groups = [group for group in self.param_groups if group[BY] == name]
            inner.step()


def groups_for_muon(groups: Sequence[Group], model: nn.Module) -> list[Group]:
    """`groups`, each in two: the weights of hidden linear layers, and what Muon is not for: the classifier among them.

    Raises:
        UsageError: there is no hidden linear layer.
    """
    names, tensors = classifier_tensors(model), dict(model.named_parameters(remove_duplicate=False))
    weights = (owner._parameters.get(name) for owner, name in affine_weights(model))  # None: a parametrization's
    hidden = {id(weight) for weight in weights if weight is not None and weight.dim() == 2}
    hidden -= {id(tensors[name]) for name in names if name in tensors}
    if not hidden:
        raise UsageError("optimizer.name: Muon is for weights of hidden linear layers, of which the network has none")
    split: list[Group] = []
    for group in groups:
        for name in ("Muon", "AdamW"):
            own = [p for p in group["params"] if (id(p) in hidden) == (name == "Muon")]
            split += [{**group, "params": own, BY: name}] if own else []
    return split
