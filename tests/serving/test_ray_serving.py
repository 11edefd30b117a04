"""The server on a local Ray instance: the same routes and answers, batches on two model replicas, tasks saved."""

import asyncio
import io
import logging
import os
import socket

import httpx
import pytest
import torch
from PIL import Image

from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.hyperclip import load_model
from hyperclip_fast.task_bank import TaskBank
from tests.serving.process import ROOT

ray = pytest.importorskip("ray", reason="needs the extra ray")
TASKS = {"pets": ["cat", "dog", "parrot"], "food": ["pizza", "sushi"]}
COLOURS = ("red", "green", "blue", "white")


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "png")
    return file.getvalue()


@pytest.fixture
def address(tmp_path, monkeypatch):
    """A local Ray with the application, shut down afterwards."""
    from ray import serve

    from hyperclip_fast.serving.on_ray import RayOptions, build_app

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(
        "local",  # not another test's
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
        options = RayOptions(bank=tmp_path / "tasks.safetensors", create=True, replicas=2, max_batch=8, max_wait_ms=50)
        serve.run(build_app(options), route_prefix="/")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


async def ask_all(address):
    async with httpx.AsyncClient(base_url=address, timeout=30) as client:
        for name, classes in TASKS.items():
            assert (await client.put(f"/v1/tasks/{name}", json={"classes": classes})).status_code == 201
        questions = [(colour, task) for colour in COLOURS for task in TASKS] * 3
        asked = [
            client.post("/v1/classify", files={"image": png(colour)}, data={"task": task}) for colour, task in questions
        ]
        return questions, await asyncio.gather(*asked)


@pytest.mark.slow
def test_the_same_answers_from_model_replicas(address, tmp_path):
    assert httpx.get(f"{address}/readyz").json() == {"status": "ready", "tasks": 0, "saves": "ok"}
    questions, answers = asyncio.run(ask_all(address))
    model = load_model()
    bank = TaskBank(model)
    bank.add_many(TASKS)
    images = torch.stack([load_image(png(colour), model.preprocessing) for colour, _ in questions])
    for prediction, answer in zip(bank.classify(images, [task for _, task in questions], 5), answers):
        assert answer.status_code == 200, answer.text
        (result,) = answer.json()["results"]
        shares = {each["name"]: each["probability"] for each in result["ranked"]}
        assert shares == pytest.approx(dict(zip(prediction.names, prediction.probabilities)), abs=1e-4)
    metrics = httpx.get(f"{address}/metrics").text.splitlines()
    assert "hyperclip_batch_images_sum 24.0" in metrics
    assert "hyperclip_batch_tasks_count 24.0" not in metrics  # images shared batches
    refused = httpx.post(f"{address}/v1/classify", files={"image": b"text"}, data={"task": "pets"})
    assert refused.status_code == 422 and refused.json()["error"]["code"] == "bad_image"
    assert httpx.delete(f"{address}/v1/tasks/food").status_code == 204
    from ray import serve

    serve.shutdown()
    assert TaskBank.load(tmp_path / "tasks.safetensors", model).tasks == ("pets",)
    assert sorted(os.listdir(tmp_path)) == [".tasks.safetensors.lock", "tasks.safetensors"]


def test_refused_options():
    from hyperclip_fast.serving.on_ray import RayOptions

    for wrong in ({"bank": "tasks.safetensors"}, {"bank": "/b", "replicas": "0"}, {"bank": "/b", "replica": "1"}, {}):
        with pytest.raises(ValueError, match=r"absolute path|greater than|not permitted|required"):
            RayOptions(**wrong)
    assert RayOptions(bank="/b", replicas="3", gpus="0.5").replicas == 3  # as `serve run` gives them
