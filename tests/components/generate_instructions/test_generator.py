"""The stage against a server that does what it likes: enough items, none twice, the bill, and no patience with what no
waiting mends. The server's count of its bill is compared with ours."""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from components.generate_instructions import limits, scheduler
from components.generate_instructions.client import Failed, UnexpectedResponse, _Answer
from components.generate_instructions.generator import generate_instructions
from components.generate_instructions.options import GenerateInstructions
from tests.components.generate_instructions.model_server import Asked, Do, ModelServer, written
from zhllama import bounded_answers
from zhllama.artifacts.manifest import Manifest
from zhllama.artifacts.open import open_artifact
from zhllama.data.instructions import read_instructions
from zhllama.errors import InputError, StorageFault
from zhllama.stage.command_line import parse
from zhllama.stage.run import run_stage


def run(model: ModelServer, store: Path | str, **more: Any) -> Manifest:
    given = {"items": 12, "base_url": model.url, "model": "writer", "per_request": 5, "answer_tokens": 2000, **more}
    return run_stage(GenerateInstructions(store=str(store), **given), generate_instructions)


def items_of(manifest: Manifest) -> list[dict[str, str]]:
    return list(read_instructions(open_artifact(manifest.reference)))


def card_of(manifest: Manifest) -> dict[str, Any]:
    return json.loads(open_artifact(manifest.reference).read("card.json"))  # type: ignore[no-any-return]


def said(*instructions: str) -> str:
    items = [{"instruction": text, "input": "", "output": "这是一个回答。"} for text in instructions]
    return json.dumps(items, ensure_ascii=False)


def agrees(model: ModelServer, manifest: Manifest) -> bool:
    """Whether our bill is the server's, to the token."""
    billed = card_of(manifest)["cost"]["billed"]
    return (billed["prompt"], billed["answer"]) == (model.billed_prompt, model.billed_answer)


# --- what comes of it -------------------------------------------------------------------------------------------------


def test_it_asks_until_there_are_enough_and_pays_what_the_server_billed(model: ModelServer, store: str) -> None:
    manifest = run(model, store, items=60, price_prompt=2.0, price_answer=8.0)
    items = items_of(manifest)
    assert manifest.kind == "instructions"
    assert len(items) == 60
    assert len({item["instruction"] for item in items}) == 60
    assert agrees(model, manifest)
    card = card_of(manifest)
    assert card["cost"]["billed_cost"] == pytest.approx((2 * model.billed_prompt + 8 * model.billed_answer) / 1e6)
    assert card["fallen"]["no output"] >= 12
    assert card["requests"]["answered"] == model.answers == manifest.metrics["answers"]
    assert sum(card["topics"].values()) == sum(card["task_types"].values()) == 60


def test_the_items_are_plain_alpaca_and_read_by_others(model: ModelServer, tmp_path: Path) -> None:
    manifest = run(model, tmp_path)
    raw = json.loads(open_artifact(manifest.reference).read("instructions.json"))
    assert all(list(item) == ["instruction", "input", "output"] for item in raw)
    assert items_of(manifest) == raw


def test_what_was_generated_is_not_paid_for_again(model: ModelServer, tmp_path: Path) -> None:
    first = run(model, tmp_path)
    answers = model.answers
    assert run(model, tmp_path).digest == first.digest
    assert model.answers == answers


def test_more_items_go_on_from_the_answers_that_were_paid_for(model: ModelServer, tmp_path: Path) -> None:
    few = run(model, tmp_path / "a", items=20)
    asked = {one.text for one in model.asked}
    many = run(model, tmp_path / "a", items=50)
    assert items_of(many)[:20] == items_of(few)
    assert agrees(model, many)
    texts = [one.text for one in model.asked]
    assert len(texts) == len(set(texts)) > len(asked)


def test_the_order_in_which_answers_come_does_not_show(model: ModelServer, tmp_path: Path) -> None:
    plain = items_of(run(model, tmp_path / "a", items=40, concurrency=1))
    late = iter([0.0, 0.25] + [0.02, 0.0, 0.1, 0.0] * 20)
    model.latency = lambda asked: next(late)
    assert items_of(run(model, tmp_path / "b", items=40, concurrency=8)) == plain
    assert model.most_out > 1


