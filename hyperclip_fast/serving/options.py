"""What a server is told when it starts."""

from dataclasses import dataclass, field

from hyperclip_fast.data.image_files import MAX_PIXELS
from hyperclip_fast.serving.gate.bodies import BodyLimits
from hyperclip_fast.serving.gate.keys import Key
from hyperclip_fast.serving.task_registry import TaskLimits


@dataclass(frozen=True)
class ServeOptions:
    """How a server batches, and what it refuses.

    Args:
        max_batch: images in a forward pass, at most.
        max_wait: seconds that an image waits for company.
        mix: False keeps a batch to one task: a baseline for measurements.
        max_concurrent_batches: batches under way at the same time.
        decoders: threads that decode images.
        bodies: how many requests, and how large and slow a body, see BodyLimits.
        max_pixels: of an image.
        max_images: of a request.
        limits: of the tasks.
        hosts: names that requests may call the server by, see KnownHosts.
        origins: pages of other origins that may send requests, see OwnPages.
        keys: who may send requests; none: everybody.
        rate: requests a second of one key; None: any number.
        access_log: log every request.
    """

    max_batch: int = 32
    max_wait: float = 0.002
    mix: bool = True
    max_concurrent_batches: int = 1
    decoders: int = 2
    bodies: BodyLimits = field(default_factory=BodyLimits)
    max_pixels: int = MAX_PIXELS // 2
    max_images: int = 16
    limits: TaskLimits = field(default_factory=TaskLimits)
    hosts: tuple[str, ...] = ("*",)
    origins: tuple[str, ...] = ()
    keys: tuple[Key, ...] = ()
    rate: float | None = None
    access_log: bool = False
