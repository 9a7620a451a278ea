"""The result of a run: the weights to ship, their checkpoint, the report and the summary.

Knows a trainer that has ended; trains nothing.
"""

from __future__ import annotations

import dataclasses
import platform
import shlex
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.arrays import AnyArray
from model.checkpoint import Checkpoint, git_revision, save_checkpoint, update_manifest
from model.evaluation.evaluate import Report, format_classes
from model.predict import Predictor, attach_golden
from model.training.bar import describe_scores
from model.training.best import BestWeights, rate_scores
from model.training.data import PairedDataset
from model.training.length import RunLength
from model.training.run_folder import RunFolder, report_write_errors
from model.training.trainer import Snapshot, Trainer
from model.training.validation import measure
from model.unet import UNet


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Which weights are shipped, and why.

    Attributes:
        step: of the shipped weights.
        report: of them on all validation images.
        scores: by step, of the last weights and, if they are others, of the best ones.
    """

    step: int
    report: Report
    scores: dict[int, dict[str, Any]]


def choose_weights(
    trainer: Trainer, validation: PairedDataset, best: BestWeights
) -> tuple[Predictor, Outcome]:
    """Measure the last weights and the best ones on all validation images; choose the better."""
    recipe, last = trainer.recipe, trainer.predictor
    report = measure(last, recipe, validation)
    scores = {trainer.steps_done: report.summary()}
    if not best.weights or best.step == trainer.steps_done:
        return last, Outcome(trainer.steps_done, report, scores)
    network = UNet.from_config(recipe.network)
    network.load_state_dict(best.weights)
    network = network.to(device=trainer.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    earlier = Predictor(network, recipe.preprocess)
    earlier_report = measure(earlier, recipe, validation)
    scores[best.step] = earlier_report.summary()
    if rate_scores(scores[best.step]) > rate_scores(scores[trainer.steps_done]):
        return earlier, Outcome(best.step, earlier_report, scores)
    return last, Outcome(trainer.steps_done, report, scores)


def summarize(
    trainer: Trainer, length: RunLength, ending: str, outcome: Outcome, run: RunFolder
) -> list[str]:
    """Describe the result of a run in a few lines."""
    time_taken = tqdm.format_interval(trainer.seconds)
    first = f"trained    {length.describe_steps(trainer)} steps in {time_taken}"
    lines = ["", f"{first}, {ending}" if ending else first]
    for step in sorted(outcome.scores):
        name = "last" if step == trainer.steps_done else "best"
        shipped = "  <- in the checkpoint" if step == outcome.step else ""
        scores = describe_scores(outcome.scores[step])
        lines.append(f"{name}       step {step}: validation {scores}{shipped}")
    if not trainer.recipe.preprocess.binary:
        lines += ["", *format_classes(outcome.report.summary()["by_class"]), ""]
    lines.append(f"pictures   {run.path}/samples.png, {run.path}/curves.png")
    lines.append(
        f"serve      UNET_WEIGHTS_DIR={shlex.quote(str(run.path))} "
        f"UNET_MODEL={shlex.quote(trainer.recipe.name)} unet serve"
    )
    return lines


def build_report(
    trainer: Trainer,
    predictor: Predictor,
    outcome: Outcome,
    training: PairedDataset,
    validation: PairedDataset,
    command: str,
) -> dict[str, Any]:
    """Collect scores of validation images and of as many training images.

    Their gap shows over-fitting.
    """
    recipe = trainer.recipe
    trained_on = training.spread(len(validation))
    return {
        "validation": outcome.report.summary(),
        "training": measure(predictor, recipe, trained_on).summary(),
        "images": {"training": len(training), "validation": len(validation)},
        "steps": trainer.steps_done,
        "shipped_step": outcome.step,
        "validation_by_step": {str(step): scores for step, scores in outcome.scores.items()},
        "hours": round(trainer.seconds / 3600, 3),
        "hardware": _describe_hardware(trainer.device),
        "command": command,
        "revision": git_revision(),
        "torch": torch.__version__,
        "recipe": recipe.to_json(),
    }


def export_checkpoint(
    trainer: Trainer, predictor: Predictor, golden: AnyArray, run: RunFolder, report: dict[str, Any]
) -> Path:
    """Write the checkpoint and its entry in the manifest; return its path.

    Args:
        predictor: has the weights.
        golden: image of the golden pair.
        report: of `build_report`; the card contains parts of it.
    """
    recipe = trainer.recipe
    card = {
        "metrics": report["validation"],
        "training_metrics": report["training"],
        "data": recipe.data.source,
        "licence": recipe.data.licence,
        "training": {
            key: report[key]
            for key in (
                "command",
                "images",
                "steps",
                "shipped_step",
                "hours",
                "hardware",
                "torch",
                "revision",
            )
        },
    }
    path = run.path / f"{recipe.name}.safetensors"
    weights = Snapshot(predictor, {"step": report["shipped_step"]}).export_weights()
    draft = Checkpoint(recipe.name, recipe.network, recipe.preprocess, weights, card=card)
    checkpoint = attach_golden(draft, golden)
    with report_write_errors(run.path):
        save_checkpoint(path, checkpoint)
        update_manifest(path)
    return path


def _describe_hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"
