"""The photographs that three packages bring, as tasks."""

import torch

from hyperclip_fast.data.augmentation import to_rgb
from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.data.photos import TASKS, photo_tasks
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.evaluation.eval_sets import load_eval_set
from hyperclip_fast.utils.extras import package_folder


def test_eighteen_photographs_in_tasks_of_eight_names():
    tasks = photo_tasks(Preprocessing(32))
    assert [len(set(task.class_names)) for task in tasks] == [8] * 4
    pictures = torch.cat([task.images for task in tasks])
    assert pictures.shape == (18, 4, 32, 32) and len({picture.numpy().tobytes() for picture in pictures}) == 18
    shown = [task.class_names[label] for task in tasks for label in task.labels.tolist()]
    assert shown == [name for files, _ in TASKS.values() for name in files.values()]


def test_a_photograph_is_what_the_model_would_be_given():
    prepare = Preprocessing(48, interpolation="bicubic", crop_pct=0.875)
    (animals, *_) = load_eval_set("photos", prepare).tasks
    cat = load_image(package_folder("skimage", "demo") / "data" / "chelsea.png", prepare)
    assert animals.class_names[animals.labels[0]] == "cat"
    assert (to_rgb(animals.images[:1])[0] - cat).abs().max() <= 1 / 255 + 1e-6  # rounded to whole levels