def test_no_more_is_out_than_concurrency_allows_and_no_answer_is_bought_in_vain(
    model: ModelServer, tmp_path: Path
) -> None:
    model.latency = lambda asked: 0.05
    run(model, tmp_path, items=60, concurrency=3)
    assert 2 <= model.most_out <= 3
    # four of five are kept of each answer, now and then one fewer
    assert model.answers <= math.ceil(60 / 3.5) + 1


def test_the_first_request_goes_alone(model: ModelServer, tmp_path: Path) -> None:
    alone = threading.Event()

    def do(asked: Asked) -> Do | None:
        if len(model.asked) == 1:
            # whoever came beside it would be here within that time
            return Do(before=lambda: alone.wait(0.2) or None)
        return None

    model.do = do
    run(model, tmp_path, items=40, concurrency=8)
    assert model.asked[1].time - model.asked[0].time >= 0.2


def test_seeds_are_shown_and_not_given_back(model: ModelServer, tmp_path: Path) -> None:
    (tmp_path / "seeds.json").write_text(said("写一首关于春天的诗", "说出三种水果"))
    model.script = [said("写一首关于春天的诗", "列出五个省的名字"), said("解释什么是光合作用", "推荐一部国产电影")]
    manifest = run(model, tmp_path / "store", items=3, seeds=str(tmp_path / "seeds.json"))
    assert "写一首关于春天的诗" in model.asked[0].text
    assert [item["instruction"][:2] for item in items_of(manifest)] == ["列出", "解释", "推荐"]
    assert card_of(manifest)["fallen"]["exact duplicate"] == 1


def test_what_is_near_to_other_files_is_left_out(model: ModelServer, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(said("写一首关于春天的小诗"))
    (tmp_path / "b.jsonl").write_text('{"instruction": "列出五个大城市的名字", "output": "北京等"}\n')
    model.script = [said("写一首关于春天的诗", "列出五个大城市名字", "解释什么是光合作用")]
    against = f"{tmp_path / 'a.json'},{tmp_path / 'b.jsonl'}"
    manifest = run(model, tmp_path / "store", items=1, against=against)
    assert [item["instruction"] for item in items_of(manifest)] == ["解释什么是光合作用"]
    assert card_of(manifest)["fallen"]["near duplicate"] == 2


def test_a_catalogue_of_ones_own_is_used(model: ModelServer, tmp_path: Path) -> None:
    from components.generate_instructions import catalogue

    own = (Path(catalogue.__file__).parent / "catalogue.yaml").read_text().replace("家常菜的做法", "航天器的轨道")
    (tmp_path / "own.yaml").write_text(own)
    run(model, tmp_path / "store", items=200, catalogue=str(tmp_path / "own.yaml"))
    texts = "".join(one.text for one in model.asked)
    assert "航天器的轨道" in texts
    assert "家常菜的做法" not in texts


# --- what the server understands --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lacks", "refused"),
    [
        (set(), 0),
        ({"json_schema"}, 1),
        ({"json_schema", "json_object"}, 2),
        ({"temperature"}, 1),
        ({"max_tokens"}, 1),
        ({"stream_options"}, 1),
        ({"json_schema", "json_object", "temperature", "max_tokens", "stream", "stream_options"}, 5),
    ],
    ids=lambda value: "+".join(sorted(value)) or "nothing" if isinstance(value, set) else "",
)
def test_what_a_server_lacks_is_found_out_at_no_cost(
    model: ModelServer, tmp_path: Path, lacks: set[str], refused: int
) -> None:
    model.takes -= lacks
    manifest = run(model, tmp_path, items=30)
    assert len(items_of(manifest)) == 30
    assert agrees(model, manifest)
    assert len(model.asked) - model.answers == refused
    # each text was worked on once, the first of them too
    assert model.answers == len({one.text for one in model.asked})


def test_what_was_found_out_is_remembered(model: ModelServer, tmp_path: Path) -> None:
    model.takes -= {"json_schema"}
    run(model, tmp_path, items=8)
    before = len(model.asked) - model.answers
    run(model, tmp_path, items=30)
    assert len(model.asked) - model.answers == before == 1


