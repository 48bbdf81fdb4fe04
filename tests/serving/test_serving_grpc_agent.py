"""gRPC of a whole agent: switched on by the configuration, told in its state, gone with it."""

from __future__ import annotations

import urllib.request

import grpc
import numpy as np
import psutil
import pytest
from grpc_kit import SERVICE, infer_request, outputs
from serving_kit import scale, write_model

from millhand.cli.state import state_lines
from millhand.serving.grpc import wire
from millhand.testing import wait_until

X = np.array([[1, 2]], dtype=np.float32)


def config(root, processes=1):
    return f"""
[http]
port = 0
[grpc]
enabled = true
port = 0
processes = {processes}
[models]
paths = ["{root}"]
"""


def infer(address, timeout_s=20.0):
    """The answer of one call on a connection of its own."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/ModelInfer", wire.ModelInferRequest.SerializeToString, wire.ModelInferResponse.FromString
        )
        return outputs(call(infer_request("scale", {"x": X}), timeout=timeout_s, wait_for_ready=True))["y"]


def fronts(agent):
    """The agent's gRPC processes."""
    children = psutil.Process(agent.process.pid).children(recursive=True)
    return [child for child in children if "millhand.serving.grpc" in child.cmdline()]


@pytest.fixture
def served(root, millhand_agent):
    """(agent, address) of two gRPC processes, the model ready."""
    scale(write_model(root, "scale") / "1/model.onnx", 2)
    agent = millhand_agent(config(root, processes=2))
    address = agent.call("state")["grpc"]
    agent.wait(lambda: agent.call("model.list")[0]["state"] == "ready", "the model")
    return agent, address


def test_the_agent_serves_grpc_and_leaves_nothing_behind(served):
    agent, address = served
    np.testing.assert_array_equal(infer(address), 2 * X)
    processes = fronts(agent)
    assert len(processes) == 2
    assert f"gRPC {address}" in " ".join(state_lines(agent.call("state")))
    assert agent.stop() == 0
    assert not any(process.is_running() for process in processes)
    with pytest.raises(grpc.RpcError):
        infer(address, timeout_s=0.3)


def test_calls_are_counted_on_the_node_s_metrics_page(served):
    agent, address = served
    for _ in range(3):
        infer(address)
    labels = f'grpc_type="unary",grpc_service="{SERVICE}",grpc_method="ModelInfer"'

    def counted():
        with urllib.request.urlopen(f"{agent.call('state')['http']}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        handled = f'grpc_server_handled_total{{{labels},grpc_code="OK"}} 3'
        return handled in lines and f"grpc_server_handling_seconds_count{{{labels}}} 3" in lines

    agent.wait(counted, "the reports of both processes")


def test_a_killed_front_comes_back_on_the_same_port(served):
    agent, address = served
    np.testing.assert_array_equal(infer(address), 2 * X)
    for process in fronts(agent):
        process.kill()
    np.testing.assert_array_equal(infer(address), 2 * X)
    wait_until(lambda: len(fronts(agent)) == 2, "both processes")


def test_fronts_end_with_a_killed_agent(served):
    agent, address = served
    np.testing.assert_array_equal(infer(address), 2 * X)
    processes = fronts(agent)
    agent.kill()
    wait_until(lambda: not any(process.is_running() for process in processes), "the end of the processes")


def test_grpc_is_off_until_it_is_asked_for(millhand_agent):
    agent = millhand_agent("[http]\nport = 0\n")
    assert agent.call("state")["grpc"] == ""
    assert fronts(agent) == []
