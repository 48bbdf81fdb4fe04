"""What is kept of messages must come to the same as reading each one in full."""

from __future__ import annotations

import numpy as np
from grpc_kit import infer_request, outputs
from hypothesis import given
from hypothesis import strategies as st

from millhand.errors import InputError
from millhand.serving import protocol
from millhand.serving.grpc import wire
from millhand.serving.grpc.plans import PLANS_OF_SIZE_CAP, Plans
from millhand.serving.grpc.requests import read_request, write_response

DTYPES = ["float32", "float16", "int64", "uint8", "int16"]
SHAPE = st.lists(st.integers(0, 40), min_size=1, max_size=3)
TENSORS = st.dictionaries(st.sampled_from("abcx"), st.tuples(st.sampled_from(DTYPES), SHAPE), min_size=1)


def arrays(specs, seed):
    generator = np.random.default_rng(seed)
    return {
        name: np.frombuffer(generator.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)
        for name, (dtype, shape) in specs.items()
    }


def placed(plan, message, slot):
    """The tensors as the worker will see them."""
    payload, inline = plan.place(message, slot)
    memory = memoryview(b"".join(payload)) if inline else slot
    return protocol.fetch(plan.tensors, memory)


def same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()  # NaN too


@given(specs=TENSORS, seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)), ring=st.booleans())
def test_a_message_like_one_before_needs_no_reading(specs, seeds, ring):
    plans = Plans()
    first, second = (infer_request("m", arrays(specs, seed), model_version="3") for seed in seeds)
    for request in (first, second):
        request.outputs.add(name="y")
        request.parameters["priority"].int64_param = 7
    message = first.SerializeToString()
    plans.keep(message, read_request(message))
    plan = plans.find(second.SerializeToString())
    assert (plan.call.model, plan.call.version, plan.call.wanted, plan.call.priority) == ("m", "3", ("y",), 7)
    slot = memoryview(bytearray(1 << 20)) if ring else None
    same(placed(plan, second.SerializeToString(), slot), arrays(specs, seeds[1]))


@given(specs=TENSORS, changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_plan_never_means_anything_else_than_the_message(specs, changes):
    plans = Plans()
    message = infer_request("m", arrays(specs, 1)).SerializeToString()
    plans.keep(message, read_request(message))
    changed = bytearray(message)
    for place, value in changes:
        changed[int(place * (len(changed) - 1))] = value
    plan = plans.find(bytes(changed))
    if plan is not None:
        read = read_request(bytes(changed))
        same(placed(plan, bytes(changed), None), read.tensors)
        assert (read.model, read.version, read.wanted, read.id) == ("m", "", (), "")


def test_what_hangs_on_more_than_the_data_is_not_kept():
    x = {"x": np.ones((1, 2), np.float32)}
    typed = wire.ModelInferRequest(model_name="m")
    typed.inputs.add(name="x", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
    final = infer_request("m", x)
    final.parameters["triton_enable_empty_final_response"].bool_param = True
    classes = infer_request("m", x)
    classes.outputs.add(name="y").parameters["classification"].int64_param = 1
    strings = np.array([b"a", b"b"], dtype=object)
    requests = [
        infer_request("m", x, id="7"),
        typed,
        final,
        classes,
        infer_request("m", {"x": strings}),
        infer_request("m", {"x": np.array([True])}),
        infer_request("m" * 5000, x),
        wire.ModelInferRequest(model_name="m"),
    ]
    messages = [request.SerializeToString() for request in requests]
    messages.append(infer_request("m", x).SerializeToString() + b"\x78\x01")  # a field of another kind
    for message in messages:
        plans = Plans()
        plans.keep(message, read_request(message))
        assert plans.find(message) is None, message


def test_raw_data_that_stand_elsewhere_are_found_there():
    """Protobuf allows any order of fields, and unknown ones that look like raw data."""
    x = np.array([[1, 2]], np.float32)
    raw = b"\x3a\x08" + x.tobytes()
    head = infer_request("m", {"x": x}).SerializeToString().removesuffix(raw)
    unknown = b"\x7a\x0a" + b"\x3a\x08" + bytes(8)  # field 15, which holds what looks like field 7
    for message in (raw + head, head + raw + unknown, unknown + raw + head):
        plans = Plans()
        plans.keep(message, read_request(message))
        same(placed(plans.find(message), message, None), {"x": x})
        other = message.replace(x.tobytes(), (2 * x).tobytes())
        same(placed(plans.find(other), other, None), {"x": 2 * x})
        assert plans.find(message[:-1] + b"\x09") is None or not message.endswith(bytes(8))


def test_a_bounded_number_of_plans_is_kept():
    plans = Plans()
    messages = []
    for number in range(10, 10 + 2 * PLANS_OF_SIZE_CAP):
        messages.append(infer_request(f"m{number}", {"x": np.ones(2, np.float32)}).SerializeToString())
        plans.keep(messages[-1], read_request(messages[-1]))
    assert [plans.find(message) is not None for message in messages] == [False] * 8 + [True] * 8


@given(specs=TENSORS, seed=st.integers(0, 99), some=st.booleans())
def test_answers_are_the_same_as_written_in_full(specs, seed, some):
    tensors = arrays(specs, seed)
    message = infer_request("m", {"x": np.ones(2, np.float32)}).SerializeToString()
    call = read_request(message)
    if some:
        call.wanted = tuple(reversed(tensors))
    slot = memoryview(bytearray(1 << 20))
    lying, payload, _ = protocol.place(tensors, slot)
    memory = memoryview(b"".join(bytes(part) for part in payload)) if payload else slot
    result = protocol.Result(bool(payload), lying, 4, 1, 2, 3)
    plans = Plans()
    for _ in range(2):
        answer = wire.ModelInferResponse.FromString(plans.answer(call, result, memory))
        assert answer == write_response(call, 4, tensors, {})
        same(outputs(answer), {name: tensors[name] for name in call.wanted or tensors})


def test_a_damaged_result_is_an_error():
    call = read_request(infer_request("m", {"x": np.ones(2, np.float32)}).SerializeToString())
    result = protocol.Result(True, (protocol.Tensor("y", "float32", (2,), 0, 8),), 1, 1, 1, 1)
    try:
        Plans().answer(call, result, memoryview(bytes(4)))
    except InputError as error:
        assert "outside" in error.message
    else:
        raise AssertionError("a tensor outside its memory was taken")
