"""Block reconstruction: inputs of blocks kept during calibration, and roundings learned on a block's output."""
