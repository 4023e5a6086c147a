"""The advice of `spec.advice` on a live model."""

from numbers import Integral

from torch import nn

from lora_inject.errors import ConfigError, check_type
from lora_inject.layers.candidates import inventory
from lora_inject.layers.survey import Survey
from lora_inject.spec.advice import advised
from lora_inject.spec.config import Config


def advise(model: nn.Module, budget: int) -> Config:
    """Return a config to start from: the largest uniform rank on all linear layers that fits.

    The rank is at most the smaller side of the largest layer: a higher one adds nothing.
    No batch is needed, and the model may be on the meta device. At an equal number of parameters
    this config is hard to beat; the learning rate matters more.

    Args:
        model: The model.
        budget: Largest number of parameters in A and B.

    Returns:
        The config, with its counts in `expect`.

    Raises:
        ConfigError: The budget is not a whole number.
        MatchError: Not even rank 1 fits, or there are no linear layers.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> config = advise(net, 70)
        >>> config.rank, config.alpha, config.expect.lora
        (3, 6.0, 66)
    """
    remedy = "Give a whole number of parameters, such as 100_000"
    check_type("advise, budget", budget, Integral, remedy, ConfigError)
    return advised(inventory(Survey(model)), budget)
