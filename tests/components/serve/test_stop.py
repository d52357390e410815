"""An answer ends before the text that was to stop it, however its pieces fall."""

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from components.serve.stop import Cut

letters = st.text("ab停", max_size=12)


@given(whole=letters, stops=st.lists(st.text("ab停", max_size=3), max_size=3), cuts=st.lists(st.integers(0, 12)))
def test_whole_or_in_pieces_it_is_the_text_before_the_first_stop(whole, stops, cuts):
    at = min((whole.find(stop) for stop in stops if stop and stop in whole), default=len(whole))
    edges = [0, *sorted(cut for cut in cuts if cut <= len(whole)), len(whole)]
    events: list[Any] = [{"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]}]
    for begin, end in itertools.pairwise(edges):
        events.append({"choices": [{"delta": {"content": whole[begin:end]}, "finish_reason": None}]})
    events += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": {}}]
    cut = Cut(stops)
    for event in events:
        cut.event(event)
    said = (choice["delta"].get("content", "") for event in events for choice in event["choices"])
    assert "".join(said) == whole[:at]
    for one in (
        {"choices": [{"message": {"content": whole}, "finish_reason": "stop"}]},
        {"choices": [{"text": whole, "finish_reason": "length"}]},
    ):
        Cut(stops).event(one)
        (choice,) = one["choices"]
        assert choice.get("message", {}).get("content", choice.get("text")) == whole[:at]


def test_a_text_alone_is_one_stop_and_the_last_event_may_bring_text():
    cut, event = Cut("停止"), {"choices": [{"text": "好停", "finish_reason": "length"}]}
    cut.event(event)
    assert event["choices"][0]["text"] == "好停"
