"""HyperNetwork: class-name embeddings of a task -> the row of norm parameters that adapts an encoder to it.

    row = base + head(pool(transformer(class embeddings)))        (HyperCLIP, arXiv 2412.16777, section 3)

The transformer reads a *set*: no positions, so the order of names does not matter, and padded names are masked out.
Two read-outs: pool="cross", one learned query a norm layer that attends to the set, and pool="mean", the paper's
figure: bottleneck, average over the set, Linear. The last layer starts at zero: a new hypernetwork yields the base row,
bit for bit.
"""

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hyperclip_fast.norm_params import NormParams, NormSpec

POOLS = ("cross", "mean")


def pad_classes(class_embeddings: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack the (K_t, E) class embeddings of T tasks to (T, K, E), and a mask (T, K) that is True on real classes.

    Raises:
        ValueError: if there is no task, or one without classes.
    """
    if not class_embeddings or any(len(task) == 0 for task in class_embeddings):
        raise ValueError(f"class_embeddings must be non-empty tasks, got sizes {[len(t) for t in class_embeddings]}")
    padded = nn.utils.rnn.pad_sequence(list(class_embeddings), batch_first=True)
    sizes = torch.tensor([len(task) for task in class_embeddings], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]


class CrossPool(nn.Module):
    """One learned query a norm layer attends to the set of classes; a bottleneck and a Linear of its own write its row.

    Args:
        spec: the layers.
        width: of the hypernetwork.
        bottleneck: width of the last hidden layer.
        num_heads: attention heads.
    """

    def __init__(self, spec: NormSpec, width: int, bottleneck: int, num_heads: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(spec.names), width) * width**-0.5)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.bottleneck = nn.Linear(width, bottleneck)
        heads = [nn.Linear(bottleneck, size) for size in spec.layer_sizes]
        for head in heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (T, K, width), mask (T, K) or None -> (T, P)."""
        queries = self.queries.expand(len(x), -1, -1)
        ignored = None if mask is None else ~mask
        read = queries + self.attn(queries, x, x, key_padding_mask=ignored, need_weights=False)[0]
        hidden = nn.functional.gelu(self.bottleneck(self.norm(read)))
        return torch.cat([head(h) for head, h in zip(self.heads, hidden.unbind(1))], dim=1)


class MeanPool(nn.Module):
    """The paper's figure: bottleneck, average over the set of classes, one Linear to the whole row.

    Args:
        spec: the layers.
        width: of the hypernetwork.
        bottleneck: width of the last hidden layer.
    """

    def __init__(self, spec: NormSpec, width: int, bottleneck: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.bottleneck = nn.Linear(width, bottleneck)
        self.head = nn.Linear(bottleneck, spec.num_params)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (T, K, width), mask (T, K) or None -> (T, P)."""
        hidden = nn.functional.gelu(self.bottleneck(self.norm(x)))
        if mask is None:
            return self.head(hidden.mean(1))
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


class HyperNetwork(nn.Module):
    """Class-name embeddings (T, K, E) -> NormParams with T rows.

    Args:
        spec: which layers, how wide: an encoder's `norm_spec`.
        text_dim: E, width of the class embeddings.
        width: of the transformer.
        depth: blocks of the transformer.
        num_heads: attention heads.
        pool: "cross" or "mean", see the module's text.
        bottleneck: width of the last hidden layer.
        learned_tokens: a control: this many learned tokens stand in place of the class embeddings, so that every
            task gets the same row and only the capacity of the modulation is left; 0 for the method itself.

    Raises:
        ValueError: for another pool, or a width that the heads do not divide.
    """

    def __init__(
        self,
        spec: NormSpec,
        text_dim: int,
        width: int = 256,
        depth: int = 2,
        num_heads: int = 4,
        pool: str = "cross",
        bottleneck: int = 64,
        learned_tokens: int = 0,
    ):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {pool!r}")
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads = {num_heads}, got {width}")
        self.spec, self.text_dim = spec, text_dim
        self.embed = nn.Linear(text_dim, width) if not learned_tokens else None
        self.tokens = nn.Parameter(torch.randn(1, learned_tokens, width)) if learned_tokens else None
        self.blocks = nn.ModuleList(Block(width, num_heads, qkv_bias=True) for _ in range(depth))
        self.pool: CrossPool | MeanPool
        if pool == "cross":
            self.pool = CrossPool(spec, width, bottleneck, num_heads)
        else:
            self.pool = MeanPool(spec, width, bottleneck)

    def forward(
        self, class_embeddings: Tensor, mask: Tensor | None = None, base: NormParams | None = None
    ) -> NormParams:
        """The rows of T tasks.

        Args:
            class_embeddings: (T, K, E).
            mask: (T, K) bool, True on real classes, False on padding; None: all are real.
            base: the encoder's `base_params`, to which the generated difference is added; None: weights 1 and
                biases 0, as new norm layers hold.

        Raises:
            ValueError: for another shape, a base of another spec, or a task without classes (seen in a CPU mask only:
                looking at another would synchronise the device).
        """
        self._check(class_embeddings, mask, base)
        if self.embed is not None:
            x = self.embed(class_embeddings)
        elif self.tokens is not None:
            x, mask = self.tokens.expand(len(class_embeddings), -1, -1), None
        attn_mask = None if mask is None else mask[:, None, None, :]
        for block in self.blocks:
            x = block(x, attn_mask=attn_mask)
        difference = self.pool(x, mask)
        return NormParams(self.spec, self._base_row(base, difference) + difference)

    def _check(self, class_embeddings: Tensor, mask: Tensor | None, base: NormParams | None) -> None:
        if class_embeddings.dim() != 3 or class_embeddings.shape[2] != self.text_dim or not class_embeddings.shape[1]:
            raise ValueError(
                f"class_embeddings must be (T, K, E) with K >= 1 and E = {self.text_dim}, "
                f"got shape {tuple(class_embeddings.shape)}"
            )
        if base is not None and base.spec != self.spec:
            raise ValueError(f"base must follow the hypernetwork's spec, P = {self.spec.num_params}, got {base}")
        if mask is None:
            return
        if mask.shape != class_embeddings.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be (T, K) = {tuple(class_embeddings.shape[:2])} and bool, "
                f"got {tuple(mask.shape)}, {mask.dtype}"
            )
        if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not mask.any(1).all():
            raise ValueError(f"mask must leave every task a class, got {mask.sum(1).tolist()} classes")

    def _base_row(self, base: NormParams | None, like: Tensor) -> Tensor:
        if base is not None:
            return base.table
        kinds = (float(key.endswith(".weight")) for key in self.spec.keys)
        pieces = [like.new_full((size,), kind) for size, kind in zip(self.spec.sizes, kinds)]
        return torch.cat(pieces)
