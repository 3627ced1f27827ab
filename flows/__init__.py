"""Orchestration: DVC decides what runs, Prefect schedules it, MLflow records it. No arithmetic."""

import os
from pathlib import Path

# Set before any of the tools is imported: each reads its variables once, at import.
TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",  # MLflow accepts only this word
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ITERATIVE_DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
# What the tools remember stays in the folder of the project, not in the home of the user.
AT_HOME = {"PREFECT_HOME": str(Path.cwd() / ".prefect")}
# A flow without a server starts one for itself; on a busy machine that takes longer than Prefect waits, 20 s.
PATIENT = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
for name, value in (TELEMETRY_OFF | AT_HOME | PATIENT).items():
    os.environ.setdefault(name, value)
