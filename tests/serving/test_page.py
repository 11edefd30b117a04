"""The page in a real browser: a picture, class names or a task, ranked names; keyboard, errors, a phone's width."""

import os
import shutil

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from hyperclip_fast.serving.gate.bodies import BodyLimits
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
    import httpx

    httpx.put(f"{address}/v1/tasks/pets", json={"classes": ["cat", "dog", "<b>parrot</b>"]}).raise_for_status()
    Image.new("RGB", (60, 40), "orange").save(tmp_path / "picture.png")
    Image.effect_noise((700, 700), 90).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
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
