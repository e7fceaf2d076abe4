"""What all tests share: one thread, as in a trial, so that numbers and times do not hang on the machine."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
