"""Correct the absolute paths in MLflow's sqlite file after its folder was moved or copied."""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

ARTIFACTS = "mlflow-artifacts"
"""the folder beside the file"""
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("tags", "value"),  # dvq.store
)
"""tables and columns that hold paths"""


def update_paths(file: Path) -> None:
    """Replace the former folders of the sqlite ``file`` by its present one. Otherwise MLflow would go on in the old
    folder, find no models, and make each run twice. A file that is no database is left for MLflow to report."""
    home = str(file.absolute().parent)
    with suppress(sqlite3.Error), closing(sqlite3.connect(file, timeout=60)) as database, database:
        experiments = database.execute("SELECT name, artifact_location FROM experiments").fetchall()
        endings = ((place, f"/{ARTIFACTS}/{name}") for name, place in experiments)
        for old in {place.removesuffix(end) for place, end in endings if place.endswith(end)} - {home}:
            for table, column in PLACES:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (home, len(old) + 1, len(old) + 1, f"{old}/"),
                )
