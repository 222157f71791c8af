"""What training's log says of each row family."""

import torch

from kvscope.harness.reference_model.data import Batch


class FamilyAccuracy:
    """Share of scored tokens predicted right, by row family: summed on the device, which only reading waits for."""

    def __init__(self, device: torch.device) -> None:
        self.names: dict[str, int] = {}
        self.sums_F2 = torch.zeros(64, 2, device=device)

    def add(self, batch: Batch, right_N: torch.Tensor) -> None:
        """Count one batch: ``right_N`` says which of its scored tokens were right."""
        ids = torch.tensor([self.names.setdefault(name, len(self.names)) for name in batch.families])
        family_N = ids[batch.at_N // batch.ids_BT.shape[1]].to(self.sums_F2.device, non_blocking=True)
        self.sums_F2.index_add_(0, family_N, torch.stack((right_N.float(), torch.ones_like(right_N).float()), 1))

    def read(self) -> dict[str, float]:
        """Return the shares since the last reading."""
        sums = self.sums_F2.tolist()
        self.sums_F2.zero_()
        return {name: round(sums[at][0] / sums[at][1], 4) for name, at in sorted(self.names.items()) if sums[at][1]}
