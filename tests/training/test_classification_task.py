"""A classifier learns colours, its weights classify and export; losses and validation by hand."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, field

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from rtmdet_geo.backends.classify import open_classifier
from rtmdet_geo.classify import classify_file
from rtmdet_geo.config import parse_recipe
from rtmdet_geo.errors import AnnotationError, DatasetNotFoundError, WeightsError
from rtmdet_geo.models.weights import save_weights
from rtmdet_geo.structures import StretchSpec
from rtmdet_geo.training.class_sampler import ClassSample
from rtmdet_geo.training.classification import ClassificationTask
from rtmdet_geo.training.lamb import Lamb
from rtmdet_geo.training.processes import Processes
from rtmdet_geo.training.schedule import param_groups, scheduled_rate

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Noisy images of three colours, 16 each to train, 8 each to validate, 48 x 40 px."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, number in (("train", 16), ("val", 8)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                image = np.clip(rng.normal(colour, 25, (40, 48, 3)), 0, 255).astype(np.uint8)
                assert cv2.imwrite(str(folder / f"{index}.png"), image[..., ::-1])
    return root


def recipe_of(root, *, data=None, augment=None, optim=None, model=None, loop=None):
    return parse_recipe(
        {
            "name": "colours",
            "model": {
                "name": "cspnext_test",
                "classes": list(COLOURS),
                "stretch": {"kind": "none"},
                **(model or {}),
            },
            "data": {
                "format": "folders", "root": str(root), "train_images": "train", "val_images": "val", **(data or {})
            },
            "augment": {
                "sampling": "classification", "image_size": 32, "eval_size": 36, "crop_area_min": 0.5,
                "randaugment_num": 0, **(augment or {}),
            },
            "optim": {
                "optimizer": "lamb", "schedule": "cosine", "epochs": 10, "batch_size": 12, "lr": 0.03,
                "warmup_epochs": 1, "weight_decay": 0.01, **(optim or {}),
            },
            "loop": {"workers": 2, **(loop or {})},
        }
    )  # fmt: skip


def task_of(recipe, **options):
    torch.manual_seed(0)
    return ClassificationTask(recipe, **({"processes": Processes(CPU), "load_weights": True} | options))


def train(task, iterations):
    """Take steps as the loop does; returns the losses."""
    optim, losses = task.recipe.optim, []
    optimizer = Lamb(param_groups(task.network, optim.weight_decay), lr=optim.lr)
    for iteration in range(iterations):
        rate = scheduled_rate(
            optim, iteration, total_iterations=iterations, iterations_per_epoch=task.epoch, base_lr=optim.lr
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        samples = [task.sampler.draw(iteration, position) for position in range(optim.batch_size)]
        images, targets = task.batch(samples, CPU)
        loss = sum(task.losses(task.network(images), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def trained(colours):
    """A task after 40 steps with everything but RandAugment."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = recipe_of(colours, augment={"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "repeats": 3})
    task = task_of(recipe)
    assert (task.epoch, task.iterations) == (4, 40)
    losses = train(task, task.iterations)
    torch.set_num_threads(threads)
    task.network.eval()
    return task, losses


def test_colours_are_learnt(trained):
    task, losses = trained
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    seen = []
    validation = task.validate(task.network, Processes(CPU), lambda done, total: seen.append((done, total)))
    assert list(validation.figures) == ["top1", "top5"] and validation.figures["top1"] > 0.9
    assert validation.figures["top5"] == 1 and validation.num_images == 24 and validation.curves == []
    assert [(row["class"], row["num_images"]) for row in validation.rows] == [(name, 8) for name in COLOURS]
    assert seen == [(12, 24), (24, 24)]
    # Negative control: an untrained network does not know them.
    fresh = task_of(task.recipe)
    assert fresh.validate(fresh.network.eval(), Processes(CPU)).figures["top1"] < 0.9


