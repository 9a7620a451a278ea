"""`unet evaluate`: a checkpoint by the reference or an engine, or a running service by its URL."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
from tqdm import tqdm

from app.client import Client, encoded
from app.engine.predictor import engine_predictor
from app.engine.selection import build_engine, choose_engines
from app.errors import EngineUnavailable
from model.arrays import AnyArray, FloatArray
from model.checkpoint import load_checkpoint, write_atomically
from model.config import PreprocessConfig
from model.evaluation.evaluate import Predict, Prediction, evaluate, from_probabilities
from model.training.data import PairedDataset, open_dataset, split_dataset
from model.training.plots import make_worst_sheet
from model.training.recipe import DataConfig, Recipe


def http_predictor(client: Client, *, instances: bool = False, **query: str | float) -> Predict:
    """A running service."""

    def predict(image: AnyArray) -> Prediction:
        data = encoded(image)  # once, for both
        mask = client.segment(data, **query).image()
        if not instances:
            return Prediction(mask)
        return Prediction(mask, client.segment(data, output="instances", **query).image())

    return predict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a checkpoint's file; with --url, the model's name")
    what = parser.add_argument_group("data: a recipe's validation images, or two folders")
    what.add_argument("--config", type=Path, help="a recipe; its [data] and its split are used")
    what.add_argument(
        "--part", choices=("validation", "training", "all"), help="of the recipe's (validation)"
    )
    what.add_argument("--images", type=Path)
    what.add_argument("--masks", type=Path)
    what.add_argument(
        "--labels",
        choices=("binary", "classes", "instances"),
        help="what masks hold (binary, or classes)",
    )
    who = parser.add_argument_group("who computes")
    who.add_argument("--url", help="of a running service")
    who.add_argument("--key", help="its API key")
    who.add_argument(
        "--engine",
        choices=("reference", "auto", "openvino", "torch"),
        default="reference",
        help="reference: plain torch in fp32; or one of the service's engines (reference)",
    )
    who.add_argument("--device", default="auto")
    who.add_argument("--precision", default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure of every image")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="PNG of the worst ten images")


def main(args: argparse.Namespace) -> int:
    try:
        return _measure(args)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ValueError(f"{args.url} does not answer: {error}") from error


def _measure(args: argparse.Namespace) -> int:
    for path in filter(None, (args.json, args.sheet)):  # before all is measured
        if not path.parent.is_dir():
            raise ValueError(f"{path}: {path.parent} is not a folder")
    with _opened(args) as judge:
        dataset = _dataset(args, judge.preprocess)
        instances = dataset.kind == "instances"
        predict = judge.predict(instances)
        report = evaluate(
            predict,
            dataset,
            classes=len(judge.preprocess.classes),
            instances=instances,
            progress=lambda samples: tqdm(
                samples, total=len(dataset), unit="image", disable=not sys.stderr.isatty()
            ),
        )
        print(f"{judge.name}\n{report.table()}", flush=True)
        if args.json:
            text = json.dumps({"model": judge.name, **report.to_json()}, indent=2)
            write_atomically(args.json, text.encode())
        if args.sheet:
            buffer = io.BytesIO()
            make_worst_sheet(report, predict, dataset).save(buffer, "PNG")
            write_atomically(args.sheet, buffer.getvalue())
    return 0


@dataclasses.dataclass
class _Judge:
    """Who is measured; `close` ends what it holds."""

    name: str
    preprocess: PreprocessConfig
    predict: Callable[[bool], Predict]
    close: Callable[[], None] = lambda: None

    def __enter__(self) -> _Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _opened(args: argparse.Namespace) -> _Judge:
    if args.url:
        client = Client(args.url, key=args.key)
        model = client.model(args.model)
        if not model["ready"]:
            raise ValueError(
                f"{args.model} at {args.url} is not ready: {model['error'] or 'still loading'}"
            )
        return _Judge(
            f"{model['id']} at {args.url}",
            PreprocessConfig.from_json(model["preprocessing"]),
            lambda instances: http_predictor(client, instances=instances, model=args.model),
            client.close,
        )
    checkpoint = load_checkpoint(Path(args.model))
    if args.engine == "reference":
        from model.predict import Predictor

        device = "cpu" if args.device == "auto" else args.device
        try:
            function = Predictor.of(checkpoint, device)
        except (RuntimeError, AssertionError) as error:  # torch's, of a device that is not there
            raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
        name = f"{checkpoint.id} by the reference"
        return _Judge(name, checkpoint.preprocess, _both(function, checkpoint.preprocess))
    try:
        choice = choose_engines(
            device=args.device, engine=args.engine, precision=args.precision, max_batch=1
        )[0]
        engine = build_engine(choice, checkpoint)
    except EngineUnavailable as error:  # the settings of the service have no say here
        raise ValueError(error.of_flag) from None
    return _Judge(
        f"{checkpoint.id} by {choice.backend} on {choice.device} in {choice.precision}",
        checkpoint.preprocess,
        _both(engine_predictor(engine, checkpoint), checkpoint.preprocess),
        engine.close,
    )


def _both(
    function: Callable[[AnyArray], FloatArray], preprocess: PreprocessConfig
) -> Callable[[bool], Predict]:
    return lambda instances: from_probabilities(function, preprocess, instances=instances)


def _dataset(args: argparse.Namespace, preprocess: PreprocessConfig) -> PairedDataset:
    if args.config:
        if args.images or args.masks or args.labels:
            raise ValueError(
                "--config says where images, masks and labels are; leave out the flags"
            )
        config = Recipe.read(args.config).data
    elif args.images and args.masks:
        if args.part:
            raise ValueError("--part is a part of a recipe's data; give its --config")
        labels = args.labels or ("binary" if preprocess.binary else "classes")
        config = DataConfig(images=str(args.images), masks=str(args.masks), labels=labels)
    else:
        raise ValueError("say what to measure on: --config RECIPE, or --images and --masks")
    if (config.labels == "classes") == preprocess.binary:
        raise ValueError(
            f"masks of {config.labels} cannot judge a model of {len(preprocess.classes)} classes"
        )
    dataset = open_dataset(config, preprocess)
    if not args.config or args.part == "all":
        return dataset
    training, validation = split_dataset(dataset, config)
    return training if args.part == "training" else validation
