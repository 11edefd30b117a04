"""Mixed batches as CUDA graphs: the host starts one graph, where an eager forward starts hundreds of kernels.

A graph's tensors never move, so each batch size that is recorded has an image buffer of its own, and all share a table
of slots. A task's row is copied to a slot when the task is first used, and stays until its slot is the least recently
used and another task needs it: between two replays rows change, and nothing is recorded anew. A smaller batch is padded
to the next size; its other images are what the last batch left there, and their results are dropped. Nothing
synchronises with the device but the caller who reads a result.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hyperclip_fast.hyper_encoder import HyperEncoder
from hyperclip_fast.hyper_vit import HyperViT
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.tasks import AdaptedTask, Ranked, rank

Encoder = HyperViT | HyperEncoder
Result = TypeVar("Result")
WARM_UPS = 3  # libraries choose and allocate on the first calls, and kernels are compiled


def graphed(
    model: HyperCLIP | Encoder, sizes: Sequence[int] = (1, 8, 32), slots: int = 64
) -> "GraphedClassifier | GraphedEncoder":
    """A model on a GPU whose mixed batches run as CUDA graphs; in eval mode, its weights must not move afterwards.

    Args:
        model: a HyperCLIP, which gives a GraphedClassifier, or an image encoder, which gives a GraphedEncoder.
        sizes: batch sizes that are recorded, each when it is first needed; larger batches run in pieces.
        slots: tasks whose rows are held at a time, (slots, P) in float32: at least as many as a batch may mix.

    Raises:
        ValueError: for a model that is not on a GPU, or sizes or slots that are not positive.
    """
    if isinstance(model, HyperCLIP):
        return GraphedClassifier(model, sizes, slots)
    return GraphedEncoder(model, sizes, slots)


def capture(
    run: Callable[[], Result], device: torch.device, pool: Any, error_mode: str = "thread_local"
) -> tuple[Callable[[], None], Result]:
    """What replays a recorded function of static tensors, and the result that each replay fills.

    Args:
        run: what to record.
        device: where.
        pool: the memory, as torch.cuda.graph_pool_handle gives it.
        error_mode: as of torch.cuda.graph; by default other threads may allocate meanwhile.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=error_mode):
        result = run()
    return graph.replay, result


class Slots:
    """Which of a fixed number of slots holds which task; the least recently used one is taken for the next."""

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"slots must be at least 1, got {count}")
        self._free = list(range(count))[::-1]
        self._of: OrderedDict[Hashable, int] = OrderedDict()  # the least recently used first
        self.count = count

    def __contains__(self, task: Hashable) -> bool:
        return task in self._of

    def assign(self, tasks: Sequence[Hashable]) -> tuple[list[int], list[tuple[int, Any]]]:
        """Slot of each task of a batch, and what must be loaded: slots with the tasks that they hold from now on.

        Raises:
            ValueError: for more different tasks than slots; nothing has changed then.
        """
        wanted = list(dict.fromkeys(tasks))
        if len(wanted) > self.count:
            raise ValueError(f"a batch may mix as many tasks as there are slots, {self.count}, got {len(wanted)}")
        for task in wanted:
            if task in self._of:
                self._of.move_to_end(task)  # whoever is in the batch is evicted last, so not for it
        loads = []
        for task in wanted:
            if task not in self._of:
                slot = self._free.pop() if self._free else self._of.popitem(last=False)[1]
                self._of[task] = slot
                loads.append((slot, task))
        return [self._of[task] for task in tasks], loads

    @contextlib.contextmanager
    def loading(self, tasks: Sequence[Hashable]) -> Iterator[tuple[list[int], list[tuple[int, Any]]]]:
        """What `assign` says, for as long as the tasks are loaded; what could not be loaded holds no slot."""
        ids, loads = self.assign(tasks)
        try:
            yield ids, loads
        except BaseException:
            for _, task in loads:
                self.forget(task)
            raise

    def forget(self, task: Hashable) -> None:
        """Free a task's slot, if it has one."""
        if task in self._of:
            self._free.append(self._of.pop(task))


