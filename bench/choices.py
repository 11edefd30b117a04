"""What `hyperclip bench` can measure, by name: light, so that its arguments are parsed without PyTorch.

tests/bench/test_benchmark.py holds these to what the cases really have.
"""

from typing import Any

STEPS = ("forward", "training")
MIXES = ("identical", "uniform", "skewed", "distinct")
DTYPES = ("float32", "bfloat16", "float16")
MODEL_STEPS = (*STEPS, "autocast")
KERNEL_ENGINES = ("eager", "compiled", "graph")
ENGINES = ("eager", "compiled", "graph", "frozen", "onnxruntime")
OPERATIONS = (
    "layer_norm",
    "add_layer_norm",
    "batch_norm_act",
    "linear_gelu",
    "linear_add",
    "norm_linear",
    "norm_linear_gelu",
)
KERNEL_PROVIDERS = ("stock", "naive", "ours", "single", "liger", "triton")
MODEL_PROVIDERS = ("stock", "naive", "ours", "single", "loop")
MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
ENCODERS = (
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "tinynet_a",
    "tinynet_c",
    "tinynet_e",
    "mobilenetv3_small_100",
    "mobilenetv3_large_100",
    "mobilevit_s",
    "mobilevitv2_100",
    "edgenext_small",
    "convnext_atto",
    "fastvit_t8",
    "repvit_m1",
    "resnet18",
    "resnet50",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
)
# What is measured where nothing is said: a GPU has the time for all of it.
DEFAULTS: dict[str, dict[str, dict[str, list[Any]]]] = {
    "cpu": {
        "kernels": {"widths": [192, 384], "batches": [16], "tasks": [16], "mixes": ["distinct"]},
        "model": {"models": list(MODELS[:2]), "batches": [1, 16, 64], "tasks": [16], "mixes": ["distinct"]},
    },
    "cuda": {
        "kernels": {"widths": [192, 384, 768], "batches": [256], "tasks": [1, 256, 4096], "mixes": list(MIXES)},
        "model": {"models": list(MODELS), "batches": [1, 8, 64, 256], "tasks": [256], "mixes": ["distinct"]},
    },
}
