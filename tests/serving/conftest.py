"""A server of a tiny model in this process, with two tasks."""

import pytest
from starlette.testclient import TestClient

from hyperclip_fast.serving.app import create_app
from hyperclip_fast.serving.batching import ModelThread
from hyperclip_fast.serving.service import bank_service
from tests.serving.asking import OPTIONS, TASKS
from tests.towers import patch_text_tower, tiny_model


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_text_tower(monkeypatch)
        model = tiny_model()
        model.text_tower.encode(["built once"])
        yield model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.safetensors"


@pytest.fixture
def service(model, path):
    thread = ModelThread(model, threads=1)
    yield bank_service(path, thread, OPTIONS, create=True)
    thread.close()


@pytest.fixture
def client(service):
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        for name, classes in TASKS.items():
            assert client.put(f"/v1/tasks/{name}", json={"classes": classes}).status_code == 201
        yield client
