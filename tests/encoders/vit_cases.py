"""Small VisionTransformers, one for each option of timm's, and stock models that hold one task's row."""

import copy
from functools import partial

import torch
from timm.layers import GluMlp, LayerNorm, LayerNormFp32, SwiGLU, SwiGLUPacked
from timm.models import VisionTransformer
from torch import Tensor, nn

from hyperclip_fast import HyperViT, NormParams, NormSpec

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 7,
}
OPTIONS = {
    "token": {},
    "features": {"num_classes": 0},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 4},
    "registers_no_embed_class": {"reg_tokens": 2, "no_embed_class": True},
    "no_embed_class": {"no_embed_class": True},
    "no_pos_embed": {"pos_embed": "none"},
    "avg": {"global_pool": "avg"},
    "avg_norm_before": {"global_pool": "avg", "fc_norm": False},
    "avg_with_prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "avgmax": {"global_pool": "avgmax"},
    "max": {"global_pool": "max"},
    "map": {"global_pool": "map", "class_token": False},
    "map_fc_norm": {"global_pool": "map", "fc_norm": True},
    "prr": {"global_pool": "prr"},
    "prr_no_class_token": {"global_pool": "prr", "class_token": False},
    "no_pool": {"global_pool": ""},
    "no_pool_fc_norm": {"global_pool": "", "fc_norm": True},
    "token_fc_norm": {"fc_norm": True},
    "no_final_norm": {"final_norm": False},
    "pre_norm": {"pre_norm": True},
    "qk_norm": {"qk_norm": True},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True, "mlp_layer": SwiGLU},
    "layer_scale": {"init_values": 0.3},
    "no_biases": {"qkv_bias": False, "proj_bias": False},
    "quick_gelu": {"act_layer": "quick_gelu"},
    "glu": {"mlp_layer": GluMlp},
    "swiglu": {"mlp_layer": SwiGLU},
    "swiglu_packed": {"mlp_layer": SwiGLUPacked},
    "diff_attention": {"attn_layer": "diff", "num_heads": 2},
    "torch_norm": {"norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    "float32_norm": {"norm_layer": partial(LayerNormFp32, eps=1e-4)},
    "embed_norm": {"embed_norm_layer": LayerNorm},
    "dynamic_size": {"dynamic_img_size": True},
    "dynamic_pad": {"dynamic_img_size": True, "dynamic_img_pad": True},
}
SIZES = {"dynamic_size": (40, 48), "dynamic_pad": (37, 45)}  # images of another size than the position embedding's


def make_stock(option: str = "token", seed: int = 0, dtype: torch.dtype = torch.float32, **more) -> VisionTransformer:
    """A small stock model in which every parameter matters: none is left at 0, 1 or 1e-6."""
    torch.manual_seed(seed)
    model = VisionTransformer(**{**SMALL, **OPTIONS[option], **more}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def make_images(option: str = "token", batch: int = 8, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *SIZES.get(option, (32, 32)), generator=generator, dtype=dtype)


def random_rows(spec: NormSpec, tasks: int = 8, seed: int = 2, dtype: torch.dtype = torch.float32) -> NormParams:
    """Rows with weights 1 +- 0.5, some of them zero or negative, and biases 0 +- 0.5."""
    generator = torch.Generator().manual_seed(seed)
    table = 0.5 * torch.randn(tasks, spec.num_params, generator=generator, dtype=dtype)
    rows = NormParams(spec, table)
    for weight, _ in rows.layers():
        weight += 1
        weight[:, 3] = 0
        weight[:, 5] = -0.7
    return rows


def stock_with_row(model: VisionTransformer, params: NormParams, task: int) -> VisionTransformer:
    """A copy of a stock model with row `task` in the place of its norm weights."""
    model, row = copy.deepcopy(model), params.state_dict(task)
    missing, unexpected = model.load_state_dict(row, strict=False)
    assert not unexpected and set(missing) == set(model.state_dict()) - set(row)
    return model


def one_by_one(model: VisionTransformer, images: Tensor, params: NormParams, task_ids: list[int]) -> Tensor:
    """What separate stock models, each with its task's row, give for each image."""
    models = {task: stock_with_row(model, params, task) for task in set(task_ids)}
    return torch.cat([models[task](image[None]) for image, task in zip(images, task_ids)])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(ours: dict[str, Tensor], ref: dict[str, Tensor]) -> None:
    """The same names with the same numbers, bit for bit."""
    assert ours.keys() == ref.keys()
    for name, value in ref.items():
        assert torch.equal(ours[name], value), f"{name}: {(ours[name] - value).abs().max()}"


def hyper_pair(option: str = "token", **more) -> tuple[VisionTransformer, HyperViT]:
    stock = make_stock(option, **more)
    return stock, HyperViT.from_timm(stock)
