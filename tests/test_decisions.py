"""Decisions as data: every form in which one may come says the same, and what is wrong with one is said in one sentence."""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import math
import pickle
import random
import time
from types import MappingProxyType, SimpleNamespace
from typing import Any

import hostile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper_elastic.errors import DecisionError, ElasticError
from esper_elastic.surgery.specs.specs import LayerSpec
from esper_elastic.training import AdaptationDecision, DecisionSource
from esper_elastic.training.decisions import TOPOLOGY, TYPES

parse = AdaptationDecision.parse
FIELDS = [field.name for field in dataclasses.fields(AdaptationDecision)]
CONV = {"kind": "Conv2d", "arguments": {"in_channels": 4, "out_channels": 4, "kernel_size": [3, 3]}}
GROW = {
    "adaptation_type": "grow",
    "layer_name": "layer1.0.conv1",
    "parameters": {"width": 24, "init": "split"},
    "confidence": 0.75,
    "urgency": 0.5,
    "metadata": {"run": 3, "why": ["plateau"]},
    "timestamp": 1234.5,
}


def fields(decision: AdaptationDecision) -> dict[str, Any]:
    return {name: getattr(decision, name) for name in FIELDS}


class Kind(enum.Enum):
    GROW = "grow"


class TextKind(enum.StrEnum):
    GROW = "grow"


class NumberedKind(enum.Enum):
    GROW = enum.auto()


class Foreign:
    """As a data class of another library has it: attributes, defaults of its own, and more that nobody asked for."""

    position = None
    layer_spec = None

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)
        self.model_config = {"frozen": True}


FORMS = {
    "decision": lambda given: AdaptationDecision(**given),
    "dict": dict,
    "read-only mapping": MappingProxyType,
    "json": json.dumps,
    "json bytes": lambda given: json.dumps(given).encode(),
    "json bytearray": lambda given: bytearray(json.dumps(given), "utf-8"),
    "foreign object": lambda given: Foreign(**given),
    "namespace": lambda given: SimpleNamespace(**given),
    "enum": lambda given: given | {"adaptation_type": Kind.GROW},
    "enum of strings": lambda given: given | {"adaptation_type": TextKind.GROW},
    "enum of numbers": lambda given: given | {"adaptation_type": NumberedKind.GROW},
    "spelled otherwise": lambda given: given | {"adaptation_type": " GROW ", "layer_name": " layer1.0.conv1"},
    "riding in metadata": lambda given: {"metadata": given["metadata"] | {k: v for k, v in given.items() if k != "metadata"}},
    "none but in metadata": lambda given: dict.fromkeys(FIELDS) | {"metadata": {**given["metadata"], **given}},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form):
    found = fields(parse(FORMS[form](GROW)))
    carried = found.pop("metadata")
    assert found == {name: value for name, value in {**dict.fromkeys(FIELDS), **GROW}.items() if name != "metadata"}
    assert carried.items() >= {"run": 3, "why": ["plateau"]}.items()


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_left_out_has_a_default(kind):
    before = time.time()
    decision = parse({"adaptation_type": kind, "layer_name": "conv1", "layer_spec": CONV})
    assert (decision.position, decision.parameters, decision.confidence, decision.urgency, decision.metadata) == (None, {}, 1.0, 1.0, {})
    assert before <= decision.timestamp <= time.time()
    assert (kind in TOPOLOGY) == ("layer" in kind or "skip" in kind)


def test_what_is_said_goes_before_what_rides_in_metadata():
    decision = parse({"adaptation_type": "grow", "layer_name": "a", "confidence": 0.5, "metadata": {"layer_name": "b", "confidence": 0.1}})
    assert (decision.layer_name, decision.confidence) == ("a", 0.5)


def test_reading_twice_changes_nothing():
    decision = parse(GROW)
    assert parse(decision) is decision
    by_hand = AdaptationDecision("grow", "conv1", timestamp=1.0)
    assert fields(parse(by_hand)) == fields(parse(parse(by_hand)))
    for copied in (copy.deepcopy(decision), pickle.loads(pickle.dumps(decision))):
        assert fields(parse(copied)) == fields(decision)
    # another one is another one, whatever it was made of
    with pytest.raises(DecisionError, match="confidence"):
        parse(dataclasses.replace(decision, confidence=2.0))


def test_what_was_given_stays_as_it_was_and_apart():
    given = copy.deepcopy(GROW)
    decision = parse(given)
    assert given == GROW
    given["parameters"]["width"] = 1
    given["metadata"]["run"] = 4
    assert decision.parameters["width"] == 24 and decision.metadata["run"] == 3


def test_a_layer_comes_as_spec_json_or_module():
    module = nn.ReLU()
    spec = LayerSpec.from_json(CONV)
    for layer, expected in ((CONV, spec), (spec, spec), (module, module)):
        assert parse({"adaptation_type": "add_layer", "position": "after_conv1", "layer_spec": layer}).layer_spec == expected


