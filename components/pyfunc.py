"""The model that MLflow loads: ``dvq.load`` behind the pyfunc interface, with nothing pickled."""

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext

import dvq


class DiscreteModel(PythonModel):  # type: ignore[misc]
    """``predict(images)`` gives codes (N, H/4, W/4, K) for uint8 images (N, H, W, 3); the parameter ``method``
    "reconstruct" gives uint8 images instead."""

    def load_context(self, context: PythonModelContext) -> None:
        self.model = dvq.load(context.artifacts["model"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002  # MLflow reads hints
        method = (params or {}).get("method", "encode")
        if method not in ("encode", "reconstruct"):
            raise ValueError(f"method is 'encode' or 'reconstruct', not '{method}'")
        images = torch.from_numpy(np.ascontiguousarray(model_input))
        return getattr(self.model, method)(images).numpy()


mlflow.models.set_model(DiscreteModel())
