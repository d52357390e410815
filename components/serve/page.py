"""The chat page: Shiny's chat component, on the gateway's own answers.

shinychat is 5 MB from PyPI with no build step and nothing fetched at run time. Looked at instead: gradio (its pins
exclude this server's starlette and pydantic), nicegui (no chat input, twice the packages), npm (needs node).
"""

import os
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs

from components.serve.gateway import Gateway
from components.serve.requests import ApiError
from zhllama.errors import InputError
from zhllama.inference.sampling import Sampling

WORDS = {
    "zh": {
        "hello": "你好！请输入问题或指令，例如“请用三句话介绍北京”。",
        "placeholder": "输入消息，按回车发送",
        "new": "新对话",
        "key": "API 密钥",
        "wrong key": "需要正确的 API 密钥。",
        "too long": "这条消息超出了模型的上下文长度，请缩短后再试。",
        "fault": "服务器出错了，请稍后再试。",
        "other": "English",
        "note": "模型的回答可能有误，请自行核对。",
    },
    "en": {
        "hello": "Hello! Ask a question or give an instruction, in Chinese or in English.",
        "placeholder": "Type a message, Enter sends it",
        "new": "New chat",
        "key": "API key",
        "wrong key": "A valid API key is needed.",
        "too long": "This message is longer than the model's context; please shorten it.",
        "fault": "The server failed; please try again later.",
        "other": "中文",
        "note": "The model's answers may be wrong; check them.",
    },
}
STYLE = """
html, body { height: 100%; margin: 0; overflow: hidden; }
shiny-chat-container { flex: 1 1 0 !important; min-height: 0; }
.bar { display: flex; align-items: center; gap: .5rem; padding: .5rem .75rem; border-bottom: 1px solid #ddd; }
.bar h1 { font-size: 1.1rem; margin: 0; flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar .form-group { margin: 0; width: 9rem; }
.bar .btn, .bar a { white-space: nowrap; }
.note { text-align: center; color: #666; font-size: .75rem; padding: .1rem; }
"""


def language_of(query: str, accepted: str) -> str:
    """`?lang=` wins over what the browser says; Chinese where neither says."""
    asked = parse_qs(query.lstrip("?")).get("lang", [""])[0]
    if asked in WORDS:
        return asked
    first = accepted.split(",")[0].strip().lower()
    return "en" if first and not first.startswith("zh") else "zh"


def fitting(messages: list[dict[str, str]], gateway: Gateway) -> list[dict[str, str]]:
    """The newest messages that leave room for an answer. ApiError 400 where the template refuses them."""
    limits = gateway.limits
    try:
        kept = limits.chat.fitting(messages, limits.positions, Sampling().max_new_tokens)
    except InputError as error:
        raise ApiError(400, str(error), "messages") from error
    return [dict(message) for message in kept]


def chat_page(gateway: Gateway) -> Any:
    """The page as an ASGI application."""
    # the component would ask a service elsewhere for the icons of sites that an answer names
    os.environ.setdefault("SHINYCHAT_ASIDE_FAVICON", "false")
    from shiny import App, reactive, ui
    from shinychat import Chat, chat_ui

    def page(request: Any) -> Any:
        language = language_of(request.url.query, request.headers.get("accept-language", ""))
        words = WORDS[language]
        key = [ui.input_password("key", None, placeholder=words["key"])] if gateway.needs_key else []
        return ui.page_fillable(
            ui.head_content(ui.tags.style(STYLE)),
            ui.div(
                ui.h1(gateway.limits.name),
                *key,
                ui.input_action_button("new", words["new"], class_="btn-sm"),
                ui.a(words["other"], href=f"?lang={'en' if language == 'zh' else 'zh'}"),
                class_="bar",
            ),
            chat_ui("chat", greeting=words["hello"], placeholder=words["placeholder"], show_history=False),
            ui.div(words["note"], class_="note"),
            title=f"{gateway.limits.name} · zhllama",
            lang=language,
            fillable_mobile=True,
            padding=0,
            gap=0,
        )

    def server(input: Any, output: Any, session: Any) -> None:
        chat = Chat("chat", history=False)
        said: list[dict[str, str]] = []

        @chat.on_user_submit
        async def _(text: str) -> None:
            accepted = session.http_conn.headers.get("accept-language", "")
            spoken = WORDS[language_of(session.clientdata.url_search(), accepted)]
            if gateway.needs_key and not gateway.key_matches(input.key() or ""):
                await chat.append_message(spoken["wrong key"])
                return
            await chat.append_message_stream(answer(text, spoken))

        async def answer(text: str, spoken: dict[str, str]) -> AsyncIterator[str]:
            pieces: list[str] = []
            try:
                asked = fitting([*said, {"role": "user", "content": text}], gateway)
                async for piece in gateway.stream(asked):
                    pieces.append(piece)
                    yield piece
            except ApiError as error:
                too_long = error.body["error"]["code"] == "context_length_exceeded"
                yield f"\n\n*{spoken['too long' if too_long else 'fault']}*"
            if pieces:
                said[:] = [*asked, {"role": "assistant", "content": "".join(pieces)}]

        @reactive.effect
        @reactive.event(input.new)
        async def _() -> None:
            said.clear()
            await chat.clear_messages(greeting=False)

    return App(page, server)
