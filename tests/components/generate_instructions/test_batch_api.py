"""Batches: made once, whatever breaks, found again, and paid as the server counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.components.generate_instructions.model_server import Asked, Do, Dropped, ModelServer, written
from tests.components.generate_instructions.test_generator import agrees, card_of, items_of, run
from zhllama.errors import InputError, StorageFault


def batched(model: ModelServer, store: Path | str, **more: Any) -> Any:
    return run(model, store, **{"items": 60, "batch": True, "batch_poll_seconds": 0.01, **more})


def in_batches(model: ModelServer) -> int:
    return sum(1 for one in model.asked if one.path == "batch")


def test_batches_give_the_items_that_requests_one_by_one_give(model: ModelServer, tmp_path: Path) -> None:
    plain = items_of(run(model, tmp_path / "a", items=60))
    model.billed_prompt = model.billed_answer = 0
    manifest = batched(model, tmp_path / "b")
    assert items_of(manifest) == plain
    assert agrees(model, manifest)
    # one answer shows that the model writes items, the rest is one batch, or a second small one
    assert 1 <= len(model.batches) <= 2
    assert in_batches(model) == card_of(manifest)["requests"]["answered"] - 1


def test_the_first_answer_teaches_the_batch_what_the_server_takes(model: ModelServer, tmp_path: Path) -> None:
    model.takes -= {"json_schema", "temperature"}
    assert agrees(model, batched(model, tmp_path))
    bodies = [one.body for one in model.asked if one.path == "batch"]
    assert all(body["response_format"] == {"type": "json_object"} for body in bodies)
    assert not any("temperature" in body or "stream" in body for body in bodies)


def test_rubbish_is_found_out_before_a_batch_is_made(model: ModelServer, tmp_path: Path) -> None:
    model.script = ["抱歉，我不能。"]
    with pytest.raises(InputError, match="gave no usable item in 5 requests"):
        batched(model, tmp_path, items=1000)
    assert len(model.asked) == 5
    assert model.batches == {}


LIMITED = Do(inside={"error": {"message": "Rate limit exceeded", "code": 429}})
WRONG = Do(inside={"error": "what is this"})


@pytest.mark.parametrize(
    "fault",
    [Do(status=500), Do(drop=True), Do(status=400), LIMITED, WRONG],
    ids=["500", "missing", "400", "429 inside", "words inside"],
)
def test_what_a_batch_did_not_answer_is_asked_for_again_and_costs_nothing(
    model: ModelServer, tmp_path: Path, fault: Do
) -> None:
    model.do = lambda asked: fault if asked.path == "batch" and len(model.asked) % 4 == 0 else None
    manifest = batched(model, tmp_path)
    assert len(items_of(manifest)) == 60
    assert agrees(model, manifest)
    assert len(model.batches) >= 2


def test_a_limit_holds_for_batches(model: ModelServer, tmp_path: Path) -> None:
    manifest = batched(model, tmp_path, items=0, max_tokens=60_000)
    assert card_of(manifest)["ended"] == "max-tokens"
    assert model.billed <= 60_000
    # each batch holds what the rest of the budget certainly holds, so it takes a few
    assert len(model.batches) >= 2
    assert 60_000 - model.billed < 2000 + 4500


@pytest.mark.parametrize("what", ["create", "retrieve"])
def test_a_connection_that_breaks_makes_no_second_batch(model: ModelServer, tmp_path: Path, what: str) -> None:
    broken = iter([True])

    def do(when: str, batch: dict[str, Any]) -> None:
        if when == what and next(broken, False):
            raise Dropped

    model.batch_do = do
    manifest = batched(model, tmp_path)
    assert agrees(model, manifest)
    assert in_batches(model) == len({one.text for one in model.asked}) - 1


@pytest.mark.parametrize("when", ["create", "retrieve"])
def test_a_run_that_ended_finds_its_batch_again(model: ModelServer, tmp_path: Path, when: str) -> None:
    """The server fails from that moment on; the next run goes on with the batch, with or without --batch."""
    plain = items_of(run(model, tmp_path / "plain", items=60))
    for batch_again in (True, False):
        model.billed_prompt = model.billed_answer = 0
        model.asked, model.batches = [], {}
        store = tmp_path / f"{when}-{batch_again}"

        def fail(what: str, batch: dict[str, Any]) -> None:
            if what == when or (when == "create" and what == "list"):
                raise Dropped

        model.batch_do = fail
        with pytest.raises(StorageFault, match="the batch goes on, run this again to go on with it"):
            batched(model, store)
        model.batch_do = lambda what, batch: None
        manifest = batched(model, store, batch=batch_again)
        assert items_of(manifest) == plain
        assert agrees(model, manifest)
        texts = [one.text for one in model.asked]
        assert len(texts) == len(set(texts))


def test_a_batch_that_was_planned_and_never_made_costs_nothing(model: ModelServer, tmp_path: Path) -> None:
    def never(what: str, batch: dict[str, Any]) -> None:
        if what == "create":
            del model.batches[batch["id"]]
            raise Dropped

    made = iter([never])
    model.batch_do = lambda what, batch: next(made, lambda *_: None)(what, batch)
    manifest = batched(model, tmp_path)
    assert agrees(model, manifest)
    assert sum(card_of(manifest)["cost"]["at_most"].values()) == model.billed


@pytest.mark.parametrize("state", ["expired", "cancelled"])
def test_a_batch_that_expired_is_made_again(model: ModelServer, tmp_path: Path, state: str) -> None:
    ended = iter([state])

    def do(what: str, batch: dict[str, Any]) -> None:
        if what == "retrieve" and batch["status"] == "in_progress":
            batch["status"] = next(ended, "in_progress")

    model.batch_do = do
    manifest = batched(model, tmp_path)
    assert len(items_of(manifest)) == 60
    assert agrees(model, manifest)


def test_a_batch_that_the_server_refuses_ends_it_with_its_reason(model: ModelServer, tmp_path: Path) -> None:
    def do(what: str, batch: dict[str, Any]) -> None:
        if what == "retrieve":
            batch["status"] = "failed"
            batch["errors"] = {"object": "list", "data": [{"code": "x", "message": "enqueued token limit reached"}]}

    model.batch_do = do
    with pytest.raises(InputError, match=r"refuses the batch .enqueued token limit reached"):
        batched(model, tmp_path)
    model.batch_do = lambda what, batch: None
    assert agrees(model, batched(model, tmp_path))


def test_a_server_without_batches_is_named(model: ModelServer, tmp_path: Path) -> None:
    model.has_batches = False
    with pytest.raises(InputError, match=r"has no Batch API as OpenAI's .*run this without --batch"):
        batched(model, tmp_path)
    manifest = run(model, tmp_path, items=60)
    assert agrees(model, manifest)


def test_an_answer_with_a_line_separator_in_it_is_paid_once(model: ModelServer, tmp_path: Path) -> None:
    def do(asked: Asked) -> Do:
        items = [{**item, "output": f"{item['output']}\u2028\x85完"} for item in written(asked.text, 5)]
        return Do(text=json.dumps(items, ensure_ascii=False))

    model.do = do
    manifest = batched(model, tmp_path)
    assert agrees(model, manifest)
    assert len({one.text for one in model.asked}) == len(model.asked)


def test_lines_that_lie_are_passed_over(model: ModelServer, tmp_path: Path) -> None:
    def do(asked: Asked) -> Do | None:
        return Do(usage={"prompt_tokens": "many"}) if asked.path == "batch" and len(model.asked) == 3 else None

    model.do = do

    def lie(what: str, batch: dict[str, Any]) -> None:
        if what == "retrieve" and batch.get("output_file_id"):
            name = batch["output_file_id"]
            first = model.files[name].splitlines()[0]
            model.files[name] += (
                b"\nnot JSON\n" + first + b'\n{"custom_id": "999999", "response": {}}\n{"custom_id": "x"}'
            )

    model.batch_do = lie
    manifest = batched(model, tmp_path)
    cost = card_of(manifest)["cost"]
    assert sum(cost["billed"].values()) < model.billed <= sum(cost["at_most"].values())