def test_a_source_is_whoever_decides():
    assert isinstance(SimpleNamespace(decisions=lambda state: ()), DecisionSource)
    assert not isinstance(SimpleNamespace(), DecisionSource)


# To JSON and back

SCALARS = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8
)
NAMES = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20)
SHARES = st.floats(0, 1)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(TYPES),
    name=NAMES,
    position=st.none() | NAMES,
    layer=st.sampled_from([CONV, {"kind": "ReLU", "arguments": {}}]),
    parameters=st.dictionaries(NAMES, VALUES, max_size=3),
    confidence=SHARES,
    urgency=SHARES,
    metadata=st.dictionaries(NAMES.filter(lambda key: key not in FIELDS), VALUES, max_size=3),
    timestamp=st.floats(0, 2**40),
)
def test_json_comes_back(kind, name, position, layer, parameters, confidence, urgency, metadata, timestamp):
    decision = parse(dict(zip(FIELDS, (kind, name, position, layer, parameters, confidence, urgency, metadata, timestamp), strict=True)))
    text = json.dumps(decision.to_json(), allow_nan=False)
    assert fields(parse(text)) == fields(decision)
    assert parse(text).to_json() == decision.to_json()
    assert str(decision).startswith(f"{kind}({name}")


@pytest.mark.parametrize(
    "value",
    [torch.tensor([0, 2, 3]), (0, 2, 3), [0, 2, 3], torch.Size([0, 2, 3])],
    ids=["tensor", "tuple", "list", "size"],
)
def test_indices_of_any_form_are_a_list_in_json(value):
    decision = parse({"adaptation_type": "prune", "layer_name": "conv1", "parameters": {"keep": value}})
    assert decision.to_json()["parameters"] == {"keep": [0, 2, 3]}
    assert parse({**GROW, "parameters": {"keep": range(3)}}).to_json()["parameters"] == {"keep": [0, 1, 2]}


def test_what_json_cannot_say_is_put_into_words():
    module = nn.Sequential(nn.ReLU(), nn.Module())
    given = {"adaptation_type": "add_layer", "position": "after_a", "layer_spec": module}
    values = {"inf": math.inf, "nan": -math.nan, "object": object(), "long": 7**9000, "trap": hostile.TrappedStr("a")}
    decision = parse({**given, "metadata": values})
    content = decision.to_json()
    assert content["layer_spec"] == {"module": "Sequential"}
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["metadata"] == {
        "inf": "inf",
        "nan": "nan",
        "object": "a object",
        "long": "an integer of 25267 bits",
        "trap": "a Trapped",
    }
    assert "25267 bits" in str(parse({**GROW, "parameters": {"width": 7**9000}}))


# What is refused

