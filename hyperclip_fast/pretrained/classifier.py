"""A zero-shot head from a classifier alone: a closed-form map from class names to the rows of its last Linear.

The rows w_c of a trained classifier are prototypes of its classes in the space of image features. Ridge regression in a
Gaussian kernel (Nystrom's, with every name as an anchor) maps text features to prototypes, and a new name gets a
prototype, too:

    K = exp(gamma (X . anchors - 1)),  A = argmin |K A - Y|^2 + ridge tr(A^T K_aa A)

X are the text features of all names and definitions, and Y their prototypes: w_c, less their mean and at length 1; of a
set of classes the members' mean. The first E right singular vectors of the prototypes project features and prototypes
to E dimensions. No image is looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperclip_fast.pretrained.class_texts import ClassTexts, imagenet_texts
from hyperclip_fast.pretrained.parts import Parts
from hyperclip_fast.pretrained.timm import as_image_tower, load_timm, preprocessing_fields
from hyperclip_fast.text import TextTower


@dataclass(frozen=True)
class ClassifierFit:
    """What the closed form gives.

    Args:
        anchors: (N, E_text), of length 1.
        weight: (E, N), from the anchors' kernel to class embeddings.
        projection: (E, D), from image features to embeddings.
    """

    anchors: Tensor
    weight: Tensor
    projection: Tensor


def fit_classifier(
    rows: Tensor,
    texts: Sequence[ClassTexts],
    encode: Callable[[Sequence[str]], Tensor],
    embed_dim: int,
    gamma: float = 6.0,
    ridge: float = 1.0,
) -> ClassifierFit:
    """Fit class embeddings and image projection to a classifier's rows, in float64.

    Args:
        rows: (C, D), the weights of its last Linear.
        texts: what classes and sets of them are called.
        encode: texts to text features (n, E_text).
        embed_dim: E, at most C and D.
        gamma: of the kernel.
        ridge: greater than 0.

    Raises:
        ValueError: for an E out of range, a ridge that is not positive, or members that are no classes.
    """
    if not 0 < embed_dim <= min(rows.shape):
        raise ValueError(f"embed_dim must lie in [1, {min(rows.shape)}] for rows {tuple(rows.shape)}, got {embed_dim}")
    if not ridge > 0:
        raise ValueError(f"ridge must be greater than 0, got {ridge}")
    if wrong := [each for each in texts if not each.members or max(each.members) >= len(rows)]:
        raise ValueError(f"texts must name some of {len(rows)} classes each, got {wrong[0]}")
    prototypes = F.normalize(rows.double() - rows.double().mean(0), dim=-1)
    projection = torch.linalg.svd(prototypes, full_matrices=False)[2][:embed_dim]
    means: dict[str, list[Tensor]] = {}
    for each in texts:
        for text in (*each.names, *each.definitions):
            means.setdefault(text, []).append(prototypes[list(each.members)].mean(0))
    wanted = torch.stack([torch.stack(parts).mean(0) for parts in means.values()]) @ projection.T
    features = F.normalize(encode(list(means)).double(), dim=-1)
    names = {name for each in texts for name in each.names}
    anchors = features[torch.tensor([text in names for text in means])]
    kernel = torch.exp(gamma * (features @ anchors.T - 1))
    among = torch.exp(gamma * (anchors @ anchors.T - 1))
    weight = torch.linalg.solve(kernel.T @ kernel + ridge * among, kernel.T @ wanted)
    return ClassifierFit(anchors.float(), weight.T.float().contiguous(), projection.float().contiguous())


def classifier_parts(
    classifier: str,
    text: TextTower,
    weights: str | bool = True,
    texts: Sequence[ClassTexts] | None = None,
    wordnet: str | Path | None = None,
    ridge: float = 1.0,
    embed_dim: int = 256,
    gamma: float = 6.0,
) -> Parts:
    """What a HyperCLIP takes over of a timm classifier: its features, and a zero-shot head in closed form.

    Args:
        classifier: a timm name, with a pretrained tag if wished.
        text: the text tower that reads names.
        weights: see `load_timm`.
        texts: what the classes are called; None: ImageNet's lemmas and definitions, which timm has.
        wordnet: folder of WordNet 3.0, whose hypernyms are added to ImageNet's classes.
        ridge: of the regression.
        embed_dim: E.
        gamma: of the kernel.

    Raises:
        ValueError: for weights that do not fit, classes without texts, or a classifier that is not one Linear.
    """
    stock = load_timm(classifier, weights)
    head = stock.get_classifier()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"classifier must end in one Linear, {classifier} ends in {type(head).__name__}")
    texts = imagenet_texts(head.out_features, wordnet) if texts is None else texts
    with torch.no_grad():
        fit = fit_classifier(head.weight, texts, text.encode, embed_dim, gamma, ridge)
    head.weight, head.bias = nn.Parameter(fit.projection), nn.Parameter(torch.zeros(embed_dim))
    zeros = {"bias": torch.zeros(embed_dim), "linear": torch.zeros(embed_dim, text.dim)}
    fields = {"text_head": "kernel", "text_anchors": len(fit.anchors), "text_gamma": gamma, "text_dim": text.dim}
    return Parts(
        as_image_tower(classifier, stock, embed_dim),
        {**fields, **preprocessing_fields(stock)},
        text,
        text_head={"anchors": fit.anchors, "weight": fit.weight, **zeros},
    )
