"""The page in a real browser: a picture, class names or a task, ranked names; keyboard, errors, a phone's width."""

import functools
import http.server
import os
import shutil
import threading

import httpx
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from hyperclip_fast.serving.gate.bodies import BodyLimits
from hyperclip_fast.serving.gate.keys import new_key, read_keys
from hyperclip_fast.serving.options import ServeOptions
from tests.serving.process import serving_here
from tests.towers import patch_text_tower, tiny_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its driver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_text_tower(monkeypatch)
        model = tiny_model()
        options = ServeOptions(bodies=BodyLimits(max_bytes=200_000))
        with serving_here(model, folder / "tasks.safetensors", options) as address:
            yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(DRIVER, env={**os.environ, "SE_OFFLINE": "true"})
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address, tmp_path):
    httpx.put(f"{address}/v1/tasks/pets", json={"classes": ["cat", "dog", "<b>parrot</b>"]}).raise_for_status()
    Image.new("RGB", (60, 40), "orange").save(tmp_path / "picture.png")
    Image.effect_noise((700, 700), 90).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    browser.get_log("browser")  # what other tests left
    browser.get(address)
    WebDriverWait(browser, 60).until(lambda _: len(Select(get(browser, "task")).options) == 2)
    return browser


def get(page, name):
    return page.find_element(By.ID, name)


def results(page):
    """Names and shares, once they are there."""
    WebDriverWait(page, 60).until(lambda _: page.find_elements(By.CSS_SELECTOR, "#results li"))
    items = page.find_elements(By.CSS_SELECTOR, "#results li")
    return [[part.text for part in item.find_elements(By.TAG_NAME, "span")] for item in items]


def status(page, text):
    WebDriverWait(page, 60).until(lambda _: text in get(page, "status").text)


def test_class_names_typed_and_a_picture(page, tmp_path):
    assert get(page, "invite").is_displayed() and not get(page, "preview").is_displayed()
    get(page, "image").send_keys(str(tmp_path / "picture.png"))
    assert get(page, "preview").is_displayed() and not get(page, "invite").is_displayed()
    get(page, "names").send_keys("sun, moon\nstar, sun,")
    get(page, "go").click()
    ranked = results(page)
    assert sorted(name for name, _ in ranked) == ["moon", "star", "sun"]
    shares = [float(share.removesuffix(" %").removeprefix("< ")) for _, share in ranked]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.3)


def test_a_task_chosen_by_keyboard_alone(page, tmp_path):
    get(page, "image").send_keys(str(tmp_path / "picture.png"))
    get(page, "task").send_keys("pets")
    assert not get(page, "names").is_displayed()
    assert get(page, "classes").text == "cat, dog, <b>parrot</b>"
    get(page, "go").send_keys(Keys.ENTER)
    assert sorted(name for name, _ in results(page)) == ["<b>parrot</b>", "cat", "dog"]  # as text, not as markup


def test_tasks_loaded_twice_at_once_are_listed_once(page):
    page.execute_async_script(
        """
        const slow = (content) => new Promise((done) => setTimeout(() => done(content), 200));
        window.fetch = async () => ({ ok: true, json: () => slow({ tasks: [{ name: "pets", classes: ["cat"] }] }) });
        Promise.all([loadTasks(), loadTasks()]).then(arguments[0]);
        """
    )
    assert [option.text for option in Select(get(page, "task")).options][1:] == ["pets"]


def test_a_picture_dropped(page):
    page.execute_script(
        """
        const canvas = document.createElement("canvas");
        canvas.toBlob((blob) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([blob], "dropped.png", {type: "image/png"}));
          document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
        });
        """
    )
    WebDriverWait(page, 60).until(lambda _: get(page, "preview").is_displayed())
    get(page, "names").send_keys("a, b")
    get(page, "go").click()
    assert len(results(page)) == 2


def test_what_is_missing_or_refused_is_said(page, tmp_path):
    get(page, "go").click()
    status(page, "Choose a picture first")
    get(page, "image").send_keys(str(tmp_path / "text.png"))
    get(page, "go").click()
    status(page, "Type some class names first")
    get(page, "names").send_keys("a, b")
    get(page, "go").click()
    status(page, "whole image file")
    get(page, "image").send_keys(str(tmp_path / "large.png"))
    get(page, "go").click()
    status(page, "at most 200000 bytes")
    assert "bad" in get(page, "status").get_attribute("class")
    get(page, "image").send_keys(str(tmp_path / "picture.png"))
    get(page, "go").click()
    assert len(results(page)) == 2 and get(page, "status").text == ""


