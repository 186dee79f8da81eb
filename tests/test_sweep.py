"""Sweeps: each job for itself, nothing done twice, nothing lost; with every launcher that is installed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from perfusion import sweep as command
from perfusion.cli import run_cli
from perfusion.config import ConfigError
from perfusion.training import sweep
from perfusion.training.composition import Multirun, multirun
from perfusion.training.devices import lease, visible_gpus
from perfusion.training.job import run_apart
from perfusion.training.run_folder import RunFolder, read_config
from tests.pipelines import tiny_pipeline_folder

ROOT = Path(__file__).resolve().parents[1]
STUB = [sys.executable, str(ROOT / "tests" / "training_stub.py")]
OTHERS = ("textual_inversion", "dreambooth", "custom_diffusion", "lora")
NAMES = "concept.name=whole,broken,killed,mistaken"
RATE = "method.value_rate=0.03"  # which the score of the stub follows from


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # for workers of launchers
    return tmp_path


def run(*words: str) -> int:
    return run_cli(lambda argv: sweep.run(argv, STUB), ["-m", *words])


def folder_of(name: str) -> RunFolder:
    (path,) = Path("runs/default").glob(f"{name}-*")
    return RunFolder(path)


def attempts(name: str) -> int:
    return len((folder_of(name).path / "attempts").read_text())


def combined(*words: str) -> Multirun:
    jobs = multirun(words)
    assert jobs is not None
    return jobs


def test_a_sweep_is_the_product_of_what_varies() -> None:
    jobs = combined("seed=0,1", "method.steps=5,7", "concept.placeholder=<x*>")
    found = [(c.seed, c.method["steps"], c.concept.placeholder) for c in jobs.configs]
    assert found == [(0, 5, "<x*>"), (0, 7, "<x*>"), (1, 5, "<x*>"), (1, 7, "<x*>")]
    assert jobs.varied(2) == ["seed=1", "method.steps=5"] and jobs.launcher == "BasicLauncher"
    assert not list(Path().iterdir()), "composing writes nothing"


def test_presets_can_sweep_and_the_command_line_goes_before_them() -> None:
    found = [(c.method["key_lock"], c.seed) for c in combined("+experiment=key_lock_sweep").configs]
    assert found == [(lock, seed) for lock in ("local", "none") for seed in (0, 1)]
    jobs = combined("+experiment=key_lock_sweep", "method.key_lock=global", "seed=3")
    assert [(c.method["key_lock"], c.seed) for c in jobs.configs] == [("global", 3)]


def test_methods_and_toys_can_be_swept() -> None:
    jobs = combined("+experiment=pareto")
    found = {(c.method["name"], c.concept.toyland and c.concept.toyland.instance, c.seed) for c in jobs.configs}
    assert len(found) == len(jobs.configs) == 30
    assert {name for name, _, _ in found} == {"perfusion", *OTHERS}
    jobs = combined("+experiment=pareto", "method=perfusion_toyland,lora_toyland", "seed=0")
    assert len({RunFolder.of(config).path for config in jobs.configs}) == 6


def crashes(launcher: Sequence[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Four jobs, three of which end badly; then the same command again."""
    assert run(NAMES, RATE, *launcher) == 1
    shown = capfd.readouterr().out
    assert "1 done, 0 skipped, 3 failed, 0 open" in shown
    assert "job 1: RuntimeError: the loss went up" in shown
    assert "job 2: killed by SIGKILL" in shown
    assert "job 3: concept.images: none there" in shown
    (row,) = [line for line in shown.splitlines() if line.lstrip().startswith("0  done")]
    assert row.split()[2:5] == ["12", "0.9996", "0.5000"], row
    assert row.endswith("concept.name=whole") and str(folder_of("whole").path) in row
    assert folder_of("broken").error.read_text().startswith("RuntimeError: the loss went up\n")
    assert "Traceback" in folder_of("broken").log.read_text() and not folder_of("whole").error.exists()
    assert [attempts(name) for name in ("whole", "broken", "killed", "mistaken")] == [1, 1, 1, 1]

    Path("mended").touch()
    assert run(NAMES, RATE, *launcher) == 0
    shown = capfd.readouterr().out
    assert "3 done, 1 skipped, 0 failed, 0 open" in shown and "1 of them done before" in shown
    assert [attempts(name) for name in ("whole", "broken", "killed", "mistaken")] == [1, 2, 2, 2]
    assert not list(Path("runs").rglob("ERROR"))

    assert run(NAMES, RATE, *launcher) == 0
    assert "0 done, 4 skipped, 0 failed, 0 open" in capfd.readouterr().out and attempts("whole") == 1


