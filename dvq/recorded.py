"""A training step for a GPU: recorded once as a CUDA graph and replayed, so that no step waits for the host.

Step by step, a GPU would wait for 250 to 300 launches of small kernels. Here the images stay on the device as
uint8, the order of the next steps' images too, and a step's number is a scalar there; the host sends a seed,
a number and one launch, and waits only where the training loop reads its curves.
"""

import gc
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dvq.randomness import minibatch, noise_seed

if TYPE_CHECKING:
    from dvq.trainer import Trainer

BLOCK = 256  # steps whose images are named to the device at once
WARM_UP = 3  # steps that PyTorch asks for before it records


class Recorded:
    """The steps of ``trainer``, with all that they read in fixed places on its device."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer, device = trainer, trainer.device
        self.images = torch.from_numpy(np.array(trainer.images)).to(device)
        self.index = torch.zeros(trainer.trial.batch_size, dtype=torch.long, device=device)
        self.now = torch.zeros((), dtype=torch.float64, device=device)
        self.terms = torch.zeros(3, dtype=next(trainer.model.parameters()).dtype, device=device)
        self.generator = torch.Generator(device)
        self.first, self.block = 0, self.index.new_empty(0, 0)
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self, step: int) -> Tensor:
        """As :meth:`dvq.trainer.Trainer.step`."""
        if self.graph is None and self.images.is_cuda:
            self.graph = self._record(step)
        self.feed(step)
        if self.graph is None:
            self.advance()
        else:
            self.graph.replay()
        return self.terms.clone()

    def forget(self) -> None:
        """Record anew at the next step, because the recorded one is out of date."""
        self.graph = None

    def feed(self, step: int) -> None:
        """Put the images' places, the noise's seed and the number of ``step`` where the recorded step reads them."""
        trial = self.trainer.trial
        if not self.first <= step < self.first + len(self.block):
            size = (trial.batch_size, len(self.images), trial.seed)
            order = np.stack([minibatch(at, *size) for at in range(step, step + BLOCK)])
            self.first, self.block = step, torch.from_numpy(order).to(self.index.device)
        self.index.copy_(self.block[step - self.first])
        self.now.fill_(step)
        self.generator.manual_seed(noise_seed(trial.seed, step))

    def advance(self) -> None:
        """The step itself: nothing in it may wait for the device."""
        images = self.images.index_select(0, self.index)
        terms = self.trainer.advance(images, self.generator, self.now)
        if len(self.terms) != len(terms):  # at the first step, which is not recorded: the loss logs numbers
            self.terms = self.terms.new_zeros(len(terms))
        self.terms.copy_(terms)

    def _record(self, step: int) -> torch.cuda.CUDAGraph:
        """Warm up, put everything back, and record; the model is as before.

        Each graph has a stream of its own. On the stream that PyTorch would use for all graphs of a process, cuBLAS
        has one workspace, which is freed with the first graph that is. And no graph may be freed while another is
        recorded.
        """
        gc.collect()  # frees trainers out of use: each is in a reference cycle with its recorded step
        before = {name: tensor.clone() for name, tensor in self.trainer.tensors()}
        self.feed(step)
        stream = torch.cuda.Stream(self.images.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.advance()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for name, tensor in self.trainer.tensors():  # the optimizer's new ones begin at 0
                tensor.copy_(before[name]) if name in before else tensor.zero_()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self.advance()
        finally:
            if collecting:
                gc.enable()
        return graph
