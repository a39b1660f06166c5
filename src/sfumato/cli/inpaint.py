"""`sfumato inpaint`: an image and a mask in; the white part of the mask is drawn anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sfumato.cli._options import TaskOptions, parse
from sfumato.cli._run import run_task
from sfumato.errors import UserError


@dataclass(frozen=True)
class Inpaint(TaskOptions):
    """Draw a part of an image anew."""

    task = "inpaint"

    mask: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(required)")] = None
    """Image of the same size: white is drawn anew, black stays, grey is blended.

    Levels within 16 of black or white count as such. White paint on transparency is a mask too.
    OpenAI's convention is the reverse (alpha 0 is drawn anew): invert the alpha of such masks.
    """
    strength: float = 1.0
    """Share of the steps to run, in (0, 1]. Below 1 the start is the image under the mask."""
    paste: bool = True
    """Copy pixels outside of the mask from the image, instead of decoding them."""

    @property
    def keeps_original(self) -> bool:
        """True where pixels are copied into a PNG of their own."""
        return self.paste and not self.grid


def inpaint(arguments: Sequence[str]) -> None:
    """Draw the white part of a mask anew; the other pixels of the image stay as they are."""
    options = parse(Inpaint, arguments, "inpaint")
    if options.mask is None:
        raise UserError("inpaint needs --mask IMAGE: white is drawn anew, black stays")
    run_task(options)
