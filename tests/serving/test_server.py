"""The server's routes in one process: answers equal the bank's, and everything bad is refused with a JSON error."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from hyperclip_fast.serving.app import create_app
from hyperclip_fast.task_bank import TaskBank
from tests.serving.asking import LIMITS, OPTIONS, TASKS, ask, check_error, expected, png


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_classify_answers_as_the_bank_does(client, model):
    response = ask(client, task="pets")
    assert response.status_code == 200
    assert response.json() == {"results": expected(model, [png()], ["pets"], 5)}
    raw = client.post("/v1/classify?task=food&topk=1", content=png("blue"), headers={"content-type": "image/png"})
    assert raw.json() == {"results": expected(model, [png("blue")], ["food"], 1)}


def test_several_images_of_one_task_or_of_their_own(client, model):
    contents = [png("red"), png("green"), png("blue")]
    files = [("image", content) for content in contents]
    one = client.post("/v1/classify", files=files, data={"task": "pets", "topk": "2"})
    assert one.json()["results"] == expected(model, contents, ["pets"] * 3, 2)
    tasks = ["food", "pets", "food"]
    each = client.post("/v1/classify", files=files, data={"task": tasks})
    assert each.json()["results"] == expected(model, contents, tasks, 5)


def test_class_names_in_place_of_a_task(client, model, service):
    response = ask(client, label=TASKS["food"])
    (result,) = response.json()["results"]
    (named,) = expected(model, [png()], ["food"], 5)
    assert result == {**named, "task": None}
    for i in range(4):
        assert ask(client, label=["cat", f"dog {i}"]).status_code == 200
    assert len(service.registry._ad_hoc) == LIMITS.ad_hoc
    assert client.get("/v1/tasks").json()["tasks"] == [{"name": n, "classes": c} for n, c in TASKS.items()]


def test_tasks_are_listed_replaced_and_removed(client):
    assert client.get("/v1/tasks/pets").json() == {"name": "pets", "classes": TASKS["pets"]}
    assert client.put("/v1/tasks/pets", json={"classes": ["wolf"]}).status_code == 200
    (wolf,) = ask(client, task="pets").json()["results"][0]["ranked"]
    assert (wolf["name"], wolf["probability"]) == ("wolf", 1.0)
    assert client.put("/v1/tasks/a/b%20c", json={"classes": ["x"]}).status_code == 201
    assert [task["name"] for task in client.get("/v1/tasks").json()["tasks"]] == ["pets", "food", "a/b c"]
    assert client.delete("/v1/tasks/pets").status_code == 204
    check_error(client.delete("/v1/tasks/pets"), 404, "unknown_task")
    check_error(ask(client, task="pets"), 404, "unknown_task")
    assert ask(client, task="a/b c").status_code == 200


BAD = {
    "no task": ({"data": {}}, 422, "bad_task"),
    "both": ({"data": {"task": "pets", "label": "cat"}}, 422, "bad_task"),
    "two tasks, one image": ({"data": {"task": ["pets", "food"]}}, 422, "bad_task"),
    "unknown task": ({"data": {"task": "birds"}}, 404, "unknown_task"),
    "topk 0": ({"data": {"task": "pets", "topk": "0"}}, 422, "bad_topk"),
    "topk text": ({"data": {"task": "pets", "topk": "many"}}, 422, "bad_topk"),
    "topk digits": ({"data": {"task": "pets", "topk": "²"}}, 422, "bad_topk"),
    "topk huge": ({"data": {"task": "pets", "topk": "9" * 5000}}, 422, "bad_topk"),
    "unknown field": ({"data": {"task": "pets", "top": "3"}}, 422, "bad_field"),
    "file as field": ({"files": {"image": png(), "task": b"pets"}}, 422, "bad_field"),
    "blank label": ({"data": {"label": ["cat", " "]}}, 422, "bad_classes"),
    "same label": ({"data": {"label": ["cat", "cat"]}}, 422, "bad_classes"),
    "many labels": ({"data": {"label": list("abcdefghi")}}, 422, "bad_classes"),
    "absurdly many labels": ({"data": {"label": [str(i) for i in range(500)]}}, 400, "bad_request"),
    "long label": ({"data": {"label": ["c" * 21]}}, 422, "bad_classes"),
    "control character": ({"data": {"label": ["a\x00b"]}}, 422, "bad_classes"),
    "no image": ({"files": {"file": png()}, "data": {"task": "pets"}}, 422, "bad_image"),
    "many images": ({"files": [("image", png())] * 4, "data": {"task": "pets"}}, 400, "bad_request"),
    "text for an image": ({"files": {"image": b"hello"}, "data": {"task": "pets"}}, 422, "bad_image"),
    "empty image": ({"files": {"image": b""}, "data": {"task": "pets"}}, 422, "bad_image"),
    "cut image": ({"files": {"image": png(size=(90, 90))[:60]}, "data": {"task": "pets"}}, 422, "bad_image"),
    "many pixels": ({"files": {"image": png(size=(101, 100))}, "data": {"task": "pets"}}, 422, "bad_image"),
    "large": ({"files": {"image": bytes(100_001)}, "data": {"task": "pets"}}, 413, "too_large"),
    "threshold 2": ({"data": {"task": "pets", "threshold": "2"}}, 422, "bad_threshold"),
    "threshold nan": ({"data": {"task": "pets", "threshold": "nan"}}, 422, "bad_threshold"),
    "XML": ({"files": None, "content": "<a/>", "headers": {"content-type": "text/xml"}}, 415, "bad_content_type"),
    "JSON and URL": ({"files": None, "json": {"images": [""]}, "params": {"task": "pets"}}, 422, "bad_field"),
    "JSON without images": ({"files": None, "json": {"tasks": ["pets"]}}, 422, "invalid"),
    "JSON of no images": ({"files": None, "json": {"images": [], "tasks": ["pets"]}}, 422, "invalid"),
    "JSON of many images": ({"files": None, "json": {"images": [""] * 4, "tasks": ["pets"]}}, 400, "bad_request"),
    "JSON, not base64": ({"files": None, "json": {"images": ["?"], "tasks": ["pets"]}}, 422, "bad_image"),
    "JSON, text for topk": ({"files": None, "json": {"images": [""], "tasks": ["a"], "topk": "3"}}, 422, "invalid"),
    "JSON, huge topk": ({"files": None, "json": {"images": [""], "tasks": ["a"], "topk": 10**30}}, 422, "invalid"),
    "JSON, unknown key": ({"files": None, "json": {"images": [""], "task": "pets"}}, 422, "invalid"),
    "no type": ({"files": None, "content": png()}, 415, "bad_content_type"),
    "no boundary": (
        {"files": None, "content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "bad_request",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_to_classify(client, name):
    request, status, code = BAD[name]
    check_error(client.post("/v1/classify", **{"files": {"image": png()}, **request}), status, code)
    assert ask(client, task="pets").status_code == 200


@pytest.mark.parametrize(
    "name, body, status, code",
    [
        ("new", '{"classes": []}', 422, "bad_classes"),
        ("new", '{"classes": "cat"}', 422, "invalid"),
        ("new", '{"classes": [1]}', 422, "invalid"),
        ("new", '{"classes": ["a"], "more": 1}', 422, "invalid"),
        ("new", "{}", 422, "invalid"),
        ("new", "[]", 422, "invalid"),
        ("new", "{", 400, "bad_json"),
        ("new", "[" * 50_000, 400, "bad_json"),
        ("new", '{"classes": ["a"], "classes": ["b"]}', 400, "bad_json"),
        ("new", '{"classes": NaN}', 400, "bad_json"),
        ("new", '{"classes": [-Infinity]}', 400, "bad_json"),
        ("new", '{"classes": [1e999]}', 400, "bad_json"),
        ("new", '{"classes": [' + "9" * 5000 + "]}", 400, "bad_json"),
        ("new", b'{"classes": ["\xff"]}', 400, "bad_json"),
        ("new", "", 400, "bad_json"),
        ("new", '{"classes": ["\\ud800"]}', 422, "bad_classes"),
        ("new", json.dumps({"classes": ["a", "a"]}), 422, "bad_classes"),
        ("new", json.dumps({"classes": [str(i) for i in range(9)]}), 422, "bad_classes"),
        ("%20", '{"classes": ["a"]}', 422, "bad_name"),
        ("", '{"classes": ["a"]}', 422, "bad_name"),
        ("n" * 21, '{"classes": ["a"]}', 422, "bad_name"),
        ("new", " " * 100_001, 413, "too_large"),
    ],
)
def test_bad_tasks_change_nothing(client, name, body, status, code):
    headers = {"content-type": "application/json"}
    check_error(client.put(f"/v1/tasks/{name}", content=body, headers=headers), status, code)
    assert [task["name"] for task in client.get("/v1/tasks").json()["tasks"]] == list(TASKS)


def test_there_is_room_for_so_many_tasks(client):
    for name in ("three", "four"):
        assert client.put(f"/v1/tasks/{name}", json={"classes": ["a"]}).status_code == 201
    check_error(client.put("/v1/tasks/five", json={"classes": ["a"]}), 409, "too_many_tasks")
    assert client.put("/v1/tasks/four", json={"classes": ["b"]}).status_code == 200
    client.delete("/v1/tasks/three")
    assert client.put("/v1/tasks/five", json={"classes": ["a"]}).status_code == 201


@pytest.mark.parametrize("route", ["/v1/tasks/pets%0A", "/v1/tasks/pe%00ts", "/v1/tasks/pets%C2%85"])
def test_a_path_is_no_other_with_a_line_end(route, client):
    before = client.get("/v1/tasks").json()
    for method, body in (("PUT", {"classes": ["a"]}), ("GET", None), ("DELETE", None)):
        answer = client.request(method, route, json=body)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
    assert client.get("/v1/tasks").json() == before


def test_health_answers_head(client):
    for path in ("/healthz", "/readyz"):
        answer = client.head(path)
        assert answer.status_code == 200 and not answer.content


def test_the_frameworks_own_errors_are_json_too(client):
    check_error(client.get("/nowhere"), 404, "not_found")
    check_error(client.delete("/v1/classify"), 405, "method_not_allowed")


def test_only_known_hosts_are_answered(service):
    service.options = replace(OPTIONS, hosts=("localhost", "[::1]", "My.Proxy"))
    with TestClient(create_app(service)) as client:
        for host in ("localhost", "localhost:8000", "[::1]:80", "my.proxy"):
            assert client.get("/healthz", headers={"host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example:8000", "localhost:8000:1", "[::1", "[", ":", ""):
            check_error(client.get("/v1/tasks", headers={"host": host}), 400, "unknown_host")
        refused = client.put("/v1/tasks/pets", json={"classes": ["a"]}, headers={"host": "evil.example"})
        check_error(refused, 400, "unknown_host")
        assert len(service.registry) == 0


def test_a_failure_inside_tells_nothing_of_the_inside(client, service, monkeypatch):
    async def broken(images, tasks, topk):
        raise RuntimeError("secret")

    monkeypatch.setattr(service.classifier, "_answers", broken)
    assert "secret" not in check_error(ask(client, task="pets"), 500, "internal")


@pytest.fixture
def held(service, monkeypatch):
    """Batches wait until this event is set."""
    gate, real = asyncio.Event(), service.classifier._answers

    async def classify(images, tasks, topk):
        await gate.wait()
        return await real(images, tasks, topk)

    monkeypatch.setattr(service.classifier, "_answers", classify)
    return gate


def test_more_requests_than_are_taken_at_a_time(client, held):
    """Six requests wait for the model; the seventh is told when to come again, and then served."""
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(ask, client, task="pets") for _ in range(6)]
        until(lambda: "hyperclip_pending_requests 6.0" in client.get("/metrics").text)
        response = ask(client, task="pets")
        check_error(response, 503, "busy")
        assert response.headers["retry-after"] == "1"
        assert client.get("/healthz").status_code == client.get("/v1/tasks").status_code == 200
        client.portal.call(held.set)
        assert [each.result().status_code for each in waiting] == [200] * 6
    assert ask(client, task="pets").status_code == 200


def test_a_task_may_go_while_requests_wait_for_it(client, service, model, held):
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(ask, client, task=task) for task in ("pets", "food")]
        until(lambda: len(service.classifier._unanswered) == 2)
        client.delete("/v1/tasks/pets")
        assert client.put("/v1/tasks/food", json={"classes": ["soup"]}).status_code == 200
        client.portal.call(held.set)
        answers = [each.result().json()["results"] for each in waiting]
    assert answers == [expected(model, [png()], [task], 5) for task in ("pets", "food")]
    assert ask(client, task="food").json()["results"][0]["ranked"][0]["name"] == "soup"


def test_health_and_metrics(client, service):
    assert client.get("/readyz").json() == {"status": "ready", "tasks": 2, "saves": "ok"}
    ask(client, task="pets")
    ask(client, task="birds")
    text = client.get("/metrics").text
    for line in (
        'hyperclip_requests_total{method="POST",route="/v1/classify",status="200"} 1.0',
        'hyperclip_requests_total{method="POST",route="/v1/classify",status="404"} 1.0',
        'hyperclip_requests_total{method="PUT",route="/v1/tasks/{name:path}",status="201"} 2.0',
        'hyperclip_request_seconds_count{route="/v1/classify"} 2.0',
        'hyperclip_batch_images_bucket{le="1.0"} 1.0',
        "hyperclip_batch_tasks_count 1.0",
        "hyperclip_pending_requests 0.0",
        "hyperclip_waiting_images 0.0",
        "hyperclip_tasks 2.0",
    ):
        assert line in text.splitlines()
    service.ready = False
    check_error(client.get("/readyz"), 503, "not_ready")
    assert client.get("/healthz").json() == {"status": "ok"}


def test_the_page_is_served_and_loads_nothing_from_elsewhere(client):
    response = client.get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "http" not in response.text.replace("http-equiv", "")


def test_a_change_is_in_the_file_once_it_is_confirmed(client, model, path):
    client.put("/v1/tasks/new", json={"classes": ["x", "y"]})
    assert TaskBank.load(path, model).tasks == ("pets", "food", "new")
    client.delete("/v1/tasks/food")
    assert TaskBank.load(path, model).tasks == ("pets", "new")
