"""What requests and answers hold, as models: they check requests, and describe both in /openapi.json."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_TOPK = 10**9


class Body(BaseModel):
    """A request's JSON: no other keys, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TaskBody(Body):
    """The class names of a task."""

    classes: list[str] = Field(description="class names, at least one, all different", examples=[["cat", "dog"]])


class EmbedBody(Body):
    """Images, each with its task, or all of them with one list of class names."""

    images: list[str] = Field(description="image files in base64", min_length=1)
    tasks: list[str] = Field([], description="the name of the one task of all images, or of each image's")
    labels: list[str] = Field([], description="class names in place of a task")


class ClassifyBody(EmbedBody):
    """What to classify."""

    topk: Annotated[int, Field(ge=1, le=MAX_TOPK)] = Field(5, description="classes of each image, at most")
    threshold: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="leave out classes with a lower score")


class Task(BaseModel):
    """A named task."""

    name: str
    classes: list[str]


class Tasks(BaseModel):
    """All named tasks."""

    tasks: list[Task]


class RankedClass(BaseModel):
    """A class name of an answer."""

    name: str
    probability: float = Field(description="softmax among the task's class names")
    score: float = Field(description="sigmoid of the logit: how well the name fits by itself")


class Classified(BaseModel):
    """An image's classes, best first; none of them where no score reaches the threshold."""

    task: str | None = Field(description="null where the request gave class names")
    ranked: list[RankedClass]


class Embedded(BaseModel):
    """An image's embedding, of length 1, by the row of its task."""

    task: str | None
    embedding: list[float]


class Problem(BaseModel):
    """What is wrong, for programs and for people."""

    code: str
    message: str
    status: int


class Failed(BaseModel):
    """One of several images that could not be read."""

    task: str | None
    error: Problem


class Classifications(BaseModel):
    """Each image's answer, in the order of the images."""

    results: list[Classified | Failed]


class Embeddings(BaseModel):
    """Each image's answer, in the order of the images."""

    results: list[Embedded | Failed]


class Health(BaseModel):
    """The process lives."""

    status: str


class Readiness(Health):
    """The server takes requests."""

    tasks: int = Field(description="how many have a name")
    saves: str = Field(description="failing where the last change could not be saved, else ok")


class ErrorBody(BaseModel):
    """Every error."""

    error: Problem