def test_trained_weights_classify_as_they_were_validated(trained, colours, tmp_path):
    task, _ = trained
    validation = task.validate(task.network, Processes(CPU))
    spec = task.spec(validation)
    assert (spec.kind, spec.tile_size, spec.overlap, spec.score_threshold) == ("classification", 32, 0, 0)
    assert spec.classes == tuple(COLOURS) and spec.stretch == StretchSpec(kind="none")
    assert spec.metrics["top1"] == round(validation.figures["top1"], 4)
    weights = tmp_path / "model.safetensors"
    save_weights(task.network, weights, spec, half=False)
    classifier = open_classifier(weights)
    right = [
        classify_file(classifier, path, top_k=1).class_names[0] == path.parent.name
        for path in sorted((colours / "val").rglob("*.png"))
    ]
    assert np.mean(right) > 0.9


def test_trained_weights_export(trained, colours, tmp_path):
    pytest.importorskip("onnx")
    from rtmdet_geo.export import export_model

    task, _ = trained
    model = tmp_path / "colours.onnx"
    assert export_model(task.network, model, spec=task.spec(None)).tile_size == 32
    found = classify_file(open_classifier(model), next((colours / "val" / "green").glob("*.png")), top_k=3)
    assert found.class_names[0] == "green" and sum(found.scores) == pytest.approx(1, abs=1e-4)


# --- batches and losses


def test_a_batch_is_normalised_and_one_hot(colours):
    task = task_of(recipe_of(colours, model={"mean": [100, 110, 120], "std": [10, 20, 40]}))
    image = np.full((3, 32, 32), 130, np.uint8)
    samples = [ClassSample(image, ("a",), 2, 0), ClassSample(image, ("b",), 0, 1)]
    images, targets = task.batch(samples, CPU)
    assert images.dtype == torch.float32 and images.shape == (2, 3, 32, 32)
    assert images[0, :, 3, 3].tolist() == pytest.approx([3, 1, 0.25])
    assert targets.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_batches_are_mixed_by_their_samples_alone(colours):
    recipe = recipe_of(colours, augment={"mixup_alpha": 1.0, "cutmix_alpha": 1.0})
    one, two = task_of(recipe), task_of(recipe)
    for iteration in (0, 3):
        samples = [one.sampler.draw(iteration, position) for position in range(6)]
        images, targets = one.batch(samples, CPU)
        again, same = two.batch(samples, CPU)
        assert torch.equal(images, again) and torch.equal(targets, same)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
        assert ((targets > 0) & (targets < 1)).any()
    other, _ = one.batch(samples[::-1], CPU)
    assert not torch.equal(other.flip(0), images)  # another first sample, other partners


def test_losses_by_hand(colours):
    """Smoothing .3 of 3 classes: shares (.75, .25, 0) become (.625, .275, .1)."""
    logits, targets = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.75, 0.25, 0.0]])
    logs = torch.log_softmax(logits, dim=1)[0].tolist()
    for smoothing, shares in ((0.0, (0.75, 0.25, 0.0)), (0.3, (0.625, 0.275, 0.1))):
        task = task_of(recipe_of(colours, augment={"label_smoothing": smoothing}))
        losses = task.losses(logits, targets)
        expected = -sum(share * log for share, log in zip(shares, logs, strict=True))
        assert list(losses) == ["loss_cls"] and losses["loss_cls"].item() == pytest.approx(expected)


# --- validation


class Constant(nn.Module):
    """Answers with the mean colour of the image: the brightest channel is its class."""

    def forward(self, images):
        return images.mean(dim=(2, 3))


@dataclass(frozen=True)
class Shared(Processes):
    """One process of several that run one after another: it gathers what those before it and itself have."""

    parts: list = field(default_factory=list)

    def gather(self, item):
        self.parts.append(item)
        return self.parts


def test_processes_share_the_images(colours):
    task = task_of(recipe_of(colours))
    whole = task.validate(Constant(), Processes(CPU))
    assert whole.figures["top1"] == 1
    parts = []
    for rank in range(2):
        together = task.validate(Constant(), Shared(CPU, rank, 2, parts))
    assert [len(ranks) for ranks, *_ in parts] == [12, 12] and together.num_images == 24
    assert together.figures == whole.figures and together.rows == whole.rows


