"""Several processes: they compute what one process computes on the whole batch, and stop and resume together."""

from __future__ import annotations

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import processes_worker
import pytest
import torch

from rtmdet_geo.config import load_recipe, parse_recipe
from rtmdet_geo.errors import ConfigError
from rtmdet_geo.models import get_model
from rtmdet_geo.models.classifier import get_classifier
from rtmdet_geo.training.loop import train_model
from rtmdet_geo.training.processes import Processes, join_processes

WORKER = Path(processes_worker.__file__)


def torchrun(number, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number), "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def gradients(recipe, folder, number, positions=""):
    """What ``processes_worker`` saves, of each of so many processes; one is this one."""
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    if number == 1:
        processes_worker.main(str(path), str(folder), positions)
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        together = {**os.environ, "WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        command = [sys.executable, str(WORKER), str(path), str(folder), positions]
        started = [
            subprocess.Popen(command, env={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(number)
        ]
        assert [process.wait(timeout=120) for process in started] == [0] * number
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(number)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtmdet_r_test", "rtmdet_ins_test"])
def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(recipe_values, tmp_path, name):
    recipe_values["model"]["name"] = name
    recipe_values["optim"] |= {"norm_eval": True, "batch_size": 4}
    whole = gradients(parse_recipe(recipe_values), tmp_path / "one", 1)[0]
    recipe_values["optim"]["batch_size"] = 2
    first, second = gradients(parse_recipe(recipe_values), tmp_path / "two", 2)
    assert any(bool((gradient != 0).any()) for gradient in whole["gradients"].values())
    for key, wanted in whole["gradients"].items():
        assert torch.equal(first["gradients"][key], second["gradients"][key]), key
        torch.testing.assert_close(first["gradients"][key], wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    for term, value in whole["losses"].items():  # the parts differ, their mean is the whole
        assert float(first["losses"][term]) != pytest.approx(float(second["losses"][term]), rel=1e-3)
        mean = (first["losses"][term] + second["losses"][term]) / 2
        assert float(mean) == pytest.approx(float(value), rel=1e-4)


@pytest.mark.slow
def test_parts_of_a_batch_add_up(recipe_values, tmp_path):
    """Accumulation in two processes: the mean of the gradients of both parts of both."""
    recipe_values["optim"] |= {"norm_eval": True, "batch_size": 2, "accumulate": 2}
    both = gradients(parse_recipe(recipe_values), tmp_path / "two", 2)
    # the first parts of both hold samples 0, 1 and 4, 5, the second 2, 3 and 6, 7; one process takes part after part
    recipe_values["optim"] |= {"batch_size": 4, "accumulate": 2}
    whole = gradients(parse_recipe(recipe_values), tmp_path / "one", 1, positions="0,1,4,5,2,3,6,7")[0]
    for key, wanted in whole["gradients"].items():
        assert torch.equal(both[0]["gradients"][key], both[1]["gradients"][key]), key
        difference = (both[0]["gradients"][key] - wanted).abs().max()
        assert float(difference) <= 1e-4 * float(wanted.abs().max()) + 1e-12, key


@pytest.mark.parametrize("name", ["rtmdet_r_test", "rtmdet_ins_test", "cspnext_test"])
def test_norms_over_all_processes_keep_names_and_sharing(name):
    build = get_classifier if name.startswith("cspnext") else get_model
    network = build(name, num_classes=2)
    before = {key: value.data_ptr() for key, value in network.state_dict().items()}
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert {key: value.data_ptr() for key, value in converted.state_dict().items()} == before
    assert not any(type(module) is torch.nn.BatchNorm2d for module in converted.modules())


@pytest.mark.slow
def test_processes_stop_together_and_resume_as_one_unbroken_run(recipe_values, tmp_path):
    recipe_values["optim"] |= {"iterations": 150, "batch_size": 1}
    recipe_values["loop"] |= {"mine_interval": 40, "checkpoint_interval": 1000}
    recipe_values["validation"]["interval"] = 60
    path = tmp_path / "recipe.yaml"
    path.write_text(parse_recipe(recipe_values).to_yaml(), encoding="utf-8")
    train = ["-m", "rtmdet_geo.cli", "train", path, "--progress", "none", "--device", "cpu", "-o"]
    whole = torchrun(2, *train, tmp_path / "whole")
    _, errors = whole.communicate(timeout=200)
    assert whole.returncode == 0, errors
    assert len(rows(tmp_path / "whole")) == 150

    broken = torchrun(2, *train, tmp_path / "broken")
    deadline = time.monotonic() + 100
    log = tmp_path / "broken" / "log.csv"
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 4):
        time.sleep(0.05)
    broken.send_signal(signal.SIGTERM)
    _, errors = broken.communicate(timeout=100)
    assert (tmp_path / "broken" / "last.pt").exists(), errors
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    with pytest.raises(ConfigError, match="2 processes, not 1"):
        train_model(load_recipe(path), tmp_path / "broken", resume=True, device="cpu")
    again = torchrun(2, *train, tmp_path / "broken", "--resume")
    _, errors = again.communicate(timeout=200)
    assert again.returncode == 0, errors
    assert rows(tmp_path / "whole") == rows(tmp_path / "broken")
    assert (tmp_path / "whole" / "history.csv").read_text() == (tmp_path / "broken" / "history.csv").read_text()


def rows(run):
    with (run / "log.csv").open() as stream:
        return [(row["iteration"], row["loss"], row["grad_norm"]) for row in csv.DictReader(stream)]


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_processes("cpu") as processes:
        assert (processes.rank, processes.world, processes.is_first) == (0, 1, True)
        assert processes.gather("x") == ["x"]
        assert torch.equal(processes.mean(torch.ones(2)), torch.ones(2))


def test_one_gpu_is_not_enough_for_two(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="'cuda:1' is one GPU, but 2 processes"), join_processes("cuda:1"):
        pass


def test_gathering_keeps_the_order_of_ranks():
    assert Processes(torch.device("cpu")).gather([3]) == [[3]]
