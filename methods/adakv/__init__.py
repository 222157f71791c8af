"""AdaKV: SnapKV's scores, and a budget that the heads of a layer share."""
