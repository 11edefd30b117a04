"""A task, or a part of a model, for other runtimes."""

from hyperclip_fast.export.specialized import push_specialized, save_specialized

__all__ = ["push_specialized", "save_specialized"]
