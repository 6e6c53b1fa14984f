"""The page in a real browser, Chromium without a window; its workers compute nothing, but for one test."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from antidreambooth.photos import decoding
from tests.conftest import ROOT
from tests.page.conftest import picture

playwright = pytest.importorskip(
    "playwright.sync_api", reason="pip install -e '.[browser-test]' for tests in a browser"
)
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install -e '.[browser-test]'")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # playwright's own pipes
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
# The console's words for a photo that is refused, and for a server that was killed.
EXPECTED = re.compile("status of 415|ERR_(CONNECTION_RE(FUSED|SET)|CONTENT_LENGTH|EMPTY_RESPONSE|SOCKET_NOT)")
expect = playwright.expect
SECONDS = 20_000  # milliseconds that anything may take


class Server:
    """A page in a process of its own, which can be killed and started again."""

    def __init__(self, home: Path, true: bool = False) -> None:
        self.home, self.true = home, true
        self.process: subprocess.Popen[str] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self) -> str:
        """Gives the address with the key."""
        program = [str(ROOT / "cli.py"), "page"] if self.true else [str(Path(__file__).with_name("fake_server.py"))]
        options = ["--port", str(self.port), "--folder", str(self.home), "--rounds", "2" if self.true else "4"]
        environment = {"FAKE_SECONDS": "1", "FAKE_ERROR": "", **os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, *program, *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        printed = "".join(self.process.stdout.readline() for _ in range(3))
        return next(word for word in printed.split() if word.startswith("http"))

    def kill(self, how: int = signal.SIGKILL) -> str:
        """Ends it, and says what it printed."""
        if self.process is None:
            return ""
        self.process.send_signal(how)
        rest, _ = self.process.communicate(timeout=10)
        self.process = None
        return rest


@pytest.fixture
def browser():
    """A browser for each test."""
    with playwright.sync_playwright() as driver:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        one = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", rules])
        yield one
        one.close()


@pytest.fixture
def server(tmp_path):
    one = Server(tmp_path / "page")
    yield one
    one.kill()


@pytest.fixture
def context(browser):
    """A browser's window; afterwards nothing foreign was asked for, and nothing went wrong on the page."""
    asked, wrong = [], []
    one = browser.new_context(viewport={"width": 1200, "height": 900})
    one.set_default_timeout(SECONDS)
    expect.set_options(timeout=SECONDS)
    one.on("request", lambda request: asked.append(request.url))
    one.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    one.on("weberror", lambda error: wrong.append(str(error.error)))
    yield one
    one.close()
    assert not [url for url in asked if not re.match(r"http://127\.0\.0\.1:|blob:http://127\.0\.0\.1:", url)]
    assert not [text for text in wrong if not EXPECTED.search(text)]


def opened(context, server):
    """The page in a tab."""
    one = context.new_page()
    one.on("dialog", lambda dialog: dialog.accept())
    one.goto(server.start())
    expect(one.locator("#choosing")).to_be_visible()
    return one


@pytest.fixture
def page(context, server):
    return opened(context, server)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("one.jpg", "two.png"):
        (folder / name).write_bytes(picture("PNG" if name.endswith("png") else "JPEG", (400, 300)))
    return [folder / "one.jpg", folder / "two.png"]


