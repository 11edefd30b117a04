"""The source that a configuration asks for."""

from pathlib import Path

import torch

from hyperclip_fast.data import Pictures, load_pictures
from hyperclip_fast.image_sets import ImageSetSource, read_folder, read_table
from hyperclip_fast.shards import ShardSource
from hyperclip_fast.sources import Share, Source, picture_source
from hyperclip_fast.train_config import DataConfig, RunConfig
from hyperclip_fast.transforms import create_reader


def create_source(
    run: RunConfig, image_size: int, share: Share, device: torch.device, pictures: Pictures | None = None
) -> tuple[Source, Pictures | None]:
    """The source of a run's batches, and the pictures that some are held out of, where it is made of such.

    Args:
        run: the configuration.
        image_size: S.
        share: of this process.
        device: where batches will go.
        pictures: those of kind "pictures", where they are loaded already.

    Raises:
        ValueError: for data that is not there, or does not have what a batch takes.
    """
    data, pin = run.data, device.type == "cuda"
    if pictures is not None or data.kind == "pictures":
        pictures = pictures or load_pictures(data.sets, size=run.train.picture_size, progress=share.rank == 0)
        return picture_source(pictures, run.train, image_size, share), pictures
    if not data.path:
        raise ValueError(f"data.path must say where the {data.kind} is, as --set data.path=..., got nothing")
    reader = create_reader(data, image_size)
    if data.kind == "shards":
        return ShardSource(run.train, data, reader, share, pin), None
    names = _class_names(data)
    if data.kind == "folder":
        images = read_folder(data.path, names)
    else:
        images = read_table(data.path, data.image_column, data.text_column, names)
    return ImageSetSource(images, run.train, data, reader, share, pin), None


def _class_names(data: DataConfig) -> dict[str, str]:
    if not data.class_names:
        return {}
    import yaml

    names = yaml.safe_load(Path(data.class_names).read_text(encoding="utf-8"))
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"class_names must be a YAML or JSON file that maps names to names, {data.class_names} is not")
    return {str(key): name for key, name in names.items()}
