"""Which data a trial names: the SHA-256 over the prepared arrays, known beforehand for each name.

The fingerprint is part of every trial's key, and ``dvq.data`` refuses to write arrays that differ from it.
"""

from typing import Literal

DataName = Literal["cifar10", "cifar10-sample"]

FINGERPRINTS: dict[str, str] = {
    "cifar10": "fc090d887c1f7dca203842407178255c8b67625c2a38205f2a7302941d22d5a6",
    "cifar10-sample": "6433030c7ebd526df9271565e847e6046775e314350868fc358ae27720059334",
}

LABELS: dict[str, str] = {
    "cifar10": "CIFAR-10",
    "cifar10-sample": "bundled sample of CIFAR-10 (not comparable with published numbers)",
}
