# Two images from one file:
#   docker build -t unet-server:0.1.0 .                         CPU, without torch
#   docker build -t unet-server:0.1.0-cuda --target cuda .      NVIDIA GPUs (run with --gpus all)
# Run it with --stop-timeout 30: by default docker stop kills the container after 10 seconds, and
# accepted requests have UNET_DRAIN_S (20) to finish.
# Packages are installed by version and hash from requirements/*.lock. The base image is a tag, which
# receives security fixes; a reproducible build adds --build-arg DIGEST=@sha256:... of the image.
ARG PYTHON=3.12
ARG DIGEST=

FROM python:${PYTHON}-slim${DIGEST} AS build
# Compiled files record the hash of their source (below), not its time, so that builds are the same.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv --without-pip /opt/venv
ENV PIP_PYTHON=/opt/venv/bin/python PATH=/opt/venv/bin:$PATH
WORKDIR /build
# Dependencies come first: their layer is most of the image and rarely changes.
COPY requirements requirements
COPY deploy/trim_packages.py ./
RUN /usr/local/bin/pip install --no-compile --require-hashes -r requirements/serve.lock \
    && /usr/local/bin/pip install --require-hashes --target tools -r requirements/build.lock \
    && python trim_packages.py /opt/venv/lib/python3*/site-packages
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY model model
COPY clients clients
COPY clients/python/unet_client clients/python/unet_client
RUN PYTHONPATH=tools /usr/local/bin/pip install --no-compile --no-deps --no-build-isolation . \
    && python -m compileall -q --invalidation-mode unchecked-hash /opt/venv/lib

FROM build AS build-cuda
# torch has files for other versions of Python, which do not compile.
RUN /usr/local/bin/pip install --no-compile --require-hashes -r requirements/torch.lock \
    && { python -m compileall -q --invalidation-mode unchecked-hash /opt/venv/lib || true; }

FROM python:${PYTHON}-slim${DIGEST} AS base
# Nothing can be installed into the image that serves.
RUN python -m pip uninstall --quiet --yes --root-user-action=ignore pip setuptools wheel \
    && rm -rf /usr/local/lib/python3*/ensurepip
# HOME and USER stand for an entry in /etc/passwd, which an assigned user does not have (OpenShift).
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    USER=unet \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    UNET_HOST=0.0.0.0 \
    UNET_PORT=8000 \
    UNET_WEIGHTS_DIR=/srv/weights
LABEL org.opencontainers.image.title="unet-server" \
      org.opencontainers.image.description="U-Net segmentation over HTTP" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="MIT"
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
USER 10001:10001
ARG REVISION=
LABEL org.opencontainers.image.revision=$REVISION

# A plain `docker build` makes the last stage.
FROM base AS cpu
COPY --from=build /opt/venv /opt/venv
COPY weights weights
USER 10001:10001
ARG REVISION=
LABEL org.opencontainers.image.revision=$REVISION
