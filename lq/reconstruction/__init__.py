"""Post-training reconstruction: AdaRound, BRECQ, QDrop, MRECG, NWQ, APHQ, FIMA-Q and GLF-Q as choices of one engine."""

from lq.reconstruction.aph import APHLoss as APHLoss
from lq.reconstruction.dplr import DPLRLoss as DPLRLoss
from lq.reconstruction.drop import Annealed as Annealed
from lq.reconstruction.drop import Constant as Constant
from lq.reconstruction.global_loss import GlobalLoss as GlobalLoss
from lq.reconstruction.granularity import Merges as Merges
from lq.reconstruction.losses import FisherLoss as FisherLoss
from lq.reconstruction.losses import KLLoss as KLLoss
from lq.reconstruction.losses import LpLoss as LpLoss
from lq.reconstruction.losses import RelativeLoss as RelativeLoss
from lq.reconstruction.reconstruct import reconstruct as reconstruct
from lq.reconstruction.report import Reconstruction as Reconstruction
from lq.reconstruction.report import UnitReport as UnitReport
from lq.reconstruction.units import Unit as Unit