@pytest.fixture
def locked(tmp_path):
    """(address of a server with keys, a key of a classifier)."""
    (key, line), (admin, other) = new_key("classify", "page"), new_key("admin", "test")
    (tmp_path / "keys.txt").write_text(f"{line}\n{other}\n")
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_text_tower(monkeypatch)
        options = ServeOptions(keys=read_keys(tmp_path / "keys.txt"))
        with serving_here(tiny_model(), tmp_path / "tasks.safetensors", options) as address:
            headers = {"Authorization": f"Bearer {admin}"}
            httpx.put(f"{address}/v1/tasks/pets", json={"classes": ["cat", "dog"]}, headers=headers).raise_for_status()
            yield address, key


def test_the_page_asks_for_a_key_where_the_server_does(browser, locked, tmp_path):
    address, key = locked
    browser.get(address)
    WebDriverWait(browser, 60).until(lambda _: get(browser, "locked").is_displayed())
    Image.new("RGB", (60, 40), "orange").save(tmp_path / "picture.png")
    get(browser, "image").send_keys(str(tmp_path / "picture.png"))
    get(browser, "names").send_keys("a, b")
    get(browser, "key").send_keys("wrong")
    get(browser, "go").click()
    status(browser, "Enter an API key")
    get(browser, "key").clear()
    get(browser, "key").send_keys(key)
    get(browser, "go").click()
    assert len(results(browser)) == 2
    browser.refresh()  # the tab remembers it
    WebDriverWait(browser, 60).until(lambda _: len(Select(get(browser, "task")).options) == 2)
    assert get(browser, "key").get_attribute("value") == key
    browser.execute_script("sessionStorage.clear()")


def test_a_page_of_another_origin_changes_nothing(browser, address, tmp_path):
    """A real browser says whose page it is, whatever the page does."""
    page = tmp_path / "evil.html"
    page.write_text("<title>evil</title>")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        browser.get(f"http://127.0.0.1:{other.server_port}/evil.html")
        attack = """
            const done = arguments[1], form = new FormData();
            form.append("label", "a");
            Promise.allSettled([
              fetch(arguments[0] + "/v1/tasks/evil", {method: "PUT", body: '{"classes": ["a"]}', mode: "cors"}),
              fetch(arguments[0] + "/v1/classify", {method: "POST", body: form, mode: "no-cors"}),
            ]).then((all) => done(all.map((each) => each.status)));
        """
        assert browser.execute_async_script(attack, address)[0] == "rejected"
        other.shutdown()
    assert "evil" not in httpx.get(f"{address}/v1/tasks").text
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    for method in ("OPTIONS", "POST"):
        counts = [line for line in lines if line.startswith("hyperclip_requests_total") and f'"{method}"' in line]
        assert any('status="403"' in line for line in counts), counts


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_routes_are_shown_to_people(browser, address):
    browser.get_log("browser")  # what other tests left
    browser.get(f"{address}/docs")
    WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#routes h2"))
    text = get(browser, "routes").text
    for part in (
        "POST /v1/classify",
        "takes application/json: {images: [string], tasks?: [string], labels?: [string], topk?: integer, "
        "threshold?: number}",
        "answers 200 application/json: {results: [{task: string or null, ranked: [{name: string, probability: number, "
        "score: number}]} or {task: string or null, error: {code: string, message: string, status: integer}}]}",
        "PUT /v1/tasks/{name}",
        "takes application/json: {classes: [string]}",
    ):
        assert part in text
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("size", [(360, 740), (1280, 900)], ids=["phone", "desk"])
def test_fits_its_window_and_loads_nothing_from_elsewhere(page, address, tmp_path, size):
    page.set_window_size(*size)
    get(page, "image").send_keys(str(tmp_path / "picture.png"))
    get(page, "names").send_keys(f"a, {'long' * 40}, c")
    get(page, "go").click()
    results(page)
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    sources = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert sources and all(source.startswith((address, "blob:")) for source in sources)
    errors = [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert all("422" in entry["message"] or "413" in entry["message"] for entry in errors), errors
    unnamed = page.execute_script(
        "return [...document.querySelectorAll('input, select, textarea, button')]"
        ".filter((e) => !(e.labels && e.labels.length) && !e.textContent.trim()).length"
    )
    assert unnamed == 0