class _Graphs:
    """A function of images and slot ids, recorded at a few batch sizes."""

    def __init__(
        self, run: Callable[[Tensor, Tensor], Tensor], sizes: Sequence[int], like: Tensor, side: tuple[int, int]
    ):
        self.sizes = sorted(set(sizes))
        if not self.sizes or self.sizes[0] < 1:
            raise ValueError(f"sizes must be batch sizes of at least 1, got {tuple(sizes)}")
        self._run, self._like, self._side = run, like, side
        self._pool = torch.cuda.graph_pool_handle() if like.is_cuda else None  # one for all sizes: one runs at a time
        self._recorded: dict[int, tuple[Tensor, Tensor, Callable[[], None], Tensor]] = {}

    def __call__(self, images: Tensor, ids: Sequence[int]) -> Tensor:
        shape = (len(ids), 3, *self._side)
        if images.shape != shape or not ids:
            raise ValueError(f"images must be {shape} for {len(ids)} tasks, got {tuple(images.shape)}")
        largest = self.sizes[-1]
        pieces = [self._piece(images[i : i + largest], ids[i : i + largest]) for i in range(0, len(ids), largest)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _piece(self, images: Tensor, ids: Sequence[int]) -> Tensor:
        count = len(ids)
        size = next(size for size in self.sizes if size >= count)
        if size not in self._recorded:
            self._recorded[size] = self._record(size)
        static, slots, replay, result = self._recorded[size]
        host = torch.tensor(ids)
        static[:count].copy_(images, non_blocking=True)
        slots[:count].copy_(host.pin_memory() if static.is_cuda else host, non_blocking=True)
        replay()
        return result[:count].clone()  # the next replay fills the same memory

    @torch.inference_mode(False)  # what is made in inference mode could not be changed outside it
    def _record(self, size: int) -> tuple[Tensor, Tensor, Callable[[], None], Tensor]:
        images = self._like.new_zeros(size, 3, *self._side)
        slots = torch.zeros(size, dtype=torch.int64, device=images.device)

        def run() -> Tensor:
            with torch.no_grad():
                return self._run(images, slots)

        return images, slots, *capture(run, images.device, self._pool)


def _check(model: Any) -> Tensor:
    """A parameter of the model, which must be on a GPU."""
    like = next(model.parameters())
    if not like.is_cuda:
        raise ValueError(f"model must be on a GPU to be recorded as CUDA graphs, got one on {like.device}")
    return like


class GraphedEncoder:
    """An image encoder whose mixed batches run as CUDA graphs, see `graphed`."""

    def __init__(self, encoder: Encoder, sizes: Sequence[int] = (1, 8, 32), slots: int = 64):
        like = _check(encoder)
        self.encoder, self._slots = encoder.eval(), Slots(slots)
        spec = encoder.norm_spec
        with torch.inference_mode(False):
            self._table = torch.zeros(slots, spec.num_params, device=like.device)
        config: Any = encoder.pretrained_cfg
        size = getattr(getattr(encoder, "patch_embed", None), "img_size", None) or config["input_size"][1:]

        def run(images: Tensor, ids: Tensor) -> Tensor:
            return encoder(images, NormParams(spec, self._table, ids))

        self._graphs = _Graphs(run, sizes, like, (size[0], size[1]))

    def __call__(self, images: Tensor, tasks: Sequence[Hashable], rows: Mapping[Any, Tensor]) -> Tensor:
        """Images (B, 3, S, S) to the encoder's output, each with its own task's row.

        Args:
            images: on any device, in any floating point dtype.
            tasks: a key for each image.
            rows: key to row (P,); asked for tasks that hold no slot. A row that has changed needs `forget` first.

        Raises:
            ValueError: for images or rows of another shape, or more different tasks than slots.
            KeyError: for a task without a row. In either case no slot has changed.
        """
        missing = {task: rows[task] for task in dict.fromkeys(tasks) if task not in self._slots}
        for task, row in missing.items():
            if row.shape != self._table.shape[1:]:
                raise ValueError(f"rows must be {tuple(self._table.shape[1:])}, got {tuple(row.shape)} for {task!r}")
        with self._slots.loading(tasks) as (ids, loads):
            for slot, task in loads:
                self._table[slot].copy_(missing[task], non_blocking=True)
        return self._graphs(images, ids)

    def forget(self, task: Hashable) -> None:
        """Take a task's row from `rows` again when it is next used."""
        self._slots.forget(task)


class GraphedClassifier:
    """A HyperCLIP whose mixed batches are classified by CUDA graphs, see `graphed`.

    Class embeddings lie in a table (slots, K, E), K the most classes of a task so far.
    """

    def __init__(self, model: HyperCLIP, sizes: Sequence[int] = (1, 8, 32), slots: int = 64):
        self._like = _check(model)
        self.model, self._sizes, self._slots = model.eval(), tuple(sizes), Slots(slots)
        with torch.inference_mode(False):
            self._table = torch.zeros(slots, model.image.norm_spec.num_params, device=model.device)
        self._make_room(16)

    def logits(self, images: Tensor, tasks: Sequence[AdaptedTask]) -> Tensor:
        """Scaled similarities (B, K) of each image (3, S, S) with its own task's classes, -inf beyond them.

        Raises:
            ValueError: for images of another shape, or more different tasks than slots.
        """
        most = max((len(task.classes) for task in tasks), default=0)
        if most > self._classes.shape[1]:
            self._make_room(1 << (most - 1).bit_length())
        with self._slots.loading(tasks) as (ids, loads):
            for slot, task in loads:
                count = len(task.classes)
                self._table[slot].copy_(task.row, non_blocking=True)
                self._classes[slot, :count].copy_(task.embeddings, non_blocking=True)
                self._bias[slot, :count] = 0
                self._bias[slot, count:] = -torch.inf
        return self._graphs(images, ids)

    def classify(self, images: Tensor, tasks: Sequence[AdaptedTask], topk: Sequence[int]) -> list[Ranked]:
        """`classify_tasks` by CUDA graphs."""
        if not len(tasks):
            return []
        return rank(self.logits(images, tasks), [task.classes for task in tasks], topk)

    @torch.inference_mode(False)
    def _make_room(self, classes: int) -> None:
        """For tasks of so many classes: new tables, so that all is loaded and recorded anew."""
        model, slots = self.model, self._slots.count
        options: dict[str, Any] = {"device": model.device, "dtype": model.logit_scale.dtype}
        embeddings = torch.zeros(slots, classes, model.config.embed_dim, **options)
        bias = torch.zeros(slots, classes, **options)  # 0 for a class, -inf where there is none
        spec, table = model.image.norm_spec, self._table

        def run(images: Tensor, ids: Tensor) -> Tensor:
            features = model.encode_image(images, NormParams(spec, table, ids))
            scores = torch.einsum("be,bke->bk", features, embeddings[ids].to(features.dtype))
            return model.logit_scale.exp() * scores + model.logit_bias + bias[ids]

        self._graphs = _Graphs(run, self._sizes, self._like, (model.image_size, model.image_size))
        self._slots, self._classes, self._bias = Slots(slots), embeddings, bias  # all at once, or nothing
