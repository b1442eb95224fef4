"""The option tables: one source for flags, recipe keys and the configuration's fields."""

import argparse
import dataclasses
from typing import Any

import pytest

from optimum_dobisvd import DobiSVDConfig
from optimum_dobisvd.commands.options import CommandSpec, add_options, from_command_line, from_recipe
from optimum_dobisvd.commands.run import STEPS
from optimum_dobisvd.commands.shared_options import CALIBRATION, METHOD, compression_config


def parse(spec: CommandSpec, *arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_options(parser, spec)
    return from_command_line(spec, parser.parse_args(list(arguments)))


def test_defaults_are_those_of_the_configuration() -> None:
    fields = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(DobiSVDConfig)
    }
    for option in METHOD + CALIBRATION:
        if option.key != "device_map":  # of from_pretrained
            assert option.default == fields[option.key], option.key


def test_every_field_of_the_configuration_can_be_asked_for() -> None:
    asked = {option.key for option in METHOD + CALIBRATION}
    set_by_the_package = {"quant_method", "format_version", "modules", "tokenizer"}
    assert {field.name for field in dataclasses.fields(DobiSVDConfig)} - set_by_the_package <= asked


@pytest.mark.parametrize("spec", STEPS.values(), ids=STEPS.keys())
def test_flags_and_recipe_keys_mean_the_same(spec: CommandSpec) -> None:
    required = [option for option in spec.options if option.required]
    flags = [option.flag + "=x" for option in required if not option.positional]
    keys = {option.key: ["x"] if option.many else "x" for option in required}
    positional = ["x"] * sum(option.positional for option in required)
    assert parse(spec, *positional, *flags) == from_recipe(spec, keys)


@pytest.mark.parametrize("spec", STEPS.values(), ids=STEPS.keys())
def test_help_shows_every_option_and_default(spec: CommandSpec) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, spec)
    text = " ".join(parser.format_help().split())
    for option in spec.options:
        assert (option.metavar or "") in text
        if not option.positional:
            assert option.flag in text
        if option.kind in (int, float) and option.default is not None:
            assert f"(default: {option.default})" in text


def test_overrides_add_up_whatever_way_they_are_given() -> None:
    spec = STEPS["compress"]
    many = ["--overrides", '{"a": {"rank": 1}, "b": {"rank": 2}}', "--override", 're:x:y:{"dense": true}']
    found = parse(spec, "out", "--model", "m", *many, "--override", 'b:{"rank": 3}')["overrides"]
    assert found == {"a": {"rank": 1}, "b": {"rank": 3}, "re:x:y": {"dense": True}}
    assert parse(spec, "out", "--model", "m")["overrides"] == {}, "the default was written to"


def test_options_make_the_configuration() -> None:
    options = parse(STEPS["compress"], "out", "--model", "m", "--ratio", "1", "--min-rank", "3", "--device", "cuda")
    config = compression_config(options, ["a text"])
    assert (config.ratio, config.min_rank, config.device, config.dataset) == (1.0, 3, "cuda", ["a text"])
