"""The option tables: one source for flags, recipe keys and the configuration's fields."""

import argparse
import dataclasses
from typing import Any

import pytest

from optimum_dobisvd import DobiSVDConfig
from optimum_dobisvd.commands.options import CommandSpec, Option, add_options, from_command_line, from_recipe
from optimum_dobisvd.commands.run import STEPS
from optimum_dobisvd.commands.shared_options import CALIBRATION, METHOD, compression_config, with_method_resolved
from optimum_dobisvd.config import default_of


def parse(spec: CommandSpec, *arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_options(parser, spec)
    return from_command_line(spec, parser.parse_args(list(arguments)))


def of_the_configuration() -> list[Option]:
    return [option for option in METHOD + CALIBRATION if option.key != "device_map"]  # that is from_pretrained's


def test_defaults_are_those_of_the_configuration() -> None:
    fields = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(DobiSVDConfig)
    }
    given = parse(STEPS["compress"], "out", "--model", "m")
    columns = with_method_resolved(given)
    by_the_method = {"allocation", "factorization", "structure"}
    for option in of_the_configuration():
        assert default_of(option.key) == fields[option.key], option.key
        assert option.default == (None if option.from_config else fields[option.key]), "a default is written twice"
        if option.key not in by_the_method:
            assert columns[option.key] == fields[option.key], option.key
    assert {option.key for option in of_the_configuration() if option.from_config} >= {
        "method",
        "nsamples",
        "seed",
        "batch_size",
        "fisher",
        "min_rank",
        "min_coverage",
    }


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
        default = default_of(option.key) if option.from_config else option.default
        if option.kind in (int, float) and default is not None:
            assert f"{' '.join(option.help.split())} (default: {default})" in text
        for old in ("--storage", "--inner", "--dense-storage"):
            assert old not in text


def test_overrides_add_up_whatever_way_they_are_given() -> None:
    spec = STEPS["compress"]
    many = ["--overrides", '{"a": {"rank": 1}, "b": {"rank": 2}}', "--override", 're:x:y:{"dense": true}']
    found = parse(spec, "out", "--model", "m", *many, "--override", 'b:{"rank": 3}')["overrides"]
    assert found == {"a": {"rank": 1}, "b": {"rank": 3}, "re:x:y": {"dense": True}}
    unset = parse(spec, "out", "--model", "m")
    assert with_method_resolved(unset)["overrides"] == {}, "the default was written to"


def test_options_make_the_configuration() -> None:
    options = parse(STEPS["compress"], "out", "--model", "m", "--ratio", "1", "--min-rank", "3", "--device", "cuda")
    config = compression_config(with_method_resolved(options), ["a text"])
    assert (config.ratio, config.min_rank, config.device, config.dataset) == (1.0, 3, "cuda", ["a text"])


@pytest.mark.parametrize(
    ("method", "asked", "structure", "quantization"),
    [
        ("global", (), "auto", None),
        ("dobi", (), "low_rank", "remap"),
        ("dobi", ("--quantization", "int8"), "low_rank", "int8"),
        ("global", ("--mixed",), "auto", None),
        ("global", ("--structure", "dense", "--quantization", "int8"), "dense", "int8"),
    ],
)
def test_the_columns_of_the_method_are_written_out(
    method: str, asked: tuple[str, ...], structure: str, quantization: str | None
) -> None:
    options = with_method_resolved(parse(STEPS["compress"], "out", "--model", "m", "--method", method, *asked))
    assert (options["structure"], options["quantization"]) == (structure, quantization)
    config = compression_config(options, ["a text"])
    again = compression_config({**options, "mixed": config.mixed}, ["a text"])
    assert config == again
    assert config.encoding.name == ("int8" if config.mixed else quantization or "float")


@pytest.mark.parametrize("command", ["compress", "plan", "quantize"])
@pytest.mark.parametrize("value", [("int8",), ()])
@pytest.mark.parametrize("flag", ["--storage", "--inner", "--dense-storage"])
def test_flags_of_earlier_versions_are_refused(
    command: str, flag: str, value: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse(STEPS[command], flag, *value)
    assert left.value.code == 2
    now = "--quantization or --mixed" if flag == "--storage" and command != "quantize" else "--quantization"
    assert f"there is no {flag} any more; write {now}\n" in capsys.readouterr().err
