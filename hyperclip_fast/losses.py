"""SigLIP's sigmoid loss (arXiv 2303.15343) over the tasks of a mixed batch."""

from torch import Tensor

from hyperclip_fast.extras import require


def siglip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """open_clip's SigLipLoss within each task, averaged over the tasks.

    An image is adapted to its own task and will be scored against that task's classes only, so other tasks' classes are
    no negatives: some of them may even carry its name.

    Args:
        image_features: (G, K, E) of length 1; image k of task g shows class k.
        text_features: (G, K, E) of length 1.
        logit_scale: the factor.
        logit_bias: added to the scaled similarities.

    Returns:
        The mean over tasks of the loss summed over classes and averaged over images, as open_clip does.

    Raises:
        ValueError: for other shapes.
    """
    if image_features.dim() != 3 or image_features.shape != text_features.shape:
        raise ValueError(
            f"image_features and text_features must be (G, K, E), got {tuple(image_features.shape)} and "
            f"{tuple(text_features.shape)}"
        )
    loss = require("open_clip.loss", "clip").SigLipLoss()
    pairs = zip(image_features, text_features)
    return sum(loss(images, texts, logit_scale, logit_bias) for images, texts in pairs) / len(image_features)
