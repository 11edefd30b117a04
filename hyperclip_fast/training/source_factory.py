"""The source that a configuration asks for, and what it holds out."""

from dataclasses import replace

import torch

from hyperclip_fast.data.batch import BatchShape, Share, Source
from hyperclip_fast.data.config import SCENES, DataConfig
from hyperclip_fast.data.file_source import ImageSetSource, read_folder, read_table
from hyperclip_fast.data.held_out import EvalTask
from hyperclip_fast.data.picture_source import JoinedSource, picture_source
from hyperclip_fast.data.pictures import Pictures, load_pictures
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.data.scenes import MOST_VALUES, evaluation_tasks, scene_source
from hyperclip_fast.data.shard_source import ShardSource
from hyperclip_fast.data.transforms import create_reader
from hyperclip_fast.training.config import RunConfig
from hyperclip_fast.utils.text_files import read_yaml


def create_source(
    run: RunConfig, image_size: int, share: Share, device: torch.device, pictures: Pictures | None = None
) -> tuple[Source, list[EvalTask]]:
    """The source of a run's batches, and tasks of what it holds out of them: nothing of files.

    Args:
        run: the configuration.
        image_size: S.
        share: of this process.
        device: where batches will go.
        pictures: those of kind "pictures", where they are loaded already.

    Raises:
        ValueError: for data that is not there, or does not have what a batch takes.
    """
    data, shape, pin = run.data, run.train.batch_shape, device.type == "cuda"
    preprocessing = run.model.preprocessing(image_size)
    if pictures is not None or data.kind == "pictures":
        pictures = pictures or load_run_pictures(run, share)
        if SCENES not in data.sets:
            source: Source = picture_source(pictures, shape, preprocessing, share, data.wordings, data.group_weights)
        else:
            source = _with_scenes(pictures, data, shape, preprocessing, share)
        return source, evaluation_tasks(pictures, data.sets)
    if not data.path:
        raise ValueError(f"data.path must say where the {data.kind} is, as --set data.path=..., got nothing")
    reader = create_reader(data, preprocessing)
    if data.kind == "shards":
        return ShardSource(shape, data, reader, share, pin), []
    names = _class_names(data)
    if data.kind == "folder":
        images = read_folder(data.path, names)
    else:
        images = read_table(data.path, data.image_column, data.text_column, names)
    return ImageSetSource(images, shape, data, reader, share, pin), []


def load_run_pictures(run: RunConfig, share: Share) -> Pictures:
    """The pictures of kind "pictures" that a configuration asks for."""
    named = tuple(name for name in run.data.sets if name != SCENES)
    return load_pictures(named or ("openmoji",), run.train.picture_size, progress=share.rank == 0)


def _with_scenes(
    pictures: Pictures, data: DataConfig, shape: BatchShape, preprocessing: Preprocessing, share: Share
) -> Source:
    """Attribute tasks on scenes of the pictures' training part; half of a batch's tasks where others are names."""
    tasks, (low, high) = shape.tasks_per_batch, shape.class_range
    is_named = set(data.sets) != {SCENES}
    count = tasks // 2 if is_named else tasks
    if is_named and (tasks < 2 or count % share.world or tasks % share.world):
        wanted = "at least 2" if share.world == 1 else f"a multiple of twice the number of processes, {share.world},"
        raise ValueError(f"tasks_per_batch must be {wanted} for scenes beside other pictures, got {tasks}")
    ours = replace(shape, tasks_per_batch=count, classes_per_task=(min(low, MOST_VALUES), min(high, MOST_VALUES)))
    scenes = scene_source(pictures, ours, preprocessing, share)
    if not is_named:
        return scenes
    others = replace(shape, tasks_per_batch=tasks - count)
    return JoinedSource(
        [picture_source(pictures, others, preprocessing, share, data.wordings, data.group_weights), scenes]
    )


def _class_names(data: DataConfig) -> dict[str, str]:
    if not data.class_names:
        return {}
    names = read_yaml(data.class_names, "class_names")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"class_names must be a YAML or JSON file that maps names to names, {data.class_names} is not")
    return {str(key): name for key, name in names.items()}
