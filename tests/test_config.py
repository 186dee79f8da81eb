"""What the command line and conf/ give: checked configs, or mistakes that read well."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from perfusion.cli import run_cli
from perfusion.config import CONF, ConfigError, checked, conf_folder
from perfusion.methods.base import method_class
from perfusion.training import composition
from perfusion.training.composition import prepared
from perfusion.training.trainer import check_keywords
from tests.training import composed

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
GROUPS = {
    group: sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    for group in ("backbone", "method", "concept", "trainer", "logger", "callbacks")
}
GIVEN = ["concept.images=x", "concept.superclass=cat"]  # what photos cannot do without


def test_presets_lie_in_the_package_of_a_wheel_and_beside_it_in_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "perfusion"
    assert conf_folder(package) == tmp_path / "conf"
    (package / "conf").mkdir(parents=True)
    assert conf_folder(package) == package / "conf"
    included = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert included["force-include"] == {"conf": "perfusion/conf"}
    assert included["exclude"] == ["perfusion/toyland/build"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_fits_every_schema(name: str) -> None:
    config = composed(f"+experiment={name}", *(GIVEN if name.startswith("photos") else []))
    assert config.experiment == name, "an experiment names its folder of runs"
    assert ("select" in config.callbacks) == (config.backbone.name == "toyland"), (
        "Toyland's scorer judges Toyland alone"
    )
    checked(method_class(config.method["name"]).Options, config.method, "method")
    check_keywords(config.trainer)


@pytest.mark.parametrize("turn", range(max(map(len, GROUPS.values()))))
def test_every_option_of_every_group_composes(turn: int) -> None:
    config = composed(*(f"{group}={options[turn % len(options)]}" for group, options in GROUPS.items()), *GIVEN)
    checked(method_class(config.method["name"]).Options, config.method, "method")
    check_keywords(config.trainer)


def test_experiments_can_be_changed_on_the_command_line() -> None:
    config = composed("+experiment=cat_oneshot", "backbone=sd15", "method=perfusion", "method.steps=7", "seed=3")
    assert config.backbone.name == "stable_diffusion" and config.method["steps"] == 7 and config.seed == 3
    assert composed("+experiment=cat_fewshot").concept.toyland.count == 5
    assert (
        composed("+experiment=cat_oneshot")
        == composed("experiment=cat_oneshot")
        == dataclasses.replace(composed(), experiment="cat_oneshot")
    )


def test_every_run_has_checkpoints_and_options_say_what_they_add() -> None:
    none, select = composed("callbacks=none"), composed("callbacks=select", "callbacks.checkpoint.every=7")
    assert [*none.callbacks] == ["checkpoint"] and {*select.callbacks} == {"checkpoint", "select"}
    assert (none.callbacks["checkpoint"]["every"], select.callbacks["checkpoint"]["every"]) == (50, 7)


@pytest.mark.parametrize(
    "value",
    ["<cat*>", "<a*> ", "it's", 'say "x"', "a\\", 'b\\"c', "photos(1)/*.jpg", "~/p#1/x=y.png", "ünï;", "a: b", "<", ""],
)
def test_values_need_no_quotes_but_the_shells(value: str) -> None:
    override = OverridesParser.create().parse_override(prepared(f"concept.placeholder={value}"))
    assert (override.key_or_group, override.value()) == ("concept.placeholder", value)


def test_a_placeholder_with_angle_brackets_reaches_the_config() -> None:
    assert composed("concept.placeholder=<my cat*>").concept.placeholder == "<my cat*>"


def test_values_that_hydra_reads_keep_their_meaning() -> None:
    assert composed("concept.images=[a.jpg,b c.jpg]").concept.images == ["a.jpg", "b c.jpg"]
    assert composed("concept.placeholder='<x*>'").concept.placeholder == "<x*>"
    assert composed("trainer.gradient_clip_val=1e-3").trainer["gradient_clip_val"] == 1e-3
    assert composed("backbone.path=null").backbone.path is None
    assert prepared("--multirun") == "--multirun"
    assert prepared("hydra.verbose=true") == "hydra.verbose=true"
    assert prepared("hydra/launcher=joblib") == "hydra/launcher=joblib"


def test_a_key_that_no_preset_names_can_be_set() -> None:
    assert composed("backbone.covariance.cache=/c").backbone.covariance.cache == "/c"
    assert composed("+backbone.covariance.cache=/c").backbone.covariance.cache == "/c"


def test_composing_writes_nothing_and_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    composed("+experiment=cat_oneshot")
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir())


def test_user_errors_are_one_line_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(argv: object) -> None:
        raise ConfigError("concept.name: missing")

    def breaks(argv: object) -> None:
        raise ValueError("a bug")

    def stops(argv: object) -> None:
        raise KeyboardInterrupt("stopped at step 3")

    def full(argv: object) -> None:
        raise OSError(28, "No space left on device", "/runs/x")

    assert run_cli(fails, []) == 2
    assert capsys.readouterr().err == "error: concept.name: missing\n"
    assert run_cli(stops, []) == 130
    assert capsys.readouterr().err == "stopped at step 3\n"
    assert run_cli(full, []) == 2
    assert run_cli(lambda argv: None, []) == 0
    with pytest.raises(ValueError, match="a bug"):
        run_cli(breaks, [])


def test_a_superclass_that_keeps_another_one_s_word_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+experiment=cat_oneshot", "concept.superclass=dog"]
    for more, said in (([], True), (["concept.placeholder=<dog*>"], False)):
        composition.run([*words, *more], lambda config: None)
        assert ("note: concept.placeholder stays <cat*> for a dog" in capsys.readouterr().err) == said
