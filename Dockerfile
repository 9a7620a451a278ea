# Two images from one file:
#   docker build -t unet-server .                    CPU, without torch
#   docker build -t unet-server:cuda --target cuda . NVIDIA GPUs (run with --gpus all)
# Run it with --stop-timeout 30: by default docker stop kills the container after 10 seconds, and
# accepted requests have UNET_DRAIN_S (20) to finish.
# Packages are installed by version and hash from requirements/*.lock. The base image is a tag, which
# receives security fixes; a reproducible build adds --build-arg DIGEST=@sha256:... of the image.
ARG PYTHON=3.12
ARG DIGEST=

FROM python:${PYTHON}-slim${DIGEST} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# Dependencies come first: their layer is most of the image and rarely changes.
COPY requirements requirements
RUN pip install --require-hashes -r requirements/serve.lock \
    && pip install --require-hashes --target tools -r requirements/build.lock
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY model model
COPY clients clients
COPY clients/python/unet_client clients/python/unet_client
RUN PYTHONPATH=tools pip install --no-deps --no-build-isolation .

FROM build AS build-cuda
RUN pip install --require-hashes -r requirements/torch.lock

FROM python:${PYTHON}-slim${DIGEST} AS base
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin unet
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    UNET_HOST=0.0.0.0 \
    UNET_PORT=8000 \
    UNET_WEIGHTS_DIR=/srv/weights
WORKDIR /srv
EXPOSE 8000
STOPSIGNAL SIGTERM
COPY deploy/healthcheck.py ./
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-I", "/srv/healthcheck.py"]
CMD ["unet", "serve"]

FROM base AS cuda
COPY --from=build-cuda /opt/venv /opt/venv
COPY weights weights
USER 10001

# A plain `docker build` makes the last stage.
FROM base AS cpu
COPY --from=build /opt/venv /opt/venv
COPY weights weights
USER 10001
