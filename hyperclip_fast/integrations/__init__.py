"""Other libraries' doors: open_clip, clip_benchmark, peft, transformers."""