@pytest.mark.parametrize("structured", ["json", "none"])
def test_structured_output_can_be_chosen(model: ModelServer, tmp_path: Path, structured: str) -> None:
    run(model, tmp_path, structured=structured, stream=False)
    (form,) = {json.dumps(one.body.get("response_format")) for one in model.asked}
    assert form == ('{"type": "json_object"}' if structured == "json" else "null")
    assert not any("stream" in one.body for one in model.asked)


def test_a_server_that_ignores_all_of_it_is_read_leniently(model: ModelServer, tmp_path: Path) -> None:
    model.script = [
        "好的：\n```json\n" + said("写一首关于春天的诗", "列出五个省的名字").replace('"', "'")[:-1] + ",]```"
    ]
    assert len(items_of(run(model, tmp_path, items=2))) == 2


# --- what passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Do(status=429, headers={"Retry-After": "0"}),
        Do(status=429),
        Do(status=500),
        Do(status=503, headers={"Retry-After": "0.01"}),
        Do(status=529),
        Do(drop=True),
    ],
    ids=["429 with a wait", "429", "500", "503", "529", "connection lost"],
)
def test_what_passes_is_tried_again(model: ModelServer, tmp_path: Path, fault: Do) -> None:
    plain = items_of(run(model, tmp_path / "a", items=30))
    model.do = lambda asked: fault if len(model.asked) % 3 == 1 else None
    assert items_of(run(model, tmp_path / "b", items=30)) == plain


LIMITED = {"message": "Rate limit exceeded", "code": 429}


@pytest.mark.parametrize("events", [False, True], ids=["body", "stream"])
@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        ({"error": LIMITED}, "429"),
        ({"error": {**LIMITED, "code": "429"}}, "429"),
        ({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, "429"),
        ({"error": {"message": "slow down", "type": "rate_limit_error", "code": None}}, "429"),
        ({"error": "Rate limit exceeded"}, "429"),
        ({"error": {"message": "您当前使用该API的并发数过高", "code": "1302"}}, "429"),
        ({"error": "busy", "code": 503}, "503"),
        ({"error": {"message": "服务繁忙，请稍后再试"}}, "503"),
        ({"choices": [{"index": 0, "error": {"message": "upstream", "code": 502}}]}, "502"),
        ({"object": "error", "message": "slow down", "code": 429}, "429"),
        ({"base_resp": {"status_code": 1002, "status_msg": "rate limit"}}, "429"),
        ({"detail": "Too Many Requests"}, "429"),
        ({"errors": [{"message": "slow down", "code": 429.0}]}, "429"),
        ({"success": False, "errorCode": "429", "errorMessage": "slow down"}, "429"),
        ({"error": {"error": LIMITED}}, "429"),
        ({"error_code": 18, "error_msg": "Open api qps request limit reached"}, "429"),
    ],
    ids=[
        "number",
        "text",
        "name",
        "type",
        "words",
        "Chinese",
        "beside",
        "busy",
        "choice",
        "flat",
        "base_resp",
        "detail",
        "list",
        "yes",
        "nested",
        "Baidu",
    ],
)
def test_an_error_inside_of_200_waits_as_its_status_would(
    model: ModelServer, tmp_path: Path, inside: Any, reason: str, events: bool
) -> None:
    first = said("写一首关于春天的诗")
    fault = Do(inside=inside, headers={"Retry-After": "0"}, events=events)
    model.script = [fault, first, fault, said("列出五个省的名字")]
    manifest = run(model, tmp_path, items=2, concurrency=1)
    assert len(items_of(manifest)) == 2
    assert card_of(manifest)["requests"]["failures"] == {f"status {reason}": 2}


def test_an_error_inside_of_200_is_said_in_the_servers_words(model: ModelServer, tmp_path: Path) -> None:
    model.script = [Do(inside={"error": LIMITED}, headers={"Retry-After": "86400"})]
    with pytest.raises(StorageFault, match=r"asks to wait 86400 s \(status 429 \(Rate limit exceeded\)\); what came"):
        run(model, tmp_path)


