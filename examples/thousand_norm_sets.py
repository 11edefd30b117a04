"""1,000 norm sets, fine-tuned in the same batches and served in one: rows that no hypernetwork made.

    python examples/thousand_norm_sets.py

A task is five held-out names of OpenMoji. One encoder, frozen but for its norms, learns each task from the five colour
pictures and is tested on the five line drawings. All tasks learn at once: a step's batch holds one picture of every
task, each with its own row, so one backward pass gives every row its own gradient. The encoder is the demo model's
image tower, rows start as its base row, and class embeddings are its text tower's. At the end the tuned rows serve one
mixed batch, which is compared with loading each row into a stock timm model, and one row is fine-tuned again alone.
"""

import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperclip_fast import HyperCLIP, NormParams
from hyperclip_fast.data.augmentation import augment, resize, to_rgb
from hyperclip_fast.data.pictures import Pictures, load_pictures
from hyperclip_fast.hyperclip import load_model


@dataclass(frozen=True)
class Tasks:
    """T tasks of K names, each with a picture to learn from and one to be tested on.

    Args:
        names: K names of each task.
        train: (T, K, 4, S, S) uint8 RGBA.
        test: (T, K, 4, S, S) uint8 RGBA.
    """

    names: list[list[str]]
    train: Tensor
    test: Tensor


def draw_tasks(pictures: Pictures, count: int, classes: int = 5, seed: int = 0) -> Tasks:
    """Random tasks from the held-out names that have two pictures."""
    held = pictures.subset(pictures.held_out)
    places = [(held.labels == i).nonzero().flatten() for i in range(len(held.names))]
    usable = torch.tensor([i for i, found in enumerate(places) if len(found) == 2])
    generator = torch.Generator().manual_seed(seed)
    drawn = [usable[torch.randperm(len(usable), generator=generator)[:classes]].tolist() for _ in range(count)]
    pairs = torch.stack([torch.stack([places[i] for i in task]) for task in drawn])  # (T, K, 2)
    names = [[held.names[i] for i in task] for task in drawn]
    return Tasks(names, held.images[pairs[..., 0]], held.images[pairs[..., 1]])


def logits(model: HyperCLIP, images: Tensor, params: NormParams, classes: Tensor) -> Tensor:
    """(B, K) of images with the classes (B, K, E) of their tasks."""
    return model.logit_scale.exp() * torch.einsum("be,bke->bk", model.encode_image(images, params), classes)


def fine_tune(model: HyperCLIP, tasks: Tasks, start: Tensor, steps: int, lr: float, only: list[int]) -> Tensor:
    """The rows (len(only), P) of some of the tasks after so many steps, all in the same batches.

    The loss is a sum over tasks, and Adam works on each number by itself: a row learns what it would learn alone.
    """
    classes = model.project_text(model.stack_tasks(tasks.names)[0]).detach()[only]
    table = start[only].clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=lr)
    for step in range(steps):
        label = step % tasks.train.shape[1]
        images = augment(tasks.train[:, label], torch.Generator().manual_seed(step))[only]
        params = NormParams(model.image.norm_spec, table)
        scores = logits(model, resize(images, model.image_size), params, classes)
        loss = F.cross_entropy(scores, torch.full((len(only),), label), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return table.detach()


@torch.inference_mode()
def accuracy(model: HyperCLIP, tasks: Tasks, table: Tensor) -> float:
    """Share of the test pictures whose name is found, in mixed batches of all tasks."""
    classes = model.project_text(model.stack_tasks(tasks.names)[0])
    params, right = NormParams(model.image.norm_spec, table), 0
    for label in range(tasks.test.shape[1]):
        images = resize(to_rgb(tasks.test[:, label]), model.image_size)
        right += int((logits(model, images, params, classes).argmax(1) == label).sum())
    return right / tasks.test.shape[0] / tasks.test.shape[1]


@torch.inference_mode()
def serve(model: HyperCLIP, images: Tensor, table: Tensor) -> tuple[float, float, float]:
    """Image t with row t: largest difference between one mixed batch and T loads of a stock model; seconds of each."""
    params = NormParams(model.image.norm_spec, table)
    start = time.perf_counter()
    mixed = model.image(images, params)
    middle = time.perf_counter()
    stock = model.stock_model(params)
    loaded = []
    for task, image in enumerate(images):
        stock.load_state_dict(params.state_dict(task), strict=False)
        loaded.append(stock(image[None]))
    end = time.perf_counter()
    return (mixed - torch.cat(loaded)).abs().max().item(), middle - start, end - middle


def main() -> None:
    """Fine-tune, test, serve and compare; print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=1000, metavar="T", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=15, metavar="N", help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-2, help="default: %(default)s")
    args = parser.parse_args()
    model = load_model().requires_grad_(False)
    tasks, every = draw_tasks(load_pictures(), args.tasks), list(range(args.tasks))
    base = model.image.base_params.table.expand(args.tasks, -1)
    began = time.perf_counter()
    table = fine_tune(model, tasks, base, args.steps, args.lr, every)
    seconds = time.perf_counter() - began
    print(f"{args.tasks} rows of {table.shape[1]} numbers, {args.steps} steps in {seconds:.0f} s: ", end="")
    print(f"{accuracy(model, tasks, base):.1%} before, {accuracy(model, tasks, table):.1%} after")
    alone = fine_tune(model, tasks, base, args.steps, args.lr, [args.tasks // 2])[0]
    print(f"a row fine-tuned alone differs by at most {(alone - table[args.tasks // 2]).abs().max():.1e}")
    images = resize(to_rgb(tasks.test[:, 0]), model.image_size)
    error, mixed, loop = serve(model, images, table)
    print(f"{args.tasks} images, each with its own row: one mixed batch {mixed:.2f} s, ", end="")
    print(f"{args.tasks} loads of a stock model {loop:.2f} s, outputs within {error:.0e}")


if __name__ == "__main__":
    main()
