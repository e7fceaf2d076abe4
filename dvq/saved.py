"""A trained model as files: ``model.safetensors`` and ``trial.json`` in a folder."""

import hashlib
import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Size, Tensor, dtype, nn

from dvq import DvqError, disk
from dvq.config import trial as make_trial
from dvq.model import Model
from dvq.randomness import seeded
from dvq.trial import Trial, values


def save(model: Model, folder: Path | str) -> None:
    """Write the weights (model.safetensors, their SHA-256 in it) and the trial (trial.json) to ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trial.json").write_text(json.dumps(values(model.trial), indent=1) + "\n", encoding="utf-8")
    write_weights(model, folder / "model.safetensors")


def write_weights(module: nn.Module, file: Path) -> None:
    """Write a module's parameters and buffers, and their SHA-256, to ``file``, completely or not at all."""
    weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    disk.replace(file, serialize(weights, {"sha256": _digest(weights)}))


def publish(model: Model, summary: dict[str, Any], folder: Path) -> None:
    """Write model/, completely or not at all; it replaces a model of as many or fewer steps.

    Raises:
        DvqError: it cannot be written (a full disk, say).
    """
    try:
        with disk.whole(folder / "model") as partial:
            save(model, partial)
            (partial / "training.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DvqError(
            f"the model cannot be written to {folder} ({error}); when there is room training goes on from its last "
            "checkpoint"
        ) from None


def load(path: str | Path) -> Model:
    """A trained model, in evaluation mode, on the CPU.

    Args:
        path: a folder that :func:`save` wrote (a trial's ``model``), or an address that an installed package
            knows how to fetch (the entry points of the group ``dvq.load``, by scheme): with this project
            installed, MLflow's ``models:/…`` and ``runs:/…``, from the server or database that
            ``MLFLOW_TRACKING_URI`` names.

    Returns:
        a :class:`dvq.model.Model`: ``encode``, ``decode``, ``reconstruct``, ``sample``, ``bits_per_dim``, on
        images uint8 (B, H, W, 3) and codes (B, H/4, W/4, K).

    Raises:
        DvqError: there is no model, it is damaged or of another network than the trial's, or nothing knows the
            address.
    """
    folder = find(path)
    for name in ("trial.json", "model.safetensors"):
        if not (folder / name).is_file():
            inside = (folder / "model" / name).is_file()
            hint = (
                f"; give {folder / 'model'}" if inside else "; give the folder 'model' of a trial in a store"
            )
            raise DvqError(f"{folder}: no model here: {name} is missing{hint}")
    try:
        trial = _trial(folder / "trial.json")
        model = _network(trial, folder)
        read_weights(model, folder / "model.safetensors")
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise damaged(folder, error) from None
    model.fix_normalization(trial.normalization_fixed_at(trial.steps - 1))
    return model.eval()


def find(path: str | Path) -> Path:
    """The folder that ``path`` names, which an address is fetched to."""
    scheme, separator, _ = str(path).partition(":/")
    return Path(_fetch(scheme, str(path)) if separator else path)


def read_weights(module: nn.Module, file: Path) -> None:
    """Load what :func:`write_weights` wrote.

    Raises:
        DvqError: they are of another network.
        OSError, ValueError, SafetensorError: the file is damaged.
    """
    with safe_open(file, "pt") as opened:
        written = (opened.metadata() or {}).get("sha256")
    weights = load_file(file)
    if _kinds(weights) != _kinds(module.state_dict()):
        raise DvqError(
            f"{file.parent}: {file.name} holds another network than trial.json describes; if its encoder or "
            "decoder was replaced, build it so, and give load_state_dict what safetensors.torch.load_file reads"
        )
    if written not in (None, _digest(weights)):  # older models do not say
        raise ValueError(f"{file.name} does not have the SHA-256 that it was written with")
    module.load_state_dict(weights)


def damaged(folder: Path, error: Exception) -> DvqError:
    """The error for a damaged file of a model."""
    return DvqError(f"{folder}: the model's files are damaged: {str(error).splitlines()[0]}")


def _trial(file: Path) -> Trial:
    fields = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"{file.name} holds no trial")
    try:
        return make_trial(fields, where=str(file))
    except DvqError as error:  # whose advice is for those who write a sweep
        raise DvqError(
            f"{str(error).partition('; ')[0]}; load the model with the code that trained it, its estimator in "
            "dvq.estimators.ESTIMATORS"
        ) from None


def _network(trial: Trial, folder: Path) -> Model:
    try:
        with seeded(0):  # whatever torch's defaults are, and of its random numbers takes none
            return Model(trial)
    except (MemoryError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["out of memory"])[0]
        raise DvqError(f"{folder}: the network of trial.json cannot be made: {reason}") from None


def _kinds(weights: dict[str, Tensor]) -> dict[str, tuple[Size, dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


def _digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 over the tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        array: Any = tensor.cpu().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def _fetch(scheme: str, address: str) -> str:
    for loader in entry_points(group="dvq.load", name=scheme):
        try:
            fetch = loader.load()
        except ImportError as error:
            raise DvqError(
                f"{address}: what knows such addresses, {loader.value}, does not load ({error})"
            ) from None
        return str(fetch(address))
    raise DvqError(f"{address}: nothing here knows addresses that begin with '{scheme}:/'; give a folder")
