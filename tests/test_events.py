"""Events survive strict JSON whatever they hold, and what is no event is refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, fields
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import FakeRun

from esper_elastic.errors import ElasticError, MonitorError
from esper_elastic.training.events import KINDS, Applied, Evaluated, Event, Mechanism, Progress, Requested, from_json, to_json
from esper_elastic.training.free_form import read_free, write_free

FREE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["nan", "$float", "$"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(["$float", "$$float", "$"]), inner, max_size=3),
    max_leaves=8,
)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field of that type."""
    if hint in (int, float, str):
        return st.from_type(hint)
    if hint == Mechanism:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is dict:
        item = get_args(hint)[1]
        return st.dictionaries(st.text(), FREE if item is Any else values(item), max_size=3)
    return st.none() | values(get_args(hint)[0])


@st.composite
def events(draw: st.DrawFn) -> Event:
    kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    return kind(**{name: draw(values(hint)) for name, hint in get_type_hints(kind).items()})


def applied(**changed: Any) -> Applied:
    usual = {"request": 1, "adaptation_type": "grow", "layer_name": "a", "mechanism": "metadata", "milliseconds": 0.1}
    return Applied(3, 1.5, **usual | {"details": {}, "widths": {"a": 3}, "parameters": 5, "multiply_adds": None} | changed)


def through_text(event: Event) -> Event:
    return from_json(json.loads(json.dumps(to_json(event), allow_nan=False)))


@given(events())
def test_every_event_survives_strict_json(event: Event) -> None:
    back = through_text(event)
    assert type(back) is type(event)
    assert repr(back) == repr(event)  # NaN is not equal to itself, its repr is


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, -0.0, 5e-324])
def test_a_loss_that_is_no_usual_number_survives(loss: float) -> None:
    back = through_text(Progress(1, 0.0, loss, 1.0, 0.1, 5))
    assert isinstance(back, Progress) and repr(back.loss) == repr(loss)
    metrics = through_text(Evaluated(1, 0.0, {"loss": loss}))
    assert isinstance(metrics, Evaluated) and repr(metrics.metrics) == repr({"loss": loss})


def test_a_string_that_looks_like_a_number_stays_a_string() -> None:
    event = Requested(1, 0.0, 1, {"layer_name": "nan", "metadata": {"$float": "inf"}}, "inf")
    assert through_text(event) == event


def test_events_are_small_and_unchangeable() -> None:
    event = applied()
    assert not hasattr(event, "__dict__")
    with pytest.raises(FrozenInstanceError):
        event.step = 4  # type: ignore[misc]


def test_fields_begin_with_step_and_time() -> None:
    for kind in KINDS.values():
        assert [field.name for field in fields(kind)][:2] == ["step", "time"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"event": "Exploded"}, "event: expected one of RunStarted, .*, got 'Exploded'"),
        ({"event": None}, "event: expected one of"),
        ({"event": ["Applied"]}, "event: expected one of"),
        ({"colour": 3}, "expected the fields step, time, request, .*, got also 'colour'"),
        ({"step": 1.0}, "Applied.step: expected an integer, got 1.0"),
        ({"step": True}, "Applied.step: expected an integer, got True"),
        ({"time": "soon"}, "Applied.time: expected a number, got 'soon'"),
        ({"time": 10**400}, "Applied.time: expected a number"),
        ({"mechanism": "magic"}, "Applied.mechanism: expected one of metadata, surgery, got 'magic'"),
        ({"mechanism": []}, "Applied.mechanism: expected one of metadata, surgery"),
        ({"layer_name": 3}, "Applied.layer_name: expected a string or null, got 3"),
        ({"multiply_adds": "many"}, "Applied.multiply_adds: expected an integer or null"),
        ({"widths": {"a": "wide"}}, "Applied.widths: expected an object of names and integers"),
        ({"widths": [3]}, "Applied.widths: expected an object of names and integers"),
        ({"details": "none"}, "Applied.details: expected an object, got 'none'"),
        ({"details": {"x": {"$float": "many"}}}, "Applied.details: expected an object"),
        ({"details": {"x": {"$float": None}}}, "Applied.details: expected an object"),
    ],
)
def test_what_is_no_event_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MonitorError, match=f"^here: .*{message}") as caught:
        from_json(to_json(applied()) | change, "here")
    assert isinstance(caught.value, ElasticError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("missing", ["step", "widths", "multiply_adds"])
def test_a_missing_field_is_refused(missing: str) -> None:
    data = to_json(applied())
    del data[missing]
    with pytest.raises(MonitorError, match=f"Applied.{missing}: expected .*, got nothing"):
        from_json(data)


@pytest.mark.parametrize("data", [None, [], "Applied", 3, {}])
def test_what_is_no_object_with_a_kind_is_refused(data: object) -> None:
    with pytest.raises(MonitorError, match="expected"):
        from_json(data)


def test_numbers_of_other_packages_are_written_as_numbers() -> None:
    event = applied(request=np.int32(4), milliseconds=torch.tensor(0.5), widths={"a": np.int64(3)}, parameters=torch.tensor(7))
    assert through_text(event) == applied(request=4, milliseconds=0.5, widths={"a": 3}, parameters=7)


# Values that are no data


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def endless() -> dict[str, Any]:
    inside: dict[str, Any] = {}
    inside.update(a=inside, b=inside, c=[inside, inside])
    return inside


@pytest.mark.parametrize(
    "value",
    [object(), Broken(), {3: {1, 2}}, b"bytes", 10**5000, "\ud800", endless(), list(range(100_000)), [[[]]] * 5, 1j, type, {"$": Broken()}],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_decision_holds_can_be_written(value: object) -> None:
    text = json.dumps(to_json(Requested(1, 0.0, 1, {"metadata": value}, "x")), allow_nan=False)
    assert len(text) < 2_000_000
    from_json(json.loads(text))


def test_tuples_become_lists_and_objects_their_repr() -> None:
    assert read_free(write_free({"a": (1, (2,)), "b": {3}, 4: None})) == {"a": [1, [2]], "b": "{3}", "4": None}


def test_the_fake_run_is_made_of_valid_events() -> None:
    told = list(FakeRun().events())
    assert [repr(through_text(event)) for event in told] == [repr(event) for event in told]
    assert {type(event).__name__ for event in told} >= set(KINDS) - {"Resumed"}