@pytest.mark.parametrize("events", [False, True], ids=["body", "stream"])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        ({"message": "no such key", "code": 401}, r"refuses the key \(401\)"),
        ({"message": "Insufficient Balance", "code": "x"}, r"no credit left \(402: Insufficient Balance\)"),
        ({"message": "gone", "code": "model_not_found"}, r"not found \(404: gone\)"),
        ({"message": "max context", "code": 400}, r"refuses the request \(400: max context\)"),
    ],
)
def test_an_error_inside_of_200_that_no_waiting_mends_ends_it(
    model: ModelServer, tmp_path: Path, error: Any, line: str, events: bool
) -> None:
    model.script = [Do(inside={"error": error}, events=events)]
    with pytest.raises(InputError, match=line):
        run(model, tmp_path)


def test_a_content_in_parts_is_read_without_its_thoughts(model: ModelServer, tmp_path: Path) -> None:
    model.takes -= {"stream"}
    model.script = [Do(text=said("写一首关于春天的诗", "列出五个省的名字"), parts=True)]
    manifest = run(model, tmp_path, items=2)
    assert len(items_of(manifest)) == 2
    assert not card_of(manifest)["fallen"]["exact duplicate"]


def test_the_servers_wait_is_kept(model: ModelServer, tmp_path: Path) -> None:
    model.script = [said("写一首关于春天的诗"), Do(status=429, headers={"Retry-After": "0.4"}), Do()]
    run(model, tmp_path, items=30, concurrency=1)
    assert model.asked[2].time - model.asked[1].time >= 0.4


def test_a_wait_that_is_too_long_is_left_to_a_later_run(model: ModelServer, tmp_path: Path) -> None:
    model.script = [Do(status=429, headers={"Retry-After": "86400"})]
    with pytest.raises(StorageFault, match=r"asks to wait 86400 s .*run this again then"):
        run(model, tmp_path)


def test_a_server_that_keeps_failing_is_a_fault_and_the_next_run_goes_on(model: ModelServer, tmp_path: Path) -> None:
    plain = items_of(run(model, tmp_path / "plain", items=30))
    model.billed_prompt = model.billed_answer = model.answers = 0
    model.do = lambda asked: Do(status=500) if model.answers >= 3 else None
    with pytest.raises(StorageFault, match="failed 10 times, the last time with: status 500; what came is kept"):
        run(model, tmp_path / "store", items=30, concurrency=4)
    assert not list((tmp_path / "store").rglob("manifest.json"))
    model.do = lambda asked: None
    manifest = run(model, tmp_path / "store", items=30)
    assert agrees(model, manifest)
    # an outage is not the fault of the requests that it met: none of them was given up
    assert items_of(manifest) == plain


def test_throttling_for_longer_than_other_faults_is_waited_out(model: ModelServer, tmp_path: Path) -> None:
    throttled = Do(status=429, headers={"Retry-After": "0"})
    model.do = lambda asked: throttled if len(model.asked) <= scheduler.ATTEMPTS + 5 else None
    assert len(items_of(run(model, tmp_path))) == 12


def test_throttling_without_end_is_a_fault(model: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "PATIENCE", 0.1)
    model.do = lambda asked: Do(status=429)
    with pytest.raises(StorageFault, match="status 429; what came is kept"):
        run(model, tmp_path)
    assert model.billed == 0


def test_a_request_that_alone_keeps_failing_is_given_up(model: ModelServer, tmp_path: Path) -> None:
    poisoned: set[str] = set()

    def do(asked: Asked) -> Do | None:
        if len(model.asked) == 4:
            poisoned.add(asked.text)
        return Do(status=500) if asked.text in poisoned else None

    model.do = do
    manifest = run(model, tmp_path, items=60, concurrency=3)
    assert len(items_of(manifest)) == 60
    assert card_of(manifest)["requests"]["failures"]["status 500"] == scheduler.ATTEMPTS


