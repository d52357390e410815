"""The chat page in a real browser: asked in Chinese on a desk and in English on a phone, and what it shows."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from components.serve.engines import Engine
from components.serve.gateway import Gateway
from components.serve.local import listening
from components.serve.page import WORDS, language_of
from components.serve.requests import Limits
from tests.fake_engine import FakeEngine
from zhllama.tokenizer.chat import Chat

KEY = "a-key-for-the-tests-only"
CHAT = "/v1/chat/completions"


def gateway_of(engine: FakeEngine, api_key: str = "", positions: int = 512) -> Gateway:
    made = Engine("fake", Path(), [], "/health")
    return Gateway(Limits("zhllama", Chat(engine.encoder), positions), made, engine.address, lambda: True, api_key)


@pytest.fixture
def address(engine: FakeEngine, request: pytest.FixtureRequest) -> Iterator[str]:
    """A gateway with its page; parametrised with a key, one that asks for it."""
    import threading

    gateway = gateway_of(engine, getattr(request, "param", ""))
    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(gateway.app(page=True), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        server.force_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("NOT CHECKED: no chromium here, so the chat page is not tried in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # as root in a container there is no sandbox to be had
        started = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield started
        started.close()


class Page:
    """The page in a window of its own: what is typed, and what is shown."""

    def __init__(self, browser: Any, address: str, width: int, height: int, language: str) -> None:
        self.tab = browser.new_page(viewport={"width": width, "height": height}, locale=language)
        self.tab.set_default_timeout(60_000)
        self.elsewhere: list[str] = []
        self.tab.on("request", lambda made: self._note(made.url, address))
        self.tab.goto(address)
        self.box = self.tab.get_by_role("textbox").last

    def _note(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.elsewhere.append(url)

    def say(self, text: str) -> None:
        self.box.click()
        # what was refused stands there again
        self.tab.keyboard.press("Control+A")
        self.tab.keyboard.type(text)
        self.tab.keyboard.press("Enter")

    def shows(self, text: str) -> None:
        self.tab.get_by_text(text, exact=False).first.wait_for()

    def fits(self) -> bool:
        """Nothing is wider than the window, and the box to type in lies within it."""
        wide, high = self.tab.evaluate("[document.documentElement.scrollWidth, window.innerHeight]")
        place = self.box.bounding_box()
        return wide <= self.tab.viewport_size["width"] and place["y"] + place["height"] <= high


def said_of(engine: FakeEngine) -> list[list[str]]:
    return [[message["content"] for message in body["messages"]] for path, body in engine.seen if path == CHAT]


@pytest.mark.browser
def test_a_conversation_in_chinese_on_a_desk(browser: Any, address: str, engine: FakeEngine) -> None:
    page = Page(browser, address, 1100, 720, "zh-CN")
    page.shows(WORDS["zh"]["hello"][:10])
    engine.pieces = ["北京是", "**中国**", "的首都。"]
    page.say("请介绍北京")
    page.shows("的首都。")
    assert page.tab.locator("strong", has_text="中国").count() == 1
    engine.pieces = ["三月", "四月"]
    page.say("什么时候去？")
    page.shows("三月四月")
    assert said_of(engine) == [["请介绍北京"], ["请介绍北京", "北京是**中国**的首都。", "什么时候去？"]]
    assert page.fits()
    page.tab.get_by_role("button", name=WORDS["zh"]["new"]).click()
    page.tab.get_by_text("三月四月").wait_for(state="detached")
    page.say("重新开始")
    page.shows("重新开始")
    page.tab.wait_for_function("document.body.innerText.includes('三月四月')")
    assert said_of(engine)[-1] == ["重新开始"]
    assert not page.elsewhere


@pytest.mark.browser
def test_on_a_phone_in_english_and_back_to_chinese(browser: Any, address: str, engine: FakeEngine) -> None:
    page = Page(browser, address, 360, 640, "en-US")
    page.shows(WORDS["en"]["hello"])
    engine.pieces = ["A long answer. " * 20] * 5 + ["The end."]
    page.say("Tell me about Beijing")
    page.shows("The end.")
    assert page.fits()
    page.tab.get_by_role("link", name="中文").click()
    page.shows(WORDS["zh"]["hello"][:10])
    assert page.tab.locator("html").get_attribute("lang") == "zh"


@pytest.mark.browser
def test_an_answer_streams_before_it_is_whole(browser: Any, address: str, engine: FakeEngine) -> None:
    def slowly(handler: Any) -> None:
        handler.stream([handler.chunk("first words")], whole=False)
        engine.released.wait(60)
        last = handler.chunk(" last words")
        handler.wfile.write(f"{len(last):x}\r\n".encode() + last + b"\r\n0\r\n\r\n")

    engine.faults[CHAT] = slowly
    page = Page(browser, address, 800, 600, "en-US")
    page.say("go on")
    page.shows("first words")
    assert page.tab.get_by_text("last words").count() == 0
    engine.released.set()
    page.shows("last words")


@pytest.mark.browser
def test_a_failure_is_said_in_the_readers_language_and_the_page_lives_on(
    browser: Any, address: str, engine: FakeEngine
) -> None:
    engine.faults[CHAT] = lambda handler: handler.json(500, {})
    page = Page(browser, address, 800, 600, "zh-CN")
    page.say("你好")
    page.shows(WORDS["zh"]["fault"])
    engine.faults.clear()
    page.say("长" * 600)
    page.shows(WORDS["zh"]["too long"])
    page.say("再见")
    page.shows("好的。")


@pytest.mark.browser
def test_what_a_model_says_is_shown_and_never_run_or_fetched(browser: Any, address: str, engine: FakeEngine) -> None:
    engine.pieces = [
        "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
        "![](http://192.0.2.1/spy.png) the end."
    ]
    page = Page(browser, address, 800, 600, "en-US")
    page.say("hello")
    page.shows("the end.")
    assert page.tab.title() == "zhllama · zhllama"
    loaded = page.tab.evaluate(
        "[...document.images].filter(image => image.src.includes('192.0.2.1') && image.naturalWidth).length"
    )
    assert loaded == 0


@pytest.mark.browser
@pytest.mark.parametrize("address", [KEY], indirect=True)
def test_with_a_key_the_page_asks_for_it(browser: Any, address: str, engine: FakeEngine) -> None:
    page = Page(browser, address, 360, 640, "en-US")
    page.say("hello")
    page.shows(WORDS["en"]["wrong key"])
    assert not said_of(engine)
    page.tab.get_by_placeholder(WORDS["en"]["key"]).fill(KEY)
    page.say("hello again")
    page.shows("好的。")
    assert page.fits()


# --- without a browser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "accepted", "language"),
    [("", "zh-CN,zh;q=0.9", "zh"), ("", "en-GB", "en"), ("", "", "zh"), ("", "de", "en"), ("?lang=en", "zh", "en"),
     ("lang=zh", "en", "zh"), ("?lang=xx", "en", "en")],
)  # fmt: skip
def test_the_language_is_asked_for_or_the_browsers(query: str, accepted: str, language: str) -> None:
    assert language_of(query, accepted) == language


def test_both_languages_say_everything() -> None:
    assert WORDS["zh"].keys() == WORDS["en"].keys()
