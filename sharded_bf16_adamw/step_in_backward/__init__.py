"""Updates inside the backward pass: a gradient is used and freed as soon as it is final."""
