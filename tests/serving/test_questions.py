"""What a request asks and is told: JSON and forms, embeddings, thresholds, a bad image of several, /openapi.json."""

import base64
import json

import jsonschema
import pytest
import torch

from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.tasks import adapt_tasks, embed_tasks
from tests.serving.asking import TASKS, ask, check_error, expected, png


def in_json(client, route="classify", **body):
    return client.post(f"/v1/{route}", json=body)


def base64_of(*contents):
    return [base64.b64encode(content).decode() for content in contents]


def test_json_asks_as_a_form_does(client, model):
    contents = [png("red"), png("blue")]
    answer = in_json(client, images=base64_of(*contents), tasks=["food", "pets"], topk=2)
    assert answer.json() == {"results": expected(model, contents, ["food", "pets"], 2)}
    one = in_json(client, images=base64_of(png()), labels=TASKS["food"])
    assert one.json()["results"] == [{**expected(model, [png()], ["food"], 5)[0], "task": None}]


def test_a_threshold_leaves_out_what_does_not_fit(client):
    (whole,) = ask(client, task="pets").json()["results"]
    scores = [each["score"] for each in whole["ranked"]]
    assert scores == sorted(scores, reverse=True)
    for threshold, left in (((scores[0] + scores[1]) / 2, 1), (scores[0] + 1e-6, 0), (0, 3)):
        (form,) = ask(client, task="pets", threshold=f"{threshold:.12f}").json()["results"]
        (same,) = in_json(client, images=base64_of(png()), tasks=["pets"], threshold=threshold).json()["results"]
        assert form == same == {"task": "pets", "ranked": whole["ranked"][:left]}


def test_a_bad_image_among_several_has_its_error_in_its_place(client, model):
    contents = [png("red"), b"no image", png("blue")]
    files = [("image", content) for content in contents]
    good = expected(model, [contents[0], contents[2]], ["pets"] * 2, 5)
    for answer in (
        client.post("/v1/classify", files=files, data={"task": "pets"}),
        in_json(client, images=base64_of(*contents), tasks=["pets"]),
    ):
        assert answer.status_code == 200
        first, second, third = answer.json()["results"]
        assert [first, third] == good
        assert second["task"] == "pets" and second["error"]["code"] == "bad_image" and second["error"]["status"] == 422


def test_embeddings(client, model):
    contents, tasks = [png("red"), png("blue")], ["pets", "food"]
    made = adapt_tasks(model, [TASKS[task] for task in tasks])
    images = torch.stack([load_image(content, model.preprocessing) for content in contents])
    wanted = embed_tasks(model, images, made)
    files = [("image", content) for content in contents]
    for answer in (
        client.post("/v1/embed", files=files, data={"task": tasks}),
        in_json(client, "embed", images=base64_of(*contents), tasks=tasks),
    ):
        results = answer.json()["results"]
        assert [result["task"] for result in results] == tasks
        found = torch.tensor([result["embedding"] for result in results])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    check_error(client.post("/v1/embed", files=files, data={"task": "pets", "topk": "2"}), 422, "bad_field")
    check_error(in_json(client, "embed", images=base64_of(png()), tasks=["pets"], topk=2), 422, "invalid")


def test_answers_and_bodies_are_what_openapi_says(client):
    """Every answer, with nothing left over, and every body that the tests send."""
    api = client.get("/openapi.json").json()
    ids = {operation["operationId"] for operations in api["paths"].values() for operation in operations.values()}
    assert {"classify", "embed", "put_task", "list_tasks"} <= ids
    routes = {(method, path) for path, operations in api["paths"].items() for method in operations}
    named = "/v1/tasks/{name}"
    assert {("post", "/v1/classify"), ("post", "/v1/embed"), ("put", named), ("delete", named)} <= routes
    files = [("image", png()), ("image", b"broken")]
    images = base64_of(png())
    answers = {
        ("post", "/v1/classify"): client.post("/v1/classify", files=files, data={"task": "pets"}),
        ("post", "/v1/embed"): client.post("/v1/embed", files=files, data={"label": ["a", "b"]}),
        ("get", "/v1/tasks"): client.get("/v1/tasks"),
        ("get", named): client.get("/v1/tasks/pets"),
        ("put", named): client.put("/v1/tasks/new", json={"classes": ["a"]}),
        ("get", "/readyz"): client.get("/readyz"),
        ("get", "/healthz"): client.get("/healthz"),
    }
    for (method, path), answer in answers.items():
        content = api["paths"][path][method]["responses"][str(answer.status_code)]["content"]
        validate(answer.json(), content["application/json"]["schema"], api)
    refused = client.post("/v1/classify", files=files[1:], data={"task": "pets"})
    content = api["paths"]["/v1/classify"]["post"]["responses"]["422"]["content"]
    validate(refused.json(), content["application/json"]["schema"], api)
    for path, body in (("classify", {"images": images, "tasks": ["pets"], "topk": 2}), ("embed", {"images": images})):
        content = api["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "multipart/form-data", "image/*", "application/octet-stream"}
        validate(body, content["application/json"]["schema"], api)
        with pytest.raises(jsonschema.ValidationError):
            validate({**body, "top": 3}, content["application/json"]["schema"], api)


def validate(value, schema, api):
    """A value by a schema of an API; objects may have no further keys."""
    closed = json.loads(
        json.dumps(api["components"]).replace('"type": "object"', '"type": "object", "additionalProperties": false')
    )
    jsonschema.validate(value, {**schema, "components": closed})
