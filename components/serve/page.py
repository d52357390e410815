"""The chat page: three static files of our own (page.html, page.css, page.js) that ask this server's own API.

An answer is a model's, and a model says what its text or its trainer made it say: it is shown as text, by nodes that
are created by name, under a policy that runs no script, loads nothing and sends nothing but to this server. Until then
it was Shiny's chat component: it renders HTML in answers, and needs 'unsafe-inline' and 'unsafe-eval' for itself.
"""

from html import escape
from pathlib import Path
from string import Template
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from components.serve.requests import Limits
from zhllama.inference.sampling import Sampling

WORDS = {
    "zh": {
        "hello": "你好！请输入问题或指令，例如“请用三句话介绍北京”。",
        "placeholder": "输入消息，按回车发送",
        "message": "消息",
        "conversation": "对话",
        "send": "发送",
        "stop": "停止",
        "new": "新对话",
        "key": "API 密钥",
        "has key": "密钥已填",
        "wrong key": "需要正确的 API 密钥。",
        "too long": "这条消息超出了模型的上下文长度，请缩短后再试。",
        "fault": "服务器出错了，请稍后再试。",
        "you": "你",
        "other": "en",
        "other name": "English",
        "note": "模型的回答可能有误，请自行核对。",
        "script": "此页面需要 JavaScript。",
    },
    "en": {
        "hello": "Hello! Ask a question or give an instruction, in Chinese or in English.",
        "placeholder": "Type a message, Enter sends it",
        "message": "Message",
        "conversation": "Conversation",
        "send": "Send",
        "stop": "Stop",
        "new": "New chat",
        "key": "API key",
        "has key": "Key is set",
        "wrong key": "A valid API key is needed.",
        "too long": "This message is longer than the model's context; please shorten it.",
        "fault": "The server failed; please try again later.",
        "you": "You",
        "other": "zh",
        "other name": "中文",
        "note": "The model's answers may be wrong; check them.",
        "script": "This page needs JavaScript.",
    },
}
_OF_SCRIPT = ("wrong key", "has key", "too long", "fault", "you")
FILES = {"/page.css": "text/css", "/page.js": "text/javascript"}
PATHS = ("/", *FILES)
"""What is open to a browser that has no key yet: nothing in it depends on what anybody asked."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
"""What a browser is told with every answer of this server, the API's as well: one may be opened as a page."""


def language_of(query: str, accepted: str) -> str:
    """`?lang=` wins over what the browser says; Chinese where neither says."""
    asked = parse_qs(query.lstrip("?")).get("lang", [""])[0]
    if asked in WORDS:
        return asked
    first = accepted.split(",")[0].strip().lower()
    return "en" if first and not first.startswith("zh") else "zh"


def page_html(language: str, limits: Limits, needs_key: bool) -> str:
    words = {name.replace(" ", "_"): escape(text) for name, text in WORDS[language].items()}
    data = (f'data-{name.replace(" ", "-")}="{escape(WORDS[language][name])}"' for name in _OF_SCRIPT)
    field = '<input type="password" id="key" aria-label="{0}" placeholder="{0}" autocomplete="off">\n'
    return Template(Path(__file__).with_name("page.html").read_text("utf-8")).substitute(
        {**words, "key": field.format(words["key"]) if needs_key else ""},
        language=language,
        model=escape(limits.name),
        # a long conversation forgets its oldest turns so that an answer has room
        room=min(Sampling().max_new_tokens, limits.positions // 2),
        words=" ".join(data),
    )


def page_routes(limits: Limits, needs_key: bool) -> list[Route]:
    """What the gateway answers for the page."""

    def page(request: Request) -> Response:
        language = language_of(request.url.query, request.headers.get("accept-language", ""))
        html = page_html(language, limits, needs_key)
        return Response(html, media_type="text/html", headers={"Vary": "Accept-Language", "Cache-Control": "no-cache"})

    def file(request: Request) -> Response:
        path = request.url.path
        content = Path(__file__).with_name(path[1:]).read_bytes()
        return Response(content, media_type=FILES[path], headers={"Cache-Control": "no-cache"})

    return [Route("/", page), *(Route(path, file) for path in FILES)]
