"""Serve the same network with LitServe, as its documentation shows.

Not part of the service: `benchmarks.litserve_compare` starts it, in an environment that has
LitServe (benchmarks/README.md). It takes an image as the form field `file`, computes the network in
torch (fp32, channels last) at one size, and returns the mask as a PNG of the image's size.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import litserve
import numpy as np
import torch
from fastapi import Response
from PIL import Image

from model.checkpoint import load_checkpoint
from model.predict import build_network
from model.transforms import normalize


class LitSegmentation(litserve.LitAPI):
    """Decode, compute and encode one request."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def setup(self, device: str) -> None:
        checkpoint = load_checkpoint(self.path)
        self.config = checkpoint.preprocess
        self.network_device = device
        network = build_network(checkpoint).eval()
        self.network = network.to(device=device, memory_format=torch.channels_last)

    def decode_request(self, request) -> tuple[Image.Image, torch.Tensor]:
        # FastAPI would take an annotation of `request` for the schema of a body
        image = Image.open(io.BytesIO(request["file"].file.read())).convert("RGB")
        height, width = self.config.resized
        resized = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        inputs = normalize(torch.from_numpy(resized)[None], self.config)
        return image, inputs.to(self.network_device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def predict(self, x: tuple[Image.Image, torch.Tensor]) -> tuple[Image.Image, np.ndarray]:
        image, inputs = x
        return image, self.network(inputs)[0, 0].sigmoid().cpu().numpy()

    def encode_response(self, output: tuple[Image.Image, np.ndarray]) -> Response:
        image, probability = output
        mask = Image.fromarray(((probability >= self.config.threshold) * 255).astype(np.uint8))
        buffer = io.BytesIO()
        mask.resize(image.size, Image.Resampling.NEAREST).save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--accelerator", default="cpu")
    args = parser.parse_args()
    api = LitSegmentation(args.checkpoint)
    server = litserve.LitServer(api, accelerator=args.accelerator, timeout=False)
    server.run(host="127.0.0.1", port=args.port, generate_client_file=False)
