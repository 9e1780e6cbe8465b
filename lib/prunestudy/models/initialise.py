"""How the convolutions of the residual nets and VGG are initialised."""

from torch import nn


class HeInitialised(nn.Module):
    """A net whose convolutions start as He et al. ("Delving deep into rectifiers", 2015) have it.

    Its constructor calls `initialise` last; whoever wants the same shape afresh may call it again.
    """

    def initialise(self) -> None:
        """Draw the convolutions' weights, normal by fan-out, from torch's own generator."""
        for layer in self.modules():
            # A net of shapes alone has no numbers, and torch takes seconds to find that out.
            if isinstance(layer, nn.Conv2d) and not layer.weight.is_meta:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
