"""`awq.modules.act.ScaledActivation`: an activation whose output is divided per channel."""

from awq.nn.activation import ScaledActivation

__all__ = ["ScaledActivation"]