def test_an_answer_whose_connection_broke_keeps_its_whole_items(model: ModelServer, tmp_path: Path) -> None:
    model.do = lambda asked: Do(cut=200) if len(model.asked) == 2 else None
    manifest = run(model, tmp_path, items=30, concurrency=1)
    text = model.asked[1].text
    whole = written(text, 5)[0]["instruction"]
    assert whole in [item["instruction"] for item in items_of(manifest)]
    assert [one.text for one in model.asked].count(text) == 1
    card = card_of(manifest)
    # its bill was never seen: it is not among what is billed, and it is among what may be
    assert sum(card["cost"]["billed"].values()) < model.billed <= sum(card["cost"]["at_most"].values())
    assert card["fallen"]["cut off"] == 1


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_an_answer_that_broke_before_its_first_item_is_asked_for_again(
    model: ModelServer, tmp_path: Path, stream: bool
) -> None:
    plain = items_of(run(model, tmp_path / "a", items=30))
    model.billed_prompt = model.billed_answer = 0
    model.do = lambda asked: Do(cut=20) if len(model.asked) % 4 == 2 else None
    manifest = run(model, tmp_path / "b", items=30, stream=stream)
    assert items_of(manifest) == plain
    assert model.billed <= sum(card_of(manifest)["cost"]["at_most"].values())
    assert set(card_of(manifest)["requests"]["failures"]) == {"connection lost"}


def test_a_stream_that_broke_after_its_first_empty_event_is_asked_for_again() -> None:
    """Some servers begin with an event that says nothing, not even the model's name."""
    answer = _Answer()
    with pytest.raises(UnexpectedResponse):
        answer.whole()
    answer.add({"model": "", "choices": []})
    with pytest.raises(Failed, match="the stream broke off"):
        answer.whole()


def test_an_answer_that_its_limit_cut_keeps_its_whole_items(model: ModelServer, tmp_path: Path) -> None:
    model.do = lambda asked: Do(finish="length", cut=200)
    manifest = run(model, tmp_path, items=5)
    assert len(items_of(manifest)) == 5
    assert agrees(model, manifest)
    assert card_of(manifest)["fallen"]["cut off"] >= 4


def test_an_answer_that_never_comes_ends_by_its_time_out(model: ModelServer, tmp_path: Path) -> None:
    model.do = lambda asked: Do(hang=True) if len(model.asked) == 2 else None
    manifest = run(model, tmp_path, items=30, timeout=3)
    assert len(items_of(manifest)) == 30
    assert "no answer within 3 s" in card_of(manifest)["requests"]["failures"]
    assert model.billed <= sum(card_of(manifest)["cost"]["at_most"].values())


@pytest.mark.parametrize(
    "usage",
    [None, {"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": "many"}, {"prompt_tokens": -1}],
    ids=["none", "zeros", "text", "negative"],
)
def test_a_server_that_does_not_count_is_taken_at_the_most(model: ModelServer, tmp_path: Path, usage: Any) -> None:
    model.do = lambda asked: Do(usage=usage)
    manifest = run(model, tmp_path, stream=usage is None)
    cost = card_of(manifest)["cost"]
    assert sum(cost["billed"].values()) == 0
    assert model.billed <= sum(cost["at_most"].values())


def test_half_a_character_costs_its_item_and_not_the_run(model: ModelServer, tmp_path: Path) -> None:
    text = said("写一首关于春天的诗", "半个字\ud83d在这里", "说说笑脸\U0001f600的意思")
    model.script = [text.replace("\U0001f600", "\ud83d\ude00")]
    manifest = run(model, tmp_path, items=2)
    assert [item["instruction"] for item in items_of(manifest)] == ["写一首关于春天的诗", "说说笑脸\U0001f600的意思"]
    assert card_of(manifest)["fallen"]["unreadable"] == 1


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, Do(drop=True), Do(usage=None)], ids=["no fault", "lost", "uncounted"])
@pytest.mark.parametrize("limit", ["max-tokens", "max-cost"])
def test_a_limit_is_never_passed_whatever_is_in_flight(
    model: ModelServer, tmp_path: Path, limit: str, fault: Do | None
) -> None:
    model.latency = lambda asked: 0.005
    model.do = lambda asked: fault if len(model.asked) % 3 == 0 else None
    tokens = 60_000
    given: dict[str, Any] = {"max_tokens": tokens} if limit == "max-tokens" else {"max_cost": tokens / 1e6}
    manifest = run(model, tmp_path, items=0, concurrency=12, price_prompt=1, price_answer=1, **given)
    assert card_of(manifest)["ended"] == limit
    assert model.billed <= tokens
    assert sum(card_of(manifest)["cost"]["at_most"].values()) <= tokens
    # what is left holds no request: its text's bytes, and the longest answer
    assert tokens - sum(card_of(manifest)["cost"]["at_most"].values()) < 2000 + 4500


