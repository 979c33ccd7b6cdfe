"""Settings and groups: everything wrong with them is told at once."""

import math
from typing import Any

import pytest

from router.config import ConfigError, GroupSpec, Settings, check_groups


def faults_of(**given: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        Settings(**given)
    return error.value.faults


def test_the_defaults_are_those_of_tgi() -> None:
    settings = Settings()
    assert settings.max_concurrent_requests == 128
    assert (settings.max_best_of, settings.max_stop_sequences, settings.max_top_n_tokens) == (
        2,
        4,
        5,
    )
    assert (settings.waiting_served_ratio, settings.max_waiting_tokens) == (0.3, 20)
    assert (settings.max_client_batch_size, settings.payload_limit) == (4, 2_000_000)
    assert settings.graceful_termination_timeout_s == 90
    assert (settings.resume_streams, settings.resume_timeout_s) == (True, 300)
    assert (settings.watermark_gamma, settings.watermark_delta) == (0.5, 2.0)


def test_all_faults_are_told_together_by_name_and_unit() -> None:
    faults = faults_of(
        port=70_000, payload_limit=0, step_deadline_s=math.nan, json_output="yes", log_level="loud"
    )
    assert len(faults) == 5
    assert any(fault.startswith("port (TCP port) must be") for fault in faults)
    assert any(fault.startswith("payload_limit (bytes) must be") for fault in faults)
    assert any(fault.startswith("step_deadline_s (seconds) must be") for fault in faults)
    assert any("json_output" in fault for fault in faults)
    assert any("log_level" in fault for fault in faults)


@pytest.mark.parametrize(
    "given",
    [
        {"max_concurrent_requests": 0},
        {"max_concurrent_requests": 1.5},
        {"max_concurrent_requests": True},
        {"max_concurrent_requests": None},
        {"max_total_tokens": -1},
        {"step_deadline_s": math.inf},
        {"step_deadline_s": 0},
        {"request_deadline_s": "10"},
        {"attempts_max": 0},
        {"host": ""},
        {"api_key": ""},
        {"resume_streams": 1},
        {"resume_timeout_s": -1},
        {"watermark_gamma": 0},
        {"watermark_gamma": 1.0},
        {"watermark_delta": -1},
        {"watermark_key": 0.5},
    ],
)
def test_what_cannot_work_is_named(given: dict[str, Any]) -> None:
    (name,) = given
    (fault,) = faults_of(**given)
    assert fault.startswith(name)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (
            {"max_input_tokens": 10, "max_total_tokens": 10},
            ("max_input_tokens", "max_total_tokens"),
        ),
        (
            {"max_total_tokens": 10, "max_batch_total_tokens": 9},
            ("max_total_tokens", "max_batch_total_tokens"),
        ),
        ({"port": 3000, "grpc_port": 3000}, ("port", "grpc_port")),
    ],
)
def test_settings_that_contradict_each_other(given: dict[str, Any], names: tuple[str, str]) -> None:
    (fault,) = faults_of(**given)
    assert all(name in fault for name in names)


def test_a_bad_number_is_not_compared_as_well() -> None:
    (fault,) = faults_of(max_input_tokens=-5, max_total_tokens=2)
    assert fault.startswith("max_input_tokens")


def test_two_ports_may_both_be_any() -> None:
    assert Settings(port=0, grpc_port=0).port == 0


def test_groups_that_can_work() -> None:
    groups = (
        GroupSpec("a", None, ("unix:///tmp/a.sock", "host:1")),
        GroupSpec("b", "m", ("[::1]:50061",)),
    )
    assert check_groups(groups) == groups


def test_all_faults_of_groups_are_told_together() -> None:
    with pytest.raises(ConfigError) as error:
        check_groups(
            [
                GroupSpec("a", None, ("unix:///a", "nowhere")),
                GroupSpec("a", None, ("unix:///a", "host:0")),
                GroupSpec("c", None, ()),
            ]
        )
    text = "\n".join(error.value.faults)
    assert len(error.value.faults) == 5
    assert "'nowhere' must be unix:///path or host:port" in text
    assert "'host:0'" in text
    assert "two groups are called a" in text
    assert "unix:///a is in group a and again" in text
    assert "group c has no worker" in text


def test_no_workers_is_a_fault() -> None:
    with pytest.raises(ConfigError, match="at least one worker"):
        check_groups([])
