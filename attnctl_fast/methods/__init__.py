"""Published methods of attention control, one frozen dataclass each."""

from ..attach.protocol import Edited, Method, Run
from .attend_and_excite import AttendAndExcite
from .attention_regulation import AttentionRegulation
from .composable_diffusion import ComposableDiffusion
from .composition import Composition, Edit
from .conform import CONFORM
from .dense_diffusion import DenseDiffusion
from .energy_context import EnergyContext
from .latent_guidance import GuidanceContext, LatentGuidance
from .nag import NAG
from .pladis import PLADIS
from .regions import Regions
from .syngen import SynGen
from .taca import TACA
from .tsam import TSAM

__all__ = [
    "AttendAndExcite",
    "AttentionRegulation",
    "CONFORM",
    "ComposableDiffusion",
    "Composition",
    "DenseDiffusion",
    "Edit",
    "Edited",
    "EnergyContext",
    "GuidanceContext",
    "LatentGuidance",
    "Method",
    "NAG",
    "PLADIS",
    "Regions",
    "Run",
    "SynGen",
    "TACA",
    "TSAM",
]