def test_whichever_limit_comes_first_ends_it(model: ModelServer, tmp_path: Path) -> None:
    manifest = run(model, tmp_path / "a", items=12, max_tokens=1_000_000, max_cost=5, price_prompt=1, price_answer=1)
    assert (card_of(manifest)["ended"], len(items_of(manifest))) == ("items", 12)
    manifest = run(model, tmp_path / "b", items=1000, max_tokens=20_000, max_cost=5, price_prompt=1, price_answer=1)
    assert card_of(manifest)["ended"] == "max-tokens"
    assert manifest.facts["summary"].startswith(f"only {len(items_of(manifest))} of 1,000 items")


def test_a_limit_counts_what_earlier_runs_spent_and_a_higher_one_goes_on(model: ModelServer, tmp_path: Path) -> None:
    first = run(model, tmp_path, items=0, max_tokens=20_000)
    again = run(model, tmp_path, items=0, max_tokens=40_000)
    assert 20_000 < model.billed <= 40_000
    assert items_of(again)[: len(items_of(first))] == items_of(first)
    assert agrees(model, again)


def test_the_estimate_comes_before_the_first_request(
    model: ModelServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before: list[str] = []
    model.do = lambda asked: before.append(caplog.text)
    with caplog.at_level("INFO"):
        run(model, tmp_path, max_cost=3, price_prompt=1, price_answer=1)
    assert "estimate for 12 items: 3 requests" in before[0]
    assert ", cost 0.0" in before[0]
    assert "never more than cost 3" in before[0]


@pytest.mark.parametrize(
    ("limit", "most"),
    # a request counts with some 5,000 tokens until its bill is known, and then with some 1,400: six are over 5,900
    [({"requests_per_minute": 3}, 3), ({"tokens_per_minute": 5_900}, 5)],
    ids=["requests", "tokens"],
)
def test_no_minute_has_more_than_the_accounts_limit(
    model: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: dict[str, Any], most: int
) -> None:
    sent: list[float] = []
    real = limits.Limits.take

    def take(pace: limits.Limits, now: float, tokens: float) -> Any:
        sent.append(now)
        return real(pace, now, tokens)

    monkeypatch.setattr(limits.Limits, "take", take)
    monkeypatch.setattr(limits, "MINUTE", 0.4)
    run(model, tmp_path, items=30, concurrency=8, **limit)
    assert len(sent) == len(model.asked) > 6
    assert all(later - sooner > 0.4 - 1e-6 for sooner, later in zip(sent, sent[most:]))


# --- what does not pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (Do(status=401), r"refuses the key \(401\); set OPENAI_API_KEY, or the file of --api-key-file"),
        (Do(status=403), r"refuses the key \(403\)"),
        (Do(status=404), r"not found \(404: .*check --model and --base-url"),
        (Do(status=402), r"the account has no credit left \(402"),
        (Do(status=429, error={"code": "insufficient_quota"}), r"the account has no credit left \(429"),
        (Do(html=True), "does not answer as a chat completions API"),
    ],
    ids=["401", "403", "404", "402", "quota", "a web page"],
)
def test_what_no_waiting_mends_ends_at_once(model: ModelServer, tmp_path: Path, entry: Do, line: str) -> None:
    model.script = [entry]
    with pytest.raises(InputError, match=line):
        run(model, tmp_path)
    assert len(model.asked) == 1


