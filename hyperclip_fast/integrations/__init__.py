"""Other libraries' doors: timm's registry, open_clip, clip_benchmark, peft, transformers."""
