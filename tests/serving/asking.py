"""What tests of the routes share: tasks, pictures, questions, and the answers that a bank gives to them."""

import io

import pytest
import torch
from PIL import Image

from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.serving.gate.bodies import BodyLimits
from hyperclip_fast.serving.options import ServeOptions
from hyperclip_fast.serving.task_registry import TaskLimits
from hyperclip_fast.task_bank import TaskBank

TASKS = {"pets": ["cat", "dog", "parrot"], "food": ["pizza", "sushi"]}
LIMITS = TaskLimits(tasks=4, ad_hoc=2, classes=8, length=20)
BODIES = BodyLimits(max_concurrent_requests=6, max_concurrent_changes=2, max_bytes=100_000)
OPTIONS = ServeOptions(bodies=BODIES, max_pixels=10_000, max_images=3, limits=LIMITS)


def png(colour="red", size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


def ask(client, *, image=None, **data):
    return client.post("/v1/classify", files={"image": image or png()}, data=data)


def expected(model, contents, tasks, topk):
    """What a bank says, as the server writes it."""
    bank = TaskBank(model)
    bank.add_many(TASKS)
    images = torch.stack([load_image(content, model.preprocessing) for content in contents])
    predictions = bank.classify(images, tasks, topk)
    return [
        {
            "task": p.task,
            "ranked": [
                {"name": n, "probability": pytest.approx(s, rel=1e-4), "score": pytest.approx(t, rel=1e-4)}
                for n, s, t in zip(p.names, p.probabilities, p.scores)
            ],
        }
        for p in predictions
    ]


def check_error(response, status, code):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert (error["code"], error["status"]) == (code, status) and error["message"]
    return error["message"]
