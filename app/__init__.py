"""The service: bytes of an image in, a mask out. Imports `model`, never the reverse."""

import sys

# Importing OpenVINO reports its use to Google Analytics, from a process that is forked for each
# report. It does without where this package cannot be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
