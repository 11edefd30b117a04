"""Text head: text features (..., E_text) to class embeddings (..., E), before they are brought to length 1.

    linear     x W^T
    kernel     exp(gamma (x^ . anchors - 1)) W^T + x^ V^T + c, where x^ is x at length 1
    identity   x

The kernel is Nystrom's layer of a Gaussian kernel between texts of length 1, |x^ - a|^2 = 2 - 2 x^ . a. It is what a
closed form from names to a classifier's rows needs, see `pretrained.classifier`; a Linear underfits there. V starts at
0. In training it tells apart texts that are far from all anchors, whose kernels are alike.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT_HEADS = ("linear", "kernel", "identity")


class KernelHead(nn.Linear):
    """A Linear over Gaussian similarities to anchors; with new anchors, random ones, until a fit replaces them.

    Args:
        text_dim: E_text.
        embed_dim: E.
        anchors: N.
        gamma: how fast similarity falls with distance: exp(-gamma / 2 |x - a|^2).
    """

    anchors: Tensor

    def __init__(self, text_dim: int, embed_dim: int, anchors: int, gamma: float):
        super().__init__(anchors, embed_dim)
        self.gamma = gamma
        self.register_buffer("anchors", F.normalize(torch.randn(anchors, text_dim), dim=-1))  # (N, E_text)
        self.linear = nn.Parameter(torch.zeros(embed_dim, text_dim))  # V

    def forward(self, x: Tensor) -> Tensor:
        """(..., E_text) -> (..., E)."""
        x = F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))  # padding is 0
        kernel = torch.exp(self.gamma * (F.linear(x, self.anchors) - 1))
        return super().forward(kernel) + F.linear(x, self.linear)

    def extra_repr(self) -> str:
        """The sizes, for print(model)."""
        return f"{self.anchors.shape[1]}, {self.out_features}, anchors={self.in_features}, gamma={self.gamma}"


def create_text_head(kind: str, text_dim: int, embed_dim: int, anchors: int = 0, gamma: float = 6.0) -> nn.Module:
    """The head of a kind.

    Args:
        kind: one of TEXT_HEADS.
        text_dim: E_text.
        embed_dim: E.
        anchors: N of "kernel"; 0 for the others.
        gamma: of "kernel".

    Raises:
        ValueError: for another kind, or sizes that it does not go with.
    """
    if kind not in TEXT_HEADS:
        raise ValueError(f"text_head must be one of {TEXT_HEADS}, got {kind!r}")
    if (anchors > 0) != (kind == "kernel") or anchors < 0:
        wanted = "at least 1" if kind == "kernel" else "0"
        raise ValueError(f"text_anchors must be {wanted} with text_head {kind}, got {anchors}")
    if not gamma > 0:
        raise ValueError(f"text_gamma must be greater than 0, got {gamma}")
    if kind == "kernel":
        return KernelHead(text_dim, embed_dim, anchors, gamma)
    if kind == "linear":
        return nn.Linear(text_dim, embed_dim, bias=False)
    if text_dim != embed_dim:
        raise ValueError(f"embed_dim must be text_dim = {text_dim} with text_head identity, got {embed_dim}")
    return nn.Identity()
