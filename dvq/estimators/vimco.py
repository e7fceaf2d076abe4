"""VIMCO: the score function on S samples, each sample's baseline made from the others."""

from typing import TYPE_CHECKING, Literal

from dvq.trial import Loss, Stochastic, TwoOrMore

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from dvq.latents import Categorical
    from dvq.model import Model
    from dvq.trial import Step


class VIMCO(Stochastic):
    """VIMCO: gradients of the S-sample bound L_S = E log (1/S) Σ_s exp w_s, unbiased with ``normalization: none``.

    In training, batch normalization makes an image's likelihood depend on the z of the other images and samples,
    which its learning signal does not account for; that ends once the statistics are fixed (``normalization_until``).

    w_s = log p(x, z_s) − log q(z_s|x);  L̂ = logsumexp(w) − log S;  L̂_{−s} is L̂ with w_s replaced by the
    mean of the other w. With w̃ = softmax(w),

        surrogate = −Σ_s stopgrad(L̂ − L̂_{−s})·log q(z_s|x) − Σ_s stopgrad(w̃_s)·w_s.

    It trains L_S, which for S > 1 is not the ELBO by which models are compared.

    Source: Mnih & Rezende 2016, "Variational Inference for Monte Carlo Objectives", eqs. 9 to 11.
    """

    estimator: Literal["vimco"] = "vimco"
    samples: TwoOrMore = 4
    """S; each costs a pass through the decoder"""
    backward: Literal["all", "one"] = "all"
    """which samples' decoder gradients are taken: all, weighted by w̃, as Mnih & Rezende do; or one, drawn in
    proportion to w̃, which is just as unbiased (but for batch normalization, whose statistics are then that sample's),
    noisier, and a good third less work at S = 4"""

    def loss(self, model: "Model", images: "Tensor", generator: "Generator", step: "Step") -> Loss:
        import torch

        from dvq.latents import per_image

        latents: Categorical = model.latents
        S, B, beta = self.samples, len(images), self.kl_weight(step)
        codes, each_log_q, rate = latents.score(model.encoder(images), S, generator)  # (S, K, N)
        log_q = per_image(each_log_q, B)  # (S, B)
        log_p = torch.stack([latents.log_p(z, B) for z in codes])
        log_ratio = beta * (log_p - log_q)
        weighted, weights, signal, nll = self._decode(model, images, codes, log_ratio.detach(), generator)
        score = (signal * log_q).sum() + (weights * log_ratio).sum()
        return Loss((weighted - score) / B, nll.mean(), rate / B)

    def _decode(
        self,
        model: "Model",
        images: "Tensor",
        codes: "Tensor",
        log_ratio: "Tensor",
        generator: "Generator",
    ) -> "tuple[Tensor, Tensor, Tensor, Tensor]":
        """Σ w̃_s·(−log p(x|z_s)) to differentiate, w̃ (S, B), L̂ − L̂_{−s} (S, B) and −log p(x|z_s) (S·B,)."""
        import torch

        from dvq.relaxation import gumbel

        vectors = model.latents.vectors(codes.transpose(0, 1).flatten(1))  # (K, S·N, D)
        repeated, B = images.repeat(len(codes), 1, 1, 1), len(images)
        if self.backward == "all":
            weighted, nll = model.distortion(
                vectors, repeated, lambda nll: (log_ratio - nll.view(-1, B)).softmax(0).flatten()
            )
            w = log_ratio - nll.view(-1, B)
        else:
            with torch.no_grad():
                nll = model.distortion(vectors, repeated)[1]
            w = log_ratio - nll.view(-1, B)
            chosen = gumbel(w, generator).add_(w).argmax(0)  # (B,), s ~ softmax(w)
            each = codes.unflatten(2, (B, -1))  # (S, K, B, P)
            z = each.gather(0, chosen.view(1, 1, B, 1).expand_as(each[:1]))[0].flatten(1)  # (K, N)
            weighted = model.distortion(model.latents.vectors(z), images)[0]
        return weighted, w.softmax(0), leave_one_out(w), nll


def leave_one_out(w: "Tensor") -> "Tensor":
    """L̂ − L̂_{−s}, the learning signal of each sample: (S, B) → (S, B)."""
    import torch

    S = len(w)
    others = (w.sum(0) - w) / (S - 1)  # (S, B), the log of the geometric mean of the others
    replaced = torch.where(
        torch.eye(S, dtype=torch.bool, device=w.device).unsqueeze(-1), others.unsqueeze(1), w
    )
    return w.logsumexp(0) - replaced.logsumexp(1)
