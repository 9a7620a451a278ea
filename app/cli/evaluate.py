"""`unet evaluate`: measure a checkpoint or a running service on a data set.

A checkpoint runs in the reference implementation (plain torch in fp32) or in an engine.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from app.cli.errors import CommandError, check_parent_folder, writing
from app.cli.service_errors import describe_refusal
from app.engine.predictor import engine_predictor
from app.engine.selection import build_engine, choose_engines, resolve
from app.errors import EngineUnavailable
from app.settings import KEY_VARIABLE
from model.arrays import AnyArray
from model.checkpoint import (
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
    update_manifest,
    write_atomically,
)
from model.config import PreprocessConfig, UNetConfig
from model.errors import first_line
from model.evaluation.evaluate import (
    Predict,
    PredictedMasks,
    Report,
    evaluate,
    from_probabilities,
)
from model.training.data import PairedDataset, open_dataset
from model.training.plots import draw_confusion, format_confusion, make_worst_sheet
from model.training.recipe import Recipe
from model.training.sections import DataConfig
from model.training.split import split_dataset
from unet_client import Client, SegmentationError, UnetClientError


def http_predictor(client: Client, *, instances: bool = False, model: str | None = None) -> Predict:
    """Predictor over a running service.

    Args:
        model: its name; None is the service's default.
    """

    def predict(image: AnyArray) -> PredictedMasks:
        if not instances:
            return PredictedMasks(client.segment(image, model=model).image())
        result = client.segment(image, model=model, output=["mask", "instances"])
        return PredictedMasks(result.image("mask"), result.image("instances"))

    return predict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a checkpoint; with --url, the name of a model")
    data = parser.add_argument_group("data", "a recipe's images, or two folders")
    data.add_argument("--config", type=Path, metavar="RECIPE", help="use the data of this recipe")
    data.add_argument(
        "--part",
        choices=("validation", "training", "all"),
        help="part of the recipe's data (default: validation)",
    )
    data.add_argument("--images", type=Path, metavar="FOLDER", help="folder of the images")
    data.add_argument("--masks", type=Path, metavar="FOLDER", help="folder of their masks")
    data.add_argument(
        "--ignore",
        type=int,
        default=-1,
        metavar="VALUE",
        help="value of pixels without a label in the masks, often 255 (default: none)",
    )
    data.add_argument(
        "--labels",
        choices=("binary", "classes", "instances"),
        help="values in the masks (default: binary, or classes if the model has several)",
    )
    engine = parser.add_argument_group("engine or service")
    engine.add_argument("--url", help="URL of a running service")
    engine.add_argument("--key", help=f"API key of the service (variable: {KEY_VARIABLE})")
    engine.add_argument(
        "--engine",
        choices=("reference", "auto", "openvino", "torch"),
        default="reference",
        help="reference: plain torch in fp32; others, and for ONNX graphs: an engine of the "
        "service (default: reference)",
    )
    engine.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    engine.add_argument(
        "--precision", default="auto", help="numeric precision of the engine (default: auto)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores of each image")
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the scores into the checkpoint's card, which the service shows",
    )
    parser.add_argument(
        "--confusion",
        type=Path,
        metavar="FILE",
        help="write the confusion matrix of several classes, as FILE.csv or FILE.png",
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="write a PNG of the ten worst images"
    )


def main(args: argparse.Namespace) -> int:
    for path in filter(None, (args.json, args.sheet, args.confusion)):
        check_parent_folder(path)
    if args.record and (args.url or args.part in ("training", "all")):
        raise CommandError("--record needs a checkpoint, and images that it was not trained on")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        raise CommandError(f"--device {args.device}: must be auto, cpu, cuda or cuda:N")
    try:
        with _open_subject(args) as subject:
            _measure(args, subject)
    except SegmentationError as error:
        raise CommandError(f"{error.status}: {describe_refusal(error)}") from error
    except UnetClientError as error:
        raise CommandError(str(error)) from error
    return 0


@dataclasses.dataclass
class _Subject:
    """The model that is measured.

    Attributes:
        name: the model and what runs it, for the report.
        predictor: called with whether instances are needed; returns the predictor.
        close: frees what it uses.
    """

    name: str
    preprocess: PreprocessConfig
    predictor: Callable[[bool], Predict]
    close: Callable[[], None] = lambda: None

    def __enter__(self) -> _Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _measure(args: argparse.Namespace, subject: _Subject) -> None:
    """Print the scores, and write the files that were asked for."""
    dataset = _open_dataset(args, subject.preprocess)
    if args.confusion and subject.preprocess.binary:
        raise CommandError(f"--confusion needs a model of several classes, not {subject.name}")
    instances = dataset.kind == "instances"
    predict = subject.predictor(instances)
    report = evaluate(
        predict,
        dataset,
        classes=subject.preprocess.classes,
        instances=instances,
        progress=lambda samples: tqdm(
            samples, total=len(dataset), unit="image", disable=not sys.stderr.isatty()
        ),
    )
    print(f"{subject.name}\n{report.table()}", flush=True)
    if args.json:
        text = json.dumps({"model": subject.name, **report.to_json()}, indent=2)
        with writing(args.json):
            write_atomically(args.json, text.encode())
    if args.record:
        _record(Path(args.model), report)
    if args.confusion:
        _write_confusion(args.confusion, report)
    if args.sheet:
        buffer = io.BytesIO()
        palette = subject.preprocess.palette
        make_worst_sheet(report, predict, dataset, palette).save(buffer, "PNG")
        with writing(args.sheet):
            write_atomically(args.sheet, buffer.getvalue())


def _record(path: Path, report: Report) -> None:
    """Replace the scores in a checkpoint's card. The file gets another sha256 and id."""
    checkpoint = load_checkpoint(path)
    card = {**checkpoint.card, "metrics": report.summary()}
    with writing(path):
        saved = save_checkpoint(path, dataclasses.replace(checkpoint, card=card))
        update_manifest(path)
    print(f"{path}: {saved.id}")


