"""New classes of a class-conditional base (DiffScaler, arXiv 2404.09976, section 3.1); any method may have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import DoesNotFit, SctoolError
from ..sites.inputs import ClassRows, class_tables
from ..sites.site import Call, Features, Inputs


class NewClasses(nn.Module):
    """Eq. 1: rows W_{N+2} ... W_{N+M+1} of the class table, which start as the null row W_uc.

    `offsets` (tables, M, D) is what is added to the null row; the tables of a tied denoiser are one.
    """

    method = "classes"
    conditions = ()
    reads_inputs = False

    def __init__(self, denoiser: nn.Module, count: int, vae_scale: int) -> None:
        super().__init__()
        try:
            self.sites: list[ClassRows] = class_tables(denoiser)
        except SctoolError as error:
            raise DoesNotFit(str(error)) from error
        self.vae_scale = vae_scale
        self.offsets = nn.Parameter(torch.zeros(len(self.sites), count, self.sites[0].width))

    def encode(self, hints: dict[str, Tensor], inputs: Inputs | None = None) -> Features:
        """Nothing: classes take no hints."""
        return {}

    def delta(self, site: ClassRows, x: Tensor, call: Call) -> Tensor | None:
        """What makes the null row x (B, D) the row of a new class; 0 for the base's classes. `call.given` are ids."""
        assert call.given is not None
        own, rows = call.given - site.rows, self.offsets[self.sites.index(site)]
        return torch.where((own >= 0)[:, None], rows[own.clamp(min=0)], 0).to(x.dtype)

    def edited(self, site: ClassRows, x: Tensor, call: Call) -> None:
        """Rows are added."""