def test_a_finished_job_that_has_read_other_files_is_named_before_the_first(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(here / "photos" / "a.png")
    words = ["concept=photos", "concept.images=photos", "concept.superclass=cat", "concept.name=whole", RATE]
    assert run(*words, "seed=0") == 0
    folder = folder_of("whole")
    read = {"directory": str(here), "files": {"concept.images": {"a.png": "of what lay there then"}}}
    folder.inputs.write_text(json.dumps(read))
    assert run(*words, "seed=0,1") == 2
    said = f"{folder.path} holds a run that has read other files (concept.images: a.png is another"
    assert said in capfd.readouterr().err
    assert len(list(Path("runs").rglob("attempts"))) == 1


def test_a_crash_costs_its_own_job_alone(capfd: pytest.CaptureFixture[str]) -> None:
    crashes([], capfd)


def test_a_run_that_could_not_be_replaced_is_done_once_nobody_wants_to(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("concept.name=whole", "seed=0") == 0
    folder_of("whole").error.write_text("no GPU\n")
    capfd.readouterr()
    assert run("concept.name=whole", "seed=0") == 0
    assert "0 failed" in capfd.readouterr().out and attempts("whole") == 1 and not folder_of("whole").error.exists()


def test_a_folder_of_photos_is_no_place_for_a_job(capfd: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    Path("photos/a.jpg").touch()
    assert run("run.dir=photos") == 2
    assert "photos is no run's folder" in capfd.readouterr().err and os.listdir("photos") == ["a.jpg"]
    config = Path("config.yaml")
    config.write_text(OmegaConf.to_yaml(asdict(combined("run.dir=photos").configs[0])))
    with pytest.raises(ConfigError, match="photos is no run's folder"):
        run_apart(config, STUB)
    assert os.listdir("photos") == ["a.jpg"]


HALVING = """
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

ConfigStore.instance().store("halving", {"_target_": "hydra_plugins.halving.Halving"}, group="hydra/sweeper")


class Halving(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        rate, scores = 0.04, [0.0]
        for number in range(9):
            (job,) = self.launcher.launch([[*arguments, f"method.value_rate={rate}"]], initial_job_idx=number)
            scores.append(job.return_value)
            if scores[-1] < scores[-2]:
                break
            rate /= 2
        print("scores", *(f"{score:.5f}" for score in scores[1:]))
"""


def test_a_sweeper_that_chooses_its_jobs_is_told_their_scores(tmp_path: Path) -> None:
    """As in any program of Hydra's: `hydra/sweeper=` names a plugin, which need not know its jobs beforehand."""
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "halving.py").write_text(HALVING)
    words = ["-m", "hydra/sweeper=halving", "concept.name=whole", "concept.placeholder=<x*>"]
    code = f"import sys\nfrom perfusion.training import sweep\nsys.exit(sweep.run({words!r}, {STUB!r}))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    for again in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr
        assert "scores 0.99910 0.99990 1.00000 0.99997" in done.stdout
        assert done.stdout.count("training seed 0") == (0 if again else 4), "what is done is not done again"
    assert len(list(Path("runs/default").glob("whole-*/DONE"))) == 4


LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.launcher.timeout_min=5"],
    "ray": ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.init.include_dashboard=false"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LAUNCHERS))
def test_every_launcher_runs_four_jobs(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec(name.partition("_")[0]) is None:
        pytest.skip(f"needs the extra {name}")
    try:
        crashes([f"hydra/launcher={name}", *LAUNCHERS[name]], capfd)
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()  # else its servers live as long as the tests


def test_run_overwrite_trains_again(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("seed=0,1", "concept.name=whole") == 0
    assert run("seed=0,1", "concept.name=whole", "run.overwrite=true") == 0
    shown = capfd.readouterr().out
    assert shown.count("2 done, 0 skipped") == 2 and "training seed 1" in shown
    assert all(path.read_text() == "xx" for path in Path("runs").rglob("attempts"))


def begun(code: str) -> subprocess.Popen[str]:
    """A process whose sweep has come to a job that waits."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(Path("runs").glob("default/slow-*/attempts")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_a_sweep_killed_at_random_loses_nothing_and_repeats_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """The job that outlives the sweep ends by itself, and the same sweep waits for it."""
    words = ["-m", "concept.name=whole,slow", "seed=0,1"]
    code = f"from perfusion.training import sweep; sweep.run({words!r}, {STUB!r})"
    killed = begun(code)
    killed.kill()
    killed.communicate()
    (file,) = Path("runs/.sweep").rglob("sweep.json")
    results = [sweep.result_of(job) for job in sweep.read(file.parent).jobs]
    assert [result.state for result in results] == ["done", "done", "open", "open"]
    assert json.loads(file.read_text())["words"] == words[1:]

    again = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert again.stdout is not None
    for line in again.stdout:
        if "another process is training this" in line:
            Path("go").touch()
            break
    rest = again.communicate(timeout=60)[0]
    assert again.returncode == 0 and "2 done, 2 skipped, 0 failed, 0 open" in rest
    assert [path.read_text() for path in Path("runs").rglob("attempts")] == ["x"] * 4


def test_a_stopped_sweep_stops_its_job_and_says_how_to_go_on() -> None:
    code = (
        "import signal, sys\nfrom perfusion.cli import run_cli\nfrom perfusion.training import sweep\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.exit(run_cli(lambda argv: sweep.run(argv, {STUB!r}), ['-m', 'concept.name=slow', 'seed=0,1']))"
    )
    stopped = begun(code)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130 and "the same command goes on" in err
    assert "0 done, 0 skipped, 0 failed, 2 open" in out


def test_the_list_of_jobs_is_refused_if_it_is_none(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"jobs": [{"x": 1}]}')
    with pytest.raises(ConfigError, match="expected the list of a sweep's jobs"):
        sweep.read(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere: found no such file, expected the sweep\.json"):
        sweep.read(tmp_path / "nowhere")


def test_the_table_of_a_sweep_can_be_had_without_running_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("concept.name=whole,broken") == 1
    (file,) = Path("runs/.sweep").rglob("sweep.json")
    table = capfd.readouterr().out.rpartition("job  state")[2]
    assert run_cli(command.main, [str(file.parent)]) == 1
    assert capfd.readouterr().out.rpartition("job  state")[2] == table and "RuntimeError" in table
    assert run_cli(command.main, ["nowhere"]) == 2


@pytest.mark.slow
def test_the_command_trains_a_sweep(tmp_path: Path) -> None:
    """The whole way, with the trainings that the stub stands for: one job breaks, and one is trained."""
    words = (
        f"backbone=sd15 backbone.path={tiny_pipeline_folder(tmp_path)} backbone.device=cpu backbone.resolution=64 "
        f"backbone.steps=1 backbone.covariance.count=50 backbone.covariance.cache={tmp_path / 'covariance'} "
        "method=perfusion method.steps=2 method.batch_size=2 method.value_rate=0.01,1e30 callbacks=none"
    )
    done = subprocess.run(
        [sys.executable, "-m", "perfusion.train", "-m", *words.split()], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 1, done.stderr
    assert "1 done, 0 skipped, 1 failed, 0 open" in done.stdout and "Training: 100%" in done.stdout
    assert "job 1: step 2: the loss is not finite" in done.stdout and "Traceback" not in done.stderr
    (finished,) = Path("runs/default").glob("*/DONE")
    assert (finished.parent / "concept.safetensors").exists()


# --- GPUs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "seen"), [("0,1", ["0", "1"]), ("GPU-a1", ["GPU-a1"]), ("", []), ("2,-1,3", ["2"])])
def test_the_gpus_that_cuda_would_see(given: str, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == seen


def config_file(*words: str) -> Path:
    return Path(sweep.plan(combined(*words), words).jobs[0].config)


def test_jobs_take_turns_at_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    one = read_config(config_file("seed=0"))
    two = read_config(config_file("trainer.devices=2"))
    named = read_config(config_file("backbone.device=cuda:1"))
    with lease(one) as (first, held), lease(one) as (second, _):
        assert (first, second) == ({"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "7"}) and len(held) == 1
        assert {path.name for path in tmp_path.rglob("12-*")} == {"12-4", "12-7"}
    with lease(two) as (both, held):
        assert both == {"CUDA_VISIBLE_DEVICES": "4,7"} and len(held) == 2
    with lease(named) as (environment, held):
        assert environment == {} and len(held) == 1
        with lease(one) as (other, _):
            assert other == {"CUDA_VISIBLE_DEVICES": "4"}, "the one that nobody named"
    for words in (["backbone.device=cpu"], ["trainer.devices=3"], ["backbone.device=cuda:2"]):
        with lease(read_config(config_file(*words))) as (environment, held):
            assert (environment, held) == ({}, [])


def test_a_job_waits_for_a_gpu_and_is_told_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with lease(read_config(config_file("seed=0"))):
        waiting: list[float] = []

        def sleep(seconds: float) -> None:
            waiting.append(seconds)
            if len(waiting) == 2:
                raise TimeoutError

        monkeypatch.setattr("perfusion.training.devices.time.sleep", sleep)
        with pytest.raises(TimeoutError):
            run_apart(config_file("seed=0"), STUB, show=False)
    folder = run_apart(config_file("seed=0"), STUB, show=False)
    assert folder.finished and "GPU 5" in folder.log.read_text()