def _write_confusion(path: Path, report: Report) -> None:
    """Write the confusion matrix, as CSV or as a picture by the file's suffix."""
    with writing(path):
        if path.suffix.lower() == ".png":
            draw_confusion(report.confusion, report.classes, path)
        else:
            write_atomically(path, format_confusion(report.confusion, report.classes).encode())


def _open_subject(args: argparse.Namespace) -> _Subject:
    if args.url:
        return _open_service(args)
    checkpoint = load_checkpoint(Path(args.model))
    if args.engine == "reference" and isinstance(checkpoint.architecture, UNetConfig):
        return _open_reference(checkpoint, args.device)
    return _open_engine(checkpoint, args)


def _open_service(args: argparse.Namespace) -> _Subject:
    try:
        client = Client(args.url, key=args.key or os.environ.get(KEY_VARIABLE))
    except ValueError as error:  # the URL or the key
        raise CommandError(str(error)) from error
    try:
        return _describe_service(client, args)
    except Exception:
        client.close()
        raise


def _describe_service(client: Client, args: argparse.Namespace) -> _Subject:
    model = client.model(args.model)
    if not model["ready"]:
        reason = model["error"] or "still loading"
        raise CommandError(f"{args.model} at {args.url} is not ready: {reason}")
    return _Subject(
        f"{model['id']} at {args.url}",
        PreprocessConfig.from_json(model["preprocessing"]),
        lambda instances: http_predictor(client, instances=instances, model=args.model),
        client.close,
    )


def _open_reference(checkpoint: Checkpoint, device: str) -> _Subject:
    from model.predict import Predictor

    device = "cpu" if device == "auto" else device
    try:
        predictor = Predictor.of(checkpoint, device)
    except (RuntimeError, AssertionError) as error:  # raised by torch if there is no such device
        raise CommandError(f"--device {device}: {first_line(error)}") from error
    preprocess = checkpoint.preprocess
    return _Subject(
        f"{checkpoint.id} by the reference",
        preprocess,
        lambda instances: from_probabilities(predictor, preprocess, instances=instances),
    )


def _open_engine(checkpoint: Checkpoint, args: argparse.Namespace) -> _Subject:
    try:
        (choice, *_) = choose_engines(
            device=args.device,
            engine="auto" if args.engine == "reference" else args.engine,
            precision=args.precision,
            max_batch=1,
        )
        choice = resolve(choice, checkpoint)
        engine = build_engine(choice, checkpoint)
    except EngineUnavailable as error:  # names the flag, because no setting is read here
        raise CommandError(error.for_cli()) from error
    preprocess = checkpoint.preprocess
    predictor = engine_predictor(engine, checkpoint)
    return _Subject(
        f"{checkpoint.id} by {choice.backend} on {choice.device} in {choice.precision}",
        preprocess,
        lambda instances: from_probabilities(predictor, preprocess, instances=instances),
        engine.close,
    )


def _open_dataset(args: argparse.Namespace, preprocess: PreprocessConfig) -> PairedDataset:
    config = _data_config(args, preprocess)
    for part in config.parts:
        if (part.labels == "classes") == preprocess.binary:
            raise CommandError(
                f"masks of {part.labels} cannot be used for a model with "
                f"{len(preprocess.classes)} classes"
            )
    dataset = open_dataset(config, preprocess)
    if not args.config or args.part == "all":
        return dataset
    training, validation = split_dataset(dataset, config)
    return training if args.part == "training" else validation


def _data_config(args: argparse.Namespace, preprocess: PreprocessConfig) -> DataConfig:
    """The data of the recipe, or of the two folders.

    Raises:
        CommandError: the arguments name both or neither.
    """
    if args.config:
        if args.images or args.masks or args.labels:
            raise CommandError(
                "--config already sets images, masks and labels; leave out these flags"
            )
        return Recipe.read(args.config).data
    if not (args.images and args.masks):
        raise CommandError("set the data: --config RECIPE, or --images and --masks")
    if args.part:
        raise CommandError("--part needs --config")
    labels = args.labels or ("binary" if preprocess.binary else "classes")
    folders = {"images": str(args.images), "masks": str(args.masks)}
    return DataConfig.from_json({**folders, "labels": labels, "ignore": args.ignore})