def test_an_image_that_does_not_decode_stops_every_process(colours, tmp_path):
    """The process that meets it and one that does not: both come to the gather, then both raise."""
    for name in COLOURS:
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_bytes((colours / "val" / name / "0.png").read_bytes())
    (tmp_path / "val" / "blue" / "0.png").write_bytes(b"no image")  # the first of three; process 1 has the second
    task, parts = task_of(recipe_of(tmp_path, data={"train_images": "val"})), []
    for rank in range(2):
        with pytest.raises(AnnotationError, match=r"blue.0\.png"):
            task.validate(Constant(), Shared(CPU, rank, 2, parts))
    assert [len(ranks) for ranks, *_ in parts] == [0, 1]
    assert pickle.loads(pickle.dumps(parts[0]))[-1].args == parts[0][-1].args  # it can be sent


def test_bad_images_of_a_validation_are_named_and_left_out(colours, tmp_path):
    for name in COLOURS:
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_bytes((colours / "val" / name / "0.png").read_bytes())
    (tmp_path / "val" / "red" / "1.png").write_bytes(b"no image")
    data = {"train_images": "val"}
    stops = task_of(recipe_of(tmp_path, data=data))
    with pytest.raises(AnnotationError, match=r"1\.png"):
        stops.validate(Constant(), Processes(CPU))
    for workers in (0, 2):
        skips = task_of(recipe_of(tmp_path, data=data | {"on_bad_image": "skip"}, loop={"workers": workers}))
        validation = skips.validate(Constant(), Processes(CPU))
        assert validation.left_out == ("red/1.png",) and validation.num_images == 3
    for name in COLOURS:
        (tmp_path / "val" / name / "0.png").write_bytes(b"no image")
    assert skips.validate(Constant(), Processes(CPU)).num_images == 3  # decoded before, and kept
    nothing = task_of(skips.recipe).validate(Constant(), Processes(CPU))
    assert nothing.num_images == 0 and math.isnan(nothing.figures["top1"])


# --- what a task is


def test_a_task_says_what_it_learns_from(colours):
    task = task_of(recipe_of(colours))
    assert task.counts() == {"images": 48, "left-out images": 24} and task.can_validate
    assert task.look_again(task.network, 5, Processes(CPU)) is None
    blind = task_of(recipe_of(colours, data={"val_images": None}))
    assert not blind.can_validate and blind.counts()["left-out images"] == 0
    with pytest.raises(DatasetNotFoundError, match="elsewhere"):
        task_of(recipe_of("elsewhere"))


def test_the_length_counts_repeats_of_the_data_and_processes(colours):
    recipe = recipe_of(colours, data={"repeat": 2}, augment={"repeats": 3}, optim={"epochs": 3})
    assert (task_of(recipe).epoch, task_of(recipe).iterations) == (8, 24)
    shared = task_of(recipe, processes=Processes(CPU, rank=1, world=3))
    assert (shared.epoch, shared.iterations) == (3, 9)  # 96 samples in steps of 36
    assert shared.sampler.samples_per_step == 36 and shared.sampler.samples_per_process == 12


def test_weights_are_loaded_unless_a_run_goes_on(trained, colours, tmp_path):
    task, _ = trained
    weights = tmp_path / "start.safetensors"
    save_weights(task.network, weights, task.spec(None), half=False)
    recipe = recipe_of(colours, model={"weights": str(weights)})
    key = "head.fc.weight"
    assert torch.equal(task_of(recipe).network.state_dict()[key], task.network.state_dict()[key])
    assert not torch.equal(
        task_of(recipe, load_weights=False).network.state_dict()[key], task.network.state_dict()[key]
    )
    assert "started from" in task_of(recipe).spec(None).training_data
    with pytest.raises(WeightsError):
        task_of(recipe_of(colours, model={"weights": str(tmp_path / "none.safetensors")}))
