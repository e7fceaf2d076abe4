"""A trial: one validated point of a sweep, as one flat frozen configuration."""

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

import dvq
from dvq import fingerprints
from dvq.fingerprints import DataName, Shape

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from dvq.latents import Categorical
    from dvq.model import Model

    Step = int | Tensor

Split = Literal["test", "tune"]
Whole = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
TwoOrMore = Annotated[int, Field(ge=2, lt=2**31)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Unkeyed: dict[str, Any] = {"key": False}  # of a field that changes no number: it is not in the trial's key
NEEDS = "needs"  # names the field without which a field does nothing


def _none_or_several(draws: int) -> int:
    if draws == 1:
        raise ValueError("one draw has no variance; give 2 or more, or 0")
    return draws


class Loss(NamedTuple):
    """What an estimator returns for one minibatch of B images."""

    surrogate: "Tensor"
    """scalar [nats an image]: the thing to differentiate; its value need not mean anything"""
    distortion: "Tensor"
    """scalar [nats an image], detached: the batch's mean −log p(x|z)"""
    rate: "Tensor"
    """scalar [nats an image], detached: the batch's mean KL(q(z|x) ‖ p(z))"""
    logged: "Mapping[str, Tensor | float]" = MappingProxyType({})
    """numbers of one's own to follow, of the same names at every step: their means over ``log_every`` steps stand
    beside the training curves as ``train/<name>``. A mean that is not finite is left out"""


def progress(step: "Step", length: int) -> "float | Tensor":
    """step / length, at least 0 and at most 1."""
    done = step / length
    return min(1.0, max(0.0, done)) if isinstance(done, float) else done.clamp(0, 1)


class Trial(BaseModel):
    """What every estimator's configuration shares: the data, the network, the optimization.

    Defaults are the paper's settings ("Continuous Relaxation Training of Discrete Latent Variable Image
    Models", NeurIPS 2017 workshop on Bayesian Deep Learning); where it is silent the field says so, and why
    this was chosen.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    estimator: str
    data: DataName = "cifar10"
    """cifar10, cifar10-sample, or as ``make data`` names images of one's own, ``birds@0123456789abcdef``, or
    ``digits@28x28x1-0123456789abcdef`` where they are not of 32×32 in colour"""
    split: Split = "test"
    """test: train on all training images, evaluate on the test images. tune: train without the images held
    out of the training set and evaluate on those; every choice is made here, never on test images."""
    seed: Whole = 0

    num_latents: Count = 8
    """K, latent variables at each of the 8×8 positions (of images of H×W: H/4 × W/4)"""
    code_dim: Count = 32
    """D, dimensions of a code vector; the paper does not say"""
    features: Count = 256
    """F, feature maps in the encoder's and decoder's layers"""
    residual_blocks: Whole = 2
    """the paper's "two layers of two residual blocks", read as van den Oord et al. 2017 have them; read as 2 × 2 it
    is 4, the first thing to try at full size"""
    normalization: Literal["batch", "none"] = "batch"
    """the paper does not say; with batch norm a short run got further (6.99 instead of 7.21 bits/dim after 300 steps,
    on 500 test images; ``pipeline/sweeps/tune.yaml`` compares on held-out ones)"""
    normalization_until: Count | None = None
    """steps after which batch normalization's means and variances are fixed, in training as in evaluation; None:
    training uses those of each minibatch to the end. Ioffe & Szegedy 2015, "Batch Normalization", fix them only after
    training; those of a minibatch tell every image something of the others"""
    output_head: Literal["1x1", "transposed"] = "1x1"
    """how the 32×32×3×256 logits are made: a transposed convolution to F maps and a 1×1 one to 768, or one
    transposed convolution straight to 768; the paper does not say"""

    steps: Count = 100_000
    """the paper does not say; no schedule looks at the last step, so that a longer trial goes on from this one"""
    batch_size: Count = 64
    learning_rate: Positive = 5e-4
    decay_after: Whole | None = None
    """steps after which the learning rate falls, by half every ``decay_half_life``; None: it is constant, as in
    the paper. Like the other schedules it does not depend on the last step: longer trials go on from shorter ones."""
    decay_half_life: Count = Field(default=10_000, json_schema_extra={NEEDS: "decay_after"})

    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """of the convolutions and the head's factors in training on a GPU; the other products of the backward pass take
    their factors as TF32 then. Likelihood, rate, optimizer and all of evaluation are float32, and so are the logits
    of a 1×1 head"""
    cpu_precision: Literal["bfloat16", "float32"] = "float32"
    """the same on a CPU. bfloat16 is for one with AMX (Intel's since Sapphire Rapids: ``amx_bf16`` in /proc/cpuinfo)
    or AVX512-BF16 (AMD's since Zen 4: ``avx512_bf16``), and many feature maps, where it is 1.8 to 2.9 times as
    fast; elsewhere it is slower. Here the logits are rounded to it too, which moves the likelihood by less than 1e-4
    bits/dim"""

    bound_samples: Count = 16
    """S of the importance-weighted bound L_S, which the final evaluation gives beside the ELBO"""

    log_every: Count = Field(default=100, json_schema_extra=Unkeyed)
    """steps between points of the training curves"""
    evaluate_every: Count = Field(default=5_000, json_schema_extra=Unkeyed)
    """steps between evaluations on all evaluation images"""
    checkpoint_every: Count = Field(default=20_000, json_schema_extra=Unkeyed)
    """steps between checkpoints, beside those that are due by time"""
    checkpoint_seconds: Positive = Field(default=60.0, json_schema_extra=Unkeyed)
    """seconds after which a checkpoint is due whatever the steps"""

    @model_validator(mode="after")
    def _check_normalization(self) -> "Trial":
        if self.normalization == "none" and self.normalization_until is not None:
            raise ValueError("normalization: none has no statistics to fix; leave normalization_until out")
        if self.normalization == "batch" and self.batch_size * self.positions == 1:
            raise ValueError("a batch of one position has no variance to normalize by; raise batch_size")
        return self

    def learning_rate_at(self, step: "Step") -> "float | Tensor":
        """The learning rate at a training step."""
        if self.decay_after is None:
            return self.learning_rate
        halvings = (step - self.decay_after) / self.decay_half_life
        return self.learning_rate * 0.5 ** (
            max(0.0, halvings) if isinstance(halvings, float) else halvings.clamp(min=0)
        )

    def normalization_fixed_at(self, step: int) -> bool:
        """Whether batch normalization's means and variances are fixed at a training step."""
        return self.normalization_until is not None and step >= self.normalization_until

    @property
    def image_shape(self) -> Shape:
        """Height, width and channels of the images, as their name says."""
        return fingerprints.shape(self.data)

    @property
    def grid(self) -> tuple[int, int]:
        """The positions of the latent variables: H/4 × W/4, after two convolutions of stride 2."""
        height, width, _ = self.image_shape
        return height // 4, width // 4

    @property
    def positions(self) -> int:
        """P, how many positions there are."""
        return math.prod(self.grid)

    @property
    def images_at_once(self) -> int:
        """How many images go through the network at a time in evaluation: the fewer, the larger they are, to bound
        memory."""
        height, width, _ = self.image_shape
        return max(1, 100 * 32 * 32 // (height * width))

    @property
    def bits_per_nat(self) -> float:
        """1 / (H·W·3 ln 2), in gray 1 / (H·W ln 2): bits/dim = this · nats an image."""
        return 1 / (math.prod(self.image_shape) * math.log(2))

    def key(self) -> str:
        """The trial's name in the store: its family, and how many steps of it."""
        return f"{self.family()}-{self.steps}"

    def family(self) -> str:
        """A hash of all that decides the numbers except the number of steps: longer trials go on from shorter ones of
        their family, since no schedule depends on the last step.

        It is made of the fields that differ from their defaults (so that a new field with a neutral default
        invalidates nothing), the data's fingerprint and ``dvq.NUMERICS``, without the fields that matter after
        training only.
        """
        after = ("steps", "autoregressive_steps")
        chosen = {name: value for name, value in self.changed().items() if name not in after}
        chosen |= {"estimator": self.estimator, "data": fingerprints.of(self.data), "numerics": dvq.NUMERICS}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]

    def changed(self) -> dict[str, Any]:
        """The fields that decide numbers and differ from their defaults, as plain JSON values."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude=self.unkeyed())

    @classmethod
    def unkeyed(cls) -> set[str]:
        """The names of the fields that change no number."""
        return {name for name, field in cls.model_fields.items() if field.json_schema_extra == Unkeyed}

    def describe(self) -> str:
        """The short name without what a sweep varies beside it: ``gs-soft-c512-k16-s0``."""
        codes = f"-c{self.num_codes}" if isinstance(self, Discrete) else ""
        return f"{self.estimator}{codes}-k{self.num_latents}-s{self.seed}"

    @abstractmethod
    def latents(self) -> "nn.Module":
        """The latent variables' own parameters: a class of ``dvq.latents`` or ``dvq.quantizers``."""

    @abstractmethod
    def loss(self, model: "Model", images: "Tensor", generator: "Generator", step: "Step") -> Loss:
        """The surrogate and the ELBO's terms for uint8 ``images`` (B, H, W, 3) at training step ``step``,
        which is a number, or a scalar on the device where the step is recorded once and replayed. So nothing
        here may wait for the device (``item()``, ``nonzero()``, a branch on a tensor)."""


class Warmed(Trial):
    """What the estimators with a KL term share: its weight may rise from 0, or be another than 1."""

    kl_warmup: Whole = 0
    """steps over which the KL's weight in the surrogate rises linearly from 0; 0: it is whole from the start, as
    in the paper"""
    final_kl_weight: Positive = 1.0
    """what it rises to: β of a β-VAE (Higgins et al. 2017), by which a grid traces rate against distortion (Alemi
    et al. 2018, "Fixing a Broken ELBO"). Evaluation always weighs the KL with 1"""

    def kl_weight(self, step: "Step") -> "float | Tensor":
        """The KL's weight at a training step."""
        return self.final_kl_weight * (progress(step + 1, self.kl_warmup) if self.kl_warmup else 1.0)


class Discrete(Trial):
    """What the estimators of discrete latent variables share: how many codes, and their prior."""

    num_codes: TwoOrMore = 512
    """C, categories of each latent variable"""
    prior: Literal["trained", "uniform"] = "trained"
    """trained: by maximum likelihood along with the model, and counted in the rate; uniform: 1/C"""
    autoregressive_steps: Whole = 0
    """the final evaluation also fits an autoregressive prior to the training images' codes, in so many steps, gives
    the bits/dim under it, and keeps it beside the model (``dvq.autoregressive``); 0: it does not. A trial that was
    trained without it, by an earlier sweep, is not trained again. Forecasts leave out what it costs"""

    def key(self) -> str:
        """The trial's name in the store, which tells the steps of an autoregressive prior too."""
        return super().key() + (f"a{self.autoregressive_steps}" if self.autoregressive_steps else "")


class LearnedCodes(Discrete):
    """What the estimators whose codebooks are learned share: how these begin."""

    codebook_std: Positive | None = None
    """σ of the codebooks' normal initialization; None: √(16 / (D·s)), which keeps 2Dσ²s, the spread of the
    posterior's logits, at 32. With a smaller one the posterior is so close to uniform that training takes
    hundreds of steps to leave it."""
    codebook_init: Literal["normal", "kmeans"] = "normal"
    """kmeans: the codebooks begin at the clusters of the first minibatches' encodings, so that no code is dead
    from the start; the encodings' spread then decides that of the logits"""


class Stochastic(Warmed, LearnedCodes):
    """What the estimators of a categorical posterior share."""

    distance_scale: Positive = 1.0
    """s in the posterior's logits −s‖v − m‖²"""
    probe_draws: Annotated[Whole, AfterValidator(_none_or_several)] = Field(
        default=0, json_schema_extra=Unkeyed
    )
    """at each evaluation along training, look at the gradient's bias and variance with so many draws (2 or
    more; 0: off); it costs passes of the decoder and changes nothing"""

    def latents(self) -> "Categorical":
        from dvq.latents import Categorical

        return Categorical(self)


def values(trial: Trial) -> dict[str, Any]:
    """All fields as plain JSON values."""
    return trial.model_dump(mode="json")
