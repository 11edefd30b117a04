"""An embedding run on a Ray cluster: every actor holds an Embedder, and parts are rows of a dataset."""

from collections.abc import Iterable, Sequence

from hyperclip_fast.embed.embedder import Embedder
from hyperclip_fast.hyperclip import load_model
from hyperclip_fast.task_bank import TaskBank
from hyperclip_fast.utils.extras import require


class _RayWorker:
    """An Embedder in an actor: rows {"part": number} in, {"part", "broken"} out."""

    def __init__(self, model, items, manifest, config, out, threads):
        bank = TaskBank.load(out / "tasks.safetensors", load_model(model, config.device))
        self.embedder = Embedder(bank, items, manifest, config, out, threads)

    def __call__(self, row: dict) -> dict:
        return {"part": row["part"], "broken": self.embedder.write(int(row["part"]))}


def run_on_ray(work: tuple, missing: Sequence[int], workers: int) -> Iterable[dict]:
    """The missing parts as a Ray dataset, mapped by a pool of actors."""
    data = require("ray.data", "ray")
    if not missing:
        return ()
    parts = data.from_items([{"part": number} for number in missing], override_num_blocks=len(missing))
    pool = data.ActorPoolStrategy(size=min(workers, len(missing)))
    gpus = 1 if work[3].device.startswith("cuda") else 0
    return parts.map(_RayWorker, fn_constructor_args=work, compute=pool, num_gpus=gpus).iter_rows()
