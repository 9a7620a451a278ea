"""Train the shipped `nuclei` on a borrowed GPU: `python -m benchmarks.gpu_nuclei --minutes 3.5`.

The training is a process with a time limit. Whenever it has saved a state, another process writes
the checkpoint of the weights that validated best so far to the folder of the results, so that a
machine that is taken away has left one. Needs torch, NumPy, SciPy, Pillow and this project; other
packages are taken from wheels (`make gpu-wheels`).

    FOLDER/nuclei.safetensors  the checkpoint
    FOLDER/report.json         scores, after a complete run
    FOLDER/metrics.jsonl       loss and scores by step
    FOLDER/samples.png         pictures of validation images
    FOLDER/train.log           everything that was printed

Further flags are those of `unet train`. `--device cpu --base-features 4 --minutes 0.2` tries the
program itself.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu_proof import unpacked

RECIPE = "model/configs/nuclei.toml"
_FINISH_SECONDS = 75.0
"""For all but the steps: starting, reading images, and the final scores."""
_STOP_SECONDS = 10.0
"""Between the polite and the final end of a process."""
_POLL_SECONDS = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=3.5, help="of training (3.5)")
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu (cuda:0)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/gpu-nuclei"), help="(build/gpu-nuclei)"
    )
    parser.add_argument(
        "--finish",
        type=float,
        default=_FINISH_SECONDS,
        help=f"seconds for everything else, after which it is ended ({_FINISH_SECONDS:.0f})",
    )
    parser.add_argument("--wheels", type=Path, default=Path(".wheels"), help="(.wheels)")
    parser.add_argument("--watch", type=Path, help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.watch:
        watch(args.watch, args.out)
        return 0
    with unpacked(args.wheels) as environment, tempfile.TemporaryDirectory() as scratch:
        return train(args, flags, environment, Path(scratch) / "run")


def train(
    args: argparse.Namespace, flags: Sequence[str], environment: Mapping[str, str], run: Path
) -> int:
    """Train within the time limit, and copy the results.

    Args:
        args: of the command line.
        flags: of `unet train`, which override those of this program.
        environment: in which all packages are found.
        run: folder of the run, which has more and larger files than the results.

    Returns:
        0 if the training ended by itself.
    """
    end = time.monotonic() + 60 * args.minutes + args.finish
    settings = ["--steps", "0", "--minutes", str(args.minutes), "--device", args.device]
    settings += ["--validate-every", "1000000"]  # at each tenth of the minutes
    command = ["-m", "app.cli", "train", RECIPE, "--out", str(run), *settings, *flags]
    watching = ["-m", "benchmarks.gpu_nuclei", "--watch", str(run), "--out", str(args.out)]
    with (args.out / "train.log").open("w") as log:
        watcher = subprocess.Popen([sys.executable, *watching], env=environment, stderr=log)
        trainer = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=log, stderr=log
        )
        try:
            status = finish(trainer, end - time.monotonic())
        finally:
            stop(trainer)
            run.mkdir(parents=True, exist_ok=True)
            (run / "ended").touch()
            finish(watcher, _STOP_SECONDS)
            stop(watcher)
            for name in ("nuclei.safetensors", "report.json", "metrics.jsonl", "samples.png"):
                if (run / name).exists():
                    shutil.copy(run / name, args.out)
    print((args.out / "train.log").read_text()[-6000:])
    return 0 if status == 0 else 1


def finish(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait for a process to end. Returns its status, or None after some seconds."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, politely at first."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            finish(process, _STOP_SECONDS)


def watch(run: Path, out: Path) -> None:
    """Write the best weights of a run to OUT whenever it saves a state, until it has ended."""
    state, seen = run / "state.pt", 0
    while True:
        ended = (run / "ended").exists()
        changed = state.stat().st_mtime_ns if state.exists() else 0
        if changed != seen:
            export_best(run, out)
            seen = changed
        if ended:
            return
        time.sleep(_POLL_SECONDS)


def export_best(run: Path, out: Path) -> None:
    """Write the checkpoint of the weights that validated best so far."""
    import torch

    from model.checkpoint import Checkpoint, save_checkpoint
    from model.predict import attach_golden
    from model.training.images import read_image
    from model.training.recipe import Recipe

    torch.set_num_threads(2)
    recipe = Recipe.read(run / "config.json")
    best = torch.load(run / "state.pt", map_location="cpu", weights_only=True)["best"]
    if not best["weights"]:  # no validation yet
        return
    weights = {name: tensor.half().numpy() for name, tensor in best["weights"].items()}
    card = {
        "data": recipe.data.source,
        "licence": recipe.data.licence,
        "training": {"shipped_step": best["step"]},
    }
    draft = Checkpoint(recipe.name, recipe.network, recipe.preprocess, weights, card=card)
    checkpoint = attach_golden(draft, read_image(Path(recipe.data.golden)))
    save_checkpoint(out / f"{recipe.name}.safetensors", checkpoint)


if __name__ == "__main__":
    sys.exit(main())
