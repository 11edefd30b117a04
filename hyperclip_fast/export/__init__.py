"""A task, or a part of a model, for other runtimes."""

from typing import TYPE_CHECKING

from hyperclip_fast.utils.lazy import lazy_names

if TYPE_CHECKING:
    from hyperclip_fast.export.formats import export
    from hyperclip_fast.export.graphs import mixed_graph, specialized_graph, text_graph
    from hyperclip_fast.export.hub_kernel import write_hub_kernel
    from hyperclip_fast.export.specialized import push_specialized, save_specialized

__all__ = [
    "export",
    "mixed_graph",
    "push_specialized",
    "save_specialized",
    "specialized_graph",
    "text_graph",
    "write_hub_kernel",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "formats": ("export",),
        "graphs": (
            "mixed_graph",
            "specialized_graph",
            "text_graph",
        ),
        "hub_kernel": ("write_hub_kernel",),
        "specialized": (
            "push_specialized",
            "save_specialized",
        ),
    },
)
