"""Mending MLflow's sqlite file, which holds absolute paths, after its folder was moved or copied."""

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
    """Replace the folders that the sqlite ``file`` was in by the one it is in. Otherwise MLflow would go on in the
    old folder, find none of the models, and have each run twice. If the file is no database, MLflow will say so."""
    home = str(file.absolute().parent)
    with suppress(sqlite3.Error), closing(sqlite3.connect(file, timeout=60)) as database, database:
        found = database.execute("SELECT name, artifact_location FROM experiments").fetchall()
        ends = ((place, f"/{ARTIFACTS}/{name}") for name, place in found)
        for old in {place.removesuffix(end) for place, end in ends if place.endswith(end)} - {home}:
            for table, column in PLACES:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (home, len(old) + 1, len(old) + 1, f"{old}/"),
                )
