"""What the command line and conf/ give: checked configs, or mistakes that read well."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from perfusion.cli import run_cli
from perfusion.config import CONF, ConfigError, TrainConfig, checked, conf_folder
from perfusion.methods.base import method_class
from perfusion.training import composition
from perfusion.training.composition import prepared
from perfusion.training.trainer import check_keywords

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
GROUPS = {
    group: sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    for group in ("backbone", "method", "concept", "trainer", "logger", "callbacks")
}
GIVEN = ["concept.images=x", "concept.superclass=cat"]  # what photos cannot do without


def compose(*argv: str) -> TrainConfig:
    configs: list[TrainConfig] = []
    composition.run(argv, configs.append)
    (config,) = configs
    return config


def mistake(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(*argv)
    return str(caught.value)


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
    config = compose(f"+experiment={name}", *(GIVEN if name.startswith("photos") else []))
    assert config.experiment == name, "an experiment names its folder of runs"
    assert ("select" in config.callbacks) == (config.backbone.name == "toyland"), (
        "Toyland's scorer judges Toyland alone"
    )
    checked(method_class(config.method["name"]).Options, config.method, "method")
    check_keywords(config.trainer)


@pytest.mark.parametrize("turn", range(max(map(len, GROUPS.values()))))
def test_every_option_of_every_group_composes(turn: int) -> None:
    config = compose(*(f"{group}={options[turn % len(options)]}" for group, options in GROUPS.items()), *GIVEN)
    checked(method_class(config.method["name"]).Options, config.method, "method")
    check_keywords(config.trainer)


def test_experiments_can_be_changed_on_the_command_line() -> None:
    config = compose("+experiment=cat_oneshot", "backbone=sd15", "method=perfusion", "method.steps=7", "seed=3")
    assert config.backbone.name == "stable_diffusion" and config.method["steps"] == 7 and config.seed == 3
    assert compose("+experiment=cat_fewshot").concept.toyland.count == 5
    assert (
        compose("+experiment=cat_oneshot")
        == compose("experiment=cat_oneshot")
        == dataclasses.replace(compose(), experiment="cat_oneshot")
    )


def test_every_run_has_checkpoints_and_options_say_what_they_add() -> None:
    none, select = compose("callbacks=none"), compose("callbacks=select", "callbacks.checkpoint.every=7")
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
    assert compose("concept.placeholder=<my cat*>").concept.placeholder == "<my cat*>"


def test_values_that_hydra_reads_keep_their_meaning() -> None:
    assert compose("concept.images=[a.jpg,b c.jpg]").concept.images == ["a.jpg", "b c.jpg"]
    assert compose("concept.placeholder='<x*>'").concept.placeholder == "<x*>"
    assert compose("trainer.gradient_clip_val=1e-3").trainer["gradient_clip_val"] == 1e-3
    assert compose("backbone.path=null").backbone.path is None
    assert prepared("--multirun") == "--multirun"
    assert prepared("hydra.verbose=true") == "hydra.verbose=true"
    assert prepared("hydra/launcher=joblib") == "hydra/launcher=joblib"


def test_a_key_that_no_preset_names_can_be_set() -> None:
    assert compose("backbone.covariance.cache=/c").backbone.covariance.cache == "/c"
    assert compose("+backbone.covariance.cache=/c").backbone.covariance.cache == "/c"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["concept.nmae=x"], ["concept.nmae", "unknown key", "'name'", "superclass"]),
        (["+concept.nmae=x"], ["concept.nmae", "'name'"]),
        (["++concept.toyland.cuont=2"], ["concept.toyland.cuont", "'count'"]),
        (["sed=1"], ["sed", "'seed'"]),
        (["+sed=1"], ["sed", "'seed'"]),
        (["bckbone=sd15"], ["bckbone", "'backbone'"]),
        (["backbone=sd_15"], ["backbone=sd_15", "'sd15'", "toyland"]),
        (["+experiment=cat_onshot"], ["experiment=cat_onshot", "'cat_oneshot'"]),
        (["experiment=cat_onshot"], ["experiment=cat_onshot", "'cat_oneshot'"]),
        (["seed=abc"], ["seed", "abc"]),
        (["concept.toyland.count=many"], ["concept.toyland.count", "many"]),
        (["concept.images=a.jpg,b.jpg"], ["concept.images=a.jpg,b.jpg", "[a,b]"]),
        (["seed=1,2"], ["seed=1,2", "-m"]),
        (["concept=photos"], ["concept.", "not given"]),
        (["seed"], ["seed", "key=value"]),
        (["concept.images=[a"], ["concept.images=[a", "cannot be read"]),
        (["concept.name=${nowhere}"], ["nowhere"]),
    ],
)
def test_mistakes_are_short_and_name_the_key(argv: list[str], parts: list[str]) -> None:
    message = mistake(*argv)
    for part in parts:
        assert part in message
    assert "\n" not in message and "++" not in message and "Hydra" not in message, message


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_an_unknown_option_of_the_method_is_an_error(sign: str) -> None:
    config = compose(f"{sign}method.stpes=1")
    with pytest.raises(ConfigError, match=r"method\.stpes: unknown key.*'steps'"):
        checked(method_class(config.method["name"]).Options, config.method, "method")


def test_trainer_keywords_are_lightnings() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.acelerator.*'accelerator'"):
        check_keywords({"acelerator": "cpu"})
    with pytest.raises(ConfigError, match=r"trainer\.max_steps: set method\.steps"):
        check_keywords({"max_steps": 3})
    with pytest.raises(ConfigError, match=r"trainer\.precision=bf16-true: expected 32-true, 16-mixed or bf16-mixed"):
        check_keywords({"precision": "bf16-true"})


def test_composing_writes_nothing_and_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose("+experiment=cat_oneshot")
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", [["from=no/such.yaml"], ["from=list.yaml"], ["from=good.yaml", "backbone=sd15"]])
def test_a_former_config_that_cannot_be_used_is_an_error(
    word: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- 1\n")
    Path("good.yaml").write_text("seed: 1\n")
    assert mistake(*word).startswith(word[0] if len(word) == 1 else word[1])


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
