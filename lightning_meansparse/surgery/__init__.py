"""Put operators into a model, calibrate them, set their α, take them out again.

The only room that changes a model, and the model is the only state: everything here finds the
operators by walking it.
"""

from lightning_meansparse.surgery.calibration import (
    IMAGE_KEYS,
    calibrate_,
    calibrate_among,
    evaluating,
    images_in,
    share_buffers,
)
from lightning_meansparse.surgery.control import alpha_set, alphas, backward_rule, set_alpha
from lightning_meansparse.surgery.insertion import (
    AFTER_INSERTION,
    operators,
    restore_,
    sparsify_,
)

__all__ = [
    "AFTER_INSERTION",
    "IMAGE_KEYS",
    "alpha_set",
    "alphas",
    "backward_rule",
    "calibrate_",
    "calibrate_among",
    "evaluating",
    "images_in",
    "operators",
    "restore_",
    "set_alpha",
    "share_buffers",
    "sparsify_",
]
