"""The estimators: one file each, holding its frozen configuration and its loss.

To add one, write its file and name it in the list below. The files import torch where they compute, not
where they are read: a configuration must be checked in milliseconds.
"""

from dvq.estimators.fsq import FSQ
from dvq.estimators.gaussian import Gaussian
from dvq.estimators.gs_hard import GSHard
from dvq.estimators.gs_soft import GSSoft
from dvq.estimators.nvil import NVIL
from dvq.estimators.reinmax import ReinMax
from dvq.estimators.rloo import RLOO
from dvq.estimators.vimco import VIMCO
from dvq.estimators.vq_ema import VQEMA
from dvq.estimators.vq_loss import VQLoss
from dvq.trial import Trial

ESTIMATORS: list[type[Trial]] = [GSSoft, GSHard, ReinMax, VIMCO, NVIL, RLOO, VQEMA, VQLoss, FSQ, Gaussian]
