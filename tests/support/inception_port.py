"""The pretrainedmodels port of BN-Inception, the independent reference."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the port compares strings with `is`
    from pretrainedmodels.models.bninception import BNInception as Port
    from pretrainedmodels.models.bninception import pretrained_settings
    from pretrainedmodels.utils import TransformImage

__all__ = ["Port", "TransformImage", "pretrained_settings"]
