"""Vision transformers, Pre-LN, Post-LN or without normalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certtrain.errors import UsageError, unknown
from certtrain.models.layers import require_sizes


class TokenBatchNorm(nn.Module):
    """BatchNorm of each feature of tokens (B, T, E)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class CenteredNorm(nn.Module):
    """LayerNorm "without variance": each token's mean is subtracted, nothing divided. An affine map.

    Bounds pass it with hardly a loss, where a division by a deviation that may be small widens them without limit.
    (Shi et al. 2020, Robustness Verification for Transformers, arXiv 2002.06622, section 4.)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) * self.weight + self.bias


class SelfAttention(nn.Module):
    """Each token's average of all tokens' values, by softmax of query times key: (B, T, E) -> (B, T, E)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention, then x + MLP; each branch normalized where it begins (pre), or the sum (post)."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, norms: Sequence[nn.Module], *, norm_first: bool) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.attention_norm, self.mlp_norm = norms
        self.norm_first = norm_first

    def forward(self, x: Tensor) -> Tensor:
        for branch, norm in ((self.attention, self.attention_norm), (self.mlp, self.mlp_norm)):
            x = x + branch(norm(x)) if self.norm_first else norm(x + branch(x))
        return x


class PatchEmbedding(nn.Module):
    """Images (B, C, H, W) as tokens (B, T, E): a strided convolution, a learned position, a class token if wished.

    shifted: the image is seen five times over, moved by half a patch along each diagonal as well. (Shifted patch
    tokenization, Lee et al. 2021, arXiv 2112.13492, without its LayerNorm.)
    """

    def __init__(self, image_shape: Sequence[int], patch: int, width: int, *, class_token: bool, shifted: bool) -> None:
        super().__init__()
        channels, height, across = image_shape
        tokens = (height // patch) * (across // patch)
        self.offset, self.shifted = patch // 2, shifted
        self.projection = nn.Conv2d(channels * (5 if shifted else 1), width, patch, patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width)) if class_token else None
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens + int(class_token), width))

    def forward(self, x: Tensor) -> Tensor:
        if self.shifted:
            height, across = x.shape[2:]
            wide = F.pad(x, [self.offset] * 4)
            moved = [
                wide[:, :, top : top + height, left : left + across]
                for top in (0, 2 * self.offset)
                for left in (0, 2 * self.offset)
            ]
            x = torch.cat([x, *moved], 1)
        tokens = self.projection(x).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], 1)
        return tokens + self.position


class FirstToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class MeanToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


POOLS: dict[str, Callable[[], nn.Module]] = {"mean": MeanToken, "token": FirstToken, "flatten": nn.Flatten}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "layer-no-variance": CenteredNorm,
    "batch": TokenBatchNorm,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
PLACES = ("pre", "post", "none")


def vit(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    depth: int = 2,
    width: int = 64,
    heads: int = 4,
    patch: int | None = None,
    mlp_width: int | None = None,
    norm: str = "pre",
    norm_kind: str = "layer",
    activation: str = "relu",
    pool: str = "mean",
    shifted_patches: bool = False,
) -> nn.Sequential:
    """A vision transformer. (Dosovitskiy et al. 2021, arXiv 2010.11929; norms: Xiong et al. 2020, arXiv 2002.04745.)

    Args:
        depth, width, heads: blocks, features of a token, and among how many heads they are divided.
        patch: side of a patch; by default 2 for images below 16 pixels, 4 below 64, 8 from there.
        mlp_width: hidden features of a block's MLP, by default twice `width`.
        norm: where blocks normalize: pre (and once behind the last block), post, none.
        norm_kind: layer, layer-no-variance, batch.
        activation: relu, gelu.
        pool: what is classified: the mean of all tokens, an extra token, or all of them (flatten).
        shifted_patches: see `PatchEmbedding`.
    """
    if norm not in PLACES:
        raise unknown("place of the norms", norm, PLACES)
    if norm_kind not in NORMS:
        raise unknown("kind of norm", norm_kind, NORMS)
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    if pool not in POOLS:
        raise unknown("pool", pool, POOLS)
    height, across = image_shape[1:]
    if patch is None:
        patch = 2 if height < 16 else 4 if height < 64 else 8
    hidden = 2 * width if mlp_width is None else mlp_width
    require_sizes("vit", depth=depth, width=width, heads=heads, patch=patch, mlp_width=hidden)
    if height % patch or across % patch:
        raise UsageError(f"vit: patches of {patch} pixels do not divide images of {height}×{across}")
    tokens = (height // patch) * (across // patch)
    if width % heads:
        raise UsageError(f"vit: {heads} heads do not divide a width of {width}")

    def normalization() -> nn.Module:
        return nn.Identity() if norm == "none" else NORMS[norm_kind](width)

    def block() -> nn.Module:
        mlp = nn.Sequential(nn.Linear(width, hidden), ACTIVATIONS[activation](), nn.Linear(hidden, width))
        norms = [normalization(), normalization()]
        return Block(SelfAttention(width, heads), mlp, norms, norm_first=norm != "post")

    return nn.Sequential(
        PatchEmbedding(image_shape, patch, width, class_token=pool == "token", shifted=shifted_patches),
        *(block() for _ in range(depth)),
        normalization() if norm == "pre" else nn.Identity(),
        POOLS[pool](),
        nn.Linear(width * (tokens if pool == "flatten" else 1), num_classes),
    )
