"""torch's types by the names that a model's description has for them."""

import torch

from viditq.models import checks

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in checks.DTYPES}
