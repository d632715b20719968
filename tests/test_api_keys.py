"""API keys: what leaks, what opens the door that should not, and rates that are not kept."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from scripted import ASK, WELL, ScriptedBackend, refused

from kestrel import cli
from kestrel.api import Overloaded, RateLimited, error_from_response
from kestrel.api_keys import ApiKey, RateLimits, find_key, hash_key, parse_keys
from kestrel.config import ConfigError, RuntimeConfig
from kestrel.server.routes import build_app

SECRET = "correct-horse-battery-staple-0001"
OTHER = "correct-horse-battery-staple-0002"


def client_of(*api_keys: Any, **options: Any) -> httpx.AsyncClient:
    backend = ScriptedBackend(api_keys=api_keys)
    backend.script = list(WELL)
    transport = httpx.ASGITransport(build_app(backend, **options))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


# Which keys open the door


async def test_a_hashed_key_opens_the_door_and_its_hash_does_not():
    async with client_of(hash_key(SECRET), OTHER) as client:
        for key, status in (
            (SECRET, 200),
            (OTHER, 200),
            (hash_key(SECRET), 401),
            (hash_key(SECRET).removeprefix("sha256:"), 401),
            (SECRET + "x", 401),
        ):
            response = await client.post("/v1/segment", json=ASK, headers=bearer(key))
            assert response.status_code == status, key


def test_the_hash_is_what_sha256sum_prints():
    assert hash_key("abc") == "sha256:" + hashlib.sha256(b"abc").hexdigest()


def test_every_key_is_compared_whatever_the_first_comparison_says(monkeypatch):
    import hmac

    compared = []
    real = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return real(one, other)

    monkeypatch.setattr("kestrel.api_keys.hmac.compare_digest", counting)
    keys = parse_keys([SECRET, OTHER])
    for offered in (SECRET, OTHER, "neither", ""):
        compared.clear()
        find_key(offered, keys)
        assert len(compared) == 2


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("", "key"),
        ("has space", "key"),
        ("é-is-not-ascii", "key"),
        (f"sha256:{'0' * 63}", "sha256"),
        (f"sha256:{'G' * 64}", "sha256"),
        (17, "api_keys[0]"),
        ({"name": "no key"}, "key"),
        ({"key": SECRET, "rate": 3}, "rate_per_s"),
        ({"key": SECRET, "rate_per_s": 0}, "rate_per_s"),
        ({"key": SECRET, "rate_per_s": float("inf")}, "rate_per_s"),
        ({"key": SECRET, "rate_per_s": True}, "rate_per_s"),
        ({"key": SECRET, "rate_per_s": float("nan")}, "rate_per_s"),
        ({"key": SECRET, "rate_per_s": 10**400}, "rate_per_s"),
        ({"key": SECRET, "rate_per_s": 5e-324}, "rate_per_s"),
        ({"key": SECRET, "rate_per_s": 1, "burst": 10**400}, "burst"),
        ({"key": SECRET, "name": ["mobile"]}, "name"),
        ({"key": SECRET, "rate_per_s": 1, "burst": 0}, "burst"),
        ({"key": SECRET, "burst": 4}, "rate_per_s"),
    ],
)
def test_a_broken_entry_is_named_by_its_place_and_not_shown(entry, part):
    with pytest.raises(ConfigError) as caught:
        RuntimeConfig(api_keys=[entry])
    message = str(caught.value)
    assert "api_keys[0]" in message and part in message
    assert SECRET not in message
    if isinstance(entry, str) and entry:
        assert entry not in message


NO_LISTS = [SECRET, {"key": SECRET}, {SECRET}, 3, 0, False, "", {}, 1.5]


@pytest.mark.parametrize("keys", NO_LISTS)
def test_keys_that_are_no_list_are_refused_and_not_split_into_letters(keys):
    with pytest.raises(ConfigError, match=r"^api_keys must be a list$"):
        RuntimeConfig(api_keys=keys)


@pytest.mark.parametrize("keys", NO_LISTS)
def test_a_graph_refuses_keys_that_are_no_list_by_their_field(keys):
    pytest.importorskip("ray.serve")
    from pydantic import ValidationError

    from serve_graph.args import GraphArgs, IngressSettings

    for model, settings in (
        (GraphArgs, {"runtime": {"api_keys": keys}}),
        (IngressSettings, {"api_keys": keys}),
    ):
        with pytest.raises(ValidationError, match="api_keys must be a list") as caught:
            model.model_validate(settings)
        assert SECRET not in str(caught.value)


def test_keys_without_a_value_are_none_at_every_door():
    """A key without a value is null in YAML."""
    pytest.importorskip("ray.serve")
    from serve_graph.args import GraphArgs, IngressSettings

    assert RuntimeConfig(api_keys=None).api_keys == ()
    assert GraphArgs.model_validate({"runtime": {"api_keys": None}}).runtime.api_keys == ()
    assert IngressSettings.model_validate({"api_keys": None}).api_keys is None


def test_the_same_key_twice_is_refused_even_when_one_is_hashed():
    with pytest.raises(ConfigError, match=r"api_keys\[1\] is the same key as api_keys\[0\]"):
        RuntimeConfig(api_keys=[SECRET, {"key": hash_key(SECRET), "rate_per_s": 5}])


def test_a_copy_of_a_config_has_the_same_keys():
    config = RuntimeConfig(api_keys=[SECRET, {"key": hash_key(OTHER), "rate_per_s": 2}])
    assert replace(config, refiner=None).api_keys == config.api_keys
    assert pickle.loads(pickle.dumps(config)) == config


# Secrets stay secret


def test_a_config_does_not_show_its_keys():
    config = RuntimeConfig(api_keys=[SECRET, hash_key(OTHER)])
    shown = f"{config!r} {config} {config.api_keys!r}"
    for secret in (SECRET, OTHER, hash_key(SECRET), hash_key(OTHER)):
        assert secret not in shown and secret.removeprefix("sha256:") not in shown
    assert SECRET.encode() not in pickle.dumps(config)


def test_a_refused_graph_config_does_not_show_its_keys():
    pytest.importorskip("ray.serve")
    from pydantic import ValidationError

    from serve_graph.args import GraphArgs

    args = {"runtime": {"api_keys": [SECRET], "devic": "cpu"}, "refine_timeout_s": 0}
    with pytest.raises(ValidationError) as caught:
        GraphArgs.model_validate(args)
    assert "devic" in str(caught.value) and "refine_timeout_s" in str(caught.value)
    assert SECRET not in str(caught.value) and SECRET not in repr(caught.value)
    good = GraphArgs.model_validate({"runtime": {"api_keys": [hash_key(SECRET)]}})
    assert SECRET not in repr(good) and hash_key(SECRET)[7:] not in repr(good)
    assert find_key(SECRET, good.runtime.api_keys) is not None


PLAIN = [SECRET, {"key": "another-plain-key-0003", "name": "mobile", "rate_per_s": 5}]


@pytest.mark.parametrize(("entry", "named"), [(PLAIN[0], "api_keys[1]"), (PLAIN[1], "mobile")])
def test_a_graph_takes_no_key_in_the_clear_and_does_not_show_it(entry, named):
    """Serve shows and logs its config: there a key in the clear is no secret any more."""
    pytest.importorskip("ray.serve")
    from pydantic import ValidationError

    from serve_graph.args import GraphArgs, IngressSettings

    keys = [hash_key(OTHER), entry]
    for model, settings in (
        (GraphArgs, {"runtime": {"api_keys": keys}}),
        (GraphArgs, {"runtime": RuntimeConfig(api_keys=keys)}),
        (IngressSettings, {"api_keys": keys}),
    ):
        with pytest.raises(ValidationError) as caught:
            model.model_validate(settings)
        said = f"{caught.value} {caught.value!r}"
        assert named in said and "python -m kestrel hash-key" in said
        assert "api_keys[0]" not in said
        assert SECRET not in said and "another-plain-key-0003" not in said


@pytest.mark.parametrize("key", [None, "a b", "sha256:12"])
def test_ingress_settings_refuse_what_is_no_key_before_they_are_used(key):
    pytest.importorskip("ray.serve")
    from pydantic import ValidationError

    from serve_graph.args import IngressSettings

    with pytest.raises(ValidationError, match=r"api_keys\[0\]"):
        IngressSettings.model_validate({"api_keys": [key]})
    assert IngressSettings.model_validate({"api_keys": [hash_key(SECRET)]}).api_keys


async def test_nothing_that_is_logged_or_answered_shows_a_key(everything_logged):
    async with client_of(SECRET, {"key": hash_key(OTHER), "rate_per_s": 0.1}) as client:
        answers = []
        for key in (SECRET, OTHER, OTHER, "wrong-key-of-somebody"):
            for path, body in (("/v1/segment", ASK), ("/v1/segment", {}), ("/nowhere", {})):
                answers.append(await client.post(path, json=body, headers=bearer(key)))
        answers.append(await client.get("/openapi.json"))
    shown = everything_logged.text + "".join(f"{a.text}{a.headers}" for a in answers)
    assert {a.status_code for a in answers} == {200, 400, 401, 404, 429}
    for secret in (SECRET, OTHER, hash_key(SECRET), hash_key(OTHER), "wrong-key-of-somebody"):
        assert secret not in shown


def test_a_key_in_the_clear_is_warned_of_once_with_the_command_that_hashes(everything_logged):
    config = [SECRET, hash_key(OTHER), {"key": "another-plain-key-0003", "name": "mobile"}]
    client_of(*config)
    warnings = [r.getMessage() for r in everything_logged.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "hash-key" in warnings[0] and "api_keys[0]" in warnings[0] and "mobile" in warnings[0]
    assert "api_keys[1]" not in warnings[0]


def test_hashed_keys_are_not_warned_of(everything_logged):
    client_of(hash_key(SECRET))
    assert not [r for r in everything_logged.records if r.levelname == "WARNING"]


# The command


def test_the_command_prints_a_hash_that_the_config_takes():
    done = subprocess.run(
        [sys.executable, "-m", "kestrel", "hash-key"],
        input=SECRET + "\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == hash_key(SECRET) + "\n"
    assert find_key(SECRET, RuntimeConfig(api_keys=[done.stdout.strip()]).api_keys)


@pytest.mark.parametrize("key", ["", "\n", "two words", "a\nb", "schlüssel-der-nicht-geht"])
def test_the_command_refuses_what_no_header_carries_and_does_not_show_it(key, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(key))
    assert cli.main(["hash-key"]) == cli.BAD_INPUT
    shown = capsys.readouterr()
    assert shown.out == "" and "visible ASCII" in shown.err
    assert not key.strip() or key.strip() not in shown.err


def test_the_command_warns_of_a_key_that_can_be_guessed(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hunter2"))
    assert cli.main(["hash-key"]) == 0
    shown = capsys.readouterr()
    assert "guessed" in shown.err and "hunter2" not in shown.err + shown.out


# Rates


def limits(rate: float, burst: int = 1, share: float = 1.0) -> tuple[RateLimits, Clock, ApiKey]:
    clock = Clock()
    (key,) = parse_keys([{"key": SECRET, "rate_per_s": rate, "burst": burst}])
    return RateLimits(share=lambda: share, clock=clock), clock, key


def test_a_burst_passes_then_the_rate_holds_and_a_pause_fills_up_to_the_burst_only():
    rates, clock, key = limits(rate=2, burst=3)
    assert [rates.wait_s(key) for _ in range(4)] == [0, 0, 0, 0.5]
    clock.now += 0.5
    assert [rates.wait_s(key) for _ in range(2)] == [0, 0.5]
    clock.now += 3600
    assert [rates.wait_s(key) for _ in range(4)] == [0, 0, 0, 0.5]


def test_over_a_minute_no_more_than_the_rate_and_one_burst_pass():
    rates, clock, key = limits(rate=5, burst=10)
    passed = 0
    for _ in range(6000):
        passed += rates.wait_s(key) == 0
        clock.now += 0.01
    assert 5 * 60 <= passed <= 5 * 60 + 10


def test_waiting_as_long_as_told_is_enough():
    rates, clock, key = limits(rate=0.3)
    assert rates.wait_s(key) == 0
    clock.now += rates.wait_s(key) + 1e-9
    assert rates.wait_s(key) == 0


def test_shares_of_several_replicas_add_up_to_the_rate():
    replicas = [limits(rate=8, burst=8, share=1 / 4) for _ in range(4)]
    passed = 0
    for _ in range(1000):
        for rates, clock, key in replicas:
            passed += rates.wait_s(key) == 0
            clock.now += 0.01
    assert 8 * 10 <= passed <= 8 * 10 + 8


def test_a_share_of_a_burst_still_lets_one_request_pass():
    rates, _, key = limits(rate=1, burst=1, share=1 / 8)
    assert rates.wait_s(key) == 0
    assert rates.wait_s(key) == 8


def test_one_client_s_rate_does_not_hold_up_another():
    rates, _, key = limits(rate=1)
    other, free = parse_keys([{"key": OTHER, "rate_per_s": 1}, "a-key-without-a-rate"])
    assert rates.wait_s(key) == 0 and rates.wait_s(key) > 0
    assert rates.wait_s(other) == 0
    assert all(rates.wait_s(free) == 0 and rates.wait_s(None) == 0 for _ in range(100))


async def test_a_used_up_rate_is_a_429_that_says_when_to_come_back():
    clock = Clock()
    keys = [{"key": SECRET, "rate_per_s": 0.25}, OTHER]
    async with client_of(*keys, rates=RateLimits(clock=clock)) as client:
        ask = lambda key: client.post("/v1/segment", json=ASK, headers=bearer(key))  # noqa: E731
        assert (await ask(SECRET)).status_code == 200
        response = await ask(SECRET)
        refused(response, 429)
        assert response.headers["retry-after"] == "4"
        assert (await ask(OTHER)).status_code == 200
        # Listing models and probes cost nothing and are not counted.
        assert (await client.get("/v1/models", headers=bearer(SECRET))).status_code == 200
        clock.now += 4
        assert (await ask(SECRET)).status_code == 200


async def test_a_client_without_the_key_cannot_use_up_its_rate():
    async with client_of({"key": SECRET, "rate_per_s": 0.001}) as client:
        for _ in range(5):
            refused(await client.post("/v1/segment", json=ASK, headers=bearer("wrong")), 401)
        assert (
            await client.post("/v1/segment", json=ASK, headers=bearer(SECRET))
        ).status_code == 200


def test_the_python_client_knows_a_used_up_rate():
    error = error_from_response(429, json.loads('{"error": "slow down"}'), "7")
    assert isinstance(error, RateLimited) and isinstance(error, Overloaded)
    assert error.retry_after_s == 7