def without_findings(page) -> None:
    """No finding of axe-core, in light and in dark, on a wide and on a narrow screen, and nothing sticks out."""
    for scheme, width in (("light", 1200), ("dark", 390), ("light", 320)):  # 320 is 1280 at 400 %
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        found = axe.Axe().run(page).response["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 1200, "height": 900})


def add(page, photos, count=None) -> None:
    page.set_input_files("#files", [str(photo) for photo in photos])
    expect(page.locator("#photos li")).to_have_count(len(photos) if count is None else count)
    expect(page.locator("#reading")).to_be_empty()


def begin(page, photos) -> None:
    add(page, photos)
    page.click("#next")
    expect(page.locator("#time")).to_contain_text("About")
    page.click("#start")
    expect(page.locator("#working")).to_be_visible()


def focus(page) -> str:
    return page.evaluate("document.activeElement.id")


def test_every_state_is_usable_by_everybody(page, photos):
    expect(page.locator("#choosing")).to_be_visible()
    assert "token" not in page.url
    expect(page.locator("#only-trial")).to_contain_text("its photos are not protected")
    without_findings(page)
    add(page, photos)
    without_findings(page)
    page.click("#next")
    expect(page.locator("#start-trial")).to_be_visible()
    expect(page.locator("#time")).to_contain_text("About 3 minutes")
    assert focus(page) == "settings-heading"
    page.check("input[value=largest]")
    expect(page.locator("#time")).to_contain_text("In 1 of 2 photos no face was found")
    expect(page.locator("#faces-news")).to_contain_text("No face was found in one.jpg, two.png")
    page.check("input[value=everything]")
    expect(page.locator("#faces-news")).to_be_empty()
    page.click("#look-start")
    expect(page.locator("#look")).to_be_visible()
    page.check("input[value=pressed]")
    expect(page.locator("#faces")).to_contain_text("No face was found in one.jpg")
    without_findings(page)
    page.click("#start")
    expect(page.locator("#step")).to_contain_text(re.compile("Step [12] of 4"))
    assert focus(page) == "working-heading"
    without_findings(page)
    expect(page.locator("#done")).to_be_visible()
    assert focus(page) == "done-heading"
    expect(page.locator(".pair")).to_have_count(2)
    expect(page.locator("#done-trial")).to_contain_text("Do not rely on these files")
    expect(page.locator("#post")).to_be_hidden()
    without_findings(page)
    page.click("#test-start")
    expect(page.locator("#test-news")).to_contain_text("of 3 done")
    expect(page.locator("#test-bar")).to_be_visible()
    expect(page.locator("#test-news")).to_contain_text("About 2 minutes left")
    expect(page.locator("#test-result")).to_contain_text("recognised in 0 of 1 pictures")
    without_findings(page)
    page.click("#delete")
    expect(page.locator("#choosing")).to_be_visible()
    expect(page.locator("#photos li")).to_have_count(0)


def test_by_keyboard_alone(page, photos):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert focus(page) == "files"
    page.set_input_files("#files", [str(photo) for photo in photos])  # the dialogue itself is the browser's own
    expect(page.locator("#photos li")).to_have_count(2)
    expect(page.locator("#reading")).to_be_empty()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # removes the first photo
    expect(page.locator("#photos li")).to_have_count(1)
    expect(page.locator("#photos button")).to_be_focused()
    page.keyboard.press("Tab")
    assert focus(page) == "next"
    page.keyboard.press("Enter")
    assert focus(page) == "settings-heading"
    expect(page.locator("#models input")).to_have_count(1)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("new FormData(document.getElementById('form')).get('strength')") == "strong"
    page.keyboard.press("Tab")
    assert focus(page) == "look-start"
    page.keyboard.press("Enter")
    expect(page.locator("#look .after")).to_have_js_property("complete", True)
    page.locator("#look input[type=range]").press("ArrowRight")
    page.locator("input[value=everything]").focus()
    for _ in range(2):
        page.keyboard.press("Tab")
    assert focus(page) == "start"
    page.keyboard.press("Enter")
    expect(page.locator("#done")).to_be_visible()
    slider = page.locator(".pair input[type=range]")
    expect(page.locator(".pair .before")).to_have_js_property("complete", True)
    slider.scroll_into_view_if_needed()
    shown = page.locator(".pair .before").bounding_box()
    assert abs(slider.bounding_box()["width"] - shown["width"]) < 2  # so that the thumb is under the divider
    page.mouse.move(shown["x"] + shown["width"] / 2, shown["y"] + 50)
    page.mouse.down()
    page.mouse.move(shown["x"] + shown["width"] / 4, shown["y"] + 50)
    page.mouse.up()
    assert slider.input_value() == "25"
    slider.fill("50")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "49 percent before, 51 percent after"
    page.keyboard.press("End")
    assert slider.get_attribute("aria-valuetext") == "100 percent before, 0 percent after"
    after = page.locator(".pair .after")
    assert after.evaluate("one => getComputedStyle(one).clipPath") == "inset(0px 0px 0px 100%)"
    page.get_by_role("button", name="Close up").focus()
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Close up")).to_have_attribute("aria-pressed", "true")
    before = page.locator(".pair .before")
    expect(before).to_have_js_property("complete", True)
    assert before.evaluate("one => one.naturalWidth") == 300


def test_a_reload_a_second_tab_and_a_killed_server_find_the_work(page, photos, server, context):
    begin(page, photos)
    page.reload()
    expect(page.locator("#working")).to_be_visible()
    second = context.new_page()
    second.goto(page.url)
    expect(second.locator("#working")).to_be_visible()
    page.close()
    server.kill()
    expect(second.locator("#lost")).to_be_visible()
    server.start()
    expect(second.locator("#lost")).to_be_hidden()
    expect(second.locator("#done")).to_be_visible()
    expect(second.locator("#summary")).to_contain_text("All 4 steps")
    third = context.new_page()
    third.goto(f"http://127.0.0.1:{server.port}/")
    expect(third.locator("#earlier")).to_contain_text("one.jpg, two.png (finished)")
    third.get_by_role("button", name="Open the work").click()
    expect(third.locator("#done")).to_be_visible()


def test_stop_and_go_on(page, photos, server):
    begin(page, photos)
    expect(page.locator("#step")).to_contain_text(re.compile("Step [12]"))
    page.click("#stop")
    expect(page.locator("#done")).to_be_visible()
    expect(page.locator("#summary")).to_contain_text(re.compile("^Stopped after . of 4 steps.$"))
    page.click("#go-on")
    expect(page.locator("#working")).to_be_visible()
    expect(page.locator("#summary")).to_contain_text("All 4 steps")
    with page.expect_download() as saved:
        page.click("#download-all")
    assert saved.value.suggested_filename == "photos.zip"
    with page.expect_download() as saved:
        page.get_by_role("link", name="Download one.png").click()
    assert saved.value.suggested_filename == "one.png"
    assert "ended" in server.kill(signal.SIGINT)


def test_what_did_not_come_to_an_end_says_why(context, photos, server, monkeypatch):
    monkeypatch.setenv("FAKE_ERROR", "the disk is full: make room")
    page = opened(context, server)
    add(page, photos)
    page.click("#next")
    page.click("#start")
    expect(page.locator("#failed")).to_be_visible()
    assert focus(page) == "failed-heading"
    expect(page.locator("#why")).to_have_text("the disk is full: make room")
    without_findings(page)
    page.click("#change")
    expect(page.locator("#photos li")).to_have_count(2)


def test_other_photos_meanwhile_wait_for_those_that_are_at_work(context, photos, server, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "10")
    page = opened(context, server)
    begin(page, photos[:1])
    page.click("#meanwhile")
    expect(page.locator("#earlier")).to_contain_text("one.jpg (at work)")
    begin(page, photos[1:])
    expect(page.locator("#step")).to_contain_text(re.compile("^Waiting for other work: .*, one.jpg"))
    without_findings(page)
    page.click("#open-first")
    expect(page.locator("#step")).to_contain_text("Step")
    page.click("#stop")  # whoever does not want to wait
    expect(page.locator("#done")).to_be_visible()
    page.click("#another")
    page.get_by_role("button", name="Open the work").first.click()
    expect(page.locator("#step")).to_contain_text("Step")
    page.click("#stop")
    expect(page.locator("#done .pair")).to_contain_text("two.png")


def test_a_real_model_is_the_usual_choice_where_one_works(context, photos, server):
    trial = {"id": "embedded", "name": "Small trial model", "bytes": 1, "able": True, "why": "", "terms": "own"}
    others = [{**trial, "id": "other", "able": False, "why": "no card"}, {**trial, "id": "real"}]
    context.route("**/models", lambda route: route.fulfill(json=[trial, *others]))
    context.route("**/estimate", lambda route: route.continue_(post_data="{}"))  # the server knows the first one only
    page = opened(context, server)
    add(page, photos[:1])
    page.click("#next")
    expect(page.locator("input[value=real]")).to_be_checked()
    expect(page.locator("input[value=other]")).to_be_disabled()
    expect(page.locator("#start-trial")).to_be_hidden()
    page.click("#back")
    expect(page.locator("#only-trial")).to_be_hidden()
    page.click("#next")
    page.check("input[value=embedded]")
    expect(page.locator("#start-trial")).to_be_visible()


def test_ctrl_c_in_the_terminal_says_that_work_goes_on(page, photos, server):
    begin(page, photos)
    assert "goes on" in server.kill(signal.SIGINT)
    server.start()
    expect(page.locator("#done")).to_be_visible()


def test_every_refused_file_has_its_sentence(page, tmp_path):
    assert decoding  # registers HEIF
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.jpg").write_bytes(picture("JPEG", (400, 300))[:-5000])
    (tmp_path / "heavy.jpg").write_bytes(bytes(41 * 2**20))
    Image.new("RGB", (10_000, 10_000), "grey").save(tmp_path / "large.png", compress_level=1)
    Image.new("RGB", (20_000, 20_000)).save(tmp_path / "larger.png", compress_level=1)
    (tmp_path / "phone.heic").write_bytes(picture("HEIF", (400, 300)))
    names = ("text.jpg", "cut.jpg", "heavy.jpg", "large.png", "larger.png", "phone.heic")
    add(page, [tmp_path / name for name in names], count=2)
    for name, words in (
        ("text", "not a picture"),
        ("cut", "damaged"),
        ("heavy", "40 MB"),
        ("larger", "400 million pixels"),
    ):
        expect(page.locator("#problems")).to_contain_text(re.compile(f"{name}.*{words}"))
    expect(page.locator("#problems p")).to_have_count(4)
    page.get_by_role("button", name="Close the message about text.jpg").click()
    expect(page.locator("#problems p")).to_have_count(3)
    shown = page.locator("#photos img")
    for number in range(2):
        expect(shown.nth(number)).to_have_js_property("complete", True)
        assert shown.nth(number).evaluate("one => one.naturalWidth") > 0
    without_findings(page)


def test_twenty_photos(page, tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.jpg").write_bytes(picture("JPEG", (400, 300), seed=number))
    begin(page, [tmp_path / f"{number}.jpg" for number in range(20)])
    expect(page.locator(".pair")).to_have_count(20)


def test_the_true_worker(context, tmp_path):
    """Real photos and the embedded model, from a cold start to the changed photos."""
    server = Server(tmp_path / "page", true=True)
    try:
        one = context.new_page()
        begun = time.monotonic()
        one.goto(server.start())
        expect(one.locator("#choosing")).to_be_visible()
        add(one, sorted((ROOT / "examples" / "photos").glob("*.jpg"))[:2])
        one.click("#next")
        one.click("#start")
        expect(one.locator("#done")).to_be_visible(timeout=180_000)
        print(f"{time.monotonic() - begun:.0f} s to the first changed photo")
        expect(one.locator("#summary")).to_contain_text("All 2 steps")
        expect(one.locator(".stack .after").first).to_have_js_property("complete", True)
        assert one.locator(".stack .after").first.evaluate("one => one.naturalWidth") == 600
        without_findings(one)
    finally:
        server.kill()