LIST = ", ".join(TYPES)
REFUSED = {
    "no decision": (3, r"expected a decision, a mapping with its fields or JSON, got 3\."),
    "nothing": (None, r"expected a decision.*got None\."),
    "a class": (AdaptationDecision, r"expected a decision.*got a type\."),
    "no json": ("{grow", r"expected JSON, got text that is none: Expecting"),
    "json of something else": ("[3]", r"expected a decision.*got a list|got \(3\)\."),
    "deep json": ("[" * 10**5, r"expected JSON, got text that is none"),
    "bytes that are no text": (b"\xff\xfe", r"expected JSON, got text that is none"),
    "a long number": ('{"urgency": ' + "1" * 5000 + "}", r"expected JSON, got text that is none"),
    "unknown field": (
        {**GROW, "layer": "conv1"},
        r"'layer': expected one of the fields adaptation_type.*Put what else there is in metadata",
    ),
    "keys that are no names": ({3: 4}, r"fields: expected names for keys, got 3\."),
    "no type": ({"layer_name": "a"}, rf"adaptation_type: expected one of {LIST}, got None\."),
    "unknown type": ({**GROW, "adaptation_type": "explode"}, rf"adaptation_type: expected one of {LIST}, got 'explode'\."),
    "type of another type": ({**GROW, "adaptation_type": 3}, r"adaptation_type: .*got 3\."),
    "enum of something else": ({**GROW, "adaptation_type": enum.Enum("Kind", ["EXPLODE"]).EXPLODE}, r"got 'EXPLODE'\."),
    "endless type": ({**GROW, "adaptation_type": "g" * 10**6}, r"got 'g+'\.\.\., a string of 1000000 characters"),
    "no name": ({"adaptation_type": "grow"}, r"grow: layer_name: expected the name of what is to change, got none"),
    "empty name": ({**GROW, "layer_name": "  "}, r"layer_name: expected a name of at most 512 printable characters, got '  '"),
    "long name": ({**GROW, "layer_name": "a" * 513}, r"layer_name: expected a name of at most 512"),
    "name with control characters": ({**GROW, "layer_name": "a\0b"}, r"layer_name: expected .*printable"),
    "name that is none": ({**GROW, "layer_name": ["conv1"]}, r"layer_name: expected a name"),
    "position that is none": ({**GROW, "position": 3}, r"position: expected a name.*got 3\."),
    "no position": (
        {"adaptation_type": "add_layer", "layer_spec": CONV},
        r'add_layer: position: expected "after_<path>" or "before_<path>"',
    ),
    "no layer": (
        {"adaptation_type": "add_layer", "position": "after_a"},
        r"add_layer: layer_spec: expected a LayerSpec, its JSON or a module",
    ),
    "unknown layer": ({**GROW, "layer_spec": {"kind": "Conv9d"}}, r"layer_spec: LayerSpec: kind: expected a layer on the allow-list"),
    "huge layer": (
        {**GROW, "layer_spec": {"kind": "Linear", "arguments": {"in_features": 2**20, "out_features": 2**20}}},
        r"layer_spec: .*at most",
    ),
    "layer that is none": ({**GROW, "layer_spec": 3}, r"layer_spec: .*expected a dict, got 3"),
    "parameters": ({**GROW, "parameters": [1]}, r"parameters: expected a dict, got"),
    "names of parameters": ({**GROW, "parameters": {1: 2}}, r"parameters: expected names for keys, got 1"),
    "deep parameters": ({**GROW, "parameters": {"a": hostile.nested(9)}}, r"parameters: expected at most 10000 values, 8 deep, got more"),
    "parameters that hold themselves": ({**GROW, "parameters": {"a": hostile.endless_list()}}, r"parameters: expected at most"),
    "many parameters": ({**GROW, "parameters": {"keep": [0] * 10_001}}, r"parameters: expected at most 10000 values"),
    "metadata": ({**GROW, "metadata": "text"}, r"metadata: expected a dict, got 'text'"),
    "confidence above": ({**GROW, "confidence": 1.0000001}, r"confidence: expected a number from 0 to 1, got 1.0000001"),
    "confidence below": ({**GROW, "confidence": -1e-9}, r"confidence: expected a number from 0 to 1"),
    "confidence that is none": ({**GROW, "confidence": math.nan}, r"confidence: expected a finite number, got nan"),
    "confidence in words": ({**GROW, "confidence": "high"}, r"confidence: expected a finite number, got 'high'"),
    "confidence yes": ({**GROW, "confidence": True}, r"confidence: expected a finite number, got True"),
    "urgency": ({**GROW, "urgency": 2}, r"urgency: expected a number from 0 to 1, got 2"),
    "urgency in metadata": ({**GROW, "urgency": None, "metadata": {"urgency": 7}}, r"urgency: expected a number from 0 to 1, got 7"),
    "timestamp": ({**GROW, "timestamp": "now"}, r"timestamp: expected a finite number, got 'now'"),
    "endless timestamp": ({**GROW, "timestamp": 10**400}, r"timestamp: expected a finite number, got an integer of 1329 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_and_said(case):
    content, message = REFUSED[case]
    with pytest.raises(DecisionError, match=message) as caught:
        parse(content)
    assert str(caught.value).startswith("decision: ") and len(str(caught.value)) < 500
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("bound", [0, 1, 0.0, 1.0])
def test_bounds_themselves_are_taken(bound):
    assert parse({**GROW, "confidence": bound, "urgency": bound}).confidence == bound


class Raising:
    """An object whose attributes do not like to be asked for."""

    @property
    def adaptation_type(self) -> str:
        raise RuntimeError("not now")


def test_objects_that_fail_to_answer_are_refused():
    for given_ in (Raising(), hostile.TrappedMapping(), hostile.TrappedObject(), hostile.TrappedStr("{}")):
        with pytest.raises(DecisionError):
            parse(given_)


def test_whatever_is_thrown_at_it_is_read_or_refused():
    rng = random.Random(0)
    read = 0
    for number in range(6000):
        content: Any = {name: hostile.value(rng) for name in FIELDS if rng.random() < 0.3}
        content["adaptation_type"] = rng.choice(TYPES) if rng.random() < 0.9 else hostile.value(rng)
        if rng.random() < 0.7:
            content["layer_name"] = "conv1"
        if rng.random() < 0.2:
            content["parameters"] = {"width": hostile.value(rng), "keep": hostile.value(rng)}
        given_ = content if number % 3 else SimpleNamespace(**content)
        if number % 50 == 0:
            given_ = rng.choice(list(hostile.mappings(content)))
        try:
            decision = parse(given_)
        except DecisionError:
            continue
        except ElasticError as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error
        read += 1
        json.dumps(decision.to_json(), allow_nan=False)
        assert len(str(decision)) < 10**4
    assert read > 200
