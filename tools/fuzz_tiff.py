"""Damage TIFFs of every kind at random, and read them in image workers as the service does.

    python tools/fuzz_tiff.py --mutations 20000 --seed 1

A damaged file may be read, or be rejected with an error for its client. A worker that is killed,
because it took too long, needed too much memory or crashed, fails its own file alone: counted, and
the file is kept in `--keep`. Anything else is a bug, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import struct
import sys
import time
from collections import Counter
from pathlib import Path

from app.batching.deadline import Deadline
from app.errors import ServiceError, UnprocessableImage
from app.imaging.workers.pool import WorkerPool
from app.imaging.workers.shared import BlockCache
from app.inference.limits import decoding_limit
from app.inference.steps import EncodedImage, decode_and_prepare, inspect_image
from model.config import PreprocessConfig
from tests.conftest import FIXTURES
from tests.unit.model.tiff.written import write_all

MAX_PIXELS = 100_000_000
PREPROCESS = PreprocessConfig()
ODD_VALUES = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def list_seeds() -> list[bytes]:
    """Whole files of every kind, each with a page and a channel that can be read."""
    files = [written.data for written in write_all().values()]
    return files + [path.read_bytes() for path in sorted((FIXTURES / "tiff").glob("*.tif"))]


def damage(whole: bytes, rng: random.Random) -> bytes:
    """Change bytes, numbers of tags or whole runs; cut off, insert, or repeat a part."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(max(1, len(data) - 8))
        match rng.randrange(6):
            case 0 | 1:
                data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            case 2:
                at = _find_tag(data, rng)
                order = "<" if data[:2] == b"II" else ">"
                struct.pack_into(order + "I", data, at, rng.choice(ODD_VALUES) & 0xFFFFFFFF)
            case 3:
                data[at : at + 8] = rng.randbytes(8)
            case 4:
                data[at] ^= 1 << rng.randrange(8)
            case _:
                part = data[at : at + rng.randint(1, 64)]
                data[at:at] = part * rng.choice((1, 1, 50))
    if rng.random() < 0.15:
        del data[rng.randrange(len(data)) :]
    return bytes(data)


def _find_tag(data: bytearray, rng: random.Random) -> int:
    """The position of a number in the first directory: type, count or value of one of its tags."""
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", data, 4)[0]
    if start + 14 > len(data):
        return 0
    tags = max(1, struct.unpack_from(order + "H", data, start)[0])
    at = start + 2 + 12 * rng.randrange(min(tags, 40)) + rng.choice((2, 4, 8))
    return min(at, len(data) - 4)


async def fuzz(mutations: int, seed: int, workers: int, keep: Path) -> int:
    """Read damaged files, and print how many ended how. Returns the number of bugs."""
    kills: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    bugs: list[str] = []
    slowest = 0.0
    pool = WorkerPool(workers, ("app.inference.steps",), on_kill=lambda why: kills.update([why]))
    pool.start()
    cache = BlockCache()
    seeds = list_seeds()
    remaining = iter(range(mutations))

    async def read_some() -> None:
        nonlocal slowest
        for number in remaining:
            rng = random.Random(f"{seed} {number}")
            data = damage(seeds[number % len(seeds)], rng)
            start = time.perf_counter()
            outcome = await read(pool, cache, data, rng)
            slowest = max(slowest, time.perf_counter() - start)
            outcomes[outcome.partition(":")[0]] += 1
            if outcome.startswith(("bug", "killed")):
                await asyncio.to_thread(save, keep, f"{outcome.partition(':')[0]}-{number}", data)
                print(f"mutation {number}: {outcome}", file=sys.stderr)
            if outcome.startswith("bug"):
                bugs.append(outcome)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(2 * workers):
                group.create_task(read_some())
    finally:
        await pool.stop()
        cache.close()
    print(f"{mutations} damaged files of {len(seeds)} kinds, seed {seed}; slowest {slowest:.1f} s")
    for outcome, count in sorted(outcomes.items()):
        print(f"  {outcome}: {count}")
    print(f"  processes ended: {dict(kills) or 'none'}")
    return len(bugs)


def save(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.tif").write_bytes(data)


async def read(pool: WorkerPool, cache: BlockCache, data: bytes, rng: random.Random) -> str:
    """Inspect and decode a file, and say how that ended."""
    page, channel = rng.choice(((None, None), (0, None), (0, 0), (1, None), (0, 1)))
    never = Deadline.never()
    with cache.borrow() as block, cache.borrow() as pixels:
        block.write(data)
        encoded = EncodedImage(block, len(data))
        try:
            header = await pool.call(
                decoding_limit(0, never), inspect_image, encoded, MAX_PIXELS, page, channel
            )
            limit = decoding_limit(header["height"] * header["width"], never)
            await pool.call(limit, decode_and_prepare, encoded, header, PREPROCESS, pixels, None)
        except UnprocessableImage as error:
            return f"killed: {error}"
        except ServiceError as error:
            return f"rejected as {type(error).__name__}"
        except RuntimeError as error:
            return f"bug: {error}"
    return "read"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("fuzzed"), help="folder for bad files")
    args = parser.parse_args()
    return 1 if asyncio.run(fuzz(args.mutations, args.seed, args.workers, args.keep)) else 0


if __name__ == "__main__":
    sys.exit(main())