@pytest.mark.parametrize(
    ("kind", "begin", "again", "encoding", "line"),
    [
        ("text/event-stream", b"data: ", b"x", "", "a stream has an event of more than 4,194,304 bytes"),
        ("text/event-stream", b"data: {\n", b"data: ,\n", "", "a stream has an event of more than"),
        ("text/event-stream", b": ", b": a comment\n", "", "a stream has an event of more than"),
        ("text/event-stream", b" ", b"\x00", "", "a stream has an event of more than"),
        ("text/event-stream", b": hello\n\n", b'data: {"choices": [{"delta": {"content": "' + b"x" * 900 + b'"}}]}\n\n',
         "", "an answer without end"),
        ("application/json", b'{"choices": [', b" ", "", "an answer without end"),
        ("text/html", b"<html>", b"<p>", "", "an answer without end"),
        ("application/json", b"\x1f\x8b", b"\x00", "gzip", r"an answer is compressed \(gzip\)"),
        ("text/event-stream", b" ", b"\x00", "zstd", r"an answer is compressed \(zstd\)"),
    ],
    ids=["line", "event", "comments", "no line", "events", "json", "page", "gzip", "zstd"],
)  # fmt: skip
def test_a_server_that_never_ends_is_left_after_some_megabytes(
    model: ModelServer, tmp_path: Path, kind: str, begin: bytes, again: bytes, encoding: str, line: str
) -> None:
    headers = {"Content-Encoding": encoding} if encoding else {}
    model.script = [Do(endless=(kind, begin, again), headers=headers)]
    with pytest.raises(InputError, match=line):
        run(model, tmp_path)
    assert len(model.asked) == 1
    # what lies in the sockets' buffers is some megabytes more
    assert model.sent < 32 * 2**20


def test_a_server_that_never_ends_its_error_is_left_too(model: ModelServer, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bounded_answers, "LONGEST_BODY", 2**20)
        model.script = [Do(status=500, endless=("application/json", b"{", b" "))]
        with pytest.raises(InputError, match="an answer has more than 1,048,576 bytes"):
            run(model, tmp_path)
    assert model.sent < 32 * 2**20


def test_a_request_that_is_refused_in_every_dialect_ends_it(model: ModelServer, tmp_path: Path) -> None:
    model.script = [Do(status=400, error={"message": "max context length is 2048"})]
    with pytest.raises(InputError, match=r"refuses the request \(400: .*max context length is 2048.*--answer-tokens"):
        run(model, tmp_path)
    assert model.billed == 0


def test_one_request_that_is_refused_is_left_out(model: ModelServer, tmp_path: Path) -> None:
    model.do = lambda asked: Do(status=400, error={"message": "content filter"}) if len(model.asked) == 3 else None
    manifest = run(model, tmp_path, items=30)
    assert len(items_of(manifest)) == 30
    assert agrees(model, manifest)


def test_a_key_that_is_revoked_on_the_way_ends_it_and_keeps_what_came(model: ModelServer, tmp_path: Path) -> None:
    model.do = lambda asked: Do(status=401) if model.answers >= 4 else None
    with pytest.raises(InputError, match="refuses the key"):
        run(model, tmp_path, items=60)
    model.do = lambda asked: None
    manifest = run(model, tmp_path, items=60)
    assert agrees(model, manifest)


