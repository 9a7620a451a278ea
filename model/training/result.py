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
from model.training.validation import load_predictor, measure


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Which weights are shipped, and why.

    Attributes:
        step: of the shipped weights; 0 for those that the run started from.
        report: of them on all validation images.
        scores: by step, of the last weights and, if they are others, of the best ones and of those
            that the run started from.
        start: id of the checkpoint whose weights were validated before the first step, or "".
    """

    step: int
    report: Report
    scores: dict[int, dict[str, Any]]
    start: str = ""

    @property
    def warning(self) -> str:
        """That training improved nothing, with advice; "" if it did."""
        if self.step > 0:
            return ""
        return (
            f"training did not improve the weights of {self.start}, which are shipped unchanged; "
            "train longer, or use a lower learning rate"
        )


def choose_weights(
    trainer: Trainer, validation: PairedDataset, best: BestWeights
) -> tuple[Predictor, Outcome]:
    """Measure the last weights, the best ones and the start's on all validation images.

    Returns:
        A predictor with the weights of the highest score, the latest of equal ones, and why.
    """
    recipe, device = trainer.recipe, trainer.device
    candidates = {trainer.steps_done: trainer.predictor}
    if best.step not in (0, trainer.steps_done):
        candidates[best.step] = load_predictor(best.weights, recipe, device)
    if best.start:
        candidates[0] = load_predictor(best.start_weights, recipe, device)
    reports = {step: measure(each, recipe, validation) for step, each in candidates.items()}
    scores = {step: report.summary() for step, report in reports.items()}
    step = max(scores, key=lambda step: (rate_scores(scores[step]), step))
    return candidates[step], Outcome(step, reports[step], scores, best.start)


def summarize(
    trainer: Trainer, length: RunLength, ending: str, outcome: Outcome, run: RunFolder
) -> list[str]:
    """Describe the result of a run in a few lines."""
    time_taken = tqdm.format_interval(trainer.seconds)
    first = f"trained    {length.describe_steps(trainer)} steps in {time_taken}"
    lines = ["", f"{first}, {ending}" if ending else first]
    for step in sorted(outcome.scores):
        name = "last" if step == trainer.steps_done else "best" if step else "start"
        shipped = "  <- in the checkpoint" if step == outcome.step else ""
        scores = describe_scores(outcome.scores[step])
        lines.append(f"{name:<10} step {step}: validation {scores}{shipped}")
    if outcome.warning:
        lines.append(f"{'warning':<10} {outcome.warning}")
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
        **_describe_start(outcome),
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
                "start",
                "warning",
                "hours",
                "hardware",
                "torch",
                "revision",
            )
            if key in report
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


def _describe_start(outcome: Outcome) -> dict[str, Any]:
    """Return the start's id and its scores, and a warning if nothing is better."""
    if not outcome.start:
        return {}
    start = {"checkpoint": outcome.start, "validation": outcome.scores[0]}
    return {"start": start, **({"warning": outcome.warning} if outcome.warning else {})}


def _describe_hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"
