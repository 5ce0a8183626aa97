"""Settings: every bad value is refused by the name of its field; every field is a flag."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import pytest

from diloco_cli.options import config_options
from diloco_cli.server import main
from diloco_proto import outer_pb2 as pb
from diloco_proto.codec import Format
from diloco_proto.errors import ConfigError
from diloco_server import RunConfig, ServerConfig

NAN = float("nan")

BAD: dict[str, list[Any]] = {
    "sync_every": [0, -1, 2.5, "100", True, None],
    "num_fragments": [0, -4, 1.0, None],
    "fragment_pattern": ["", "random", None, 3],
    "overlap_steps": [-1, 100, 0.5],
    "mixing_alpha": [-0.1, 1.1, NAN, "0.5", None],
    "outer_optimizer": ["adam", "", None],
    "outer_lr": [0.0, -0.7, NAN, float("inf"), "0.7"],
    "outer_momentum": [-0.1, 1.0, NAN],
    "uplink_codec": ["int5", "INT4", "", 4],
    "downlink_codec": ["int5", None],
    "min_workers": [0, -1, 1.5],
    "grace_seconds": [-1.0, NAN, "soon", "", None, True, "-1"],
    "lease_seconds": [0.0, 0.9, NAN, float("inf"), "15"],
    "weighting": ["loss", None],
    "delay_buffer": [0, -1, 2.5, "soon", None, True],
    "error_feedback": ["yes", True, None],
    "max_outer_grad_norm": [-1.0, NAN, float("inf"), "10"],
    "max_staleness": [-1, 0.5, "soon", None],
    "max_away": [0, -1, 2.5],
    "dynamic_local_updates": [1, "on", None],
    "stop_after_rounds": [-1, 1.0],
    "stop_after_tokens": [-1, 1e9],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_a_bad_value_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"\b{field}\b"):
        RunConfig(**{field: value})


def test_every_field_has_bad_values() -> None:
    assert BAD.keys() == {f.name for f in dataclasses.fields(RunConfig)}


def test_the_defaults_are_good() -> None:
    config = RunConfig()
    assert (config.sync_every, config.num_fragments, config.overlap_steps, config.mixing_alpha) == (100, 4, 2, 0.5)
    assert (config.uplink, config.downlink) == (Format.INT4, Format.INT4)
    assert config.grace is None


@pytest.mark.parametrize(
    ("value", "grace"), [("auto", None), ("inf", float("inf")), (float("inf"), float("inf")), (0, 0.0), ("2.5", 2.5)]
)
def test_ways_to_write_a_grace(value: Any, grace: float | None) -> None:
    assert RunConfig(grace_seconds=value).grace == grace


def test_whole_numbers_are_good_floats() -> None:
    config = RunConfig(mixing_alpha=1, outer_lr=1, lease_seconds=20)
    assert config.outer_lr == 1.0
    assert isinstance(config.outer_lr, float)
    assert config == RunConfig(mixing_alpha=1.0, outer_lr=1.0, lease_seconds=20.0)


def test_workers_get_what_they_have_to_know() -> None:
    config = RunConfig(sync_every=30, num_fragments=3, fragment_pattern="balanced", overlap_steps=0, mixing_alpha=0)
    config = dataclasses.replace(config, uplink_codec="e3m0", downlink_codec="bf16")
    assert config.to_pb() == pb.RunSettings(
        sync_every=30,
        num_fragments=3,
        fragment_pattern="balanced",
        overlap_steps=0,
        mixing_alpha=0.0,
        uplink_codec=pb.CODEC_E3M0,
        downlink_codec=pb.CODEC_BF16,
    )


def test_the_text_form_makes_the_same_config_again() -> None:
    config = RunConfig(sync_every=30, grace_seconds=1.5, weighting="uniform", outer_lr=2.0)
    types = {f.name: type(f.default) for f in dataclasses.fields(RunConfig)}
    text = config.as_text()
    values = {k: v == "true" if types[k] is bool else types[k](v) for k, v in text.items()}
    assert RunConfig(**values) == config


def test_coarse_uplinks_bring_error_feedback() -> None:
    assert RunConfig(uplink_codec="int2").to_pb().error_feedback
    assert not RunConfig().to_pb().error_feedback
    assert RunConfig(error_feedback="on").to_pb().error_feedback
    with pytest.raises(ConfigError, match="uplink_codec ternary needs error feedback"):
        RunConfig(uplink_codec="ternary", error_feedback="off")
    with pytest.raises(ConfigError, match="downlink_codec"):
        RunConfig(downlink_codec="int2")


def test_asynchronous_limits_follow_the_live_workers() -> None:
    config = RunConfig(outer_optimizer="delayed-nesterov")
    assert config.asynchronous
    assert (config.buffered(5), config.staleness_limit(5)) == (5, 20)
    fixed = dataclasses.replace(config, delay_buffer=3, max_staleness=2)
    assert (fixed.buffered(5), fixed.staleness_limit(5)) == (3, 2)
    assert RunConfig().staleness_limit(5) == 0


def test_a_config_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().sync_every = 3  # type: ignore[misc]


# -- the daemon's own --


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_neither_tls_nor_tokens(host: str) -> None:
    assert not ServerConfig(host=host).guarded


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "203.0.113.7", "example.org", "", "localhost.evil"])
def test_anything_else_does(host: str) -> None:
    assert ServerConfig(host=host).guarded
    assert not ServerConfig(host=host, insecure=True).guarded


@pytest.mark.parametrize("port", [-1, 65536])
def test_no_such_port(port: int) -> None:
    with pytest.raises(ConfigError, match=f"port is {port}"):
        ServerConfig(port=port)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^init is .*nothing"):
        ServerConfig(init=tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"^port_file is .*nowhere"):
        ServerConfig(port_file=tmp_path / "nowhere" / "port")
    with pytest.raises(ConfigError, match=r"^join_url_file is .*nowhere"):
        ServerConfig(join_url_file=tmp_path / "nowhere" / "join-url")


# -- flags --


@pytest.mark.parametrize("config", [RunConfig, ServerConfig])
def test_every_field_is_a_flag_with_its_default_and_help(config: type) -> None:
    options = {p.name: p for p in main.params if isinstance(p, click.Option)}
    for f in dataclasses.fields(config):
        option = options[f.name]
        assert option.opts == ["--" + f.name.replace("_", "-")]
        assert option.default == f.default
        assert option.help == f.metadata["help"]
        if f.metadata["choices"]:
            assert tuple(option.type.choices) == f.metadata["choices"]


def test_flags_give_the_dataclass_its_own_types() -> None:
    @click.command()
    @config_options(RunConfig)
    def command(**values: Any) -> RunConfig:
        return RunConfig(**values)

    assert command.main([], standalone_mode=False) == RunConfig()
    arguments = ["--sync-every", "30", "--outer-lr", "2", "--grace-seconds", "7", "--weighting", "uniform"]
    assert command.main(arguments, standalone_mode=False) == RunConfig(
        sync_every=30, outer_lr=2.0, grace_seconds=7, weighting="uniform"
    )