@pytest.mark.parametrize("rubbish", ["抱歉，我不能。", "", '[{"instruction": "x"}]', "[1, 2", "<html>"])
@pytest.mark.parametrize("concurrency", [1, 16])
def test_a_model_that_gives_rubbish_is_asked_just_so_often_and_shown(
    model: ModelServer, tmp_path: Path, rubbish: str, concurrency: int
) -> None:
    model.script = [rubbish]
    with pytest.raises(InputError, match="gave no usable item in 3 requests; its last answer begins") as caught:
        run(model, tmp_path, items=500, fruitless=3, concurrency=concurrency)
    assert repr(rubbish)[:20] in str(caught.value)
    assert len(model.asked) == 3
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_model_that_runs_dry_ends_with_what_there_is(model: ModelServer, tmp_path: Path) -> None:
    model.script = [said("写一首关于春天的诗"), said("列出五个省的名字"), said("列出五个省的名字")]
    manifest = run(model, tmp_path, items=4, fruitless=2, concurrency=1)
    assert len(items_of(manifest)) == 2
    assert len(model.asked) == 4
    assert card_of(manifest)["ended"] == "fruitless"
    assert manifest.facts["summary"].startswith("only 2 of 4 items")


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"max_tokens": 4000}, r"--max-tokens holds no request: one may take 2,\d+ \+ 2,000 tokens"),
        ({"max_cost": 0.004, "price_prompt": 1, "price_answer": 1}, "--max-cost holds no request: .*, cost 0.00"),
    ],
)
def test_a_limit_that_holds_no_request_is_refused_before_one_is_sent(
    model: ModelServer, tmp_path: Path, more: dict[str, Any], line: str
) -> None:
    with pytest.raises(InputError, match=line):
        run(model, tmp_path, **more)
    assert model.asked == []


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--base-url", "localhost:8000"], "--base-url localhost:8000 is no address"),
        (["--base-url", "http://host:99999/v1"], "--base-url http://host:99999/v1 is no address"),
        (["--base-url", "http://host:port/v1"], "--base-url http://host:port/v1 is no address"),
        (["--base-url", "http://[::1/v1"], r"--base-url http://\[::1/v1 is no address"),
        (["--base-url", "http://:8000/v1"], "--base-url http://:8000/v1 is no address"),
        (["--base-url", "http://user:pass@host/v1"], "put the key into OPENAI_API_KEY"),
        (["--items", "-1"], "--items is -1"),
        (["--items", "0"], "nothing says when to stop; give --items, --max-cost or --max-tokens"),
        (["--per-request", "500"], "--per-request is 500"),
        (["--requests-per-minute", "0.5"], "--requests-per-minute is 0.5; it must be 0 or 1 and more"),
        (["--max-cost", "1"], "--max-cost needs prices; give --price-prompt and --price-answer"),
        (["--max-cost", "1", "--price-prompt", "0.1"], "--max-cost needs prices"),
        (["--structured", "xml"], "--structured is xml; it must be one of auto"),
        (["--model", ""], "--model is missing"),
        (["--import-from", "somewhere"], "--import-from asks no model"),
        (["--api-key", "sk-1"], "there is no option --api-key"),
    ],
)
def test_wrong_options_are_refused(more: list[str], line: str) -> None:
    given = {"--store": "s", "--items": "4", "--base-url": "http://host/v1", "--model": "m"}
    given |= dict(zip(more[::2], more[1::2]))
    with pytest.raises(InputError, match=line):
        parse(GenerateInstructions, [word for pair in given.items() for word in pair])


# --- the key ----------------------------------------------------------------------------------------------------------


def command(model: ModelServer, store: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "components.generate_instructions", "--store", str(store), "--items", "4"]
    return [*words, "--base-url", model.url, "--model", "writer", "--seeds", "", "--answer-tokens", "2000", *more]


def ran(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    there = {**os.environ, "ZHLLAMA_LOG": "DEBUG", **environment}
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=there, check=False)


@pytest.mark.slow
def test_the_command_ends_with_2_and_no_key_in_its_log(model: ModelServer, tmp_path: Path, key: str) -> None:
    model.script = [Do(status=401, error={"message": f"wrong key {key}"})]
    done = ran(command(model, tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: generate_instructions: http://127.0.0.1")
    assert key not in done.stderr + done.stdout


@pytest.mark.slow
def test_a_mounted_key_is_used_and_is_nowhere_in_the_log_or_the_store(model: ModelServer, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("sk-mounted-secret-key\n")
    done = ran(command(model, tmp_path / "store", "--api-key-file", str(secret)), OPENAI_API_KEY="")
    assert done.returncode == 0, done.stderr
    assert {one.key for one in model.asked} == {"Bearer sk-mounted-secret-key"}
    assert "sk-mounted-secret-key" not in done.stderr + done.stdout
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert not any(b"sk-mounted-secret-key" in path.read_bytes() for path in files)


@pytest.mark.parametrize("content", [None, "", "two\nlines", "密钥"], ids=["absent", "empty", "lines", "no ASCII"])
def test_a_key_file_that_holds_no_key_is_refused(model: ModelServer, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "secret").write_text(content)
    with pytest.raises(InputError, match=r"--api-key-file .*secret: "):
        run(model, tmp_path / "store", api_key_file=str(tmp_path / "secret"))
    assert model.asked == []
