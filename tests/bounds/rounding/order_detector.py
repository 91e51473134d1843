"""A network whose class depends on the order in which it sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OrderDetector(nn.Module):
    """Class 1 where 2^24 + x - 2^24, summed in an order in which x survives, is more than one half.

    After Jia and Rinard, Exploiting Verified Neural Networks via Floating Point Numerical Error (2021), and Szász,
    Bánhelyi and Jelasity, No Soundness in the Real World (ICML 2025).
    """

    def __init__(self, order: tuple[int, int, int]) -> None:
        super().__init__()
        self.hidden, self.sum, self.logits = nn.Linear(1, 3), nn.Linear(3, 1, bias=False), nn.Linear(1, 2)
        large = 2.0**24
        with torch.no_grad():
            self.hidden.weight.copy_(torch.tensor([[0.0], [1.0], [0.0]])[list(order)])
            self.hidden.bias.copy_(torch.tensor([large, 0.0, large])[list(order)])
            self.sum.weight.copy_(torch.tensor([[1.0, 1.0, -1.0]])[:, list(order)])
            self.logits.weight.copy_(torch.tensor([[-1.0], [1.0]]))
            self.logits.bias.copy_(torch.tensor([0.5, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(F.relu(self.sum(F.relu(self.hidden(x)))))
