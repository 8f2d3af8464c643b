"""Options of the token view."""

from typing import Literal

from pydantic import Field

from prefdistill.core.options import Section


class Weights(Section):
    """What the token view multiplies margins by, and how it adds up psi; the defaults are those of TVKD."""

    alpha: float = Field(0.7, description="Weight of the shaping margin on the page.")
    beta: float = Field(0.1, description="Weight of the DPO margin on the page.")
    discount: float = Field(1.0, ge=0, le=1, description="gamma of psi.")
    terminal: Literal["last", "bootstrap", "zero"] = Field("last", description="What is used as V after an end token.")
